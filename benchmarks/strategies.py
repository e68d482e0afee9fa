"""The cost of every strategy: time and memory of a training step over those of Pre-LN.

    python benchmarks/strategies.py [--strategies lns peri_ln ...] [--model llama_130m] [--threads 1] [--save]

A step is the forward pass, the loss, the backward pass and the optimizer's update on random tokens, of a decoder with
four blocks and a vocabulary of 512 tokens: the head does not hide the blocks. A strategy and Pre-LN take turns in each
round, and `time` is the median over rounds of the ratio of their processor times on a CPU, and the ratio of median
times on a GPU. `memory` is the ratio of the peak memory that a step allocates beside parameters and optimizer state,
`parameters` the number of parameters that a block has beyond Pre-LN's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _results import (
    DEVICE,
    ON_GPU,
    argument_parser,
    load_shape,
    mean_loss,
    milliseconds,
    peak_bytes,
    report,
    rounds,
    training_step,
)
from torch import Tensor, nn

from cod_lightning.config.schema import OptimConfig
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.train.optim import build_optimizer

BASELINE = "pre_ln"
BLOCKS, VOCABULARY = 4, 512


def build(name: str, shape: DecoderConfig, tokens: Tensor) -> tuple[nn.Module, Callable[[], None]]:
    """A model and its training step, which has run once: the optimizer has its state."""
    model = build_decoder(shape, build_all({"name": name}, BLOCKS), seed=1, device=DEVICE)
    optimizer = build_optimizer(model, OptimConfig(), max_steps=1000)[0]
    batches = [(tokens, next_tokens(tokens))]
    step = partial(training_step, partial(mean_loss, model), optimizer, batches, autocast=ON_GPU)
    step()
    return model, step


def block_parameters(model: nn.Module) -> float:
    """Parameters of a block, mean over blocks."""
    return statistics.mean(sum(p.numel() for p in block.parameters()) for block in model.blocks)


def time_ratio(step: Callable[[], None], baseline: Callable[[], None], seconds: float) -> float:
    steps = {"strategy": step, "baseline": baseline}
    if ON_GPU:
        times = milliseconds(steps, seconds)
        return times["strategy"] / times["baseline"]
    series = rounds(steps, seconds, time.process_time)
    return statistics.median(a / b for a, b in zip(series["strategy"], series["baseline"], strict=True))


def main() -> None:
    parser = argument_parser(__doc__, "strategies", seconds=5, threads=1)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES), metavar="NAME")
    parser.add_argument("--model", default="llama_130m", help="name of configs/model: the widths of the blocks")
    parser.add_argument("--rows", type=int, default=64 if ON_GPU else 2, help="batch size")
    parser.add_argument("--length", type=int, default=256, help="sequence length")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = replace(load_shape(args.model), num_hidden_layers=BLOCKS, vocab_size=VOCABULARY)
    tokens = torch.randint(VOCABULARY, (args.rows, args.length), device=DEVICE)
    baseline, baseline_step = build(BASELINE, shape, tokens)
    baseline_bytes = peak_bytes(baseline_step)
    rows: list[dict[str, Any]] = []
    for name in args.strategies:
        model, step = build(name, shape, tokens)
        rows.append(
            {
                "strategy": name,
                "model": args.model,
                "blocks": BLOCKS,
                "tokens": tokens.numel(),
                "threads": args.threads,
                "time": round(time_ratio(step, baseline_step, args.seconds), 3),
                "memory": round(peak_bytes(step) / baseline_bytes, 3),
                "parameters": round(block_parameters(model) - block_parameters(baseline), 2),
            }
        )
    report(args, rows)


if __name__ == "__main__":
    main()
