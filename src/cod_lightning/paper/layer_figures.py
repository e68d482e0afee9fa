"""Figures of layers and of training (Figures 2 to 10 and the theorems), drawn from the runs of one column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from cod_lightning.paper.claims import Column, ReportRow, nearest_step
from cod_lightning.paper.figures import figure_grid, mean_of, panel_title, row_colour, sd_of
from cod_lightning.paper.findings import loss_increases
from cod_lightning.plots import COLOURS, DEPTH_COLOURS, lines_by_depth, style


def results_of(row: ReportRow, measure: str) -> list[Mapping[str, Any]]:
    """Results of a measure, one for each run that has it."""
    return [run.measures[measure] for run in row.runs if measure in run.measures]


def mean_line(axes: Axes, series: Sequence[Sequence[float]], colour: Any, label: str) -> None:
    """Mean over seeds by layer, with a band of one standard deviation."""
    mean, sd = mean_of(series), sd_of(series)
    layers = np.arange(1, len(mean) + 1)
    axes.plot(layers, mean, color=colour, marker="o", ms=3, label=label)
    axes.fill_between(layers, mean - sd, mean + sd, color=colour, alpha=0.25, lw=0)


@style()
def angle_and_removal(column: Column) -> Figure | None:
    """Figures 2, 3, 7 and 10: angular distances between layers, and the increase of the loss without each block."""
    maps = {
        row.name: mean_of(r["distances"] for r in results)
        for row in column.rows
        if (results := results_of(row, "angular"))
    }
    costs = {
        row.name: list(map(loss_increases, results)) for row in column.rows if (results := results_of(row, "removal"))
    }
    rows = [row for row in column.rows if row.name in maps or row.name in costs]
    parts = bool(maps) + bool(costs)
    if not rows:
        return None
    figure, axes = figure_grid(0.4 + 2.6 * parts, rows=parts, columns=len(rows), sharey="row")
    if maps:
        highest = max(float(np.nanmax(values)) for values in maps.values())
        for panel, row in zip(axes[0], rows, strict=True):
            if row.name in maps:
                end = len(maps[row.name]) + 0.5
                image = panel.imshow(
                    maps[row.name],
                    **{"aspect": "auto", "origin": "lower", "interpolation": "nearest"},
                    **{"extent": (0.5, end, 0.5, end), "vmin": 0, "vmax": highest},
                )
            panel.grid(False)
            panel.set(title=row.label, xlabel="layer $l$")
        axes[0][0].set_ylabel("$n$")
        figure.colorbar(image, ax=axes[0], label="angular distance of $x_l$ and $x_{l+n}$")
    if costs:
        for panel, row in zip(axes[-1], rows, strict=True):
            if row.name in costs:
                mean, sd = mean_of(costs[row.name]), sd_of(costs[row.name])
                bars = sd if sd.any() else None
                panel.bar(np.arange(1, len(mean) + 1), mean, color=row_colour(row, rows), yerr=bars)
            panel.set_yscale("symlog", linthresh=1e-3)
            panel.set(xlabel="removed layer", **({} if maps else {"title": row.label}))
        axes[-1][0].set_ylabel("increase of the loss, nats")
    return figure


def recorded_variances(column: Column) -> list[tuple[ReportRow, list[int], np.ndarray, np.ndarray]]:
    """Row, steps, mean and standard deviation of the variance [steps, layers] of every row that recorded it."""
    recorded = []
    for row in column.rows:
        if series := [run.history["layers"] for run in row.runs if "layers" in run.history]:
            variances = [np.array(layers["variance"], dtype=float) for layers in series]
            recorded.append((row, series[0]["step"], mean_of(variances), sd_of(variances)))
    return recorded


@style()
def variance_over_steps(column: Column) -> Figure | None:
    """Figures 4 and 8: variance of the residual stream after every layer over the steps, one panel for each row."""
    recorded = recorded_variances(column)
    if not recorded:
        return None
    across = min(len(recorded), 3)
    down = math.ceil(len(recorded) / across)
    figure, axes = figure_grid(0.5 + 2.6 * down, rows=down, columns=across, sharey=True)
    norm = Normalize(1, max(recorded[0][2].shape[1], 2))
    for panel, (row, steps, mean, _) in zip(axes.flat, recorded, strict=False):
        colours = lines_by_depth(panel, steps, mean, norm)
        panel.set_title(row.label)
        last = f"last layer at the end: {mean[-1, -1]:.3g}"
        panel.text(0.97, 0.03, last, transform=panel.transAxes, ha="right", fontsize=8)
    for panel in axes.flat[len(recorded) :]:
        panel.set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("variance of the residual stream")
    figure.colorbar(colours, ax=axes, label="layer")
    return figure


@style()
def variance_by_layer(column: Column) -> Figure | None:
    """Figure 9: variance of the residual stream by layer at fractions of the run, one panel for each row."""
    recorded, fractions = recorded_variances(column), column.first.paper["fractions"]
    if not recorded:
        return None
    figure, axes = figure_grid(3.2, columns=len(recorded), sharey=True)
    shades = matplotlib.colormaps[DEPTH_COLOURS]
    for panel, (row, steps, _, _) in zip(axes[0], recorded, strict=True):
        series = [
            np.array(run.history["layers"]["variance"], dtype=float) for run in row.runs if "layers" in run.history
        ]
        for index, fraction in enumerate(fractions):
            at = nearest_step(steps, fraction)
            colour = shades(0.85 * index / max(len(fractions) - 1, 1))
            label = f"step {steps[at]:,} of {steps[-1]:,} ({steps[at] / steps[-1]:.0%})"
            mean_line(panel, [variance[at] for variance in series], colour, label)
        panel.set(xlabel="layer", title=row.label)
        panel.legend()
    axes[0][0].set_ylabel("variance of the residual stream")
    return figure


@style()
def mean_jacobians(column: Column) -> Figure | None:
    """Figure 5: Jacobians of five blocks, averaged over tokens, of the first seed; one line for each row."""
    first_maps = [(row, maps[0]) for row in column.rows if (maps := results_of(row, "jacobian_map"))]
    if not first_maps:
        return None
    across = max(len(result["layers"]) for _, result in first_maps)
    figure, axes = figure_grid(
        0.4 + 1.5 * len(first_maps), rows=len(first_maps), columns=across, sharex=True, sharey=True
    )
    norm = SymLogNorm(0.01, vmin=-1, vmax=1)
    for panels, (row, result) in zip(axes, first_maps, strict=True):
        for panel, layer, matrix in zip(panels, result["layers"], result["matrices"], strict=True):
            image = panel.imshow(np.array(matrix), cmap="RdBu_r", norm=norm, interpolation="nearest")
            panel.set(title=f"layer {layer}", xticks=[], yticks=[])
            panel.grid(False)
        panels[0].set_ylabel(f"{row.label}\noutput")
    for panel in axes[-1]:
        panel.set_xlabel("input")
    figure.colorbar(image, ax=axes, label="mean of $dy/dx$", extend="both")
    return figure


Curve = tuple[np.ndarray, np.ndarray]
"""Steps and losses."""


def curve_difference(curve: Curve, other: Curve) -> Curve:
    """Difference of two curves at the steps that both have."""
    steps, here, there = np.intersect1d(curve[0], other[0], return_indices=True)
    return steps, curve[1][here] - other[1][there]


def training_curves(row: ReportRow) -> dict[int, Curve]:
    """Training losses by seed."""
    series = {run.seed: run.history["train"] for run in row.runs if "train" in run.history}
    return {seed: (np.array(curve["step"]), np.array(curve["loss"], dtype=float)) for seed, curve in series.items()}


@style()
def loss_curves(column: Column) -> Figure | None:
    """Figure 6: training loss over the steps, published and ours, and below it the difference to the baseline."""
    published = {
        name: {0: (np.array(points, dtype=float)[:, 0], np.array(points, dtype=float)[:, 1])}
        for name, points in (column.first.paper.get("published_curves") or {}).items()
    }
    ours = {row.name: curves for row in column.rows if (curves := training_curves(row))}
    panels = {"published": published, panel_title(column.first.scale, column): ours}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    figure, axes = figure_grid(5.0, rows=2, columns=len(panels), sharex="col", height_ratios=(2, 1))
    for (top, bottom), (title, curves) in zip(axes.T, panels.items(), strict=True):
        base = curves.get(column.baseline.name, {})
        for row in (row for row in column.rows if row.name in curves):
            options = {"color": row_colour(row, column.rows), "marker": "o" if title == "published" else None, "ms": 3}
            mine = curves[row.name]
            steps = next(iter(mine.values()))[0]
            top.plot(steps, mean_of(losses for _, losses in mine.values()), label=row.label, **options)
            pairs = [curve_difference(mine[seed], base[seed]) for seed in mine if seed in base]
            if row is not column.baseline and pairs:
                mean, sd = mean_of(losses for _, losses in pairs), sd_of(losses for _, losses in pairs)
                bottom.plot(pairs[0][0], mean, **options)
                bottom.fill_between(pairs[0][0], mean - sd, mean + sd, color=options["color"], alpha=0.25, lw=0)
        bottom.axhline(0, color="black", lw=0.8)
        top.set(ylabel="training loss, nats", title=title)
        top.legend()
        bottom.set(xlabel="step", ylabel=f"minus {column.baseline.label}")
        bottom.xaxis.set_major_locator(MaxNLocator(5))
        bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


@style()
def theorems(column: Column) -> Figure | None:
    """Variances and Jacobian norms of Pre-LN and LNS by layer, compared with their lemmas and theorems."""
    results_by_row = [(row, results) for row in column.rows if (results := results_of(row, "theory"))]
    if not results_by_row:
        return None
    figure, axes = figure_grid(0.4 + 2.9 * len(results_by_row), rows=len(results_by_row), columns=2)
    for (left, right), (row, results) in zip(axes, results_by_row, strict=True):
        lemma, theorem = ("4.1", "4.2") if results[0]["lns"] else ("3.2", "3.3")
        mean_line(left, [result["variances"] for result in results], COLOURS[0], "measured")
        for name, label, line, colour in (
            ("lemma", f"Lemma {lemma}, c = 1", "--", COLOURS[1]),
            ("lemma_fitted", f"Lemma {lemma}, c fitted: {fmean(r['c'] for r in results):.2g}", ":", COLOURS[1]),
            ("recursion", "the same, c = 1, from its own values", "-.", COLOURS[2]),
        ):
            mean = mean_of(result[name] for result in results)
            left.plot(range(1, len(mean) + 1), mean, line, color=colour, label=label)
        left.set(yscale="log", xlabel="layer $l$", ylabel="variance of $x_l$", title=f"{row.label}: variance")
        left.legend()
        if not results[0]["gains"]:
            right.set_visible(False)
            continue
        mean_line(right, [result["gains"] for result in results], COLOURS[0], "measured")
        bound = mean_of(result["fitted_log_bound"] for result in results)
        a, b = mean_of(result["fitted_constants"] for result in results)
        label = f"Theorem {theorem}, fitted: A = {a:.2g}, B = {b:.2g}"
        right.plot(range(1, len(bound) + 1), np.exp(bound), "--", color=COLOURS[1], label=label)
        shape_bound = mean_of(result["shape_log_bound"] for result in results)
        if shape_bound.size:
            right.plot([], [], " ", label=f"with A, B of the shapes, last layer: $e^{{{shape_bound[-1]:.0f}}}$")
        right.set(xlabel="layer $l$", ylabel=r"$\|dy_l/dx_1\|_2$", title=f"{row.label}: Jacobian norm")
        low, high = right.get_ylim()
        if low <= 0 or high > 5 * low:
            right.set_yscale("log")
        right.legend()
    return figure


DRAW: dict[str, Callable[[Column], Figure | None]] = {
    **dict.fromkeys(("Figure 2", "Figure 3", "Figure 7", "Figure 10"), angle_and_removal),
    **dict.fromkeys(("Figure 4", "Figure 8"), variance_over_steps),
    "Figure 5": mean_jacobians,
    "Figure 6": loss_curves,
    "Figure 9": variance_by_layer,
    "theory": theorems,
}
"""Functions that draw the runs of one column, by target; the theorems by the experiment's name."""


def draw(column: Column) -> Figure | None:
    """The figure of a column's target; None if it has no figure, or nothing was measured."""
    function = DRAW.get(column.first.name) or DRAW.get(column.first.target)
    return function(column) if function and any(row.runs for row in column.rows) else None
