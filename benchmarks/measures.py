"""The time of every measure of the layers beside a training step, and the share that the default ones take of a run.

    python benchmarks/measures.py [--experiments quickstart table1_130m] [--rows 2] [--set key=value ...] [--save]

A step is the forward pass, the loss, the backward pass and Adam on `data.batch_size` rows of random tokens, without
data or logging. Where it has more than one micro-batch, it is taken as so many times the forward and backward pass of
`--rows` rows as make up the batch, and only what is measured by default is timed. Measures are those that run in
training, on as many rows as there; a share counts how often each is due, and drawing the figures for TensorBoard.

Steps and what is measured by default take turns, at least five times each. All others are run once each, between two
steps.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _results import milliseconds, save, show
from torch.utils.tensorboard import SummaryWriter

from cod_lightning.config import Config, compose
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.layered import Layered
from cod_lightning.measure.layers import layer_statistics, plot_variance
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.callbacks import IN_TRAINING, worth_a_figure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATISTICS = "layer statistics"


def training_step(config: Config, decoder: Decoder, rows: int) -> tuple[Callable[[], None], float]:
    """A function that does a part of a step, and how many such parts make up a step."""
    whole = config.data.batch_size == config.data.micro_batch_size
    rows = config.data.batch_size if whole else rows
    tokens = torch.randint(decoder.lm_head.out_features, (rows, config.data.seq_len), device=DEVICE)
    optimizer = torch.optim.Adam(decoder.parameters(), config.optim.lr)

    def step() -> None:
        found = decoder(tokens, next_tokens(tokens))
        (found.total / found.counts.sum()).backward()
        if whole:
            optimizer.step()
        optimizer.zero_grad()

    return step, config.data.batch_size / rows


def once(function: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    began = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def measured_steps(every: int, max_steps: int) -> list[int]:
    """When a callback measures."""
    return sorted({*range(0, max_steps + 1, every), max_steps})


def measure(config: Config, rows: int, seconds: float) -> list[dict[str, Any]]:
    trainer, vocabulary = config.trainer, config.model.vocab_size or config.data.vocab_size
    shape = replace(config.model, vocab_size=vocabulary)
    decoder = build_decoder(shape, build_all(config.norm, shape.num_hidden_layers), seed=1, device=DEVICE)
    step, parts = training_step(config, decoder, rows)
    probe = torch.randint(vocabulary, (trainer.probe_rows, config.data.seq_len), device=DEVICE)
    batches, model = probe.split(config.data.micro_batch_size), Layered(decoder)
    measures: dict[str, Callable[[], object]] = {STATISTICS: partial(layer_statistics, decoder, probe)}
    measures |= {
        name: partial(function, model, batches, None, lambda done, total: None)
        for name, function in IN_TRAINING.items()
    }
    due = {STATISTICS: trainer.stats_every, **trainer.measures}
    usual = {name: function for name, function in measures.items() if due.get(name)}

    steps = measured_steps(trainer.stats_every, trainer.max_steps)
    variances = [[1.0 + layer for layer in range(model.depth)]] * len(steps)
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def figure() -> None:
            writer.add_figure("variance by layer", plot_variance(steps, variances))

        first_figure = once(figure)
        times = milliseconds({"step": step, "figure": figure, **usual}, seconds)
    a_step = times["step"] * parts
    drawn = sum(worth_a_figure(at, trainer.stats_every, trainer.max_steps) for at in steps if at)
    counts = {name: len(measured_steps(due[name], trainer.max_steps)) for name in usual}
    costs = {name: times[name] * counts[name] for name in usual}
    costs["figure"] = first_figure + times["figure"] * (drawn - 1)
    relative = {"step": 1.0, "figure": times["figure"] / a_step, **{name: times[name] / a_step for name in usual}}
    if parts == 1:
        before = once(step)
        for name in measures.keys() - usual.keys():
            times[name] = once(measures[name])
            after = once(step)
            relative[name] = times[name] / ((before + after) / 2)
            before = after
    common = {
        "experiment": config.experiment,
        "layers": model.depth,
        "width": shape.hidden_size,
        "steps": trainer.max_steps,
    }
    found = [
        {
            **common,
            "what": name,
            "ms": round(a_step if name == "step" else times[name], 1),
            "over_step": round(relative[name], 4),
            "times": {"figure": drawn, **counts}.get(name, ""),
            "share": round(costs[name] / a_step / trainer.max_steps, 6) if name in costs else "",
        }
        for name in ["step", "figure", *measures]
        if name in relative
    ]
    share = sum(costs.values()) / a_step / trainer.max_steps
    return [
        *found,
        {**common, "what": "all by default", "ms": "", "over_step": "", "times": "", "share": round(share, 6)},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["quickstart", "table1_130m"])
    parser.add_argument("--rows", type=int, default=2, help="of a part of a step that has several micro-batches")
    parser.add_argument("--threads", type=int, default=1 if DEVICE == "cpu" else os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5, help="for each of what is measured by default")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_measures.csv")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of every experiment")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name in options.experiments:
        rows += measure(compose([f"experiments={name}", *options.set]), options.rows, options.seconds)
    show(rows)
    if options.save:
        save("measures", rows, threads=options.threads)


if __name__ == "__main__":
    main()
