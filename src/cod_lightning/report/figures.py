"""The paper's figures, drawn from run records and from what was measured of the runs, and one for each of its tables.

Every figure is 900 pixels wide, and the same bytes for the same records. Where there are several seeds, lines and maps
are means over them, and bands and bars one standard deviation.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from cod_lightning.report.claims import Column, Experiment, Metric, Row, Run

WIDTH, DPI = 7.5, 120
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
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
FRACTIONS = (0.05, 0.15, 0.3)
"""Of a run, at which Figure 9 is taken: steps 1,000, 3,000 and 6,000 of 20,000."""


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
    count = max((len(row.runs) for row in column.rows), default=0)
    return f"{count} seed{'s' * (count > 1)}"


def mean_of(arrays: Iterable[Any]) -> np.ndarray:
    """Of equally long nested lists, in which None is no number."""
    return np.mean([np.array(array, dtype=float) for array in arrays], axis=0)


def sd_of(arrays: Iterable[Any]) -> np.ndarray:
    """Likewise; zero for a single one."""
    found = [np.array(array, dtype=float) for array in arrays]
    return np.std(found, axis=0, ddof=1) if len(found) > 1 else np.zeros_like(found[0])


# Tables ----------------------------------------------------------------------------------------------------------------


def headline(column: Column) -> Metric | None:
    """What a table's figure shows: the metric that its file names, or the last one that the paper prints."""
    experiment = column.experiments[0]
    metrics = experiment.metrics
    return next((m for m in metrics if m.name == experiment.paper.get("metric")), metrics[-1] if metrics else None)


@styled
def differences(scales: Mapping[str, Sequence[Column]]) -> Figure | None:
    """Differences to the baseline: the paper's in one panel, ours in one panel for each scale; None without any.

    Args:
        scales: columns of one target, those of the paper's scale among them.
    """
    published = scales["paper"]
    metric = headline(published[0])
    if metric is None:
        return None
    ours = {scale: [c for c in group if any(line.difference for line in c.lines_of(metric))] for scale, group in scales.items()}
    ours = {scale: group for scale, group in ours.items() if group}
    rows = [row for row in published[0].rows if row is not published[0].baseline]
    panels: list[tuple[str, list[tuple[str, list[tuple[float, float | None, bool] | None]]]]] = []
    series = []
    for column in published:
        lines = {line.row.name: line.claims[0] for line in column.lines_of(metric)}
        found = [lines[row.name] if row.name in lines else None for row in rows]
        points = [(c.difference, None, c.trained) if c and c.difference is not None else None for c in found]
        series.append((column.heading, points))
    panels.append(("published", series))
    for scale, group in ours.items():
        series = []
        for column in group:
            named = {line.row.name: line for line in column.lines_of(metric)}
            found = [named.get(row.name) for row in rows]
            points = [
                (line.difference.mean, line.difference.margin, not line.untrained) if line and line.difference else None
                for line in found
            ]
            series.append((column.heading, points))
        panels.append((f"ours, scale={scale}, {seeds_of(group[0])}", series))

    figure, axes = blank(1.1 + 0.3 * len(rows) + 0.12 * len(published), columns=len(panels), sharey=True)
    for place, (title, series) in zip(axes[0], panels, strict=True):
        forest(place, series, [row.label for row in rows], title)
    figure.supxlabel(
        f"difference to {published[0].baseline.label} in {metric.unit}, "
        f"{'less' if metric.lower else 'more'} is better; bars: 95 % interval of paired differences",
        fontsize=9,
    )
    return figure


def forest(
    axes: Axes,
    series: Sequence[tuple[str, Sequence[tuple[float, float | None, bool] | None]]],
    labels: Sequence[str],
    title: str,
) -> None:
    """Points with intervals, one line for each label from top to bottom; what did not train is an arrow at the edge.

    Args:
        axes: to draw in.
        series: names, and for each label (value, half the interval or None, whether it trained), or None.
        labels: of the lines.
        title: of the panel.
    """
    shades = matplotlib.colormaps[LAYERS]
    seen = [
        value + sign * (margin or 0)
        for _, points in series
        for point in points
        if point is not None and point[2]
        for value, margin, _ in [point]
        for sign in (-1, 1)
    ]
    low, high = min([0.0, *seen]), max([0.0, *seen])
    room = 0.08 * (high - low) or 0.1
    for index, (name, points) in enumerate(series):
        tint = shades(0.85 * index / max(len(series) - 1, 1)) if len(series) > 1 else COLOURS[0]
        shift = 0.6 * ((index + 0.5) / len(series) - 0.5)
        shown = False
        for line, point in enumerate(points):
            if point is None:
                continue
            value, margin, trained = point
            if trained:
                axes.errorbar(
                    value,
                    line + shift,
                    xerr=margin,
                    fmt="o",
                    ms=5,
                    mfc=tint if margin is not None or title == "published" else "white",
                    color=tint,
                    capsize=2,
                    label=None if shown else name,
                )
                shown = True
            else:
                text = f"did not train: {value:+.1f}"
                axes.annotate(
                    text, (high + room, line + shift), color=tint, fontsize=7, ha="right", va="center", clip_on=False
                )
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlim(low - room, high + room)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title(title)
    if len(series) > 1:
        axes.legend(ncols=min(len(series), 4), loc="upper center", bbox_to_anchor=(0.5, -0.12), handletextpad=0.2)


# Figure 1 --------------------------------------------------------------------------------------------------------------


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
            place.errorbar(size, loss, yerr=[s or 0 for s in sd], fmt="o", ms=5, color=tint, capsize=2, label=label)
            if curve:
                along = np.geomspace(min(size), max(size), 100)
                place.plot(along, curve[1](along), color=tint)
        place.set(xscale="log", xlabel="parameters N", ylabel="loss, nats per token", title=title)
        place.legend()
    return figure


# Layers ----------------------------------------------------------------------------------------------------------------


def measured(row: Row, name: str) -> list[Mapping[str, Any]]:
    """What was measured of each of a row's runs."""
    return [run.measures[name] for run in row.runs if name in run.measures]


@styled
def layers(column: Column) -> Figure | None:
    """Figures 2, 3, 7 and 10: angular distances between layers, and the rise of the loss without each block."""
    rows = [row for row in column.rows if measured(row, "angular") or measured(row, "removal")]
    if not rows:
        return None
    maps = {row.name: mean_of(found["distances"] for found in measured(row, "angular")) for row in rows if measured(row, "angular")}
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
            place.set(xlabel="layer removed", yscale="log", **({} if maps else {"title": row.label}))
        axes[-1][0].set_ylabel("rise of the loss, nats")
    return figure


def with_layers(column: Column) -> list[Row]:
    """The rows whose runs recorded their layers over time."""
    return [row for row in column.rows if any(run.record.get("history", {}).get("layers") for run in row.runs)]


def variances(row: Row) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Steps, and the mean and standard deviation over seeds of the variance of the stream [steps, layers]."""
    series = [run.record["history"]["layers"] for run in row.runs if run.record.get("history", {}).get("layers")]
    found = [layers["variance"] for layers in series]
    return series[0]["step"], mean_of(found), sd_of(found)


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
        place.set(yscale="log", xlabel="step", title=f"{row.label}, last layer at the end: {mean[-1, -1]:.3g}")
    for place in axes.flat[len(rows) :]:
        place.set_visible(False)
    for place in axes[:, 0]:
        place.set_ylabel("variance of the residual stream")
    figure.colorbar(ScalarMappable(norm, shades), ax=axes, label="layer")
    return figure


@styled
def by_layer(column: Column) -> Figure | None:
    """Figure 9: variance of the stream over the layers at three fractions of the run, one panel for each row."""
    rows = with_layers(column)
    if not rows:
        return None
    figure, axes = blank(3.2, columns=len(rows), sharey=True)
    shades = matplotlib.colormaps[LAYERS]
    for place, row in zip(axes[0], rows, strict=True):
        steps, mean, sd = variances(row)
        for index, fraction in enumerate(FRACTIONS):
            at = min(range(len(steps)), key=lambda i: abs(steps[i] - fraction * steps[-1]))
            along, tint = np.arange(1, mean.shape[1] + 1), shades(0.85 * index / (len(FRACTIONS) - 1))
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
    figure, axes = blank(0.6 + 1.6 * len(rows), rows=len(rows), columns=across, sharex=True, sharey=True)
    norm = SymLogNorm(0.01, vmin=-1, vmax=1)
    for line, (row, found) in enumerate(zip(rows, maps, strict=True)):
        for place, layer, matrix in zip(axes[line], found["layers"], found["matrices"], strict=True):
            image = place.imshow(np.array(matrix), cmap="RdBu_r", norm=norm, interpolation="nearest")
            place.set(title=f"{row.label}, layer {layer}", xticks=[], yticks=[])
            place.grid(False)
        axes[line][0].set_ylabel("output")
    for place in axes[-1]:
        place.set_xlabel("input")
    figure.colorbar(image, ax=axes, label="mean of $dy/dx$", extend="both")
    return figure


# Training --------------------------------------------------------------------------------------------------------------


@styled
def curves(column: Column) -> Figure | None:
    """Figure 6: training loss over the steps, published and ours, and below it the difference to the baseline."""
    rows, base = column.rows, column.baseline
    panels: list[tuple[str, dict[str, tuple[np.ndarray, list[np.ndarray]]]]] = []
    published = column.experiments[0].paper.get("published_curves") or {}
    if published:
        points = {name: np.array(curve, dtype=float) for name, curve in published.items()}
        panels.append(("published", {name: (curve[:, 0], [curve[:, 1]]) for name, curve in points.items()}))
    histories = {row.name: [r.record["history"]["train"] for r in row.runs if "history" in r.record] for row in rows}
    ours = {
        name: (np.array(found[0]["step"], dtype=float), [np.array(series["loss"]) for series in found])
        for name, found in histories.items()
        if found
    }
    if ours:
        scale = column.experiments[0].scale
        panels.append((f"ours, scale={scale}, {seeds_of(column)}", ours))
    if not panels:
        return None
    figure, axes = blank(5.0, rows=2, columns=len(panels), sharex="col", height_ratios=(2, 1))
    for (top, bottom), (title, found) in zip(axes.T, panels, strict=True):
        for row in rows:
            if row.name not in found:
                continue
            steps, losses = found[row.name]
            tint = colour(row, rows)
            top.plot(steps, mean_of(losses), color=tint, label=row.label, marker="o" if title == "published" else None, ms=3)
            if row is base or base.name not in found:
                continue
            ground, theirs = found[base.name]
            common = np.isin(steps, ground)
            pairs = [loss[common] - other[np.isin(ground, steps)] for loss, other in zip(losses, theirs, strict=False)]
            mean, sd = mean_of(pairs), sd_of(pairs)
            bottom.plot(steps[common], mean, color=tint)
            bottom.fill_between(steps[common], mean - sd, mean + sd, color=tint, alpha=0.25, lw=0)
        bottom.axhline(0, color="black", lw=0.8)
        top.set(ylabel="training loss, nats", title=title)
        top.legend()
        bottom.set(xlabel="step", ylabel=f"minus {base.label}")
        bottom.xaxis.set_major_locator(MaxNLocator(5))
        bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


@styled
def theory(rows: Sequence[Row]) -> Figure | None:
    """Variances and gains of Pre-LN and LNS over the layers, beside what the paper derives of them."""
    rows = [row for row in rows if measured(row, "theory")]
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
        constants = ", ".join(f"{name} = {value:.2g}" for name, value in zip("AB", mean_of(one["fitted_constants"] for one in found), strict=True))
        right.plot(range(1, len(logs) + 1), np.exp(logs), "--", color=COLOURS[1], label=f"Theorem {theorem}, fitted: {constants}")
        shapes = mean_of(one["shape_log_bound"] for one in found)
        note = f"with A and B from the shapes: e^{shapes[-1]:.0f} at the last layer" if shapes.size else ""
        right.set(
            yscale="log",
            xlabel="layer $l$",
            ylabel=r"$\|dy_l/dx_1\|_2$",
            title=f"{row.label}: gain" + (f"\n{note}" if note else ""),
        )
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
"""How the figures are drawn that show the runs of one column; `differences` and `sizes` show all of a target."""
