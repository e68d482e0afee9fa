"""Figures of losses: differences to the baseline, over a varied setting, and over model sizes (Figure 1).

Every figure is 900 pixels wide, and equal records give equal bytes. With several seeds, lines and maps are means, and
bands and bars one standard deviation, unless the figure says otherwise. Differences of fewer than three seeds are
crosses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from cod_lightning.paper.claims import UNTRAINED_GAP, Column, Metric, ReportRow
from cod_lightning.paper.statistics import FEW_SEEDS, MIN_SEEDS
from cod_lightning.paper.tuning import Tuned
from cod_lightning.plots import COLOURS, MARKERS, grid_figure, log_axis, strategy_colour, style

report_figure = partial(grid_figure, 7.5)
"""`report_figure(height, rows, columns)`: a figure 7.5 inches or 900 pixels wide, and its axes."""
SETTING_LABELS = {
    "tokens": "training tokens",
    "blocks": "blocks",
    "lr": "peak learning rate",
    "embedding_std": "initial standard deviation of the embeddings",
}
"""Labels of the settings that an experiment may vary (`paper.axis`)."""
MAX_LINES = 12
"""Rows that a figure over a setting can tell apart."""
MIN_TUNED = 3
"""Strategies that a figure of own best rates needs; fewer are read in the table."""

ROW_STRATEGIES = {"deep_norm": "deep_norm_released", "deep_norm_deepnet": "deep_norm", "language": "pre_ln"}
"""Strategies of rows that have another name."""


def row_colour(row: ReportRow) -> str:
    """The colour of the row's strategy; rows that are variants of LNS have that of LNS."""
    return strategy_colour(ROW_STRATEGIES.get(row.name, row.name)) or COLOURS[0]


def number_range(numbers: Sequence[int]) -> str:
    """The smallest and the largest of some numbers, such as "1 to 3", or "3" if they are equal."""
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(high) if low == high else f"{low} to {high}"


def panel_title(scale: str, column: Column) -> str:
    count = number_range([len(row.runs) for row in column.rows if row.runs])
    return f"ours, scale={scale},\n{count} seed{'s' * (count != '1')}"


# Differences to the baseline -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A difference to the baseline."""

    value: float
    margin: float | None
    """Half the width of the interval."""
    trained: bool
    few_seeds: bool = False


def our_points(column: Column) -> dict[str, Point]:
    """Our differences in the headline metric, by row."""
    compared = {c.row.name: (c, c.difference) for c in column.compare(column.headline)}
    return {name: Point(d.mean, d.margin, not c.untrained, d.n < MIN_SEEDS) for name, (c, d) in compared.items() if d}


def why_absent(column: Column) -> dict[str, str]:
    """Why a row has no difference of ours, by row."""
    return {c.row.name: c.caveat or c.absence for c in column.compare(column.headline)}


def published_points(column: Column) -> dict[str, Point]:
    """The first experiment's published differences in the headline metric, by row."""
    figures = {c.row.name: c.published[0] for c in column.compare(column.headline)}
    return {name: Point(p.difference, None, p.trained) for name, p in figures.items() if p.difference is not None}


@style()
def difference_figure(scales: Mapping[str, Sequence[Column]]) -> Figure | None:
    """Differences to the baseline: the paper's in one panel, ours in one panel for each scale; None without any.

    Args:
        scales: columns of one target, those of scale=paper among them.
    """
    paper = scales["paper"]
    panels = {"the paper": {column.heading: published_points(column) for column in paper}}
    absent: dict[str, dict[str, str]] = {}
    for scale, columns in scales.items():
        title = panel_title(scale, columns[0])
        panels[title] = {column.heading: our_points(column) for column in columns}
        absent[title] = why_absent(columns[0])
    panels = {title: series for title, series in panels.items() if any(series.values())}
    names = {name for series in panels.values() for points in series.values() for name in points}
    rows = [row for row in paper[0].rows if row.name in names]
    metric = paper[0].headline
    if metric is None or not rows:
        return None
    figure, axes = report_figure(1.4 + (0.22 + 0.09 * len(paper)) * len(rows), columns=len(panels), sharey=True)
    for panel, (title, series) in zip(axes[0], panels.items(), strict=True):
        forest(panel, series, rows, absent.get(title, {}))
        panel.set_title(title)
        panel.xaxis.set_major_locator(MaxNLocator(9 // len(panels)))
    figure.supxlabel(
        f"difference to {paper[0].baseline.label} ({metric.unit}), {'less' if metric.lower_is_better else 'more'} "
        f"is better\n{forest_note(list(panels.values()), 'did not train')}",
        fontsize=9,
    )
    if len(paper) > 1:
        marks = [Line2D([], [], marker=mark, color="black", ls="", ms=5) for mark in MARKERS[: len(paper)]]
        labels = [column.heading for column in paper]
        options = {"title": "columns of the paper", "title_fontsize": 8, "alignment": "left"}
        figure.legend(marks, labels, loc="outside upper left", ncols=len(paper), handletextpad=0.1, **options)
    return figure


Series = Mapping[str, Mapping[str, Point]]
"""Points by heading of a column and name of a row."""


def forest(axes: Axes, series: Series, rows: Sequence[ReportRow], absent: Mapping[str, str]) -> None:
    """Points with intervals, a line for each row from top to bottom, in its colour; marks are those of the columns.

    Rows that did not train have hollow marks at the right edge, with their value.

    Args:
        axes: to draw on.
        series: points.
        rows: rows of the axes.
        absent: why a row has no point, by row.
    """
    points = [point for by_row in series.values() for point in by_row.values()]
    ends = [point.value + sign * (point.margin or 0) for point in points if point.trained for sign in (-1, 1)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.08 * (high - low) or 0.1
    edge = high + (room if all(point.trained for point in points) else 6 * room)
    for (index, by_row), (line, row) in product(enumerate(series.values()), enumerate(rows)):
        if (point := by_row.get(row.name)) is None:
            continue
        y = line + 0.7 * ((index + 0.5) / len(series) - 0.5)
        mark = "x" if point.few_seeds else MARKERS[index % len(MARKERS)]
        options: dict[str, Any] = {"fmt": mark, "ms": 5, "capsize": 2}
        if point.trained:
            axes.errorbar(point.value, y, xerr=point.margin, color=row_colour(row), **options)
        else:
            axes.errorbar(edge - room, y, mfc="white", color=row_colour(row), **options)
            text: dict[str, Any] = {"xytext": (-6, 0), "textcoords": "offset points", "va": "center", "ha": "right"}
            axes.annotate(f"{point.value:+.1f}", (edge - room, y), fontsize=8, **text)
    for line, row in enumerate(rows):
        if not any(row.name in by_row for by_row in series.values()):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            options = {"transform": axes.get_yaxis_transform(), "va": "center", "color": "#666666", "fontsize": 8}
            axes.text(0.03, line, absent.get(row.name, "not in the paper"), bbox=box, **options)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlim=(low - room, edge), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [fill(row.label, 20) for row in rows])


def forest_note(panels: Sequence[Series], beyond: str) -> str:
    """Explain the marks that are drawn.

    Args:
        panels: points of every panel.
        beyond: about rows whose mark is at the right edge.
    """
    points = [point for series in panels for by_row in series.values() for point in by_row.values()]
    notes = {
        "bars: 95 % interval over seeds": any(point.margin for point in points),
        f"x: {FEW_SEEDS}": any(point.few_seeds for point in points),
        f"hollow at the right edge: {beyond}": not all(point.trained for point in points),
        "horizontal axes differ": len(panels) > 1,
    }
    return f"({'; '.join(note for note, drawn in notes.items() if drawn)})" if any(notes.values()) else ""


def only_trained(points: Mapping[str, Point]) -> dict[str, Point]:
    return {name: point for name, point in points.items() if point.trained}


@style()
def differences_over_settings(
    panels: Sequence[tuple[str, str, Sequence[Column]]], paper: Sequence[Column]
) -> Figure | None:
    """Loss differences to the baseline over varied settings, with the paper's values as hollow marks.

    A panel needs two settings that were run, a row two of one panel; None without any panel, or with more than
    `MAX_LINES` rows. Rows that did not train are left out. A row has a line from three settings on.

    Args:
        panels: title, setting (a key of `SETTING_LABELS`) and columns of one scale each, in the order of the setting.
        paper: columns of scale=paper whose published differences are drawn at their own settings.
    """
    panels = [panel for panel in panels if sum(bool(only_trained(our_points(column))) for column in panel[2]) > 1]
    if not panels:
        return None
    published = [Column((experiment,)) for column in paper for experiment in column.experiments]
    settings_run = [Counter(name for c in columns for name in only_trained(our_points(c))) for _, _, columns in panels]
    several = {name for counts in settings_run for name, count in counts.items() if count > 1}
    rows = {row.name: row for _, _, columns in panels for c in columns for row in c.rows if row.name in several}
    if len(rows) > MAX_LINES:
        return None
    lines, across = math.ceil(len(panels) / 2), min(len(panels), 2)
    figure, axes = report_figure(0.5 + 2.9 * lines, lines, across)
    legend: dict[str, Line2D] = {}
    notes: dict[str, Line2D] = {}
    for panel, (title, axis, columns) in zip(axes.flat, panels, strict=False):
        ours = [
            (column.first.axes[axis], {name: p for name, p in only_trained(our_points(column)).items() if name in rows})
            for column in columns
        ]
        marks = [(column.first.axes[axis], only_trained(published_points(column))) for column in published]
        settings = [x for x, points in (*ours, *marks) if points]
        aside = (max(settings) / min(settings)) ** 0.005  # rows beside each other, so that their bars can be told apart
        for row in rows.values():
            colour, line = row_colour(row), []
            for x, points in ours:
                if point := points.get(row.name):
                    place = x * aside ** (list(points).index(row.name) - (len(points) - 1) / 2)
                    options = {"fmt": "x" if point.few_seeds else "o", "ms": 4.5, "capsize": 2, "elinewidth": 1}
                    panel.errorbar(place, point.value, point.margin, color=colour, **options)
                    line += [] if point.few_seeds else [(place, point.value)]
                    legend[row.label] = Line2D([], [], color=colour, lw=3)
                    if point.few_seeds:
                        notes[FEW_SEEDS] = Line2D([], [], marker="x", ms=4.5, ls="", color="black")
            if len(line) > 2:  # a line through two points would suggest a trend
                panel.plot(*zip(*line, strict=True), color=colour)
            for x, points in marks:
                if row.name in points and any(row.name in drawn for _, drawn in ours):
                    panel.plot(x, points[row.name].value, "D", ms=6, mfc="none", color=colour)
                    notes["the paper, where it trained, at its widths and tokens"] = Line2D(
                        [], [], marker="D", ls="", mfc="none", color="black"
                    )
        panel.axhline(0, color="black", lw=0.8)
        panel.set(xlabel=SETTING_LABELS[axis], title=title)
        log_axis(panel.xaxis)
        if axis == "tokens":
            panel.xaxis.set_major_formatter(lambda x, _: short_number(x))
        else:
            label_ticks(panel, [x for x, points in ours if points])
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for panel in axes[:, 0]:
        panel.set_ylabel(f"loss minus that of {panels[0][2][0].baseline.label} (nats)\nbars: 95 % interval")
    legend |= notes
    figure.legend(list(legend.values()), list(legend), loc="outside upper left", ncols=4)
    return figure


@style()
def tuned_figure(scales: Mapping[str, Sequence[Tuned]]) -> Figure | None:
    """Differences of every strategy to the baseline, each at its own best learning rate, the best on top.

    None if no scale has `MIN_TUNED` differences.

    Args:
        scales: rows by scale; those without a difference are left out.
    """
    panels = {scale: [best for best in tuned if best.difference] for scale, tuned in scales.items()}
    panels = {scale: tuned for scale, tuned in panels.items() if len(tuned) >= MIN_TUNED}
    if not panels:
        return None
    figure, axes = report_figure(1.2 + 0.27 * max(map(len, panels.values())), columns=len(panels))
    drawn: list[Series] = []
    for panel, (scale, tuned) in zip(axes[0], panels.items(), strict=True):
        differences = [(best.row.name, best.difference) for best in tuned if best.difference]
        points = {name: Point(d.mean, d.margin, d.mean <= UNTRAINED_GAP, d.n < MIN_SEEDS) for name, d in differences}
        drawn.append({"": points})
        forest(panel, drawn[-1], [best.row for best in tuned], {})
        panel.set_title(f"scale={scale}")
    label = "loss minus that of the baseline, each at its own best learning rate (nats)"
    figure.supxlabel(f"{label}\n{forest_note(drawn, 'far behind')}", fontsize=9)
    return figure


def label_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label a logarithmic x axis at these values only."""
    axes.set_xticks(list(values), [short_number(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())


def short_number(value: float) -> str:
    """Such as 1.3B, 134M, 0.5M or 0.02."""
    if value >= 999.5e6:
        return f"{float(f'{value / 1e9:.2g}'):,g}B"
    return f"{value / 1e6:.3g}M" if value >= 1e5 else f"{float(f'{value:.3g}'):,g}"


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

    def fit(c: float) -> tuple[float, float, float, float]:
        terms = (n / n[0]) ** -c
        b, a = np.polyfit(terms, loss, 1)
        if a < 0:
            a, b = 0.0, float(terms @ loss / (terms @ terms))
        if b < 0:
            a, b = float(loss.mean()), 0.0
        return float(((a + b * terms - loss) ** 2).sum()), float(a), float(b), float(c)

    _, a, b, c = min(map(fit, np.linspace(0.005, 1, 200)))
    scale = b * n[0] ** c
    return f"{a:.2f} + {scale:.3g} N^-{c:.3f}", lambda x: a + scale * x**-c


@style()
def loss_over_size(scales: Mapping[str, Sequence[Column]]) -> Figure:
    """Figure 1: loss over model size with a fit, published in one panel, ours in one for each scale."""
    metric = Metric("val_loss")
    panels: dict[str, dict[str, list[tuple[float, float, float]]]] = {}

    def add(title: str, row: ReportRow, size: float, loss: float, sd: float | None = None) -> None:
        panels.setdefault(title, {}).setdefault(row.name, []).append((size, loss, sd or 0.0))

    for scale, columns in scales.items():
        for column in columns:
            for c in column.compare(metric):
                if scale == "paper" and (value := c.published[0].value) is not None:
                    add("the paper", c.row, column.first.size, value)
                if c.sample is not None:
                    size = next(run.record["parameters"] for run in c.row.runs if not run.failure)
                    add(panel_title(scale, column), c.row, size, c.sample.mean, c.sample.sd)
    rows = scales["paper"][0].rows
    figure, axes = report_figure(3.6, columns=len(panels))
    for panel, (title, series) in zip(axes[0], panels.items(), strict=True):
        for row in (row for row in rows if row.name in series):
            size, loss, sd = zip(*sorted(series[row.name]), strict=True)
            colour, fit = row_colour(row), fit_sizes(size, loss)
            label = row.label + (f": {fit[0]}" if fit else "")
            panel.errorbar(size, loss, sd if any(sd) else None, fmt="o", ms=5, color=colour, capsize=2, label=label)
            if fit:
                x = np.geomspace(min(size), max(size), 100)
                panel.plot(x, fit[1](x), color=colour)
        panel.set(xlabel="parameters N", ylabel="loss (nats per token)", title=title)
        log_axis(panel.xaxis)
        label_ticks(panel, sorted({size for points in series.values() for size, _, _ in points}))
        panel.legend()
    return figure
