"""Panels of the figure of a result, as data: lines over the layers, heat maps and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = Sequence[float | None]
Points = tuple[Sequence[float], Sequence[float]]
"""x and y of points."""


@dataclass(frozen=True)
class Lines:
    """A panel with lines over the layers.

    None, and on a logarithmic axis a value that is not positive, leaves a gap.
    """

    ylabel: str
    """The quantity and its unit."""
    lines: Mapping[str, Values]
    """Values by label."""
    log: bool = False
    """Use a logarithmic y axis."""
    x: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    """Layers of the values, for all lines or by label; None: 1, 2, ...."""
    xlabel: str = "layer"
    errors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Standard errors of lines, by label."""
    points: Mapping[str, Points] = field(default_factory=dict)
    """Single points by label."""
    level: tuple[str, float] | None = None
    """Label and y of a horizontal line."""

    def draw(self, axes: Axes) -> None:
        from cod_lightning import plots

        plots.layer_lines(axes, self.lines, self.ylabel, log=self.log, x=self.x, errors=self.errors)
        axes.set_xlabel(self.xlabel)
        if self.level is not None:
            colour = axes.xaxis.label.get_color()
            axes.axhline(self.level[1], color=colour, lw=1, ls=":", label=self.level[0])
        draw_points(axes, self.points)
        if len(self.lines) + len(self.points) + (self.level is not None) > 1:
            plots.legend_above(axes)


@dataclass(frozen=True)
class HeatMap:
    """A panel with a matrix [rows][columns] and a colour bar, rows upwards; None is left blank."""

    matrix: Sequence[Values]
    xlabel: str
    """Name of the columns."""
    ylabel: str
    """Name of the rows."""
    label: str
    """Name of the colours."""
    first: int = 1
    """Number of the first row and column."""
    log: bool = False
    """Use logarithmic colours; values that are not positive get the colour of the smallest positive value."""
    signed: bool = False
    """Use colours that are white at zero and reach equally far on both sides."""
    title: str = ""
    points: Mapping[str, Points] = field(default_factory=dict)
    """Single points by label."""
    limits: tuple[float, float] | None = None
    """Values of the first and the last colour; None: those of the matrix."""

    def draw(self, axes: Axes) -> None:
        from matplotlib.colors import LogNorm

        from cod_lightning import plots

        values = np.array(self.matrix, dtype=float)
        rows, columns = values.shape
        vmin, vmax = self.limits or (None, None)
        colours: dict[str, Any] = {"vmin": vmin, "vmax": vmax}
        if self.log and (values > 0).any():
            positive = values[values > 0]
            colours = {"norm": LogNorm(positive.min(), positive.max(), clip=True)}
        elif self.signed:
            limit = np.nanmax(np.abs(values))
            colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
        start = self.first - 0.5
        extent = (start, start + columns, start, start + rows)
        image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", extent=extent, **colours)
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, title=self.title)
        axes.grid(False)
        plots.integer_ticks(axes.xaxis)
        plots.integer_ticks(axes.yaxis)
        bar = axes.figure.colorbar(image, ax=axes, label=self.label)
        if "norm" in colours:
            plots.log_axis(bar.ax.yaxis)
        draw_points(axes, self.points)
        if self.points:
            plots.legend_above(axes)


@dataclass(frozen=True)
class Bars:
    """A panel with one bar for each name, with its value written above it."""

    ylabel: str
    bars: Mapping[str, float]

    def draw(self, axes: Axes) -> None:
        axes.bar_label(axes.bar(list(self.bars), list(self.bars.values()), width=0.6), fmt="%.3f")
        axes.set_ylabel(self.ylabel)
        axes.margins(y=0.1)


Panel = Lines | HeatMap | Bars


def draw_points(axes: Axes, points: Mapping[str, Points]) -> None:
    for label, (x, y) in points.items():
        axes.plot(x, y, "wo", mec="black", ms=4, zorder=3, label=label)


def draw_panels(panels: Sequence[Panel], title: str = "", shared_legend: bool = False) -> Figure:
    """Draw panels in rows of at most three, and four in two rows.

    The figure is at most 13 inches wide, so that its text stays readable where a page scales it to 800 pixels. With
    `shared_legend`, the legend of the first panel is that of all.
    """
    from cod_lightning import plots

    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    width = {1: 6.4, 2: 5.4}.get(columns, 13 / columns)
    with plots.style():
        figure, axes = plots.grid_figure(width * columns, 3.9 * rows, rows, columns)
        figure.suptitle(title)
        for place, panel in zip(axes.flat, panels, strict=False):
            panel.draw(place)
            if shared_legend and (legend := place.get_legend()):
                legend.remove()
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        if shared_legend:
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure
