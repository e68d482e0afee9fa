"""Time and memory of the loss from hidden states: ours, all logits at once, torch's, and Liger's if installed.

    python benchmarks/loss.py [--tokens 32768] [--width 1024] [--vocabulary 32000] [--save]

Times the forward and the backward pass together. Memory is the peak beyond the inputs, measured in a separate process
for each variant: allocated by torch on a GPU, resident on a CPU. The errors are relative to float64.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from _results import DEVICE, ON_GPU, argument_parser, milliseconds, relative_error, report
from torch import Tensor

from cod_lightning.kernels.loss import linear_cross_entropy, reference_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [tokens, width], weight [vocabulary, width], targets [tokens]) -> summed loss."""


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden[None], weight, targets[None]).total


def all_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return reference_linear_cross_entropy(hidden[None], weight, targets[None]).total


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


VARIANTS: dict[str, Loss] = {"ours": ours, "all logits": all_logits}
if hasattr(F, "linear_cross_entropy"):
    VARIANTS["torch"] = torch_chunked
if ON_GPU and find_spec("liger_kernel"):
    VARIANTS["liger"] = liger


def draw(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Random (hidden, weight, targets)."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.width, device=DEVICE).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocabulary, args.width, device=DEVICE)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(args.vocabulary, (args.tokens,), device=DEVICE)


def forward_backward(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The summed loss; gradients of the mean loss by hidden states and weight."""
    total = loss(hidden, weight, targets)
    return [total.detach(), *torch.autograd.grad(total / len(targets), [hidden, weight])]


def allocated_peak() -> int:
    """Peak memory of this process in bytes: allocated by torch on a GPU, resident on a CPU."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def send_peak(name: str, args: argparse.Namespace, channel: Any) -> None:
    """Run in a child process: send the peak memory of one pass beyond its inputs."""
    torch.set_num_threads(args.threads)
    inputs = draw(args)
    forward_backward(VARIANTS[name], *draw(argparse.Namespace(**{**vars(args), "tokens": 64, "vocabulary": 64})))
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    before = allocated_peak()
    forward_backward(VARIANTS[name], *inputs)
    channel.send(allocated_peak() - before)


def peak_memory(name: str, args: argparse.Namespace) -> int:
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe()
    child = spawn.Process(target=send_peak, args=(name, args, sender))
    child.start()
    sender.close()  # so that `recv` raises EOFError if the child dies
    memory = receiver.recv()
    child.join()
    return memory


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One table row for each variant."""
    inputs = draw(args)
    exact = forward_backward(all_logits, *(t.detach().double().requires_grad_() for t in inputs[:2]), inputs[2])
    passes = {name: partial(forward_backward, loss, *inputs) for name, loss in VARIANTS.items()}
    times = milliseconds(passes, args.seconds)
    errors = {name: [relative_error(*pair) for pair in zip(run(), exact, strict=True)] for name, run in passes.items()}
    return [
        {
            "variant": name,
            "dtype": args.dtype,
            "tokens": args.tokens,
            "width": args.width,
            "vocabulary": args.vocabulary,
            "ms": round(times[name], 3),
            "over_ours": round(times[name] / times["ours"], 3),
            "peak_mb": round(peak_memory(name, args) / 1e6, 1),
            **{f"error_{of}": f"{e:.1e}" for of, e in zip(("loss", "hidden", "weight"), errors[name], strict=True)},
        }
        for name in VARIANTS
    ]


def main() -> None:
    parser = argument_parser(__doc__, "loss", seconds=2, threads=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=32_768 if ON_GPU else 2048)
    parser.add_argument("--width", type=int, default=1024 if ON_GPU else 256)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--dtype", default="bfloat16" if ON_GPU else "float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report(args, measure(args))


if __name__ == "__main__":
    main()
