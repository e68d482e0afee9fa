"""The norms in plain PyTorch: the specification of every faster implementation."""

import torch
from torch import Tensor

KINDS = ("rms", "layer")
"""Kinds of `reference_add_norm`."""
BOUNDED = ("dyt", "derf", "bhyt")
"""Kinds of `reference_bounded_norm`."""
KAPPA = 10.0
"""BHyT's constant kappa."""


def reference_add_norm(
    x: Tensor,
    weight: Tensor | None = None,
    branch: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
    gain: float = 1.0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream s = x + branch, and y = gain * weight * (s - m) / sqrt(v + eps), rounded once.

    For `rms`, m = 0 and v is the mean square of s over the hidden dimension; for `layer`, m is the mean and v the
    (biased) variance. The norm reads s after it is rounded to its dtype, so that adding and normalising together
    equals one after the other. Statistics are computed in float32, or in float64 if s is float64.

    Args:
        x: [..., hidden].
        weight: [hidden], or None for a norm without parameters.
        branch: [..., hidden] like x, or None: s is x itself.
        kind: `rms` or `layer`.
        eps: added to v.
        gain: constant factor of y, 1/sqrt(l) for LayerNorm Scaling.
        groups: equal consecutive parts of the hidden dimension, each with its own m and v; must divide hidden.
        dtype: dtype of y; None: that of s.

    Returns:
        s [..., hidden] in the common dtype of x and branch, and y [..., hidden].

    Raises:
        ValueError: an unknown kind.
    """
    require_kind(kind, KINDS)
    stream = x if branch is None else x + branch
    at_least_fp32 = torch.promote_types(stream.dtype, torch.float32)
    parts = stream.to(at_least_fp32).unflatten(-1, (groups, -1))
    if kind == "layer":
        parts = parts - parts.mean(-1, keepdim=True)
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(at_least_fp32)
    return stream, (y * gain).to(dtype or stream.dtype)


def reference_bounded_norm(
    x: Tensor,
    alpha: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    branch: Tensor | None = None,
    *,
    kind: str,
    eps: float = 1e-6,
    gain: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream s = x + branch, and y = gain * (weight * g(s) + bias) with a bounded function g, rounded once.

    - `dyt`: g = tanh(alpha s) (Zhu et al., arXiv 2503.10622);
    - `derf`: g = erf(alpha s + shift) (Chen et al., arXiv 2512.10938);
    - `bhyt`: g = tanh(alpha s / (10 sqrt(v + eps))), v the mean square of s over the hidden dimension (BHyT, arXiv
      2601.09719: alpha is its lambda, 10 its kappa).

    Args:
        x: [..., hidden].
        alpha: [1].
        weight: [hidden], or None.
        bias: [hidden], or None.
        shift: [1], or None.
        branch: [..., hidden] like x, or None: s is x itself.
        kind: `dyt`, `derf` or `bhyt`.
        eps: added to v.
        gain: constant factor of y.
        dtype: dtype of y; None: that of s.

    Returns:
        s [..., hidden] in the common dtype of x and branch, and y [..., hidden].

    Raises:
        ValueError: an unknown kind.
    """
    require_kind(kind, BOUNDED)
    stream = x if branch is None else x + branch
    at_least_fp32 = torch.promote_types(stream.dtype, torch.float32)
    z = stream.to(at_least_fp32)
    if kind == "bhyt":
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) / KAPPA
    z = alpha.to(at_least_fp32) * z
    if shift is not None:
        z = z + shift.to(at_least_fp32)
    y = torch.erf(z) if kind == "derf" else torch.tanh(z)
    if weight is not None:
        y = y * weight.to(at_least_fp32)
    if bias is not None:
        y = y + bias.to(at_least_fp32)
    return stream, (y * gain).to(dtype or stream.dtype)


def require_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} must be {', '.join(kinds[:-1])} or {kinds[-1]}")
