"""The time of every measure of the layers beside a training step, and the share that the default ones take of a run.

    python benchmarks/measures.py [--experiments quickstart table1_130m] [--rows 2] [--set key=value ...] [--save]

A step is the forward pass, the loss, the backward pass and Adam on `data.batch_size` rows of random tokens, without
data or logging. Measures are those that run in training, on as many rows as there; a share counts how often each is
due, and drawing the figures for TensorBoard. Steps and what is measured by default take turns, at least five times
each. All others are run once each, between two steps.

Where a step has more than one micro-batch, it is taken as so many times the forward and backward pass of `--rows` rows
as make up the batch, and only what is measured by default is timed, once. On a CPU the time is the processor's, which
other processes stretch less than the clock's.
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

from cod_lightning.config.compose import compose
from cod_lightning.config.schema import Config
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.activation_stats import layer_statistics, plot_variance
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.callbacks import IN_TRAINING, worth_a_figure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOCK = time.perf_counter if DEVICE == "cuda" else time.process_time


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
    began = CLOCK()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1000 * (CLOCK() - began)


def measured_steps(every: int, max_steps: int) -> list[int]:
    """When a callback measures."""
    return sorted({*range(0, max_steps + 1, every), max_steps})


def measure(config: Config, rows: int, seconds: float) -> list[dict[str, Any]]:
    trainer, vocabulary = config.trainer, config.model.vocab_size or config.data.vocab_size
    shape = replace(config.model, vocab_size=vocabulary)
    decoder = build_decoder(shape, build_all(config.norm, shape.num_hidden_layers), seed=1, device=DEVICE)
    step, parts = training_step(config, decoder, rows)
    probe = torch.randint(vocabulary, (trainer.probe_rows, config.data.seq_len), device=DEVICE)
    batches, model = probe.split(config.data.micro_batch_size), ModelAdapter(decoder)
    measures: dict[str, Callable[[], object]] = {"layer statistics": partial(layer_statistics, decoder, probe)}
    for name, function in IN_TRAINING.items():
        measures[name] = partial(function, model, batches, None, lambda done, total: None)
    steps = {"layer statistics": measured_steps(trainer.stats_every, trainer.max_steps)}
    steps |= {name: measured_steps(every, trainer.max_steps) for name, every in trainer.measures.items() if every}
    drawn = [
        at for at in steps["layer statistics"] if at and worth_a_figure(at, trainer.stats_every, trainer.max_steps)
    ]

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        variances = [[1.0 + layer for layer in range(model.depth)]] * len(drawn)
        usual: dict[str, Callable[[], object]] = {
            "step": step,
            "figure": lambda: writer.add_figure("variance by layer", plot_variance(drawn, variances)),
            **{name: measures[name] for name in steps},
        }
        first_figure = once(usual["figure"])  # brings in matplotlib
        if parts == 1:
            times = milliseconds(usual, seconds, CLOCK)
        else:
            step()
            times = {name: once(function) for name, function in usual.items()}
    a_step = times["step"] * parts
    relative = {name: value / a_step for name, value in times.items()} | {"step": 1.0}
    if parts == 1:
        before = once(step)
        for name in [name for name in measures if name not in usual]:
            times[name], after = once(measures[name]), once(step)
            relative[name], before = 2 * times[name] / (before + after), after
    counts = {name: len(due) for name, due in steps.items()} | {"figure": len(drawn)}
    shares = {name: relative[name] * count / trainer.max_steps for name, count in counts.items()}
    shares["figure"] += (first_figure - times["figure"]) / a_step / trainer.max_steps
    shares["all by default"] = sum(shares.values())
    times["step"] = a_step
    lines = [(name, times[name], relative[name]) for name in ("step", "figure", *measures) if name in times]
    return [
        {
            "experiment": config.experiment,
            "layers": model.depth,
            "width": shape.hidden_size,
            "steps": trainer.max_steps,
            "what": name,
            "ms": ms and round(ms, 1),
            "over_step": over and round(over, 5),
            "times": counts.get(name, ""),
            "share": f"{shares[name]:.1e}" if name in shares else "",
        }
        for name, ms, over in [*lines, ("all by default", "", "")]
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
