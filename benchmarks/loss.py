"""Time and memory of the loss from hidden states: all logits at once, ours, torch's and Liger's where installed.

    python benchmarks/loss.py [--tokens 32768] [--width 1024] [--vocabulary 32000] [--save]

Forward and backward pass. Memory is the peak beyond the inputs, in a process of its own for each variant: on a GPU what
torch allocated, on a CPU what the process held.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _results import milliseconds, save, show
from torch import Tensor

from cod_lightning.kernels.loss import linear_cross_entropy, reference_linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [tokens, width], weight, targets [tokens]) -> summed loss."""


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden[None], weight, targets[None]).total


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return reference_linear_cross_entropy(hidden[None], weight, targets[None]).total


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def of_liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


def variants() -> dict[str, Loss]:
    found: dict[str, Loss] = {"ours": ours, "all logits": all_logits}
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = of_torch
    if DEVICE == "cuda":
        try:
            import liger_kernel  # noqa: F401
        except ImportError:
            pass
        else:
            found["liger"] = of_liger
    return found


def draw(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.width, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(options.vocabulary, options.width, device=DEVICE)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(options.vocabulary, (options.tokens,), device=DEVICE)


def run(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    total = loss(hidden, weight, targets)
    return [total.detach(), *torch.autograd.grad(total / len(targets), [hidden, weight])]


def held() -> int:
    """Bytes that this process holds at most since it started."""
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak(name: str, options: argparse.Namespace, channel: Any) -> None:
    """Send the peak memory of one pass, beyond its inputs."""
    torch.set_num_threads(options.threads)
    inputs = draw(options)
    small = draw(argparse.Namespace(**{**vars(options), "tokens": 64, "vocabulary": 64}))
    run(variants()[name], *small)  # loads the libraries
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(variants()[name], *inputs)
        channel.send(torch.cuda.max_memory_allocated() - before)
    else:
        before = held()
        run(variants()[name], *inputs)
        channel.send(held() - before)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    inputs = draw(options)
    exact = run(all_logits, *(t.detach().double().requires_grad_() for t in inputs[:2]), inputs[2])
    found = variants()
    times = milliseconds({name: partial(run, loss, *inputs) for name, loss in found.items()}, options.seconds)
    rows = []
    for name, loss in found.items():
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(run(loss, *inputs), exact, strict=True)]
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        child = spawn.Process(target=peak, args=(name, options, there))
        child.start()
        there.close()  # so that a child that dies ends the waiting
        memory = here.recv()
        child.join()
        rows.append(
            {
                "variant": name,
                "dtype": options.dtype,
                "tokens": options.tokens,
                "width": options.width,
                "vocabulary": options.vocabulary,
                "ms": round(times[name], 3),
                "over_ours": round(times[name] / times["ours"], 3),
                "peak_mb": round(memory / 1e6, 1),
                **{f"error_{what}": f"{e:.1e}" for what, e in zip(("loss", "hidden", "weight"), errors, strict=True)},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--tokens", type=int, default=32_768 if on_gpu else 2048)
    parser.add_argument("--width", type=int, default=1024 if on_gpu else 256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=2, help="for each variant")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_loss.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    show(rows)
    if options.save:
        save("loss", rows)


if __name__ == "__main__":
    main()
