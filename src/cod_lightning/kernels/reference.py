"""The norms as plain torch: what every faster implementation must equal."""

import torch
from torch import Tensor


def reference_norm(
    x: Tensor,
    weight: Tensor | None = None,
    branch: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
    gain: float = 1.0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stream s = x + branch, and y = gain * weight * (s - m) / sqrt(v + eps), rounded once.

    For `rms`, m = 0 and v is the mean square of s over the hidden dimension; for `layer`, m is the mean and v the
    (biased) variance. With `groups`, the statistics are taken over equal consecutive parts of the hidden dimension. The
    norm is that of the sum as the stream holds it, rounded to its dtype: adding and normalising together is the same
    function as one after the other.

    Args:
        x: [..., hidden].
        weight: [hidden], or None for a norm without parameters.
        branch: [..., hidden] like x, or None: the stream is x itself.
        kind: `rms` or `layer`.
        eps: added to v.
        gain: constant factor of y, 1/sqrt(l) for LayerNorm Scaling.
        groups: number of parts; divides hidden.
        dtype: of y; None: that of the stream.

    Returns:
        The stream [..., hidden] in the common dtype of x and branch; y [..., hidden]; 1/sqrt(v + eps) [..., groups],
        which carries no gradient. Computed in float32, in float64 where the stream is.
    """
    stream = x if branch is None else x + branch
    wide = torch.promote_types(stream.dtype, torch.float32)
    parts = stream.to(wide).unflatten(-1, (groups, -1))
    if kind == "layer":
        parts = parts - parts.mean(-1, keepdim=True)
    rstd = torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
    y = (parts * rstd).flatten(-2)
    if weight is not None:
        y = y * weight.to(wide)
    return stream, (y * gain).to(dtype or stream.dtype), rstd.squeeze(-1).detach()
