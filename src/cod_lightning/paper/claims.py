"""What the paper prints beside what runs gave: values over seeds, differences to the baseline, and their direction.

A difference is taken between runs of the same seed, which start from the same draws and see the same batches, in a
unit that can be compared across scales: the logarithm of the ratio of two perplexities is a difference of losses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from statistics import fmean, stdev
from typing import Any, TypeVar

S = TypeVar("S", bound="Sample")

BASELINE = "pre_ln"
"""The row that others are compared with; where there is none, the first."""

UNTRAINED = 1.0
"""Nats above the best row of its column from which on a published run counts as one that did not train. Those that
stayed at the frequencies of words lie 4 above the best, all others within 0.15."""

STUCK = 0.03
"""A run of ours did not train if its validation loss fell by less in its second half. At toy scale runs that stay at
the frequencies of words gain 0.015 nats there, the slowest of the others 0.05 and most of them 0.4."""

QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's t with 1, 2, ... degrees of freedom that 95 % of a symmetric sample stay within."""


@dataclass(frozen=True)
class Run:
    """A finished or failed run, or a public model that was measured."""

    seed: int
    record: Mapping[str, Any]
    """As `train.run.fit` returns it; of a run that failed, `failure` and where that was; of a public model, empty."""
    measures: Mapping[str, Mapping[str, Any]]
    """What was measured of it, by name, as the JSON files hold it."""

    @property
    def failure(self) -> str | None:
        """Why it ended early and has no figures."""
        return self.record.get("failure")

    @property
    def history(self) -> Mapping[str, Mapping[str, Any]]:
        """What it recorded over its steps; empty where there is nothing."""
        return self.record.get("history", {})


@dataclass(frozen=True)
class Row:
    """One row of a table at one scale."""

    name: str
    label: str
    published: Mapping[str, float]
    """By metric; empty where the paper prints none."""
    note: str | None
    computes: str
    """Stands for what its runs compute, but for the seed: rows that share it share their runs."""
    runs: tuple[Run, ...]
    """By seed, each once."""
    gpu_hours: float | None
    """Estimate for one run; None where there is none."""


@dataclass(frozen=True)
class Experiment:
    """One column of a table, or the runs of a figure, at one scale."""

    name: str
    scale: str
    target: str
    """Such as "Table 1"."""
    column: str
    """Its heading within the target."""
    size: int
    """Parameters at the paper's scale: columns are ordered by it."""
    title: str
    """What it reproduces, in a sentence."""
    setting: str
    """Shape, text and tokens at this scale, in words."""
    paper: Mapping[str, Any]
    """The `paper:` block of its file."""
    rows: tuple[Row, ...]

    @property
    def metrics(self) -> list[Metric]:
        """What the paper prints of its rows, and what is compared of runs where that is something else."""
        printed = dict.fromkeys(name for row in self.rows for name in row.published)
        own = self.paper.get("metric", "")
        if printed and any(own in run.record for row in self.rows for run in row.runs):
            printed[own] = None
        return [Metric(name) for name in printed]

    @property
    def baseline(self) -> int:
        """Which of the rows the others are compared with."""
        return next((index for index, row in enumerate(self.rows) if row.name == BASELINE), 0)

    @property
    def source(self) -> str:
        """The number of the published table or figure, such as "130M"."""
        return self.column or self.name


@dataclass(frozen=True)
class Metric:
    """A figure that the paper prints, by its key in the record: a perplexity, a loss, or an accuracy in per cent."""

    name: str

    @property
    def title(self) -> str:
        return {"ppl": "perplexity", "val_loss": "loss"}.get(self.name, self.name)

    @property
    def digits(self) -> int:
        """Behind the point."""
        return 3 if self.name.endswith("loss") else 2

    @property
    def difference_digits(self) -> int:
        """Likewise, of differences."""
        return 3 if self.lower else 2

    @property
    def unit(self) -> str:
        """Of differences."""
        return "nats" if self.lower else "points"

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        return self.is_ppl or self.name.endswith("loss")

    @property
    def is_ppl(self) -> bool:
        return self.name.startswith("ppl")

    def of(self, record: Mapping[str, Any]) -> float | None:
        """The record's figure, None where it has none."""
        value = record.get(self.name)
        return None if value is None else float(value)

    def difference(self, value: float, base: float) -> float:
        """In `unit`."""
        return math.log(value / base) if self.is_ppl else value - base

    def undone(self, value: float, batches: int) -> float:
        """A published figure without the bias of the released evaluation, which divides N mean losses by N + 1.

        Args:
            value: as published.
            batches: N.
        """
        factor = (batches + 1) / batches
        return value**factor if self.is_ppl else value * factor


@dataclass(frozen=True)
class Sample:
    """Values over seeds; `sd` is that of the sample (n - 1), None for a single value."""

    n: int
    mean: float
    sd: float | None

    @classmethod
    def of(cls: type[S], values: Sequence[float]) -> S:
        return cls(len(values), fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Difference(Sample):
    """Paired differences over seeds."""

    @property
    def margin(self) -> float | None:
        """Half the 95 % t interval of the mean; None for a single seed."""
        if self.sd is None:
            return None
        quantile = QUANTILES[min(self.n - 1, len(QUANTILES)) - 1]
        return quantile * self.sd / math.sqrt(self.n)

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.margin is not None and abs(self.mean) > self.margin


SAME, OPPOSITE, NOISE, ONE_SEED = "same", "opposite", "within noise", "one seed"


@dataclass(frozen=True)
class Claim:
    """What the paper prints of a row, and whether ours points the same way."""

    experiment: Experiment
    value: float | None
    undone: float | None
    """Without the bias of the released evaluation; None where that is not known."""
    difference: float | None
    """To the baseline, in the metric's unit."""
    trained: bool
    direction: str | None
    """Of our difference against the published one: one of the four above, None where there is nothing to compare."""


@dataclass(frozen=True)
class Line:
    """A row of one column for one metric."""

    row: Row
    metric: Metric
    sample: Sample | None
    """None: not run."""
    untrained: int
    """Runs that did not train, among `sample`."""
    failures: tuple[str, ...]
    """Of runs that ended early."""
    difference: Difference | None
    """To the baseline; None for the baseline, and where the two share no seed."""
    claims: tuple[Claim, ...]
    """One for each experiment of the column."""


@dataclass(frozen=True)
class Column:
    """Experiments of one target whose rows are the same runs at a scale."""

    experiments: tuple[Experiment, ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Of the first experiment, under the labels of all."""
        same = zip(*(experiment.rows for experiment in self.experiments), strict=True)
        names = [", ".join(dict.fromkeys(row.label for row in rows)) for rows in same]
        first = self.experiments[0]
        public = {name for name, row in first.paper.get("rows", {}).items() if "subject" in row}
        return tuple(
            replace(row, label=f"stand-in for {name}" if row.name in public and first.scale != "paper" else name)
            for row, name in zip(first.rows, names, strict=True)
        )

    @cached_property
    def baseline(self) -> Row:
        return self.rows[self.experiments[0].baseline]

    @property
    def heading(self) -> str:
        return ", ".join(experiment.source for experiment in self.experiments)

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for row in self.rows for run in row.runs})

    @property
    def metrics(self) -> list[Metric]:
        """What the paper prints of any of its experiments."""
        return list(dict.fromkeys(metric for experiment in self.experiments for metric in experiment.metrics))

    @cached_property
    def lines(self) -> list[Line]:
        """Metric by metric, every row in the paper's order."""
        return [line for metric in self.metrics for line in self.lines_of(metric)]

    def lines_of(self, metric: Metric) -> list[Line]:
        found = [values(row, metric) for row in self.rows]
        base = found[self.experiments[0].baseline]
        lines = []
        for index, (row, mine) in enumerate(zip(self.rows, found, strict=True)):
            pairs = [metric.difference(mine[seed], base[seed]) for seed in mine.keys() & base.keys()]
            compared = Difference.of(pairs) if pairs and row is not self.baseline else None
            lines.append(
                Line(
                    row,
                    metric,
                    Sample.of(list(mine.values())) if mine else None,
                    sum(stuck(run.record) for run in row.runs if run.seed in mine) if metric.lower else 0,
                    tuple(run.failure for run in row.runs if run.failure),
                    compared if compared and math.isfinite(compared.mean) else None,
                    tuple(claim(experiment, index, metric, compared) for experiment in self.experiments),
                )
            )
        return lines


def seed_counts(rows: Iterable[Row]) -> str:
    """How many seeds the rows that were run have, such as "3" or "1 to 3"."""
    counts = [len(row.runs) for row in rows if row.runs]
    low, high = min(counts, default=0), max(counts, default=0)
    return str(high) if low == high else f"{low} to {high}"


def values(row: Row, metric: Metric) -> dict[int, float]:
    """By seed, of the runs that have it."""
    found = {run.seed: metric.of(run.record) for run in row.runs}
    return {seed: value for seed, value in found.items() if value is not None}


def untrained(metric: Metric, value: float, column: Sequence[float]) -> bool:
    """Whether a published value lies more than `UNTRAINED` above the best of its column."""
    return metric.lower and metric.difference(value, min(column)) > UNTRAINED


def stuck(record: Mapping[str, Any]) -> bool:
    """Whether a run learned next to nothing in its second half, or ended without a finite loss."""
    if not math.isfinite(record["val_loss"]):
        return True
    validations = record.get("history", {}).get("val", {"step": []})
    if len(validations["step"]) < 2:
        return False
    steps, losses = validations["step"], validations["val_loss"]
    halfway = min(range(len(steps)), key=lambda index: abs(steps[index] - steps[-1] / 2))
    return losses[halfway] - losses[-1] < STUCK


def claim(experiment: Experiment, index: int, metric: Metric, ours: Difference | None) -> Claim:
    """What the paper prints of a row of an experiment, beside our difference to the baseline."""
    printed = [row.published.get(metric.name) for row in experiment.rows]
    batches = experiment.paper.get("evaluation_batches") if metric.lower else None
    undone = [None if value is None or batches is None else metric.undone(value, batches) for value in printed]
    best = [value if whole is None else whole for value, whole in zip(printed, undone, strict=True)]
    value, base = best[index], best[experiment.baseline]
    difference = (
        None if value is None or base is None or index == experiment.baseline else metric.difference(value, base)
    )
    return Claim(
        experiment,
        printed[index],
        undone[index],
        difference,
        value is None or not untrained(metric, value, [other for other in best if other is not None]),
        direction(ours, difference),
    )


def direction(ours: Difference | None, published: float | None) -> str | None:
    """Whether our difference has the sign of the published one; one within noise has none."""
    if ours is None or published is None:
        return None
    if ours.margin is None:
        return ONE_SEED
    if not ours.beyond_noise:
        return NOISE
    return SAME if (ours.mean > 0) == (published > 0) else OPPOSITE


def columns(experiments: Iterable[Experiment]) -> list[Column]:
    """The columns that experiments of one target and one scale make, in the order of their sizes.

    Rows that are the same runs everywhere are one column, whatever the paper's sizes were.
    """
    together: dict[tuple[tuple[str, str], ...], list[Experiment]] = {}
    for experiment in experiments:
        together.setdefault(tuple((row.name, row.computes) for row in experiment.rows), []).append(experiment)
    return [Column(tuple(group)) for group in together.values()]


def by_target(experiments: Iterable[Experiment]) -> dict[str, dict[str, list[Experiment]]]:
    """Experiments by target, tables before figures as the paper numbers them, then by scale; smallest size first."""
    ordered = sorted(experiments, key=lambda e: (order(e.target), SCALES.index(e.scale), e.size, e.name))
    return {
        target: {scale: list(group) for scale, group in groupby(of_target, key=lambda e: e.scale)}
        for target, of_target in groupby(ordered, key=lambda e: e.target)
    }


SCALES = ("paper", "mini", "small", "toy")
"""From the published size down."""


def order(target: str) -> tuple[int, int, str]:
    """Sorts "Table 2" before "Table 10" before "Figure 1" before anything else."""
    kind, _, number = target.partition(" ")
    kinds = ("Table", "Figure")
    known = kind in kinds and number.isdecimal()
    return (kinds.index(kind) if known else len(kinds), int(number) if known else 0, target)
