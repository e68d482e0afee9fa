"""Figures of layers and of training (Figures 2 to 10 and the theorems), drawn from the runs of one column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure

from cod_lightning.paper.claims import Column, ReportRow, nearest_step
from cod_lightning.paper.figures import panel_title, report_figure, row_colour
from cod_lightning.paper.findings import findings_key, loss_increases
from cod_lightning.plots import (
    DEPTH_COLOURS,
    PlainNumbers,
    depth_bar,
    integer_ticks,
    layer_lines,
    legend_above,
    lines_by_depth,
    style,
)

Curve = tuple[np.ndarray, np.ndarray]
"""Steps, and the values at these steps."""
LINEAR_THRESHOLD = 1e-3
"""Increases of the loss (nats) from minus this to this are drawn on a linear axis, all others on a logarithmic one."""


def stacked(results: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """A field of the results of a measure [runs, ...]; None becomes NaN."""
    return np.array([result[name] for result in results], dtype=float)


def sd_of(values: np.ndarray) -> np.ndarray:
    """Standard deviation over the first dimension, zero for a single value."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else np.zeros_like(values[0])


def set_titles(axes: Sequence[Axes], rows: Sequence[tuple[ReportRow, int]]) -> None:
    """Title a panel for each row with its label and number of seeds."""
    for panel, (row, seeds) in zip(axes, rows, strict=True):
        panel.set_title(fill(f"{row.label} (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{seeds})", 75 // len(rows)))


@style()
def angle_and_removal(column: Column) -> Figure | None:
    """Figures 2, 3, 7 and 10: angular distances between layers, and the increase of the loss without each block.

    Angles are means over seeds; increases are dots, one for each seed, as they span decades and both signs.
    """
    angles, costs = {}, {}
    for row in column.rows:
        if results := row.results("angular"):
            angles[row.name] = stacked(results, "distances").mean(axis=0)
        if results := row.results("removal"):
            costs[row.name] = np.array([loss_increases(result) for result in results])
    rows = [row for row in column.rows if row.name in angles or row.name in costs]
    if not rows:
        return None
    parts = bool(angles) + bool(costs)
    figure, axes = report_figure(0.4 + 2.6 * parts, rows=parts, columns=len(rows), sharey="row")
    set_titles(axes[0], [(row, max(len(row.results(name)) for name in ("angular", "removal"))) for row in rows])
    if angles:
        highest = max(float(np.nanmax(distances)) for distances in angles.values())
        for panel, row in zip(axes[0], rows, strict=True):
            if row.name in angles:
                distances = angles[row.name]
                end = len(distances) + 0.5
                options: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
                image = panel.imshow(distances, extent=(0.5, end, 0.5, end), vmin=0, vmax=highest, **options)
            panel.grid(False)
            panel.set_xlabel("layer $l$")
            integer_ticks(panel.xaxis)
        axes[0][0].set_ylabel("layers further on, $n$")
        figure.colorbar(image, ax=axes[0], label="angular distance of $x_l$\nand $x_{l+n}$ (angle / $\\pi$)")
    if costs:
        for panel, row in zip(axes[-1], rows, strict=True):
            panel.set_yscale("symlog", linthresh=LINEAR_THRESHOLD)
            if row.name in costs:
                increases, colour = costs[row.name], row_colour(row)
                layers = np.arange(1, increases.shape[1] + 1)
                panel.plot(layers, increases.T, "o", ms=3, mew=0, alpha=0.6, color=colour)
                panel.hlines(np.median(increases, axis=0), layers - 0.35, layers + 0.35, color=colour)
                panel.set_xlim(0.5, len(layers) + 0.5)
            panel.yaxis.set_major_formatter(PlainNumbers())
            integer_ticks(panel.xaxis)
            panel.set_xlabel("removed layer")
        limits = axes[-1][0].get_ylim()
        for panel in axes[-1]:
            panel.axhspan(-LINEAR_THRESHOLD, LINEAR_THRESHOLD, color="black", alpha=0.08, lw=0)
        ylabel = "increase of the loss (nats)\ndots: seeds, lines: medians\ngrey: linear axis"
        axes[-1][0].set(ylim=limits, ylabel=ylabel)
    return figure


def recorded_variances(column: Column) -> list[tuple[ReportRow, list[int], np.ndarray]]:
    """Row, common steps and variance [runs, steps, layers] of every row that recorded it."""
    recorded = []
    for row in column.rows:
        if curves := recorded_curves(row, "layers", "variance"):
            steps, variances = at_common_steps(list(curves.values()))
            recorded.append((row, steps.tolist(), variances))
    return recorded


def recorded_curves(row: ReportRow, series: str, values: str) -> dict[int, Curve]:
    """The recorded steps and values of a series by seed, of the runs that have it."""
    recorded = {run.seed: run.history[series] for run in row.runs if series in run.history}
    return {seed: (np.array(each["step"]), np.array(each[values], dtype=float)) for seed, each in recorded.items()}


def at_common_steps(curves: Sequence[Curve]) -> Curve:
    """The steps that all curves have, and the values at these [curves, steps, ...]; runs may record at other steps."""
    steps = reduce(np.intersect1d, (each for each, _ in curves))
    return steps, np.stack([values[np.isin(each, steps)] for each, values in curves])


@style()
def variance_over_steps(column: Column) -> Figure | None:
    """Figures 4 and 8: variance of the residual stream after every layer over the steps, one panel for each row."""
    recorded = recorded_variances(column)
    if not recorded:
        return None
    figure, axes = report_figure(3.1, columns=len(recorded), sharey=True)
    norm = Normalize(1, max(recorded[0][2].shape[-1], 2))
    set_titles(axes[0], [(row, len(variances)) for row, _, variances in recorded])
    for panel, (_, steps, variances) in zip(axes[0], recorded, strict=True):
        mean = variances.mean(axis=0)
        colours = lines_by_depth(panel, steps, mean, norm)
        last = f"last layer at the end: {mean[-1, -1]:.3g}"
        panel.text(0.97, 0.03, last, transform=panel.transAxes, ha="right", fontsize=8)
    axes[0][0].set_ylabel("variance of the residual stream")
    depth_bar(figure, colours, axes)
    return figure


@style()
def variance_by_layer(column: Column) -> Figure | None:
    """Figure 9: variance of the residual stream by layer at fractions of the run, one panel for each row."""
    recorded, fractions = recorded_variances(column), column.first.paper.get("fractions")
    if not recorded or not fractions:
        return None
    figure, axes = report_figure(3.2, columns=len(recorded), sharey=True)
    set_titles(axes[0], [(row, len(variances)) for row, _, variances in recorded])
    for panel, (_, steps, variances) in zip(axes[0], recorded, strict=True):
        lines, errors = {}, {}
        for fraction in fractions:
            at = nearest_step(steps, fraction)
            label = f"at {fraction:.0%} of the run (nearest recorded step: {steps[at]:,})"
            lines[label], errors[label] = variances[:, at].mean(axis=0), sd_of(variances[:, at])
        panel.set_prop_cycle(color=matplotlib.colormaps[DEPTH_COLOURS](np.linspace(0, 0.8, len(lines))))
        layer_lines(panel, lines, "", errors=errors)
        panel.legend()
    axes[0][0].set_ylabel("variance of the residual stream")
    return figure


@style()
def mean_jacobians(column: Column) -> Figure | None:
    """Figure 5: Jacobians of five blocks, averaged over tokens, of the first seed; one line for each row."""
    measured = [(row, [run for run in row.runs if "jacobian_map" in run.measures]) for row in column.rows]
    first = [(row, runs[0]) for row, runs in measured if runs]
    if not first:
        return None
    maps = [(row, run.measures["jacobian_map"]) for row, run in first]
    across = max(len(result["layers"]) for _, result in maps)
    figure, axes = report_figure(0.4 + 1.5 * len(maps), rows=len(maps), columns=across, sharex=True, sharey=True)
    seeds = sorted({str(run.seed) for _, run in first if run.record})
    figure.suptitle(f"seed {' and '.join(seeds)}" if seeds else "", fontsize=9)
    norm = SymLogNorm(0.01, vmin=-1, vmax=1)
    for panels, (row, result) in zip(axes, maps, strict=True):
        for panel, layer, matrix in zip(panels, result["layers"], result["matrices"], strict=True):
            image = panel.imshow(np.array(matrix), cmap="RdBu_r", norm=norm, interpolation="nearest")
            panel.set(title=f"layer {layer}", xticks=[], yticks=[])
            panel.grid(False)
        panels[0].set_ylabel(f"{fill(row.label, 20)}\noutput")
    for panel in axes[-1]:
        panel.set_xlabel("input")
    figure.colorbar(image, ax=axes, label="mean of $dy/dx$", extend="both", format=PlainNumbers())
    return figure


@style()
def loss_curves(column: Column) -> Figure | None:
    """Figure 6: training loss over the steps, published and ours, and below it the difference to the baseline."""
    published = {name: np.array(points).T for name, points in column.first.paper.get("published_curves", {}).items()}
    panels = {
        "the paper": {name: {0: (steps, losses)} for name, (steps, losses) in published.items()},
        panel_title(column.first.scale, column): {
            row.name: curves for row in column.rows if (curves := recorded_curves(row, "train", "loss"))
        },
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return None
    figure, axes = report_figure(5.0, rows=2, columns=len(panels), sharex="col", height_ratios=(2, 1))
    for (top, bottom), (title, curves) in zip(axes.T, panels.items(), strict=True):
        base = curves.get(column.baseline.name, {})
        marker = "o" if title == "the paper" else None
        for row in (row for row in column.rows if row.name in curves):
            colour, own = row_colour(row), curves[row.name]
            steps, losses = at_common_steps(list(own.values()))
            top.plot(steps, losses.mean(axis=0), color=colour, marker=marker, ms=3, label=row.label)
            pairs = [at_common_steps([own[seed], base[seed]]) for seed in own if seed in base]
            if row is not column.baseline and pairs:
                steps, differences = at_common_steps([(steps, ours - theirs) for steps, (ours, theirs) in pairs])
                mean, sd = differences.mean(axis=0), sd_of(differences)
                bottom.plot(steps, mean, color=colour, marker=marker, ms=3)
                bottom.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.25, lw=0)
        bottom.axhline(0, color="black", lw=0.8)
        top.set(ylabel="training loss (nats)", title=title)
        top.legend()
        bottom.set(xlabel="step", ylabel=f"minus {column.baseline.label}\n(nats)")
        integer_ticks(bottom.xaxis)
    return figure


THEORY_FIELDS = (
    *("variances", "lemma", "lemma_fitted", "recursion", "c", "gains"),
    *("fitted_constants", "fitted_log_bound", "shape_log_bound"),
)
"""Fields of the measure `theory` that are drawn."""

THEORY_COLOURS = ("black", "#888888", "#bbbbbb")


@style()
def theorems(column: Column) -> Figure | None:
    """Variances and Jacobian norms of Pre-LN and LNS by layer, compared with their lemmas and theorems."""
    measured = [(row, results) for row in column.rows if (results := row.results("theory"))]
    if not measured:
        return None
    figure, axes = report_figure(0.4 + 2.9 * len(measured), rows=len(measured), columns=2)
    for (left, right), (row, results) in zip(axes, measured, strict=True):
        lemma, theorem = ("4.1", "4.2") if results[0]["lns"] else ("3.2", "3.3")
        mean = {name: stacked(results, name).mean(axis=0) for name in THEORY_FIELDS}
        colours = [row_colour(row), *THEORY_COLOURS]
        ours = f"measured (n = {len(results)})"
        lines = {
            ours: mean["variances"],
            f"Lemma {lemma} on the measured variances, c = 1": mean["lemma"],
            f"the same, c = {mean['c']:.2g} by least squares": mean["lemma_fitted"],
            f"Lemma {lemma} on the first variance alone, c = 1": mean["recursion"],
        }
        errors: dict[str, Any] = {ours: sd_of(stacked(results, "variances"))}
        left.set_prop_cycle(color=colours)
        layer_lines(left, lines, f"{row.label}: variance of $x_l$", log=True, errors=errors)
        legend_above(left)
        a, b = mean["fitted_constants"]
        gains, fitted = mean["gains"], np.exp(mean["fitted_log_bound"])
        lines = {ours: gains, f"Theorem {theorem}, least squares: A = {a:.2g}, B = {b:.2g}": fitted}
        log = bool(max(gains.max(), fitted.max()) > 5 * min(gains.min(), fitted.min()))
        errors = {ours: sd_of(stacked(results, "gains"))}
        right.set_prop_cycle(color=colours)
        layer_lines(right, lines, row.label + r": $\|dy_l/dx_1\|_2$", log=log, errors=errors)
        if mean["shape_log_bound"].size:
            exponent = mean["shape_log_bound"][-1]
            label = f"bound, A and B from the weights' shapes:\n$e^{{{exponent:.0f}}}$ at the last layer (not drawn)"
            right.errorbar([], [], fmt=" ", label=label)
        right.set_ylim(bottom=min(1.0, *gains, *fitted))  # a gain of 1 is no growth
        legend_above(right)
    return figure


DRAW: dict[str, Callable[[Column], Figure | None]] = {
    **dict.fromkeys(("Figure 2", "Figure 3", "Figure 7", "Figure 10"), angle_and_removal),
    **dict.fromkeys(("Figure 4", "Figure 8"), variance_over_steps),
    "Figure 5": mean_jacobians,
    "Figure 6": loss_curves,
    "Figure 9": variance_by_layer,
    "Theory": theorems,
}
"""Functions that draw the runs of one column, by its key in `QUANTITIES`."""


def draw(column: Column) -> Figure | None:
    """The figure of a column's target; None if it has no figure, or nothing was measured."""
    function = DRAW.get(findings_key(column))
    return function(column) if function and column.first.has_runs else None
