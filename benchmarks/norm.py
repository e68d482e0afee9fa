"""Norms compared: ours, torch's, Inductor's, plain operations, and Liger's and quack's if installed.

    python benchmarks/norm.py [--rows 4096 32768] [--widths 768 1024 2048 4096] [--save | --tune]

Times the norm alone, which returns the residual stream as well, and the residual addition with the norm. Both include
the LNS factor (gain), and their backward passes the gradient from the residual stream. Errors are relative to float64.
`share` is the bandwidth of the minimal memory traffic over that of a copy in the same run; tensors that fit into the
last-level cache (8 MB at 4,096 x 1,024 in bfloat16) can exceed 1.

--save writes CSV and plot into benchmarks/results. --tune times other tiles of our kernels instead (on a GPU).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from _results import (
    DEVICE,
    ON_GPU,
    argument_parser,
    milliseconds,
    relative_error,
    report,
    result_path,
    reuse_freed_memory,
)
from torch import Tensor

from cod_lightning.kernels import triton_norm
from cod_lightning.kernels.norm import add_norm
from cod_lightning.kernels.reference import reference_add_norm

EPS, GAIN = 1e-6, 7**-0.5
Variant = Callable[..., tuple[Tensor, Tensor]]
"""(x [rows, width], weight [width], optionally branch [rows, width]) -> (stream, y), both [rows, width]."""


def ours(x: Tensor, weight: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return add_norm(x, weight, branch, eps=EPS, gain=GAIN)


def plain(x: Tensor, weight: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    stream = x if branch is None else x + branch
    fp32 = stream.float()
    normed = (fp32 * torch.rsqrt(fp32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return stream, weight * normed * GAIN


def torch_norm(x: Tensor, weight: Tensor, branch: Tensor | None = None, gain: float = GAIN) -> tuple[Tensor, Tensor]:
    """`nn.RMSNorm` times gain."""
    stream = x if branch is None else x + branch
    y = F.rms_norm(stream, stream.shape[-1:], weight, EPS)
    return stream, y if gain == 1 else y * gain


def liger(x: Tensor, weight: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if branch is None:
        return x, LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)
    y, stream = LigerFusedAddRMSNormFunction.apply(branch, x, weight, EPS, 0.0, "llama", False)
    return stream, y


def quack(x: Tensor, weight: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from quack import rmsnorm

    if branch is None:
        return x, rmsnorm(x, weight, eps=EPS)
    y, stream = rmsnorm(branch, weight, residual=x, eps=EPS, prenorm=True)
    return stream, y


FOLDED = {"nn.RMSNorm folded": partial(torch_norm, gain=1), "liger": liger, "quack": quack}
"""Variants without a gain; their weight is weight * gain, rounded to the dtype before the timing."""


def variants() -> dict[str, Variant]:
    inductor = torch.compile(plain, fullgraph=True, dynamic=False)
    known = {"ours": ours, "nn.RMSNorm": torch_norm, "inductor": inductor, "plain": plain, **FOLDED}
    for name, package in (("liger", "liger_kernel"), ("quack", "quack")):
        if not (ON_GPU and find_spec(package)):
            del known[name]
    return known


def draw(rows: int, width: int, dtype: torch.dtype, add: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs [x, weight], and branch if `add`; gradients of the outputs [stream, y]."""
    x, branch, *grad_outputs = (torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(4))
    weight = (1 + 0.2 * torch.randn(width, device=DEVICE)).to(dtype)
    return [t.requires_grad_() for t in (x, weight, *([branch] if add else []))], grad_outputs


def fold(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """The inputs of the variant `name`: with the gain in the weight if it is one of `FOLDED`."""
    x, weight, *branch = inputs
    return [x, (weight.detach() * GAIN).requires_grad_(), *branch] if name in FOLDED else inputs


def error(name: str, variant: Variant, width: int, dtype: torch.dtype, add: bool) -> float:
    """Largest relative error of y and the gradients, against the reference in float64."""
    inputs, grad_outputs = draw(256, width, dtype, add)
    reference = partial(reference_add_norm, eps=EPS, gain=1.0 if name in FOLDED else GAIN)
    results = []
    for function, to in ((variant, dtype), (reference, torch.float64)):
        leaves = [t.detach().to(to).requires_grad_() for t in fold(name, inputs)]
        stream, y = function(*leaves)
        results.append([y, *torch.autograd.grad([stream, y], leaves, [g.to(to) for g in grad_outputs])])
    return max(map(relative_error, *results))


def copy_bandwidth() -> float:
    """GB/s of reading and writing a tensor that is larger than every cache."""
    source = torch.randn(2**28 if ON_GPU else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e6 / milliseconds({"copy": lambda: target.copy_(source)})["copy"]


def measure(rows: int, width: int, dtype: torch.dtype, add: bool, copy: float, seconds: float) -> list[dict[str, Any]]:
    """One table row for each direction and variant."""
    torch._dynamo.reset()  # compile for this shape alone
    functions = variants()
    drawn, grad_outputs = draw(rows, width, dtype, add)
    inputs = {name: fold(name, drawn) for name in functions}
    outputs = {name: function(*inputs[name]) for name, function in functions.items()}
    errors = {name: error(name, function, width, dtype, add) for name, function in functions.items()}
    megabytes = rows * width * dtype.itemsize / 1e6

    def forward(name: str) -> tuple[Tensor, Tensor]:
        return functions[name](*inputs[name])

    def backward(name: str) -> object:
        return torch.autograd.grad(outputs[name], inputs[name], grad_outputs, retain_graph=True)

    def both(name: str) -> object:
        return torch.autograd.grad(forward(name), inputs[name], grad_outputs)

    passes = {"forward": 4 if add else 2, "backward": 4}  # over memory
    passes["both"] = sum(passes.values())
    table = []
    for direction, run in (("forward", forward), ("backward", backward), ("both", both)):
        times = milliseconds({name: partial(run, name) for name in functions}, seconds)
        for name, ms in times.items():
            bandwidth = passes[direction] * megabytes / ms
            table.append(
                {
                    "operation": "add_norm" if add else "norm",
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows": rows,
                    "width": width,
                    "direction": direction,
                    "variant": name,
                    "ms": round(ms, 5),
                    "over_ours": round(ms / times["ours"], 3),
                    "gb_per_s": round(bandwidth, 1),
                    "share": round(bandwidth / copy, 3),
                    "error": f"{errors[name]:.2e}",
                    "copy_gb_per_s": round(copy, 1),
                }
            )
    return table


def plot(table: list[dict[str, Any]]) -> None:
    """Draw the shares at the largest number of rows."""
    from cod_lightning import plots

    most = max(row["rows"] for row in table)
    names, widths = list(dict.fromkeys(row["variant"] for row in table)), sorted({row["width"] for row in table})
    shares = {
        (row["operation"], row["direction"], row["variant"], row["width"]): row["share"]
        for row in table
        if row["rows"] == most
    }
    panels = itertools.product(("norm", "add_norm"), ("forward", "backward"))
    with plots.style():
        figure, grid = plots.grid_figure(7.5, 6, 2, 2, sharex=True, sharey=True)
        for axes, (operation, direction) in zip(grid.flat, panels, strict=True):
            for position, name in enumerate(names):
                left = [w + 0.8 * ((position + 0.5) / len(names) - 0.5) for w in range(len(widths))]
                heights = [shares[operation, direction, name, width] for width in widths]
                axes.bar(left, heights, 0.75 / len(names), label=name)
            axes.set(title=f"{operation}, {direction}, {most:,} rows")
            axes.set_xticks(range(len(widths)), [f"{width:,}" for width in widths])
        figure.supxlabel("width", fontsize=9)
        figure.supylabel("share of the bandwidth of a copy", fontsize=9)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=len(names))
    path = result_path("norm", ".png")
    path.write_bytes(plots.figure_bytes(figure))
    print(path)


def tune(widths: list[int], rows: int, dtype: torch.dtype) -> None:
    """Time tiles of our kernels; `constants` in triton_norm.py chooses among them."""
    constants = triton_norm.constants
    for width, tuned in itertools.product(widths, (False, True)):
        inputs, grad_outputs = draw(rows, width, dtype, add=True)
        current = constants(width, backward=tuned)
        times: dict[tuple[int, int], float] = {}
        for tile in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
            if not 4 <= tile[0] * current["BLOCK"] / (32 * tile[1]) <= 64:
                continue

            def with_tile(*args: Any, backward: bool = False, tuned=tuned, tile=tile) -> dict[str, Any]:
                changed = {"ROWS": tile[0], "num_warps": tile[1]} if backward == tuned else {}
                return constants(*args, backward=backward) | changed

            triton_norm.constants = with_tile
            run = partial(ours, *inputs)
            if tuned:
                run = partial(torch.autograd.grad, ours(*inputs), inputs, grad_outputs, retain_graph=True)
            times[tile] = milliseconds({"": run}, 0.1)[""]
        triton_norm.constants = constants
        print(f"width {width}, {'backward' if tuned else 'forward'}, (rows, warps) and milliseconds")
        print("  now ", (current["ROWS"], current["num_warps"]), round(times[current["ROWS"], current["num_warps"]], 5))
        print("  best", *(f"{tile} {times[tile]:.5f}" for tile in sorted(times, key=times.__getitem__)[:5]))


def main() -> None:
    parser = argument_parser(__doc__, "norm", seconds=0.5)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 32768] if ON_GPU else [512, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 2048, 4096])
    parser.add_argument("--dtype", default="bfloat16" if ON_GPU else "float32")
    parser.add_argument("--tune", action="store_true", help="time other tiles of our kernels")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    reuse_freed_memory()
    if args.tune:
        return tune(args.widths, max(args.rows), dtype)
    copy = copy_bandwidth()
    table = [
        row
        for add, rows, width in itertools.product((False, True), args.rows, args.widths)
        for row in measure(rows, width, dtype, add, copy, args.seconds)
    ]
    report(args, table)
    if args.save:
        plot(table)


if __name__ == "__main__":
    main()
