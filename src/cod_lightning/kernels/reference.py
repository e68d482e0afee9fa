"""The norms as plain torch: what every faster implementation must equal."""

import torch
from torch import Tensor


def reference_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
    gain: float = 1.0,
    groups: int = 1,
) -> Tensor:
    """Gain * weight * (x - m) / sqrt(v + eps), rounded once.

    For `rms`, m = 0 and v is the mean square over the hidden dimension; for `layer`, m is the mean and v the (biased)
    variance. With `groups`, the statistics are taken over equal consecutive parts of the hidden dimension.

    Args:
        x: [..., hidden].
        weight: [hidden], or None for a norm without parameters.
        kind: `rms` or `layer`.
        eps: added to v.
        gain: constant factor of the output, 1/sqrt(l) for LayerNorm Scaling.
        groups: number of parts; divides hidden.

    Returns:
        [..., hidden] in the dtype of x; computed in float32, in float64 where x is.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = x.to(dtype).unflatten(-1, (groups, -1))
    if kind == "layer":
        parts = parts - parts.mean(-1, keepdim=True)
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(dtype)
    return (y * gain).to(x.dtype)
