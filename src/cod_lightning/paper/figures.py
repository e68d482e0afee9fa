"""Figures of losses: differences to the baseline, over a varied setting, and over model sizes (Figure 1).

Every figure is 900 pixels wide, and equal records give equal bytes. With several seeds, lines and maps are means, and
bands and bars one standard deviation, unless the figure says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from cod_lightning.paper.claims import Column, Comparison, Metric, ReportRow
from cod_lightning.plots import COLOURS, DEPTH_COLOURS, grid_figure, style

WIDTH = 7.5
"""Width of a figure in inches; 900 pixels."""


def figure_grid(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of the common width and its axes [rows, columns]."""
    return grid_figure(WIDTH, height, rows, columns, **options)


def row_colour(row: ReportRow, rows: Sequence[ReportRow]) -> str:
    """The colour of a row among those of a figure: LNS and the baseline have the same in every figure."""
    names = list(dict.fromkeys(("lns", "pre_ln", *(other.name for other in rows))))
    return COLOURS[names.index(row.name) % len(COLOURS)]


def seed_count(rows: Iterable[ReportRow]) -> str:
    """Number of seeds of the rows that were run, such as "3" or "1 to 3"."""
    counts = [len(row.runs) for row in rows if row.runs]
    low, high = min(counts, default=0), max(counts, default=0)
    return str(high) if low == high else f"{low} to {high}"


def panel_title(scale: str, column: Column) -> str:
    count = seed_count(column.rows)
    return f"ours, scale={scale}, {count} seed{'s' * (count != '1')}"


def mean_of(arrays: Iterable[Any]) -> np.ndarray:
    """Mean of nested lists of equal shape; None counts as NaN."""
    return np.mean([np.array(array, dtype=float) for array in arrays], axis=0)


def sd_of(arrays: Iterable[Any]) -> np.ndarray:
    """Standard deviation of nested lists of equal shape; zero for a single one."""
    stacked = [np.array(array, dtype=float) for array in arrays]
    return np.std(stacked, axis=0, ddof=1) if len(stacked) > 1 else np.zeros_like(stacked[0])


# Differences to the baseline -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A difference to the baseline."""

    value: float
    margin: float | None
    """Half the width of the interval."""
    trained: bool


def published_point(comparison: Comparison) -> Point | None:
    published = comparison.published[0]
    return None if published.difference is None else Point(published.difference, None, published.trained)


def our_point(comparison: Comparison) -> Point | None:
    ours = comparison.difference
    return None if ours is None else Point(ours.mean, ours.margin, not comparison.untrained)


ColumnPoints = list[tuple[str, list[Point | None]]]
"""Name of a column, and a point or None for each row."""


@style()
def difference_figure(scales: Mapping[str, Sequence[Column]]) -> Figure | None:
    """Differences to the baseline: the paper's in one panel, ours in one panel for each scale; None without any.

    Args:
        scales: columns of one target, those of scale=paper among them.
    """
    published = scales["paper"]
    metric = published[0].headline
    if metric is None:
        return None
    rows = [row for row in published[0].rows if row is not published[0].baseline]

    def series(columns: Sequence[Column], point: Callable[[Comparison], Point | None]) -> ColumnPoints:
        lines = []
        for column in columns:
            points = {c.row.name: point(c) for c in column.comparisons if c.metric == column.headline}
            lines.append((column.heading, [points.get(row.name) for row in rows]))
        return lines

    panels = [("published", series(published, published_point))]
    panels += [(panel_title(scale, columns[0]), series(columns, our_point)) for scale, columns in scales.items()]
    panels = [(title, lines) for title, lines in panels if any(point for _, points in lines for point in points)]
    drawn = [i for i in range(len(rows)) if any(points[i] for _, lines in panels for _, points in lines)]
    if not drawn:
        return None
    rows = [rows[i] for i in drawn]
    panels = [(title, [(name, [points[i] for i in drawn]) for name, points in lines]) for title, lines in panels]
    figure, axes = figure_grid(1.4 + (0.22 + 0.09 * len(published)) * len(rows), columns=len(panels), sharey=True)
    for panel, (title, lines) in zip(axes[0], panels, strict=True):
        forest(panel, lines, [row.label for row in rows], title)
    figure.supxlabel(
        f"difference to {published[0].baseline.label} in {metric.unit}, {'less' if metric.lower_is_better else 'more'} "
        "is better (bars: 95 % interval over seeds; triangles: did not train)",
        fontsize=9,
    )
    return figure


def forest(axes: Axes, series: ColumnPoints, labels: Sequence[str], title: str) -> None:
    """Points with intervals, one line for each label from top to bottom; triangles at the right edge did not train."""
    shades = matplotlib.colormaps[DEPTH_COLOURS]
    every_point = [point for _, points in series for point in points if point is not None]
    ends = [point.value + sign * (point.margin or 0) for point in every_point if point.trained for sign in (-1, 1)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.08 * (high - low) or 0.1
    edge = high + (room if all(point.trained for point in every_point) else 3.5 * room)
    for index, (name, points) in enumerate(series):
        colour = shades(0.85 * index / max(len(series) - 1, 1)) if len(series) > 1 else COLOURS[0]
        shift = 0.7 * ((index + 0.5) / len(series) - 0.5)
        for line, point in enumerate(points):
            if point is None:
                continue
            if point.trained:
                axes.errorbar(point.value, line + shift, xerr=point.margin, fmt="o", ms=5, color=colour, capsize=2)
            else:
                axes.plot(edge - 0.3 * room, line + shift, ">", ms=5, color=colour)
                place = (edge - 0.7 * room, line + shift)
                axes.text(*place, f"{point.value:+.1f}", va="center", ha="right", fontsize=8, color=colour)
        axes.plot([], [], "o", ms=5, color=colour, label=name)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlim=(low - room, edge), ylim=(len(labels) - 0.5, -0.5), title=title)
    axes.set_yticks(range(len(labels)), labels)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if len(series) > 1:
        axes.legend(ncols=min(len(series), 4), loc="upper center", bbox_to_anchor=(0.5, -0.12), handletextpad=0.1)


AXES = {
    "tokens": "training tokens",
    "blocks": "blocks",
    "lr": "peak learning rate",
    "embedding_std": "initial standard deviation of the embeddings",
}
"""Labels of the settings that an experiment may vary (`paper.axis`)."""


@style()
def along_axes(panels: Sequence[tuple[str, str, Sequence[Column]]], paper: Sequence[Column]) -> Figure | None:
    """Loss differences to the baseline over varied settings, with the paper's values as hollow marks.

    A panel needs two settings that were run; None without any panel.

    Args:
        panels: title, setting (a key of `AXES`) and columns of one scale each.
        paper: columns of scale=paper whose published differences are drawn at their own settings.
    """
    panels = [panel for panel in panels if sum(any(c.difference for c in x.comparisons) for x in panel[2]) > 1]
    if not panels:
        return None
    figure, axes = figure_grid(3.4, columns=len(panels))
    rows = list({row.name: row for _, _, columns in panels for column in columns for row in column.rows}.values())
    for panel, (title, axis, columns) in zip(axes[0], panels, strict=True):
        lines: dict[str, list[tuple[float, Point]]] = {}
        marks: dict[str, list[tuple[float, float]]] = {}
        for column in columns:
            for c in column.comparisons:
                if c.metric == column.headline and (point := our_point(c)) is not None:
                    lines.setdefault(c.row.name, []).append((column.first.axes[axis], point))
        for experiment in (e for column in paper for e in column.experiments):
            for c in Column((experiment,)).comparisons:
                if c.row.name in lines and (point := published_point(c)) is not None and point.trained:
                    marks.setdefault(c.row.name, []).append((experiment.axes[axis], point.value))
        for row in (row for row in rows if row.name in lines):
            colour, points = row_colour(row, rows), sorted(lines[row.name], key=lambda item: item[0])
            x, values = [place for place, _ in points], [point for _, point in points]
            bars = [point.margin or 0 for point in values]
            panel.errorbar(x, [point.value for point in values], bars, marker="o", ms=4, capsize=2, color=colour)
            panel.plot([], [], "o-", color=colour, label=row.label)
            for place, value in marks.get(row.name, ()):
                panel.plot(place, value, "D", ms=6, mfc="none", color=colour)
        panel.axhline(0, color="black", lw=0.8)
        panel.set(xscale="log", xlabel=AXES[axis], title=title)
        if axis == "blocks":
            ticks = sorted({column.first.axes[axis] for column in columns})
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
        if any(marks.values()):
            panel.plot([], [], "D", mfc="none", color="black", label="the paper, at its scale")
        panel.legend()
    axes[0][0].set_ylabel(f"loss less that of {panels[0][2][0].baseline.label}, nats")
    return figure


# Figure 1 ------------------------------------------------------------------------------------------------------------


def fit_sizes(sizes: Sequence[float], losses: Sequence[float]) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
    """Fit losses over model sizes; return the equation and the curve, None for a single size.

    Four points or more: L = a + b N^-c with a, b >= 0, by least squares over a grid of c. Fewer: a straight line over
    the logarithm of N.
    """
    n, loss = np.array(sizes, dtype=float), np.array(losses, dtype=float)
    if len(set(sizes)) < 2:
        return None
    if len(n) < 4:
        slope, start = np.polyfit(np.log10(n), loss, 1)
        return f"{start:.2f} {slope:+.3f} log10 N", lambda x: start + slope * np.log10(x)
    best = (math.inf, 0.0, 0.0, 0.0)
    for c in np.linspace(0.005, 1, 200):
        terms = (n / n[0]) ** -c
        b, a = np.polyfit(terms, loss, 1)
        if a < 0:
            a, b = 0.0, float(terms @ loss / (terms @ terms))
        error = float(((a + b * terms - loss) ** 2).sum())
        best = min(best, (error, float(a), float(b), float(c)))
    _, a, b, c = best
    scale = b * n[0] ** c
    return f"{a:.2f} + {scale:.3g} N^-{c:.3f}", lambda x: a + scale * x**-c


@style()
def loss_over_size(scales: Mapping[str, Sequence[Column]]) -> Figure:
    """Figure 1: loss over model size with a fit, published in one panel, ours in one for each scale."""
    metric = Metric("val_loss")
    rows = scales["paper"][0].rows
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}

    def add(title: str, row: ReportRow, size: float, loss: float, sd: float = 0.0) -> None:
        panels.setdefault(title, {}).setdefault(row.name, []).append((size, loss, sd))

    for column in scales["paper"]:
        for c in column.compare(metric):
            if (value := c.published[0].value) is not None:
                add("published", c.row, column.first.size, value)
    for scale, columns in scales.items():
        for column in columns:
            for c in column.compare(metric):
                if c.sample is not None:
                    size = c.row.runs[0].record["parameters"]
                    add(panel_title(scale, column), c.row, size, c.sample.mean, c.sample.sd or 0.0)
    figure, axes = figure_grid(3.6, columns=len(panels))
    for panel, (title, series) in zip(axes[0], panels.items(), strict=True):
        for row in (row for row in rows if row.name in series):
            size, loss, sd = zip(*sorted(series[row.name]), strict=True)
            colour, curve = row_colour(row, rows), fit_sizes(size, loss)
            label = row.label + (f": {curve[0]}" if curve else "")
            bars = sd if any(sd) else None
            panel.errorbar(size, loss, yerr=bars, fmt="o", ms=5, color=colour, capsize=2, label=label)
            if curve:
                x = np.geomspace(min(size), max(size), 100)
                panel.plot(x, curve[1](x), color=colour)
        panel.set(xscale="log", xlabel="parameters N", ylabel="loss, nats per token", title=title)
        ticks = sorted({size for points in series.values() for size, _, _ in points})
        panel.set_xticks(ticks, [f"{n / 1e9:.2g}B" if n >= 1e9 else f"{n / 1e6:.3g}M" for n in ticks])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.legend()
    return figure
