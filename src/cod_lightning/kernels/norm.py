"""The norm that the decoder calls: one function, and what carries it out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.kernels.reference import reference_norm

try:
    from cod_lightning.kernels import triton_norm as fused
except ImportError:  # Triton is made for Linux alone
    fused = None


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    branch: Tensor | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
    gain: float = 1.0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference_norm`, fast: the stream x + branch, its norm times gain, and 1/sqrt(v + eps).

    Use the stream that is returned instead of x in what follows: its gradient is then added in the norm's own backward
    pass. Under a transform of `torch.func` it is the reference itself.

    Args:
        x: [..., hidden].
        weight: [hidden], or None for a norm without parameters; torch's norms take it in the dtype of the stream.
        branch: [..., hidden] to add to x first, or None.
        kind: `rms` or `layer`.
        eps: added to the mean square or variance.
        gain: constant factor of y.
        groups: equal parts of the hidden dimension with statistics of their own.
        dtype: of y; None: that of the stream.
        backend: `triton`; `torch`; or `auto`, Triton for tensors on a GPU that it can take and torch for all others.

    Returns:
        The stream [..., hidden]; y [..., hidden]; and 1/sqrt(v + eps) [..., groups] without gradient, or None from
        torch's RMSNorm, which does not hand it out.

    Raises:
        ValueError: an unknown kind or backend, or tensors that backend="triton" cannot take; says why.
    """
    if kind not in ("rms", "layer") or backend not in ("auto", "torch", "triton"):
        raise ValueError(f"kind={kind!r} must be rms or layer, backend={backend!r} must be auto, torch or triton")
    compiling = torch.compiler.is_compiling()
    if torch._C._are_functorch_transforms_active():
        return reference_norm(x, weight, branch, kind=kind, eps=eps, gain=gain, groups=groups, dtype=dtype)
    if backend == "torch" or (backend == "auto" and (not x.is_cuda or obstacle(x, weight, branch, groups))):
        return torch_norm(x, weight, branch, kind, eps, gain, groups, dtype)
    if why := obstacle(x, weight, branch, groups):
        raise ValueError(f"norm_backend='triton' cannot be used here: {why}; norm_backend='auto' can")
    assert fused is not None
    numbers: tuple[float | Tensor, float | Tensor] = gain, eps
    if compiling:
        # As tensors they are no constants of the compiled code, which all blocks then share.
        one = torch.ones((), dtype=torch.float32, device=x.device)
        numbers = one * gain, one * eps
    return fused.TritonNorm.apply(x, weight, branch, *numbers, kind == "layer", groups, dtype)


def torch_norm(
    x: Tensor,
    weight: Tensor | None,
    branch: Tensor | None,
    kind: str,
    eps: float,
    gain: float,
    groups: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`norm` by torch's own kernels, the gain folded into the weight so that it costs no pass over x.

    Not in half precision, where weight * gain would be rounded to the same wrong gain for every token (by 2.5e-3 of it
    in block 7 in bfloat16): there the gain multiplies the output.
    """
    stream = x if branch is None else x + branch
    folded = weight is not None and stream.dtype.itemsize >= 4
    if weight is not None:
        weight = weight.to(stream.dtype)
        if folded and gain != 1:
            weight = weight * gain
    parts = stream if groups == 1 else stream.unflatten(-1, (groups, -1))
    inside = weight if groups == 1 else None
    rstd = None
    if kind == "rms":
        y = F.rms_norm(parts, parts.shape[-1:], inside, eps)
    else:
        y, _, rstd = torch.native_layer_norm(parts, parts.shape[-1:], inside, None, eps)
        # In half precision torch rounds it on some devices.
        rstd = rstd.view(*x.shape[:-1], groups) if rstd.dtype.itemsize >= 4 else None
    if groups > 1:
        y = y.flatten(-2) if weight is None else y.flatten(-2) * weight
    return stream, (y if folded or gain == 1 else y * gain).to(dtype or stream.dtype), rstd


def obstacle(x: Tensor, weight: Tensor | None, branch: Tensor | None, groups: int) -> str | None:
    """Why the Triton kernels cannot take these tensors, None if they can."""
    tensors = [tensor for tensor in (x, weight, branch) if tensor is not None]
    if fused is None:
        return "Triton is not installed; it is made for Linux alone"
    if not x.is_cuda and not fused.INTERPRETED:
        return (
            f"the tensors are on {x.device.type}, not on a GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        )
    if wrong := [tensor.dtype for tensor in tensors if tensor.dtype not in fused.DTYPES]:
        return f"{wrong[0]} is not among float32, bfloat16 and float16"
    shape, hidden = x.shape, x.shape[-1] if x.ndim else 0
    if hidden == 0 or hidden % groups:
        return f"groups={groups} does not divide the hidden dimension of {list(shape)}"
    if weight is not None and weight.shape != (hidden,):
        return f"the weight has the shape {list(weight.shape)}, expected [{hidden}]"
    if branch is not None and branch.shape != shape:
        return f"the branch has the shape {list(branch.shape)}, x {list(shape)}"
    if hidden // groups > fused.MAX_WIDTH:
        return f"rows are {hidden // groups} wide, at most {fused.MAX_WIDTH} fit into the registers"
    if any(tensor.device != x.device for tensor in tensors):
        return "the tensors are on several devices"
    if strange := [type(tensor) for tensor in tensors if type(tensor) not in (Tensor, nn.Parameter)]:
        return f"the kernels take plain tensors, not {strange[0].__name__}"
    return None
