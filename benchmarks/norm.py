"""The norms side by side: ours, torch's, Inductor's, Liger's and quack's where installed, and plain operations.

    python benchmarks/norm.py [--rows 4096 32768] [--widths 768 1024 2048 4096] [--save | --tune]

Times the norm alone, which returns the stream as well, and the residual addition with the norm; the gain is part of
both, and the gradient that reaches the stream from elsewhere of their backward passes. Every variant is first held
against float64. `share` is the least traffic that the operation needs, over the time, over the bandwidth of a copy
measured in the same run; operands smaller than the last cache (8 MB at 4,096 x 1,024 in bfloat16) can exceed it.

--save writes CSV and plot into benchmarks/results. --tune times other tiles of our kernels instead (on a GPU).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _results import keep_freed_memory, milliseconds, path_of, save, show
from torch import Tensor

from cod_lightning.kernels import triton_norm
from cod_lightning.kernels.norm import add_norm
from cod_lightning.kernels.reference import reference_add_norm

EPS, GAIN = 1e-6, 7**-0.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Variant = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(x, weight, branch) -> (stream, y)."""


def ours(x: Tensor, weight: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_norm(x, weight, branch, eps=EPS, gain=GAIN)


def plain(x: Tensor, weight: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    stream = x if branch is None else x + branch
    wide = stream.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return stream, weight * normed * GAIN


def of_torch(x: Tensor, weight: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """`nn.RMSNorm`, and the gain as a user would multiply it."""
    stream = x if branch is None else x + branch
    return stream, F.rms_norm(stream, stream.shape[-1:], weight, EPS) * GAIN


def of_torch_folded(x: Tensor, folded: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    stream = x if branch is None else x + branch
    return stream, F.rms_norm(stream, stream.shape[-1:], folded, EPS)


def liger(x: Tensor, folded: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    if branch is None:
        return x, LigerRMSNormFunction.apply(x, folded, EPS, 0.0, "llama", False)
    y, stream = LigerFusedAddRMSNormFunction.apply(branch, x, folded, EPS, 0.0, "llama", False)
    return stream, y


def quack(x: Tensor, folded: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    from quack import rmsnorm

    if branch is None:
        return x, rmsnorm(x, folded, eps=EPS)
    y, stream = rmsnorm(branch, folded, residual=x, eps=EPS, prenorm=True)
    return stream, y


FOLDED = {"nn.RMSNorm folded": of_torch_folded, "liger": liger, "quack": quack}
"""Variants that know no gain: they are given weight * gain, rounded to the dtype before the clock starts."""


def variants() -> dict[str, Variant]:
    inductor = torch.compile(plain, fullgraph=True, dynamic=False)
    found = {"ours": ours, "nn.RMSNorm": of_torch, "inductor": inductor, "plain": plain, **FOLDED}
    for name, package in (("liger", "liger_kernel"), ("quack", "quack")):
        if DEVICE == "cpu" or importlib.util.find_spec(package) is None:
            del found[name]
    return found


def draw(rows: int, width: int, dtype: torch.dtype, branched: bool) -> tuple[list[Tensor | None], list[Tensor]]:
    """(x, weight, branch), and what reaches stream and y from behind."""
    x, branch, *upstream = (torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(4))
    weight = (1 + 0.2 * torch.randn(width, device=DEVICE)).to(dtype)
    return [x.requires_grad_(), weight.requires_grad_(), branch.requires_grad_() if branched else None], upstream


def leaves_of(name: str, leaves: list[Tensor | None]) -> list[Tensor | None]:
    """(x, weight, branch) as a variant takes them."""
    x, weight, branch = leaves
    assert weight is not None
    return [x, (weight.detach() * GAIN).requires_grad_(), branch] if name in FOLDED else leaves


def error(name: str, variant: Variant, width: int, dtype: torch.dtype, branched: bool) -> float:
    """The largest relative error among y and the gradients, against the reference in float64."""
    leaves, upstream = draw(256, width, dtype, branched)
    results = []
    gain = 1.0 if name in FOLDED else GAIN
    leaves = leaves_of(name, leaves)
    for function, cast in ((variant, dtype), (lambda *t: reference_add_norm(*t, eps=EPS, gain=gain), torch.float64)):
        cast_leaves = [None if leaf is None else leaf.detach().to(cast).requires_grad_() for leaf in leaves]
        stream, y = function(*cast_leaves)
        wanted = [leaf for leaf in cast_leaves if leaf is not None]
        results.append([y, *torch.autograd.grad([stream, y], wanted, [u.to(cast) for u in upstream])])
    return max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(*results, strict=True)
    )


def copy_bandwidth() -> float:
    """GB/s of reading and writing a tensor that no cache holds."""
    source = torch.randn(2**28 if DEVICE == "cuda" else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e6 / milliseconds({"copy": lambda: target.copy_(source)})["copy"]


def measure(
    rows: int, width: int, dtype: torch.dtype, branched: bool, copy: float, seconds: float
) -> list[dict[str, Any]]:
    torch._dynamo.reset()  # every shape is compiled anew
    known = variants()
    drawn, upstream = draw(rows, width, dtype, branched)
    leaves = {name: leaves_of(name, drawn) for name in known}
    wanted = {name: [leaf for leaf in given if leaf is not None] for name, given in leaves.items()}
    outputs = {name: variant(*leaves[name]) for name, variant in known.items()}
    moved = rows * width * dtype.itemsize / 1e6

    def backward(name: str) -> object:
        return torch.autograd.grad(outputs[name], wanted[name], upstream, retain_graph=True)

    def both(name: str) -> object:
        return torch.autograd.grad(known[name](*leaves[name]), wanted[name], upstream)

    times = {
        "forward": milliseconds({name: partial(variant, *leaves[name]) for name, variant in known.items()}, seconds),
        "backward": milliseconds({name: partial(backward, name) for name in known}, seconds),
        "both": milliseconds({name: partial(both, name) for name in known}, seconds),
    }
    passes = {"forward": 4 if branched else 2, "backward": 4}
    passes["both"] = sum(passes.values())
    return [
        {
            "operation": "add_norm" if branched else "norm",
            "dtype": str(dtype).removeprefix("torch."),
            "rows": rows,
            "width": width,
            "direction": direction,
            "variant": name,
            "ms": round(times[direction][name], 5),
            "over_ours": round(times[direction][name] / times[direction]["ours"], 3),
            "gb_per_s": round(passes[direction] * moved / times[direction][name], 1),
            "share": round(passes[direction] * moved / times[direction][name] / copy, 3),
            "error": f"{error(name, known[name], width, dtype, branched):.2e}",
        }
        for direction in times
        for name in known
    ]


def plot(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    most = max(row["rows"] for row in rows)
    panels = list(itertools.product(("norm", "add_norm"), ("forward", "backward")))
    names, widths = list(dict.fromkeys(r["variant"] for r in rows)), sorted({r["width"] for r in rows})
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (operation, direction) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for position, name in enumerate(names):
            shares = {
                r["width"]: r["share"]
                for r in rows
                if (r["operation"], r["direction"], r["variant"], r["rows"]) == (operation, direction, name, most)
            }
            places = [w + 0.8 * (position / len(names) - 0.5) for w in range(len(widths))]
            axes.bar(places, [shares[w] for w in widths], 0.75 / len(names), label=name)
        axes.set(title=f"{operation}, {direction}, {most:,} rows", xlabel="width", ylabel="share of copy bandwidth")
        axes.set_xticks(range(len(widths)), map(str, widths))
    figure.axes[0].legend(fontsize="small")
    path = path_of("norm", ".png")
    figure.savefig(path, dpi=110)
    print(path)


def tune(widths: list[int], rows: int, dtype: torch.dtype) -> None:
    """Time tiles of our kernels; `constants` in triton_norm.py holds the choice."""
    chosen = triton_norm.constants
    for width, backward in itertools.product(widths, (False, True)):
        leaves, upstream = draw(rows, width, dtype, branched=True)
        now = chosen(width, backward=backward)
        timed: dict[tuple[int, int], float] = {}
        for tile in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
            if 4 <= tile[0] * now["BLOCK"] / (32 * tile[1]) <= 64:
                triton_norm.constants = partial(retiled, chosen, backward, tile)
                work = partial(ours, *leaves)
                if backward:
                    work = partial(torch.autograd.grad, ours(*leaves), leaves, upstream, retain_graph=True)
                timed[tile] = milliseconds({"": work}, 0.1)[""]
        triton_norm.constants = chosen
        print(f"width {width}, {'backward' if backward else 'forward'}, (rows, warps) and milliseconds")
        print("  now ", (now["ROWS"], now["num_warps"]), round(timed[now["ROWS"], now["num_warps"]], 5))
        print("  best", *(f"{tile} {timed[tile]:.5f}" for tile in sorted(timed, key=timed.__getitem__)[:5]))


def retiled(
    chosen: Callable[..., dict[str, Any]], tuned: bool, tile: tuple[int, int], *given: Any, backward: bool = False
):
    """`triton_norm.constants` with another tile in the direction that is tuned."""
    found = chosen(*given, backward=backward)
    return found | {"ROWS": tile[0], "num_warps": tile[1]} if backward == tuned else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 32768] if DEVICE == "cuda" else [512, 4096])
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1024, 2048, 4096])
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_norm.{csv,png}")
    parser.add_argument("--tune", action="store_true", help="time other tiles of our kernels")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    keep_freed_memory()
    if options.tune:
        return tune(options.widths, max(options.rows), dtype)
    copy = copy_bandwidth()
    rows = [
        row
        for branched, count, width in itertools.product((False, True), options.rows, options.widths)
        for row in measure(count, width, dtype, branched, copy, options.seconds)
    ]
    show(rows, f"copy: {copy:,.0f} GB/s")
    if options.save:
        save("norm", [row | {"copy_gb_per_s": round(copy, 1)} for row in rows])
        plot(rows)


if __name__ == "__main__":
    main()
