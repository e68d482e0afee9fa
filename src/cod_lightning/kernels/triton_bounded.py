"""The bounded norms as Triton kernels: `reference_bounded_norm` with one pass over memory in each direction.

The backward pass recomputes tanh or erf from the stream, so that nothing else is saved but, for BHyT, one number a
row. All arithmetic is in float32. Each program sums the gradients of weight, bias, alpha and shift over its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from cod_lightning.kernels.triton_norm import Number, constants, forward_outputs, num_programs, rows_of


@triton.jit
def tanh(z):
    """Within two roundings: a polynomial (Cephes) where 1 - 2 / (exp(2z) + 1) would cancel."""
    square = z * z
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    size = tl.minimum(tl.abs(z), 20.0)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, p * square * z + z, tl.where(z < 0, -large, large))


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, branch, weight, bias, alpha, shift, stream, y, rstd, rows, x_stride, branch_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ERF: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS rows. May be None: `branch` with `stream`, `bias`, `shift`, and `rstd` (all but BHyT)."""
    if LOAD:
        eps = tl.load(eps)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    column_mask = column < WIDTH
    mask = (row < rows)[:, None] & column_mask[None, :]
    offsets = row[:, None] * WIDTH + column[None, :]

    z = tl.load(x + row[:, None] * x_stride + column[None, :], mask, other=0.0).to(tl.float32)
    if branch is not None:
        z += tl.load(branch + row[:, None] * branch_stride + column[None, :], mask, other=0.0).to(tl.float32)
        rounded = z.to(stream.dtype.element_ty)
        tl.store(stream + offsets, rounded, mask)
        z = rounded.to(tl.float32)
    if rstd is not None:
        r = 1 / tl.sqrt_rn(tl.sum(z * z, 1) / WIDTH + eps)
        tl.store(rstd + row, r, row < rows)
        z *= r[:, None]
    z *= tl.load(alpha)
    if shift is not None:
        z += tl.load(shift)
    out = tl.erf(z) if ERF else tanh(z)
    out *= tl.load(weight + column, column_mask, other=0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + column, column_mask, other=0.0)[None, :]
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    stream, weight, alpha, shift, rstd, dy, dstream, dx, dbranch, dweight, dbias, dalpha, dshift, rows, stream_stride,
    dy_stride, dstream_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ERF: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile; `dweight`, `dbias` [programs, hidden], `dalpha`, `dshift` [programs] are its sums.

    May be None: `shift`, `rstd` (all but BHyT), `dstream` and `dbranch`.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    column_mask = column < WIDTH
    a = tl.load(alpha)
    factor = tl.load(weight + column, column_mask, other=0.0)[None, :]
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    sum_alpha = tl.zeros((ROWS,), tl.float32)
    sum_shift = tl.zeros((ROWS,), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & column_mask[None, :]
        offsets = row[:, None] * WIDTH + column[None, :]
        n = tl.load(stream + row[:, None] * stream_stride + column[None, :], mask, other=0.0).to(tl.float32)
        g = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask, other=0.0).to(tl.float32)
        if rstd is not None:
            r = tl.load(rstd + row, row < rows, other=0.0)[:, None]
            n *= r
        z = n * a
        if shift is not None:
            z += tl.load(shift)
        if ERF:
            t = tl.erf(z)
            slope = 1.1283791670955126 * tl.exp(-z * z)  # 2 / sqrt(pi)
        else:
            t = tanh(z)
            slope = 1.0 - t * t
        sum_weight += tl.sum(g * t, 0)
        sum_bias += tl.sum(g, 0)
        g *= factor * slope
        sum_alpha += tl.sum(g * n, 1)
        sum_shift += tl.sum(g, 1)
        d = g * a
        if rstd is not None:
            d = (d - n * (tl.sum(d * n, 1) / WIDTH)[:, None]) * r
        if dstream is not None:
            d += tl.load(dstream + row[:, None] * dstream_stride + column[None, :], mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask)
        if dbranch is not None:
            tl.store(dbranch + offsets, d.to(dbranch.dtype.element_ty), mask)
    tl.store(dweight + program * WIDTH + column, sum_weight, column_mask)
    tl.store(dbias + program * WIDTH + column, sum_bias, column_mask)
    tl.store(dalpha + program, tl.sum(sum_alpha, 0))
    tl.store(dshift + program, tl.sum(sum_shift, 0))


def tiles(hidden: int, erf: bool, backward: bool = False) -> dict[str, Any]:
    """The compile-time constants of a kernel."""
    meta = constants(hidden, backward=backward)
    return {name: meta[name] for name in ("WIDTH", "BLOCK", "ROWS", "num_warps")} | {"ERF": erf}


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    alpha: Tensor,
    shift: Tensor | None,
    eps: Number,
    erf: bool,
    normalised: bool,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Compute `forward_outputs`, with rstd for BHyT; parameters are float32."""
    outputs = forward_outputs(x, branch, int(normalised), 1, dtype)
    rstd = outputs[1] if normalised else None
    stream = None if branch is None else outputs[-1]
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    meta: dict[str, Any] = tiles(hidden, erf) | {"LOAD": isinstance(eps, Tensor)}
    x, x_stride = rows_of(x)
    branch, branch_stride = (None, 0) if branch is None else rows_of(branch)
    with torch.cuda.device_of(x):
        forward_kernel[max(1, triton.cdiv(rows, meta["ROWS"])),](
            x, branch, weight, bias, alpha, shift, stream, outputs[0], rstd, rows, x_stride, branch_stride, eps,
            **meta,
        )  # fmt: skip
    return outputs


def backward_outputs(
    stream: Tensor, weight: Tensor, dtype: torch.dtype, branch_dtype: torch.dtype | None
) -> list[Tensor]:
    """Allocate the gradients of weight, bias, alpha and shift, of x, and of the branch if its dtype differs."""
    sizes = (len(weight), len(weight), 1, 1)
    of_parameters = [torch.empty(size, dtype=torch.float32, device=stream.device) for size in sizes]
    dtypes = [dtype] if branch_dtype is None else [dtype, branch_dtype]
    return of_parameters + [torch.empty(stream.shape, dtype=dtype, device=stream.device) for dtype in dtypes]


def backward(
    stream: Tensor,
    weight: Tensor,
    alpha: Tensor,
    shift: Tensor | None,
    rstd: Tensor | None,
    dy: Tensor,
    dstream: Tensor | None,
    erf: bool,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Compute `backward_outputs`."""
    outputs = backward_outputs(stream, weight, dtype, branch_dtype)
    hidden = stream.shape[-1]
    rows, meta = stream.numel() // hidden, tiles(hidden, erf, backward=True)
    programs = num_programs(stream.device, rows, meta)
    partial = [torch.empty((programs, len(total)), dtype=torch.float32, device=stream.device) for total in outputs[:4]]
    stream, stream_stride = rows_of(stream)
    dy, dy_stride = rows_of(dy)
    dstream, dstream_stride = (None, 0) if dstream is None else rows_of(dstream)
    with torch.cuda.device_of(stream):
        backward_kernel[programs,](
            stream, weight, alpha, shift, rstd, dy, dstream, outputs[4], None if branch_dtype is None else outputs[5],
            partial[0], partial[1], partial[2], partial[3], rows, stream_stride, dy_stride, dstream_stride, **meta,
        )  # fmt: skip
    for total, sums in zip(outputs, partial, strict=False):
        torch.sum(sums, 0, out=total)
    return outputs


forward_op = library.custom_op(
    "cod_lightning::bounded_norm",
    forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? branch, Tensor weight, Tensor? bias, Tensor alpha, Tensor? shift, Tensor eps, bool erf, "
    "bool normalised, ScalarType? dtype) -> Tensor[]",
)
backward_op = library.custom_op(
    "cod_lightning::bounded_norm_backward",
    backward,
    mutates_args=(),
    schema="(Tensor stream, Tensor weight, Tensor alpha, Tensor? shift, Tensor? rstd, Tensor dy, Tensor? dstream, "
    "bool erf, ScalarType dtype, ScalarType? branch_dtype) -> Tensor[]",
)


@forward_op.register_fake
def _(x, branch, weight, bias, alpha, shift, eps, erf, normalised, dtype):
    return forward_outputs(x, branch, int(normalised), 1, dtype)


@backward_op.register_fake
def _(stream, weight, alpha, shift, rstd, dy, dstream, erf, dtype, branch_dtype):
    return backward_outputs(stream, weight, dtype, branch_dtype)


class TritonBoundedNorm(torch.autograd.Function):
    """(x, branch, weight, bias, alpha, shift, eps, erf, normalised, dtype) -> (stream, y)."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, alpha, shift, eps, erf, normalised, dtype):
        run = forward_op if torch.compiler.is_compiling() else forward
        outputs = run(x, branch, weight, bias, alpha, shift, eps, erf, normalised, dtype)
        stream = x if branch is None else outputs[-1]
        ctx.save_for_backward(stream, weight, alpha, shift, outputs[1] if normalised else None)
        ctx.erf, ctx.dtype, ctx.biased = erf, x.dtype, bias is not None
        ctx.branched = branch is not None
        ctx.branch_dtype = branch.dtype if ctx.branched and branch.dtype != x.dtype else None
        ctx.set_materialize_grads(False)
        return stream, outputs[0]

    @staticmethod
    def backward(ctx, *upstream):
        dstream, dy = upstream
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the Triton norm has no second derivative; norm_backend='torch' has")
        if dy is None and dstream is None:
            return (None,) * 10
        if dy is None:  # y was not used
            dx, dbranch = dstream.to(ctx.dtype), dstream.to(ctx.branch_dtype or ctx.dtype)
            return dx, dbranch if ctx.branched else None, *(None,) * 8
        run = backward_op if torch.compiler.is_compiling() else backward
        outputs = run(*ctx.saved_tensors, dy, dstream, ctx.erf, ctx.dtype, ctx.branch_dtype)
        dweight, dbias, dalpha, dshift, dx = outputs[:5]
        dbranch = outputs[-1] if ctx.branched else None
        shift = ctx.saved_tensors[3]
        of_shift = None if shift is None else dshift
        return dx, dbranch, dweight, dbias if ctx.biased else None, dalpha, of_shift, None, None, None, None
