"""Builders of runs, rows and experiments for the report, and readers of its Markdown."""

import math
from dataclasses import replace

from cod_lightning.paper.claims import Column, Experiment, ReportRow, Run

LAYERS = 4
PUBLISHED = {"post_ln": 27.2, "mix_ln": 26.07, "pre_ln": 26.73, "lns": 25.76, "admin": 1358.11}
LOSSES = {
    "post_ln": [5.1, 5.0, 5.1],  # lower than the baseline, published higher
    "mix_ln": [5.4, 5.7, 5.5],  # sometimes lower, sometimes higher
    "pre_ln": [5.5, 5.6, 5.4],
    "lns": [5.1, 5.3, 5.0],  # lower than the baseline for every seed, as published
}


def run(seed, loss, halfway=9.0, **measures):
    """A run that ended at a loss, with layers recorded at four steps."""
    steps = [0, 50, 100, 200]
    variance = [[0.1 * step + layer + 1 for layer in range(LAYERS)] for step in steps]
    return Run(
        seed,
        {
            **{"val_loss": loss, "ppl": math.exp(loss), "parameters": 1000, "wall_seconds": 1800.0},
            "versions": {"python": "3.11", "torch": "2.13"},
            "git_commit": "0123456789abcdef+changes",
            "hardware": {"cpu": "abacus", "cores": 2, "threads": 1, "gpus": []},
            "date": "2026-11-24T10:00:00+00:00",
            "data_fingerprint": "feed" * 16,
            "history": {
                "val": {"step": [100, 200], "val_loss": [halfway, loss]},
                "train": {"step": steps, "loss": [9.0, 8.0, 7.0, loss]},
                "layers": {"step": steps, "variance": variance},
            },
        },
        measures,
    )


def diverged(seed):
    record = run(seed, 0.0).record
    environment = {name: record[name] for name in ("versions", "git_commit", "hardware", "date")}
    return Run(seed, {"failure": "the loss is nan at step 3", **environment}, {})


def row(name, published, *runs, label=None, run_id=None, gpu_hours=None, note=None):
    figures = published if isinstance(published, dict) else {} if published is None else {"ppl": published}
    return ReportRow(name, label or name, figures, note, run_id or name, tuple(runs), gpu_hours)


def table(*rows, name="table1_130m", scale="toy", column="130M", size=134, target="Table 1", axes=None, **paper):
    paper = {"source": "the paper"} | paper
    return Experiment(name, scale, target, column, size, f"setting of {scale}", paper, rows, axes or {})


def rate_columns(losses):
    """A column for each rate, from losses by rate and strategy, of seeds 1, 2, ...; None where a run diverged."""
    return [
        Column((table(*(row(name, None, *runs_of(each)) for name, each in strategies.items()), column=rate),))
        for rate, strategies in losses.items()
    ]


def runs_of(losses):
    return [diverged(seed) if loss is None else run(seed, loss) for seed, loss in enumerate(losses, 1)]


def without_runs(experiment, scale="paper"):
    return replace(experiment, scale=scale, rows=tuple(replace(r, runs=()) for r in experiment.rows))


def with_published(rows, figures):
    """The rows with other published perplexities."""
    return [replace(r, published={"ppl": figure}) for r, figure in zip(rows, figures, strict=True)]


def rows_at(scale, run_at="toy"):
    return [
        row(
            name,
            value,
            *(run(seed, loss) for seed, loss in enumerate(LOSSES.get(name, []), 1) if scale == run_at),
            run_id=f"{name}-{scale}",
            gpu_hours=10.0 if scale == "paper" else None,
        )
        for name, value in PUBLISHED.items()
    ]


def comparison(experiment, name):
    return next(c for c in Column((experiment,)).comparisons if c.row.name == name)


def tables_of(markdown):
    """The first table below every heading: head and rows of cells."""
    tables, heading = {}, ""
    for block in markdown.split("\n\n"):
        heading = block if block.startswith("#") else heading
        if block.startswith("| "):
            lines = [line.strip("| ").split(" | ") for line in block.splitlines()]
            tables.setdefault(heading, [[cell.strip() for cell in line] for line in [lines[0], *lines[2:]]])
    return tables
