"""Published figures compared with the figures of runs: rows, experiments, columns, and differences to the baseline.

A difference is in a unit that can be compared across scales: the logarithm of a ratio of perplexities is a difference
of losses in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cod_lightning.paper.statistics import MIN_SEEDS, UNCLEAR, UNLIKE, Difference, Sample, grouped

SCALES = ("paper", "mini", "small", "toy")
"""Scales, from the published size down."""

BASELINE = "pre_ln"
"""The row that others are compared with; without it, the first row."""

UNTRAINED_GAP = 1.0
"""A published run did not train if its loss is more nats above the best of its column. Runs that stayed at
the frequencies of words are 4 nats above, all others within 0.15."""

PUBLISHED_NOISE = 0.01
"""Smaller published differences (nats) have no clear sign: in Table 8 a factor that the norm cancels costs 0.009."""

STUCK_DECREASE = 0.03
"""A run of ours did not train if its validation loss fell by fewer nats in the second half. At scale=toy, runs that
stay at the frequencies of words gain 0.015 nats there, the slowest of the others 0.05 and most of them 0.4."""


@dataclass(frozen=True)
class Run:
    """A finished or diverged run, or a pretrained model that was measured."""

    seed: int
    record: Mapping[str, Any]
    """Content of record.json, or of failed.json with the reason as `failure`; empty for a pretrained model."""
    measures: Mapping[str, Mapping[str, Any]]
    """Results of measures by name, as in their JSON files."""
    folder: Path = Path()
    """Folder of the run in the results folder."""

    @property
    def failure(self) -> str | None:
        """Why the run diverged."""
        return self.record.get("failure")

    @property
    def history(self) -> Mapping[str, Mapping[str, Any]]:
        """Series recorded over the steps."""
        return self.record.get("history", {})


@dataclass(frozen=True)
class ReportRow:
    """A row of a table at one scale."""

    name: str
    label: str
    published: Mapping[str, float]
    """Published figures by metric."""
    note: str | None
    run_id: str
    """Identifies what the runs compute, apart from the seed: rows with the same id have the same runs."""
    runs: tuple[Run, ...]
    """Runs, one for each seed."""
    gpu_hours: float | None
    """Estimated GPU-hours of one run; None without an estimate."""

    def results(self, measure: str) -> list[Mapping[str, Any]]:
        """Results of a measure, one for each run that has it."""
        return [run.measures[measure] for run in self.runs if measure in run.measures]


@dataclass(frozen=True)
class Metric:
    """A perplexity, a loss, or an accuracy in per cent, named after its key in the run record."""

    name: str

    @property
    def title(self) -> str:
        return {"ppl": "perplexity", "val_loss": "loss"}.get(self.name, self.name)

    @property
    def is_ppl(self) -> bool:
        return self.name.startswith("ppl")

    @property
    def lower_is_better(self) -> bool:
        return self.is_ppl or self.name.endswith("loss")

    @property
    def unit(self) -> str:
        """Unit of a difference."""
        return "nats" if self.lower_is_better else "points"

    @property
    def value_format(self) -> str:
        return ".3f" if self.name.endswith("loss") else ".2f"

    @property
    def difference_format(self) -> str:
        return ".3f" if self.lower_is_better else ".2f"

    def by_seed(self, row: ReportRow) -> dict[int, float]:
        """Values of the runs that have one."""
        return {run.seed: float(v) for run in row.runs if (v := run.record.get(self.name)) is not None}

    def common_seeds(self, *rows: ReportRow) -> list[int]:
        """Seeds of which every row has a value."""
        return sorted(set.intersection(*(set(self.by_seed(row)) for row in rows)))

    def paired_difference(
        self, row: ReportRow, base: ReportRow, seeds: Sequence[int] | None = None
    ) -> Difference | None:
        """Difference of two rows on these seeds, or all that both have; None without any, or if one is not finite.

        Accuracies of few images are rounded: equal differences over the seeds still vary by that.
        """
        pairs = self.differences(row, base, self.common_seeds(row, base) if seeds is None else seeds)
        if not pairs or not all(map(math.isfinite, pairs)):
            return None
        images = row.runs[0].record.get("val_images", math.inf) if self.name == "accuracy" else math.inf
        rounding = 100 / images / math.sqrt(6)  # sd of the difference of two values rounded to 100 / images points
        difference = Difference.of(pairs)
        return difference if difference.sd is None else replace(difference, sd=max(difference.sd, rounding))

    def differences(self, row: ReportRow, base: ReportRow, seeds: Sequence[int]) -> list[float]:
        """Differences of two rows by seed; both have all seeds."""
        values, bases = self.by_seed(row), self.by_seed(base)
        return [self.difference(values[seed], bases[seed]) for seed in seeds]

    def difference(self, value: float, base: float) -> float:
        return math.log(value / base) if self.is_ppl else value - base

    def unbiased(self, value: float, batches: int) -> float:
        """A published value without the bias of the released evaluation, which divides N mean losses by N + 1.

        Args:
            value: the published value.
            batches: the number of batches N.
        """
        factor = (batches + 1) / batches
        return value**factor if self.is_ppl else value * factor


@dataclass(frozen=True)
class Published:
    """The paper's figure of a row."""

    value: float | None
    unbiased: float | None
    """The value without the bias of the released evaluation; None if the bias is not known."""
    difference: float | None
    """Difference to the baseline without that bias, in the metric's unit."""
    printed_difference: float | None
    """Difference of the values as printed."""
    trained: bool


@dataclass(frozen=True)
class Experiment:
    """One column of a table, or the runs of a figure, at one scale."""

    name: str
    scale: str
    target: str
    """Table or figure, such as "Table 1"."""
    column: str
    """Heading of the column, such as "130M"."""
    size: int
    """Parameters at scale=paper; orders the columns."""
    setting: str
    """Shape, data and length at this scale."""
    paper: Mapping[str, Any]
    """The `paper:` block of the experiment's file."""
    rows: tuple[ReportRow, ...]
    axes: Mapping[str, float] = field(default_factory=dict)
    """Settings that an experiment may vary (`paper.axis`), by name."""

    @property
    def axis(self) -> str | None:
        """The setting that this family of experiments varies, a key of `axes`."""
        return self.paper.get("axis")

    @property
    def beyond_paper(self) -> bool:
        """Whether the paper has no such experiment; one without a `source` is the user's own."""
        return str(self.paper.get("source", "not in the paper")).startswith("not in the paper")

    @property
    def metrics(self) -> list[Metric]:
        """Metrics with published figures, and the experiment's own `metric` if runs have it and it is compared here.

        `val_loss` if there is neither.
        """
        names = dict.fromkeys(name for row in self.rows for name in row.published)
        own = self.paper.get("metric", "" if names else "val_loss")
        has_own = any(own in run.record for row in self.rows for run in row.runs)
        if has_own and (names or self.axis or self.beyond_paper):
            names[own] = None
        return [Metric(name) for name in names]

    @property
    def baseline_index(self) -> int:
        """Index of the row that the others are compared with."""
        return next((index for index, row in enumerate(self.rows) if row.name == BASELINE), 0)

    @property
    def heading(self) -> str:
        return self.column or self.name

    @property
    def has_runs(self) -> bool:
        return any(row.runs for row in self.rows)

    def published(self, metric: Metric) -> list[Published]:
        """The paper's figures of all rows; differences are without the bias of the released evaluation.

        An accuracy of ours that the paper does not have is compared with the paper's average.
        """
        entries, usual = self.paper.get("rows", {}), self.paper.get("evaluation_batches")
        counts = [
            entries.get(row.name, {}).get("evaluation_batches", usual) if metric.lower_is_better else None
            for row in self.rows
        ]
        is_ours = metric.name == "accuracy" and not any(metric.name in row.published for row in self.rows)
        values = [row.published.get("average" if is_ours else metric.name) for row in self.rows]
        unbiased = [
            metric.unbiased(value, count) if value and count else None
            for value, count in zip(values, counts, strict=True)
        ]
        best = [corrected or value for value, corrected in zip(values, unbiased, strict=True)]
        lowest = min((value for value in best if value is not None), default=None)

        def to_baseline(values: Sequence[float | None]) -> list[float | None]:
            base = values[self.baseline_index]
            pairs = [None if value is None or base is None else (value, base) for value in values]
            pairs[self.baseline_index] = None
            return [pair and metric.difference(*pair) for pair in pairs]

        def trained(value: float | None) -> bool:
            if value is None or lowest is None or not metric.lower_is_better:
                return True
            return metric.difference(value, lowest) <= UNTRAINED_GAP

        columns = values, unbiased, to_baseline(best), to_baseline(values), map(trained, best)
        return [Published(*figures) for figures in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """A row compared with the baseline in one metric."""

    row: ReportRow
    metric: Metric
    sample: Sample | None
    """Our values over seeds; None if the row was not run."""
    untrained: int
    """Number of runs in `sample` that did not train."""
    difference: Difference | None
    """Difference to the baseline; None for the baseline, if the two share no seed, and if a run of either diverged: the
    seeds that are left would flatter it."""
    early: Difference | None
    """The difference on the first three seeds alone; None if it has no others."""
    unpaired: tuple[int, ...]
    """Seeds that only one of row and baseline was run with; the difference leaves them out."""
    published: tuple[Published, ...]
    """Published figures, one for each experiment of the column."""
    key: tuple[str, ...]
    """Identifies the runs and the metric: comparisons with the same key are one statistical test."""

    @property
    def failures(self) -> list[str]:
        """Reasons of runs that diverged."""
        return [run.failure for run in self.row.runs if run.failure]

    @property
    def caveat(self) -> str:
        """Whether runs did not train or diverged, in words; empty if none did."""
        diverged = f"{len(self.failures)} of {len(self.row.runs)} diverged" if self.failures else ""
        return ", ".join(filter(None, ["did not train here" if self.untrained else "", diverged]))

    @property
    def absence(self) -> str:
        """Why there is no difference, in a word or two."""
        return "failed" if self.failures else "not compared" if self.row.runs else "not run"

    def direction(self, published: Published) -> str | None:
        """One of the directions in `statistics`; None if there is nothing to compare."""
        if self.difference is None or published.difference is None:
            return None
        if published.trained == bool(self.untrained):
            return UNLIKE
        if self.metric.lower_is_better and abs(published.difference) < PUBLISHED_NOISE:
            return UNCLEAR
        return self.difference.direction(published.difference)


@dataclass(frozen=True)
class Column:
    """Experiments of one target whose rows have the same runs at a scale."""

    experiments: tuple[Experiment, ...]

    @property
    def first(self) -> Experiment:
        return self.experiments[0]

    @cached_property
    def rows(self) -> tuple[ReportRow, ...]:
        """Rows of the first experiment, with the labels of all experiments."""
        rows = []
        for same_runs in zip(*(experiment.rows for experiment in self.experiments), strict=True):
            label = ", ".join(dict.fromkeys(row.label for row in same_runs))
            entry = self.first.paper.get("rows", {}).get(same_runs[0].name, {})
            if "subject" in entry and self.first.scale != "paper":
                label = f"stand-in for {label}"
            rows.append(replace(same_runs[0], label=label))
        return tuple(rows)

    @cached_property
    def baseline(self) -> ReportRow:
        return self.rows[self.first.baseline_index]

    @property
    def heading(self) -> str:
        return ", ".join(experiment.heading for experiment in self.experiments)

    @property
    def metrics(self) -> list[Metric]:
        return list(dict.fromkeys(metric for experiment in self.experiments for metric in experiment.metrics))

    @property
    def headline(self) -> Metric | None:
        """The metric that the experiment's file names, else the average, else the last."""
        by_name = {metric.name: metric for metric in self.metrics}
        last = (self.metrics or [None])[-1]
        return by_name.get(self.first.paper.get("metric", "")) or by_name.get("average", last)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Metric by metric, every row in the paper's order."""
        return [comparison for metric in self.metrics for comparison in self.compare(metric)]

    def compare(self, metric: Metric | None) -> list[Comparison]:
        """Compare every row with the baseline in a metric; empty without a metric."""
        if metric is None:
            return []
        base_seeds = {run.seed for run in self.baseline.runs}
        published = zip(*(experiment.published(metric) for experiment in self.experiments), strict=True)
        comparisons = []
        for row, figures in zip(self.rows, published, strict=True):
            values, seeds = metric.by_seed(row), {run.seed for run in row.runs}
            diverged = any(run.failure for run in (*row.runs, *self.baseline.runs))
            difference, early, common = None, None, metric.common_seeds(row, self.baseline)
            if row is not self.baseline and not diverged:
                difference = metric.paired_difference(row, self.baseline)
                early = metric.paired_difference(row, self.baseline, common[:MIN_SEEDS])
            untrained = [run for run in row.runs if run.seed in values and metric.lower_is_better and stuck(run.record)]
            comparisons.append(
                Comparison(
                    row=row,
                    metric=metric,
                    sample=Sample.of(list(values.values())) if values else None,
                    untrained=len(untrained),
                    difference=difference,
                    early=early if len(common) > MIN_SEEDS else None,
                    unpaired=tuple(sorted(seeds ^ base_seeds)) if seeds and base_seeds else (),
                    published=figures,
                    key=(row.run_id, self.baseline.run_id, metric.name),
                )
            )
        return comparisons


def stuck(record: Mapping[str, Any]) -> bool:
    """Whether the loss is not finite at the end, or hardly fell in the second half of the run."""
    if not math.isfinite(record["val_loss"]):
        return True
    validations = record.get("history", {}).get("val", {"step": []})
    if len(validations["step"]) < 2:
        return False
    losses = np.array(validations["val_loss"], dtype=float)  # None stands for infinity
    return bool(losses[nearest_step(validations["step"], 0.5)] - losses[-1] < STUCK_DECREASE)


def nearest_step(steps: Sequence[int], fraction: float) -> int:
    """Index of the recorded step that is nearest to a fraction of the run."""
    return min(range(len(steps)), key=lambda index: abs(steps[index] - fraction * steps[-1]))


# Groups of experiments -----------------------------------------------------------------------------------------------

Targets = Mapping[str, Mapping[str, Sequence[Experiment]]]
"""Experiments by target and scale."""


def group_columns(experiments: Iterable[Experiment]) -> list[Column]:
    """The columns of one target and scale, by size; experiments that share all runs are one column."""
    by_runs = grouped((tuple((row.name, row.run_id) for row in e.rows), e) for e in experiments)
    return [Column(tuple(group)) for group in by_runs.values()]


def by_target(experiments: Iterable[Experiment]) -> Targets:
    """Experiments by target and scale: tables, figures, then the rest; each by the varied setting and by size."""

    def key(e: Experiment) -> tuple[Any, ...]:
        return (*target_order(e.target), SCALES.index(e.scale), e.axes.get(e.axis or "", 0), e.size, e.name)

    targets = grouped((e.target, e) for e in sorted(experiments, key=key))
    return {target: grouped((e.scale, e) for e in group) for target, group in targets.items()}


def target_order(target: str) -> tuple[int, int, str]:
    """Sorts "Table 2" before "Table 10" before "Figure 1" before anything else."""
    kind, _, number = target.partition(" ")
    if kind in ("Table", "Figure") and number.isdecimal():
        return (("Table", "Figure").index(kind), int(number), target)
    return (2, 0, target)
