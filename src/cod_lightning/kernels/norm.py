"""The norms that the decoder calls, and the choice of their backend."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.errors import UserError, first_line
from cod_lightning.kernels.reference import (
    BOUNDED,
    KAPPA,
    KINDS,
    reference_add_norm,
    reference_bounded_norm,
    require_kind,
)

try:
    from cod_lightning.kernels import triton_bounded, triton_norm
except ImportError:  # Triton supports only Linux
    triton_bounded = triton_norm = None

NormFunction = Callable[..., tuple[Tensor, Tensor]]
"""Returns the residual stream and its norm."""


def add_norm(
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
) -> tuple[Tensor, Tensor]:
    """`reference_add_norm`, fast: the residual stream x + branch, and its norm times gain.

    Use the returned stream in place of x: the backward pass of the norm then adds its gradient. Transforms of
    `torch.func`, and compiled code without Triton, run the reference.

    The arguments are those of `reference_add_norm`; torch's norms cast the weight to the dtype of the stream. `backend`
    is `triton`; `torch`; or `auto`, Triton for the GPU tensors that it supports and torch for all others.

    Returns:
        The stream [..., hidden] and y [..., hidden].

    Raises:
        ValueError: an unknown kind or backend.
        UserError: tensors that backend="triton" does not support, with the reason.
    """
    require_kind(kind, KINDS)
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or not use_triton(backend, x, weight, branch, groups):
        # torch's norms would compile eps in, and the blocks of a model differ in it.
        plain_norm = reference_add_norm if transformed or torch.compiler.is_compiling() else torch_add_norm
        return plain_norm(x, weight, branch, kind=kind, eps=eps, gain=gain, groups=groups, dtype=dtype)
    assert triton_norm is not None
    constants = shared_constant(gain, x.device), shared_constant(eps, x.device)
    return triton_norm.TritonAddNorm.apply(x, weight, branch, *constants, kind == "layer", groups, dtype)


def use_triton(
    backend: str, x: Tensor, weight: Tensor | None, branch: Tensor | None, groups: int = 1, *others: Tensor | None
) -> bool:
    """Whether the Triton kernels compute a norm of these tensors, `others` being its other parameters.

    Raises:
        ValueError: an unknown backend.
        UserError: tensors that backend="triton" does not support, with the reason.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend={backend!r} must be auto, torch or triton")
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    reason = unsupported(x, weight, branch, groups, *others)
    if reason and backend == "triton":
        raise UserError(f"norm_backend='triton' does not support this: {reason}; use norm_backend='auto'")
    return reason is None


def shared_constant(value: float, device: torch.device) -> float | Tensor:
    """A constant of a kernel; in compiled code a tensor, so that blocks with other constants share one compilation."""
    if not torch.compiler.is_compiling():
        return value
    return torch.ones((), dtype=torch.float32, device=device) * value


def torch_add_norm(
    x: Tensor,
    weight: Tensor | None,
    branch: Tensor | None,
    *,
    kind: str,
    eps: float,
    gain: float,
    groups: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """`add_norm` by torch's own kernels, with the gain folded into the weight so that it costs no pass over x.

    Half precision would round weight * gain to the same wrong gain for every token (in bfloat16 by a relative 2.5e-3 in
    block 7): there the gain multiplies the output.
    """
    stream = x if branch is None else x + branch
    folded = weight is not None and stream.dtype.itemsize >= 4
    if weight is not None:
        weight = weight.to(stream.dtype)
        if folded and gain != 1:
            weight = weight * gain
    parts = stream if groups == 1 else stream.unflatten(-1, (groups, -1))
    inside = weight if groups == 1 else None
    if kind == "rms":
        y = F.rms_norm(parts, parts.shape[-1:], inside, eps)
    elif stream.is_cpu and stream.dtype.itemsize < 4:
        # On a CPU the kernel for half precision also sums the weight's gradient in half precision.
        inside = None if inside is None else inside.float()
        y = F.layer_norm(parts.float(), parts.shape[-1:], inside, None, eps).to(stream.dtype)
    else:
        y = F.layer_norm(parts, parts.shape[-1:], inside, None, eps)
    if groups > 1:
        y = y.flatten(-2) if weight is None else y.flatten(-2) * weight
    return stream, (y if folded or gain == 1 else y * gain).to(dtype or stream.dtype)


def bounded_norm(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`reference_bounded_norm`, fast: the residual stream x + branch, and its bounded norm times gain.

    Use the returned stream in place of x, as with `add_norm`. The torch backend is the reference.

    The arguments are those of `reference_bounded_norm`, and `backend` as in `add_norm`.

    Returns:
        The stream [..., hidden] and y [..., hidden].

    Raises:
        ValueError: an unknown kind or backend, or a parameter of another shape.
        UserError: tensors that backend="triton" does not support, with the reason.
    """
    require_kind(kind, BOUNDED)
    for name, number in (("alpha", alpha), ("shift", shift)):
        if number is not None and number.numel() != 1:
            raise ValueError(f"{name} has the shape {list(number.shape)}, expected [1]")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has the shape {list(vector.shape)}, expected {list(x.shape[-1:])}")
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or not use_triton(backend, x, weight, branch, 1, alpha, bias, shift):
        return reference_bounded_norm(x, alpha, weight, bias, shift, branch, kind=kind, eps=eps, gain=gain, dtype=dtype)
    assert triton_bounded is not None
    # The constants are part of the parameters: in float32, which half precision would round, and so that the blocks of
    # a model share one compilation.
    alpha = alpha.float() / KAPPA if kind == "bhyt" else alpha.float()
    if weight is None:
        weight = torch.ones(x.shape[-1:], dtype=torch.float32, device=x.device)
    weight = weight.float() * gain
    bias = None if bias is None else bias.float() * gain
    shift = None if shift is None else shift.float()
    parameters = weight, bias, alpha, shift
    return triton_bounded.TritonBoundedNorm.apply(
        x, branch, *parameters, shared_constant(eps, x.device), kind == "derf", kind == "bhyt", dtype
    )


def checked_backend(
    backend: str, device: torch.device, kind: str, hidden: int, groups: int, stream: torch.dtype, branch: torch.dtype
) -> str:
    """The backend, or torch with a warning if it is `auto` and the Triton kernels are wrong on this device.

    No GPU has been tested yet, so the first model of a process compares the kernels with the reference. Call this
    before the model is built and compiled.

    Args:
        backend: `auto`, `torch` or `triton`.
        device: where the model will run.
        kind: `rms`, `layer` or one of `BOUNDED`.
        hidden: number of channels.
        groups: as in `add_norm`.
        stream: dtype of the residual stream and of the weight.
        branch: dtype of branches and of y.

    Raises:
        UserError: backend="triton", and the kernels are wrong.
    """
    if backend == "torch" or device.type != "cuda":
        return backend
    error = kernel_error(device, kind, hidden, groups, stream, branch)
    if error is None:
        return backend
    if backend == "triton":
        raise UserError(f"model.norm_backend='triton': {error}; use model.norm_backend=torch, and please report this")
    warnings.warn(f"model.norm_backend='auto' uses torch: {error}; please report this", stacklevel=2)
    return "torch"


@cache
def kernel_error(
    device: torch.device, kind: str, hidden: int, groups: int, stream: torch.dtype, branch: torch.dtype
) -> str | None:
    """How the Triton kernels differ from the reference on random tensors, or None; see `checked_backend` for arguments.

    An error may be four times that of the reference in the same dtypes.
    """
    if triton_norm is None or hidden % groups:
        return None
    generator = torch.Generator().manual_seed(0)
    # Each program of the backward kernel gets two or three tiles.
    rows = 1 + 20_480 * groups * triton_norm.multiprocessors(device) // hidden

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    weight = 1 + normal((hidden,), stream) / 4
    x, added, dstream, dy = (normal((rows, hidden), dtype) for dtype in (stream, branch, stream, branch))
    if unsupported(x, weight, added, groups):
        return None

    def bounded(function: NormFunction) -> NormFunction:
        """A bounded norm as a function of x, weight and branch."""

        def norm(x: Tensor, weight: Tensor, branch: Tensor | None = None, *, groups: int, **options: Any) -> Any:
            return function(x, weight[:1], weight, weight / 2, weight[:1] / 4, branch, **options)

        return norm

    def results(function: NormFunction, exact: bool = False, **options: Any) -> dict[str, Tensor]:
        """Outputs and gradients of the norm with and without the addition, by name."""
        tensors = {}
        for case, inputs in {"norm": [x, weight], "add_norm": [x, weight, added]}.items():
            leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in inputs]
            outputs = function(*leaves, kind=kind, gain=0.7, groups=groups, dtype=None if exact else branch, **options)
            upstream = [gradient.to(output.dtype) for gradient, output in zip((dstream, dy), outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, leaves, upstream)
            for name, tensor in zip(("stream", "y", "dx", "dweight", "dbranch"), (*outputs, *gradients), strict=False):
                tensors[f"{name} of {case}"] = tensor.detach().double()
        return tensors

    with torch.inference_mode(False), torch.enable_grad():
        plain_norm = bounded(reference_bounded_norm) if kind in BOUNDED else reference_add_norm
        exact, reference = results(plain_norm, exact=True), results(plain_norm)
        try:
            ours = results(bounded(bounded_norm) if kind in BOUNDED else add_norm, backend="triton")
        except Exception as error:
            return f"the Triton kernels fail on {device}: {first_line(error)}"
    for name, truth in exact.items():
        error, allowed = ((tensors[name] - truth).norm() / truth.norm() for tensors in (ours, reference))
        if not error <= 4 * max(float(allowed), 2**-24):
            return f"the Triton kernels are wrong on {device}: {name} is off by {error:.1e}, not {allowed:.1e}"
    return None


def unsupported(
    x: Tensor, weight: Tensor | None, branch: Tensor | None, groups: int, *others: Tensor | None
) -> str | None:
    """Why the Triton kernels do not support these tensors, or None if they do."""
    tensors = [tensor for tensor in (x, weight, branch, *others) if tensor is not None]
    if triton_norm is None:
        return "Triton is not installed; it supports only Linux"
    if not x.is_cuda and not triton_norm.INTERPRETED:
        return f"the tensors are on {x.device.type}, not on a GPU (TRITON_INTERPRET=1 runs slowly on the CPU)"
    if dtypes := [tensor.dtype for tensor in tensors if tensor.dtype not in triton_norm.DTYPES]:
        return f"{dtypes[0]} is not float32, bfloat16 or float16"
    hidden = x.shape[-1] if x.ndim else 0
    if hidden == 0 or hidden % groups:
        return f"groups={groups} does not divide the hidden dimension of {list(x.shape)}"
    if weight is not None and weight.shape != (hidden,):
        return f"the weight has the shape {list(weight.shape)}, expected [{hidden}]"
    if branch is not None and branch.shape != x.shape:
        return f"the branch has the shape {list(branch.shape)}, x {list(x.shape)}"
    if hidden // groups > triton_norm.MAX_WIDTH:
        return f"groups of {hidden // groups} channels exceed the maximum of {triton_norm.MAX_WIDTH}"
    if any(tensor.device != x.device for tensor in tensors):
        return "the tensors are on several devices"
    if subclasses := [type(tensor) for tensor in tensors if type(tensor) not in (Tensor, nn.Parameter)]:
        return f"the kernels need plain tensors, not {subclasses[0].__name__}"
    return None
