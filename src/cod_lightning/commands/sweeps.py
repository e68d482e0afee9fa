"""The table at the end of a sweep: its configurations over their seeds, then its runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from cod_lightning.commands.terminal import Record, format_duration, is_finite
from cod_lightning.config.schema import METRIC_FORMATS, printed_metrics
from cod_lightning.paper.statistics import Difference, Sample, grouped

BARS = "▁▂▃▄▅▆▇█"
MAX_BARS = 12
"""Layers drawn in a line of bars; those of a deeper model are evenly spaced."""


@dataclass(frozen=True)
class Line:
    """A line of the table: the runs of one configuration, or one run."""

    label: str
    records: list[Record]
    """The runs that finished."""
    failed: int

    @property
    def loss(self) -> float:
        """Mean validation loss; infinite if no run finished."""
        return fmean(record["val_loss"] for record in self.records) if self.records else float("inf")

    @property
    def metrics(self) -> set[str]:
        """The metrics that are shown of some run."""
        return {name for r in self.records for name in printed_metrics(r, r["config"]["protocol"])}

    @property
    def variance(self) -> list[float | None]:
        """Variance after each layer, a mean over the runs; None if it is not finite."""
        series = [r["history"]["layers"]["variance"][-1] for r in self.records if "layers" in r["history"]]
        return [fmean(values) if all(map(is_finite, values)) else None for values in zip(*series, strict=True)]

    def mean(self, name: str) -> str:
        """Mean ± standard deviation of a metric."""
        values = [record[name] for record in self.records if name in record]
        return Sample.of(values).format(METRIC_FORMATS[name], METRIC_FORMATS[name]) if values else ""

    def above(self, best: Line) -> str:
        """How much the loss is above that of the best line: over the seeds of both, ± half of its 95 % interval."""
        ours, theirs = ({r["seed"]: r["val_loss"] for r in line.records} for line in (self, best))
        pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        difference = Difference.of(pairs) if pairs else Difference(1, self.loss - best.loss, None)
        return difference.format("+.4f", ".4f")

    def cells(self, names: Sequence[str], above: str, top: float) -> list[str]:
        """The cells of the line after its label."""
        if not self.records:
            return ["failed"]
        first, *others = [self.mean(name) for name in names]
        if self.failed:
            first += f" ({self.failed} failed)"
        last = "not measured"
        if self.variance:
            last = "not finite" if self.variance[-1] is None else f"{self.variance[-1]:.4g}"
        seconds = format_duration(fmean(record["wall_seconds"] for record in self.records))
        return [first, above, *others, last, bars(self.variance, top), seconds]


def sweep_table(runs: Sequence[tuple[str, Record | None]]) -> Table:
    """The configurations of a sweep by validation loss, then its runs if seeds vary; failed runs last.

    Args:
        runs: the label of each run, such as "norm=lns seed=1", and its record, None for a failed run.
    """
    groups = grouped((without_seed(label), record) for label, record in runs)
    sections = [lines((label, [record]) for label, record in runs)]
    notes = []
    if len(groups) < len(runs):
        sections.insert(0, lines(groups.items()))
        notes = [
            "mean ± standard deviation over seeds",
            "above best: paired by seed, ± half of the 95 % interval from three seeds on",
        ]
    compared = sections[0]
    names = [name for name in METRIC_FORMATS if any(name in line.metrics for line in compared)]
    every = [value for section in sections for line in section for value in line.variance]
    top = max(filter(is_finite, every), default=0.0)

    table = Table(title="runs by validation loss", title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    for name in (*names[:1], "above best", *names[1:], "last-layer variance"):
        table.add_column(name, justify="right", no_wrap=name == "val_loss")
    table.add_column("by layer", no_wrap=True)
    table.add_column("wall time", justify="right")
    for section in sections:
        for line in section:
            above = line.above(compared[0]) if section is compared and line is not compared[0] else ""
            table.add_row(line.label, *line.cells(names, above, top))
        table.add_section()
    if top:
        notes.append(f"bars: variance after each layer, all lines from 0 to {top:.4g}")
    table.caption = "; ".join(notes)
    return table


def lines(groups: Iterable[tuple[str, list[Record | None]]]) -> list[Line]:
    """The lines of some groups of runs, by validation loss."""
    built = []
    for label, records in groups:
        finished = [record for record in records if record is not None]
        built.append(Line(label, finished, failed=len(records) - len(finished)))
    return sorted(built, key=lambda line: line.loss)


def without_seed(label: str) -> str:
    """The label of a run without its seed."""
    return " ".join(word for word in label.split() if not word.startswith("seed=")) or "all seeds"


def bars(values: Sequence[float | None], top: float) -> str:
    """One character a layer, whose height is in proportion to `top`; "!" is a value that is not finite."""
    count = min(len(values), MAX_BARS)
    drawn = [values[round(i * (len(values) - 1) / max(count - 1, 1))] for i in range(count)]
    return "".join(BARS[min(int(len(BARS) * x / top), len(BARS) - 1)] if is_finite(x) and top else "!" for x in drawn)
