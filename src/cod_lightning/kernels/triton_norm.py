"""The norms as Triton kernels: `reference_add_norm` with one pass over memory in each direction.

The forward pass reads x and the branch, and writes the stream and y. The backward pass reads the stream and the
gradients of both, and writes the gradient of x. In bfloat16 that is 4 and 8 bytes an element for a norm, 8 and 8 with
the residual addition. The gain multiplies the weight in registers. All arithmetic is in float32 and every result is
rounded once. Results do not depend on the order in which programs run: each program sums the weight's gradient in
float32 over its own rows, and a second kernel adds these sums in the order of the programs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from triton import knobs

MAX_WIDTH = 16_384
"""Widest group of channels: the tile of a program must stay in registers."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 runs the kernels on the CPU."""

COLUMNS = 16
"""Channels whose weight gradient one program sums: 64 bytes, the smallest read of memory."""

Number = float | Tensor
"""A constant: a number, or a float32 tensor of one element on the device, which the kernels LOAD."""


@triton.jit
def centred(s, column_mask, WIDTH: tl.constexpr):
    """`s` minus its mean, 0 outside; removes the rounding error of a mean that was subtracted before."""
    s = tl.where(column_mask, s, 0.0)
    return tl.where(column_mask, s - (tl.sum(s, 1) / WIDTH)[:, None], 0.0)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, branch, weight, stream, y, mean, rstd, rows, x_stride, branch_stride, eps, gain,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS rows of one group. May be None: `branch` with `stream`, `weight`, and `mean` (RMSNorm)."""
    if LOAD:
        gain, eps = tl.load(gain), tl.load(eps)
    group = tl.program_id(1)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    column_mask = column < WIDTH
    mask = (row < rows)[:, None] & column_mask[None, :]
    channel = group * WIDTH + column[None, :]
    offsets = row[:, None] * (GROUPS * WIDTH) + channel

    s = tl.load(x + row[:, None] * x_stride + channel, mask, other=0.0).to(tl.float32)
    if branch is not None:
        s += tl.load(branch + row[:, None] * branch_stride + channel, mask, other=0.0).to(tl.float32)
        rounded = s.to(stream.dtype.element_ty)
        tl.store(stream + offsets, rounded, mask)
        s = rounded.to(tl.float32)
    if mean is not None:
        m = tl.sum(s, 1) / WIDTH
        tl.store(mean + row * GROUPS + group, m, row < rows)
        s = centred(s - m[:, None], column_mask[None, :], WIDTH)
    r = 1 / tl.sqrt_rn(tl.sum(s * s, 1) / WIDTH + eps)
    tl.store(rstd + row * GROUPS + group, r, row < rows)
    factor = gain
    if weight is not None:
        factor = gain * tl.load(weight + group * WIDTH + column, column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y + offsets, (s * r[:, None] * factor).to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    stream, weight, mean, rstd, dy, dstream, dx, dbranch, partial, rows, stream_stride, dy_stride, dstream_stride, gain,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, LOAD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile of one group.

    May be None: `weight`, `mean` (RMSNorm), `dstream`, `dbranch` and `partial` [programs, hidden].
    """
    if LOAD:
        gain = tl.load(gain)
    program, programs, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    column_mask = column < WIDTH
    channel = group * WIDTH + column[None, :]
    factor = gain
    if weight is not None:
        factor = gain * tl.load(weight + group * WIDTH + column, column_mask, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & column_mask[None, :]
        offsets = row[:, None] * (GROUPS * WIDTH) + channel
        s = tl.load(stream + row[:, None] * stream_stride + channel, mask, other=0.0).to(tl.float32)
        g = tl.load(dy + row[:, None] * dy_stride + channel, mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row * GROUPS + group, row < rows, other=0.0)[:, None]
        if mean is not None:
            s -= tl.load(mean + row * GROUPS + group, row < rows, other=0.0)[:, None]
            s = centred(s, column_mask[None, :], WIDTH)
        normed = s * r
        if partial is not None:
            dweight += tl.sum(g * normed, 0)
        g *= factor
        d = g - normed * (tl.sum(g * normed, 1) / WIDTH)[:, None]
        if mean is not None:
            d -= (tl.sum(g, 1) / WIDTH)[:, None]
        d *= r
        if dstream is not None:
            d += tl.load(dstream + row[:, None] * dstream_stride + channel, mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, d.to(dx.dtype.element_ty), mask)
        if dbranch is not None:
            tl.store(dbranch + offsets, d.to(dbranch.dtype.element_ty), mask)
    if partial is not None:
        tl.store(partial + program * (GROUPS * WIDTH) + group * WIDTH + column, dweight, column_mask)


@triton.jit(do_not_specialize=["programs"])
def dweight_kernel(
    partial, dweight, programs, gain,
    HIDDEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """The sum of `partial` [programs, hidden] over the programs in order, times the gain."""
    if LOAD:
        gain = tl.load(gain)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < HIDDEN
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < programs)[:, None] & column_mask[None, :]
        total += tl.sum(tl.load(partial + row[:, None] * HIDDEN + column[None, :], mask, other=0.0), 0)
    tl.store(dweight + column, (total * gain).to(dweight.dtype.element_ty), column_mask)


@lru_cache
def constants(hidden: int, groups: int = 1, load: bool = False, backward: bool = False) -> dict[str, Any]:
    """The compile-time constants of a kernel: group width, tile of ROWS rows and BLOCK columns, number of warps.

    Each thread has 16 elements in both directions: two 16-byte loads of bfloat16 in flight for each operand.
    """
    width = hidden // groups
    block = triton.next_power_of_2(width)
    rows = max(1, min(8, (2048 if backward else 4096) // block))
    meta: dict[str, Any] = {"WIDTH": width, "GROUPS": groups, "BLOCK": block, "ROWS": rows, "LOAD": load}
    if backward:
        # The next tile is prefetched into shared memory: 98 KB of float32 at 8,192 columns; 16,384 exceed many GPUs.
        meta["STAGES"] = 2 if block <= 8192 else 1
    return meta | {"num_warps": max(1, min(16, rows * block // 512))}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 for the interpreter, so that a program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def num_programs(device: torch.device, rows: int, meta: dict[str, Any]) -> int:
    """Programs of a backward kernel: as many as the device runs at once, at most one for each tile of rows."""
    resident = multiprocessors(device) * max(1, 16 // meta["num_warps"])
    return max(1, min(resident, triton.cdiv(rows, meta["ROWS"])))


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """View x [..., hidden] as rows of contiguous elements, copied if necessary, and their stride."""
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


def forward_outputs(
    x: Tensor, branch: Tensor | None, statistics: int, groups: int, dtype: torch.dtype | None
) -> list[Tensor]:
    """Allocate y, the statistics [..., groups], which are rstd and then the mean, and with a branch the stream."""
    stream = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    outputs = [torch.empty(x.shape, dtype=dtype or stream, device=x.device)]
    for _ in range(statistics):
        outputs.append(torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device))
    if branch is not None:
        outputs.append(torch.empty(x.shape, dtype=stream, device=x.device))
    return outputs


def forward(
    x: Tensor,
    weight: Tensor | None,
    branch: Tensor | None,
    gain: Number,
    eps: Number,
    layer: bool,
    groups: int,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Compute `forward_outputs`."""
    outputs = forward_outputs(x, branch, 1 + layer, groups, dtype)
    y, rstd = outputs[:2]
    mean = outputs[2] if layer else None
    stream = None if branch is None else outputs[-1]
    hidden = x.shape[-1]
    rows = x.numel() // hidden
    meta = constants(hidden, groups, isinstance(gain, Tensor))
    x, x_stride = rows_of(x)
    branch, branch_stride = (None, 0) if branch is None else rows_of(branch)
    with torch.cuda.device_of(x):
        forward_kernel[max(1, triton.cdiv(rows, meta["ROWS"])), groups](
            x, branch, weight, stream, y, mean, rstd, rows, x_stride, branch_stride, eps, gain, **meta
        )
    return outputs


def backward_outputs(
    stream: Tensor, weight: Tensor | None, dtype: torch.dtype, branch_dtype: torch.dtype | None
) -> list[Tensor]:
    """Allocate the gradients of x, of the branch if its dtype differs, and of the weight unless it is None."""
    dtypes = [dtype] if branch_dtype is None else [dtype, branch_dtype]
    outputs = [torch.empty(stream.shape, dtype=dtype, device=stream.device) for dtype in dtypes]
    return outputs if weight is None else [*outputs, torch.empty_like(weight)]


def backward(
    stream: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    dstream: Tensor | None,
    gain: Number,
    dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    weighted: bool,
) -> list[Tensor]:
    """Compute `backward_outputs`; the weight's gradient only if `weighted`."""
    outputs = backward_outputs(stream, weight if weighted else None, dtype, branch_dtype)
    dx, dbranch = outputs[0], None if branch_dtype is None else outputs[1]
    hidden, groups = stream.shape[-1], rstd.shape[-1]
    rows = stream.numel() // hidden
    meta = constants(hidden, groups, isinstance(gain, Tensor), backward=True)
    programs = num_programs(stream.device, rows, meta)
    partial = torch.empty((programs, hidden), dtype=torch.float32, device=stream.device) if weighted else None
    stream, stream_stride = rows_of(stream)
    dy, dy_stride = rows_of(dy)
    dstream, dstream_stride = (None, 0) if dstream is None else rows_of(dstream)
    with torch.cuda.device_of(stream):
        backward_kernel[programs, groups](
            stream, weight, mean, rstd, dy, dstream, dx, dbranch, partial, rows, stream_stride, dy_stride,
            dstream_stride, gain, **meta,
        )  # fmt: skip
        if weighted:
            sums: dict[str, Any] = {"HIDDEN": hidden, "COLUMNS": COLUMNS, "ROWS": 256, "LOAD": meta["LOAD"]}
            dweight_kernel[(triton.cdiv(hidden, COLUMNS),)](partial, outputs[-1], programs, gain, **sums)
    return outputs


# Compiled code calls the kernels as custom operators with tensors as constants, so that the blocks of a model, whose
# gains differ, share one compilation.
forward_op = library.custom_op(
    "cod_lightning::norm",
    forward,
    mutates_args=(),
    schema="(Tensor x, Tensor? weight, Tensor? branch, Tensor gain, Tensor eps, bool layer, int groups, "
    "ScalarType? dtype) -> Tensor[]",
)
backward_op = library.custom_op(
    "cod_lightning::norm_backward",
    backward,
    mutates_args=(),
    schema="(Tensor stream, Tensor? weight, Tensor? mean, Tensor rstd, Tensor dy, Tensor? dstream, Tensor gain, "
    "ScalarType dtype, ScalarType? branch_dtype, bool weighted) -> Tensor[]",
)


@forward_op.register_fake
def _(x, weight, branch, gain, eps, layer, groups, dtype):
    return forward_outputs(x, branch, 1 + layer, groups, dtype)


@backward_op.register_fake
def _(stream, weight, mean, rstd, dy, dstream, gain, dtype, branch_dtype, weighted):
    return backward_outputs(stream, weight if weighted else None, dtype, branch_dtype)


class TritonAddNorm(torch.autograd.Function):
    """(x, weight, branch, gain, eps, layer, groups, dtype) -> (stream, y), as in `reference_add_norm`."""

    @staticmethod
    def forward(ctx, x, weight, branch, gain, eps, layer, groups, dtype):
        run = forward_op if torch.compiler.is_compiling() else forward
        weight = None if weight is None else weight.contiguous()
        outputs = run(x, weight, branch, gain, eps, layer, groups, dtype)
        y, rstd, mean = outputs[0], outputs[1], outputs[2] if layer else None
        stream = x if branch is None else outputs[-1]
        ctx.save_for_backward(stream, weight, mean, rstd)
        ctx.gain, ctx.dtype = gain, x.dtype
        ctx.branched = branch is not None
        ctx.branch_dtype = branch.dtype if ctx.branched and branch.dtype != x.dtype else None
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    def backward(ctx, *upstream):
        dstream, dy = upstream
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("the Triton norm has no second derivative; norm_backend='torch' has")
        weighted = ctx.needs_input_grad[1]
        if dy is None and dstream is None:
            return (None,) * 8
        if dy is None:  # y was not used
            dx, dbranch, dweight = dstream.to(ctx.dtype), dstream.to(ctx.branch_dtype or ctx.dtype), None
        else:
            run = backward_op if torch.compiler.is_compiling() else backward
            outputs = run(*ctx.saved_tensors, dy, dstream, ctx.gain, ctx.dtype, ctx.branch_dtype, weighted)
            dx, dbranch = outputs[0], outputs[0 if ctx.branch_dtype is None else 1]
            dweight = outputs[-1] if weighted else None
        return dx, dweight, dbranch if ctx.branched else None, None, None, None, None, None
