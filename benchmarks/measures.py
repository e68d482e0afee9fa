"""Time of every layer measure beside a training step, and the share of a run that the default measures take.

    python benchmarks/measures.py [--experiments quickstart table1_130m] [--rows 2] [--only MEASURE ...]
        [--set key=value ...] [--save]

A step is the forward pass, the loss, the backward pass and Adam on `data.batch_size` sequences of random tokens,
without data loading or logging. Measures run as in training, on as many sequences as there. A share counts how often a
measure is due, and includes its TensorBoard figures. Steps and default measures take turns, at least five times each;
every other measure runs once, between two steps. `over_forward` is the ratio to a forward pass over the sequences that
the measure reads; `jacobian, all layers` is the one of the command `measure`.

If a step has several micro-batches, its time is extrapolated from a forward and backward pass of `--rows` sequences,
and only the default measures are timed, once. On a CPU the clock is processor time, which other programs disturb less.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from _results import DEVICE, ON_GPU, argument_parser, elapsed, mean_loss, milliseconds, report
from torch.utils.tensorboard import SummaryWriter

from cod_lightning.config.compose import compose
from cod_lightning.config.schema import PROBE_ROWS, Config
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.training import TRAINING_MEASURES, plot_variance, probe_statistics
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.probes import is_figure_step

CLOCK = time.perf_counter if ON_GPU else time.process_time
Function = Callable[[], object]


def once(function: Function) -> float:
    """Milliseconds of one call."""
    return 1000 * elapsed(function, CLOCK)


def partial_step(config: Config, decoder: Decoder, sequences: int) -> tuple[Function, float]:
    """A function that runs one part of a training step, and the number of parts in a step."""
    whole = config.data.batch_size == config.data.micro_batch_size
    sequences = config.data.batch_size if whole else sequences
    tokens = torch.randint(decoder.lm_head.out_features, (sequences, config.data.seq_len), device=DEVICE)
    optimizer = torch.optim.Adam(decoder.parameters(), config.optim.lr)

    def step() -> None:
        mean_loss(decoder, tokens, next_tokens(tokens)).backward()
        if whole:
            optimizer.step()
        optimizer.zero_grad()

    return step, config.data.batch_size / sequences


def sequences_read(name: str, batches: Sequence[torch.Tensor]) -> int:
    """The number of sequences that a measure reads."""
    if name == "jacobian":
        return min(4, sum(map(len, batches)))
    measure = MEASURES.get(name, MEASURES["jacobian"])
    return len(batches[0][: measure.first_sequences]) if measure.first_sequences else sum(map(len, batches))


def measure(config: Config, sequences: int, seconds: float, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One table row for the step, for the figure, for each measure, and for all default measures together.

    `only` names the measures to time besides the default ones; empty: all.
    """
    trainer, vocabulary = config.trainer, config.model.vocab_size or config.data.vocab_size
    shape = replace(config.model, vocab_size=vocabulary)
    decoder = build_decoder(shape, build_all(config.norm, shape.num_hidden_layers), seed=1, device=DEVICE)
    step, parts = partial_step(config, decoder, sequences)
    probe = torch.randint(vocabulary, (trainer.probe_rows or PROBE_ROWS, config.data.seq_len), device=DEVICE)
    batches, model = probe.split(config.data.micro_batch_size), ModelAdapter(decoder)
    measures: dict[str, Function] = {"layer statistics": partial(probe_statistics, decoder, probe)}
    functions = {**TRAINING_MEASURES, "jacobian, all layers": MEASURES["jacobian"]}
    for name, function in functions.items():
        measures[name] = partial(function, model, batches, None, lambda done, total: None)
    reads = {name: sequences_read(name, batches) / len(probe) for name in functions}
    intervals = {"layer statistics": trainer.stats_every, **trainer.measures}
    due = {
        name: sorted({*range(0, trainer.max_steps + 1, every), trainer.max_steps})
        for name, every in intervals.items()
        if every
    }
    figure_steps = [
        at for at in due["layer statistics"] if at and is_figure_step(at, trainer.stats_every, trainer.max_steps)
    ]

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        variances = [[1.0 + layer for layer in range(model.depth)]] * len(figure_steps)
        default: dict[str, Function] = {
            "step": step,
            "figure": lambda: writer.add_figure("variance by layer", plot_variance(figure_steps, variances)),
            **{name: measures[name] for name in due},
            "forward": torch.no_grad()(lambda: [model.logits(batch) for batch in batches]),
        }
        first_figure = once(default["figure"])  # imports matplotlib
        if parts == 1:
            times = milliseconds(default, seconds, CLOCK)
        else:
            step()
            times = {name: once(function) for name, function in default.items()}
    step_ms = times["step"] * parts
    relative = {name: value / step_ms for name, value in times.items()} | {"step": 1.0}
    if parts == 1:
        before = once(step)
        for name in [name for name in measures if name not in default and (not only or name in only)]:
            times[name], after = once(measures[name]), once(step)
            relative[name], before = 2 * times[name] / (before + after), after
    counts = {name: len(steps) for name, steps in due.items()} | {"figure": len(figure_steps)}
    shares = {name: relative[name] * count / trainer.max_steps for name, count in counts.items()}
    shares["figure"] += (first_figure - times["figure"]) / step_ms / trainer.max_steps
    shares["all by default"] = sum(shares.values())
    times["step"] = step_ms
    lines = [(name, times[name], relative[name]) for name in ("step", "figure", "forward", *measures) if name in times]
    return [
        {
            "experiment": config.experiment,
            "layers": model.depth,
            "width": shape.hidden_size,
            "steps": trainer.max_steps,
            "what": name,
            "ms": ms and round(ms, 1),
            "over_step": over and round(over, 5),
            "over_forward": round(ms / times["forward"] / reads[name], 1) if name in reads else "",
            "times": counts.get(name, ""),
            "share": f"{shares[name]:.1e}" if name in shares else "",
        }
        for name, ms, over in [*lines, ("all by default", "", "")]
    ]


def main() -> None:
    parser = argument_parser(__doc__, "measures", seconds=5, threads=os.cpu_count() if ON_GPU else 1)
    parser.add_argument("--experiments", nargs="+", default=["quickstart", "table1_130m"])
    parser.add_argument("--rows", type=int, default=2, help="sequences of a timed part of a step with micro-batches")
    parser.add_argument("--only", nargs="*", default=[], metavar="MEASURE", help="besides the default ones; empty: all")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides for every experiment")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    for name in args.experiments:
        rows += measure(compose([f"experiments={name}", *args.set]), args.rows, args.seconds, args.only)
    report(args, rows, threads=args.threads)


if __name__ == "__main__":
    main()
