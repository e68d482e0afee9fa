"""The paper's figures, drawn from run records and from what was measured of the runs, and one for each of its tables.

Every figure is 900 pixels wide, and the same bytes for the same records. Where there are several seeds, lines and maps
are means over them, and bands and bars one standard deviation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

from cod_lightning.paper.claims import Column, Line, Metric, Row, seed_counts

WIDTH, DPI = 7.5, 120
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}
COLOURS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d6a9f", "#a0a0a0", "#7a4419")
"""Of rows, the baseline second."""
LAYERS = "viridis"
"""Colour map over depth."""


styled = rc_context(STYLE)
"""Decorates what draws; the defaults of whoever imports this stay as they are."""


@styled
def png(figure: Figure) -> bytes:
    """The figure as a file, which says nothing of when and by what it was made."""
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png", metadata={"Software": None})
    return file.getvalue()


def blank(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure of the common width and its axes [rows, columns]."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def colour(row: Row, rows: Sequence[Row]) -> str:
    """Of a row among those of a figure: LNS and the baseline keep theirs."""
    names = [name for name in dict.fromkeys(("lns", "pre_ln", *(other.name for other in rows)))]
    return COLOURS[names.index(row.name) % len(COLOURS)]


def seeds_of(column: Column) -> str:
    counts = seed_counts(column.rows)
    return f"{counts} seed{'s' * (counts != '1')}"


def mean_of(arrays: Iterable[Any]) -> np.ndarray:
    """Of equally long nested lists, in which None is no number."""
    return np.mean([np.array(array, dtype=float) for array in arrays], axis=0)


def sd_of(arrays: Iterable[Any]) -> np.ndarray:
    """Likewise; zero for a single one."""
    found = [np.array(array, dtype=float) for array in arrays]
    return np.std(found, axis=0, ddof=1) if len(found) > 1 else np.zeros_like(found[0])


# Tables --------------------------------------------------------------------------------------------------------------


def headline(column: Column) -> Metric | None:
    """What a table's figure shows: the metric that its file names, the average, or the last one that is printed."""
    named = (column.experiments[0].paper.get("metric"), "average")
    return next((metric for metric in column.metrics if metric.name in named), (column.metrics or [None])[-1])


@dataclass(frozen=True)
class Point:
    """A difference to the baseline."""

    value: float
    margin: float | None
    """Half of its interval."""
    trained: bool


@styled
def differences(scales: Mapping[str, Sequence[Column]]) -> Figure | None:
    """Differences to the baseline: the paper's in one panel, ours in one panel for each scale; None without any.

    Args:
        scales: columns of one target, those of the paper's scale among them.
    """
    published = scales["paper"]
    metric = headline(published[0])
    rows = [row for row in published[0].rows if row is not published[0].baseline]
    if metric is None or not rows:
        return None

    def series(group: Sequence[Column], point: Callable[[Line], Point | None]) -> list[tuple[str, list[Point | None]]]:
        lines = [(c.heading, {line.row.name: line for line in c.lines if line.metric == headline(c)}) for c in group]
        return [(name, [point(found[r.name]) if r.name in found else None for r in rows]) for name, found in lines]

    panels = [("published", series(published, printed))]
    for scale, group in scales.items():
        found = series(group, ours)
        if any(point for _, points in found for point in points):
            panels.append((f"ours, scale={scale}, {seeds_of(group[0])}", found))
    figure, axes = blank(1.4 + (0.22 + 0.09 * len(published)) * len(rows), columns=len(panels), sharey=True)
    for place, (title, found) in zip(axes[0], panels, strict=True):
        forest(place, found, [row.label for row in rows], title)
    figure.supxlabel(
        f"difference to {published[0].baseline.label} in {metric.unit}, {'less' if metric.lower else 'more'} is better"
        " (bars: 95 % interval over seeds; triangles: did not train)",
        fontsize=9,
    )
    return figure


def forest(axes: Axes, series: Sequence[tuple[str, Sequence[Point | None]]], labels: Sequence[str], title: str) -> None:
    """Points with intervals, one line for each label from top to bottom; what did not train stands at the right edge.

    Args:
        axes: to draw in.
        series: names, and a point or None for each label.
        labels: of the lines.
        title: of the panel.
    """
    shades = matplotlib.colormaps[LAYERS]
    points = [point for _, found in series for point in found if point is not None]
    ends = [point.value + sign * (point.margin or 0) for point in points if point.trained for sign in (-1, 1)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    room = 0.08 * (high - low) or 0.1
    edge = high + (room if all(point.trained for point in points) else 3.5 * room)
    for index, (name, found) in enumerate(series):
        tint = shades(0.85 * index / max(len(series) - 1, 1)) if len(series) > 1 else COLOURS[0]
        shift = 0.7 * ((index + 0.5) / len(series) - 0.5)
        for line, point in enumerate(found):
            if point is None:
                continue
            if point.trained:
                axes.errorbar(point.value, line + shift, xerr=point.margin, fmt="o", ms=5, color=tint, capsize=2)
            else:
                axes.plot(edge - 0.3 * room, line + shift, ">", ms=5, color=tint)
                place = (edge - 0.7 * room, line + shift)
                axes.text(*place, f"{point.value:+.1f}", va="center", ha="right", fontsize=8, color=tint)
        axes.plot([], [], "o", ms=5, color=tint, label=name)
    axes.axvline(0, color="black", lw=0.8)
    axes.set(xlim=(low - room, edge), ylim=(len(labels) - 0.5, -0.5), title=title)
    axes.set_yticks(range(len(labels)), labels)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if len(series) > 1:
        axes.legend(ncols=min(len(series), 4), loc="upper center", bbox_to_anchor=(0.5, -0.12), handletextpad=0.1)


def printed(line: Line) -> Point | None:
    claim = line.claims[0]
    return None if claim.difference is None else Point(claim.difference, None, claim.trained)


def ours(line: Line) -> Point | None:
    found = line.difference
    return None if found is None else Point(found.mean, found.margin, not line.untrained)


# Figure 1 ------------------------------------------------------------------------------------------------------------


def fit_sizes(sizes: Sequence[float], losses: Sequence[float]) -> tuple[str, Callable[[np.ndarray], np.ndarray]] | None:
    """A curve through losses over sizes, and its equation; None for a single size.

    From four points on L = a + b N^-c with a, b >= 0, by least squares over a grid of c; below that, a straight line
    over the logarithm of N, or what passes through two points.
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
        missed = float(((a + b * terms - loss) ** 2).sum())
        best = min(best, (missed, float(a), float(b), float(c)))
    _, a, b, c = best
    scale = b * n[0] ** c
    return f"{a:.2f} + {scale:.3g} N^-{c:.3f}", lambda x: a + scale * x**-c


@styled
def sizes(scales: Mapping[str, Sequence[Column]]) -> Figure:
    """Figure 1: loss over size with a fit, published in one panel, ours in one for each scale."""
    metric = Metric("val_loss")
    rows = scales["paper"][0].rows
    panels: dict[str, dict[str, list[tuple[float, float, float | None]]]] = {"published": {}}
    for column in scales["paper"]:
        for line in column.lines_of(metric):
            if line.claims[0].value is not None:
                size = column.experiments[0].size
                panels["published"].setdefault(line.row.name, []).append((size, line.claims[0].value, None))
    for scale, group in scales.items():
        for column in group:
            for line in column.lines_of(metric):
                if line.sample is not None:
                    size = line.row.runs[0].record["parameters"]
                    points = panels.setdefault(f"ours, scale={scale}, {seeds_of(column)}", {})
                    points.setdefault(line.row.name, []).append((size, line.sample.mean, line.sample.sd))
    panels = {title: points for title, points in panels.items() if points}
    figure, axes = blank(3.6, columns=len(panels))
    for place, (title, found) in zip(axes[0], panels.items(), strict=True):
        for row in rows:
            points = sorted(found.get(row.name, []))
            if not points:
                continue
            size, loss, sd = zip(*points, strict=True)
            tint = colour(row, rows)
            curve = fit_sizes(size, loss)
            label = row.label + (f": {curve[0]}" if curve else "")
            bars = [s or 0 for s in sd] if any(sd) else None
            place.errorbar(size, loss, yerr=bars, fmt="o", ms=5, color=tint, capsize=2, label=label)
            if curve:
                along = np.geomspace(min(size), max(size), 100)
                place.plot(along, curve[1](along), color=tint)
        place.set(xscale="log", xlabel="parameters N", ylabel="loss, nats per token", title=title)
        ticks = sorted({size for points in found.values() for size, _, _ in points})
        place.set_xticks(ticks, [f"{n / 1e9:.2g}B" if n >= 1e9 else f"{n / 1e6:.3g}M" for n in ticks])
        place.xaxis.set_minor_locator(NullLocator())
        place.legend()
    return figure


# Layers --------------------------------------------------------------------------------------------------------------


def measured(row: Row, name: str) -> list[Mapping[str, Any]]:
    """What was measured of each of a row's runs."""
    return [run.measures[name] for run in row.runs if name in run.measures]


@styled
def layers(column: Column) -> Figure | None:
    """Figures 2, 3, 7 and 10: angular distances between layers, and the rise of the loss without each block."""
    rows = [row for row in column.rows if measured(row, "angular") or measured(row, "removal")]
    if not rows:
        return None
    maps = {
        row.name: mean_of(found["distances"] for found in measured(row, "angular"))
        for row in rows
        if measured(row, "angular")
    }
    rises = {
        row.name: [[loss - found["loss"] for loss in found["losses"]] for found in measured(row, "removal")]
        for row in rows
        if measured(row, "removal")
    }
    parts = [part for part in (maps, rises) if part]
    figure, axes = blank(0.4 + 2.6 * len(parts), rows=len(parts), columns=len(rows), sharey="row")
    if maps:
        top = max(float(np.nanmax(values)) for values in maps.values())
        for index, row in enumerate(rows):
            place = axes[0][index]
            if row.name in maps:
                depth = len(maps[row.name])
                image = place.imshow(
                    maps[row.name],
                    aspect="auto",
                    origin="lower",
                    interpolation="nearest",
                    extent=(0.5, depth + 0.5, 0.5, depth + 0.5),
                    vmin=0,
                    vmax=top,
                )
            place.grid(False)
            place.set(title=row.label, xlabel="layer $l$")
        axes[0][0].set_ylabel("$n$")
        figure.colorbar(image, ax=axes[0], label="angular distance of $x_l$ and $x_{l+n}$")
    if rises:
        for index, row in enumerate(rows):
            place = axes[-1][index]
            if row.name in rises:
                mean, sd = mean_of(rises[row.name]), sd_of(rises[row.name])
                place.bar(np.arange(1, len(mean) + 1), mean, color=colour(row, rows), yerr=sd if sd.any() else None)
            place.set_yscale("symlog", linthresh=1e-3)
            place.set(xlabel="layer removed", **({} if maps else {"title": row.label}))
        axes[-1][0].set_ylabel("rise of the loss, nats")
    return figure


def with_layers(column: Column) -> list[Row]:
    """The rows whose runs recorded their layers over time."""
    return [row for row in column.rows if layer_series(row)]


def layer_series(row: Row) -> list[Mapping[str, Any]]:
    return [run.history["layers"] for run in row.runs if "layers" in run.history]


def variances(row: Row) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Steps, and the mean and standard deviation over seeds of the variance of the stream [steps, layers]."""
    series = layer_series(row)
    found = [layers["variance"] for layers in series]
    return series[0]["step"], mean_of(found), sd_of(found)


def nearest_step(steps: Sequence[int], fraction: float) -> int:
    """Where among the recorded steps a fraction of the run comes nearest."""
    return min(range(len(steps)), key=lambda index: abs(steps[index] - fraction * steps[-1]))


@styled
def over_steps(column: Column) -> Figure | None:
    """Figures 4 and 8: variance of the stream behind every layer over the steps, one panel for each row."""
    rows = with_layers(column)
    if not rows:
        return None
    found = [variances(row) for row in rows]
    depth = found[0][1].shape[1]
    across = min(len(rows), 3)
    down = math.ceil(len(rows) / across)
    figure, axes = blank(0.5 + 2.6 * down, rows=down, columns=across, sharey=True)
    shades, norm = matplotlib.colormaps[LAYERS], Normalize(1, max(depth, 2))
    for place, row, (steps, mean, _) in zip(axes.flat, rows, found, strict=False):
        for layer in range(depth):
            place.plot(steps, mean[:, layer], color=shades(norm(layer + 1)), lw=1)
        place.set(yscale="log", xlabel="step", title=row.label)
        last = f"last layer at the end: {mean[-1, -1]:.3g}"
        place.text(0.97, 0.03, last, transform=place.transAxes, ha="right", fontsize=8)
    for place in axes.flat[len(rows) :]:
        place.set_visible(False)
    for place in axes[:, 0]:
        place.set_ylabel("variance of the residual stream")
    figure.colorbar(ScalarMappable(norm, shades), ax=axes, label="layer")
    return figure


@styled
def by_layer(column: Column) -> Figure | None:
    """Figure 9: variance of the stream over the layers at fractions of the run, one panel for each row."""
    rows, fractions = with_layers(column), column.experiments[0].paper["fractions"]
    if not rows:
        return None
    figure, axes = blank(3.2, columns=len(rows), sharey=True)
    shades = matplotlib.colormaps[LAYERS]
    for place, row in zip(axes[0], rows, strict=True):
        steps, mean, sd = variances(row)
        for index, fraction in enumerate(fractions):
            at = nearest_step(steps, fraction)
            along, tint = np.arange(1, mean.shape[1] + 1), shades(0.85 * index / max(len(fractions) - 1, 1))
            label = f"step {steps[at]:,} of {steps[-1]:,} ({steps[at] / steps[-1]:.0%})"
            place.plot(along, mean[at], color=tint, marker="o", ms=3, label=label)
            place.fill_between(along, mean[at] - sd[at], mean[at] + sd[at], color=tint, alpha=0.25, lw=0)
        place.set(xlabel="layer", title=row.label)
        place.legend()
    axes[0][0].set_ylabel("variance of the residual stream")
    return figure


@styled
def jacobians(column: Column) -> Figure | None:
    """Figure 5: Jacobians of five blocks, averaged over tokens, of the first seed, one line for each row."""
    rows = [row for row in column.rows if measured(row, "jacobian_map")]
    if not rows:
        return None
    maps = [measured(row, "jacobian_map")[0] for row in rows]
    across = max(len(found["layers"]) for found in maps)
    figure, axes = blank(0.4 + 1.5 * len(rows), rows=len(rows), columns=across, sharex=True, sharey=True)
    norm = SymLogNorm(0.01, vmin=-1, vmax=1)
    for line, (row, found) in enumerate(zip(rows, maps, strict=True)):
        for place, layer, matrix in zip(axes[line], found["layers"], found["matrices"], strict=True):
            image = place.imshow(np.array(matrix), cmap="RdBu_r", norm=norm, interpolation="nearest")
            place.set(title=f"layer {layer}", xticks=[], yticks=[])
            place.grid(False)
        axes[line][0].set_ylabel(f"{row.label}\noutput")
    for place in axes[-1]:
        place.set_xlabel("input")
    figure.colorbar(image, ax=axes, label="mean of $dy/dx$", extend="both")
    return figure


# Training ------------------------------------------------------------------------------------------------------------


Curves = dict[int, tuple[np.ndarray, np.ndarray]]
"""Steps and losses by seed."""


@styled
def curves(column: Column) -> Figure | None:
    """Figure 6: training loss over the steps, published and ours, and below it the difference to the baseline."""
    published = column.experiments[0].paper.get("published_curves") or {}
    printed = {name: np.array(curve, dtype=float) for name, curve in published.items()}
    ours = {row.name: training_curves(row) for row in column.rows}
    panels: dict[str, dict[str, Curves]] = {
        "published": {name: {0: (curve[:, 0], curve[:, 1])} for name, curve in printed.items()},
        f"ours, scale={column.experiments[0].scale}, {seeds_of(column)}": {
            n: found for n, found in ours.items() if found
        },
    }
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return None
    figure, axes = blank(5.0, rows=2, columns=len(panels), sharex="col", height_ratios=(2, 1))
    for (top, bottom), (title, found) in zip(axes.T, panels.items(), strict=True):
        base = found.get(column.baseline.name, {})
        for row in (row for row in column.rows if row.name in found):
            tint, mark = colour(row, column.rows), "o" if title == "published" else None
            mine = found[row.name]
            steps = next(iter(mine.values()))[0]
            top.plot(
                steps, mean_of(losses for _, losses in mine.values()), color=tint, label=row.label, marker=mark, ms=3
            )
            pairs = [minus(mine[seed], base[seed]) for seed in mine if seed in base]
            if row is not column.baseline and pairs:
                mean, sd = mean_of(losses for _, losses in pairs), sd_of(losses for _, losses in pairs)
                bottom.plot(pairs[0][0], mean, color=tint, marker=mark, ms=3)
                bottom.fill_between(pairs[0][0], mean - sd, mean + sd, color=tint, alpha=0.25, lw=0)
        bottom.axhline(0, color="black", lw=0.8)
        top.set(ylabel="training loss, nats", title=title)
        top.legend()
        bottom.set(xlabel="step", ylabel=f"minus {column.baseline.label}")
        bottom.xaxis.set_major_locator(MaxNLocator(5))
        bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def training_curves(row: Row) -> Curves:
    series = {run.seed: run.history["train"] for run in row.runs if "train" in run.history}
    return {seed: (np.array(one["step"]), np.array(one["loss"], dtype=float)) for seed, one in series.items()}


def minus(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The difference of two curves at the steps that both have."""
    steps, here, there = np.intersect1d(one[0], other[0], return_indices=True)
    return steps, one[1][here] - other[1][there]


@styled
def theory(column: Column) -> Figure | None:
    """Variances and gains of Pre-LN and LNS over the layers, beside what the paper derives of them."""
    rows = [row for row in column.rows if measured(row, "theory")]
    if not rows:
        return None
    figure, axes = blank(0.4 + 2.9 * len(rows), rows=len(rows), columns=2)
    for (left, right), row in zip(axes, rows, strict=True):
        found = measured(row, "theory")
        lemma, theorem = ("4.1", "4.2") if found[0]["lns"] else ("3.2", "3.3")
        drawn = {
            f"Lemma {lemma}, c = 1": ("lemma", "--", COLOURS[1]),
            f"Lemma {lemma}, c fitted: {fmean(one['c'] for one in found):.2g}": ("lemma_fitted", ":", COLOURS[1]),
            "the same, c = 1, from its own values": ("recursion", "-.", COLOURS[2]),
        }
        band(left, [one["variances"] for one in found], "measured")
        for label, (name, style, tint) in drawn.items():
            mean = mean_of(one[name] for one in found)
            left.plot(range(1, len(mean) + 1), mean, style, color=tint, label=label)
        left.set(yscale="log", xlabel="layer $l$", ylabel="variance of $x_l$", title=f"{row.label}: variance")
        left.legend()
        if not found[0]["gains"]:
            right.set_visible(False)
            continue
        band(right, [one["gains"] for one in found], "measured")
        logs = mean_of(one["fitted_log_bound"] for one in found)
        a, b = mean_of(one["fitted_constants"] for one in found)
        label = f"Theorem {theorem}, fitted: A = {a:.2g}, B = {b:.2g}"
        right.plot(range(1, len(logs) + 1), np.exp(logs), "--", color=COLOURS[1], label=label)
        shapes = mean_of(one["shape_log_bound"] for one in found)
        if shapes.size:
            right.plot([], [], " ", label=f"with A, B of the shapes, last layer: $e^{{{shapes[-1]:.0f}}}$")
        right.set(xlabel="layer $l$", ylabel=r"$\|dy_l/dx_1\|_2$", title=f"{row.label}: gain")
        low, high = right.get_ylim()
        if low <= 0 or high > 5 * low:
            right.set_yscale("log")
        right.legend()
    return figure


def band(axes: Axes, series: Sequence[Sequence[float]], label: str) -> None:
    """Mean and standard deviation over seeds, over the layers from 1."""
    mean, sd = mean_of(series), sd_of(series)
    along = np.arange(1, len(mean) + 1)
    axes.plot(along, mean, color=COLOURS[0], marker="o", ms=3, label=label)
    axes.fill_between(along, mean - sd, mean + sd, color=COLOURS[0], alpha=0.25, lw=0)


DRAWN: dict[str, Callable[[Column], Figure | None]] = {
    "Figure 2": layers,
    "Figure 3": layers,
    "Figure 4": over_steps,
    "Figure 5": jacobians,
    "Figure 6": curves,
    "Figure 7": layers,
    "Figure 8": over_steps,
    "Figure 9": by_layer,
    "Figure 10": layers,
}
"""How the figures are drawn that show the runs of one column; `differences` and `sizes` show all of a target. What is
neither a table nor one of these shows theory."""
