"""One style for every figure: of measures, of training and of the report.

Import this module inside the function that draws: matplotlib takes half a second to import.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DPI = 120
COLOURS = ("#00798c", "#d1495b", "#edae49", "#66a182", "#2e4057", "#8d6a9f", "#a0a0a0", "#7a4419")
DEPTH_COLOURS = "viridis"
"""Colour map over depth."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}

style = partial(rc_context, STYLE)
"""`with style():` or `@style()` around code that draws; the importing program's matplotlib settings stay unchanged."""


@style()
def png(figure: Figure) -> bytes:
    """The figure as a PNG file without a date or version: equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png", metadata={"Software": None})
    return file.getvalue()


def grid_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of this size in inches, without pyplot's global state, and its axes [rows, columns].

    `options` are those of `Figure.subplots`.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def layer_lines(
    axes: Axes,
    lines: Mapping[str, Sequence[float | None]],
    ylabel: str,
    *,
    log: bool = False,
    x: Sequence[float] | None = None,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw one line for each entry of `lines`, by its label in the legend.

    Args:
        axes: to draw on.
        lines: values of layers; None, and on a logarithmic axis a value that is not positive, leaves a gap.
        ylabel: the quantity and its unit.
        log: use a logarithmic y axis.
        x: layers of the values; None: layers 1, 2, ....
        errors: error bars of lines, by label.
    """
    for label, values in lines.items():
        shown = [math.nan if value is None or (log and value <= 0) else value for value in values]
        places = list(x or range(1, len(shown) + 1))[: len(shown)]
        axes.errorbar(places, shown, (errors or {}).get(label), marker="o", ms=3, capsize=2, label=label)
    axes.set(xlabel="layer", ylabel=ylabel, yscale="log" if log else "linear")
    integer_ticks(axes.xaxis)


def lines_by_depth(axes: Axes, steps: Sequence[int], values: Any, norm: Normalize | None = None) -> ScalarMappable:
    """Draw one line over the steps for each layer, coloured by depth, on a logarithmic axis.

    Args:
        axes: to draw on.
        steps: optimizer steps [measurements].
        values: [measurements, layers].
        norm: maps layers to colours; None: from the first layer to the last.

    Returns:
        What a colour bar needs.
    """
    values = np.asarray(values, dtype=float)
    colours = ScalarMappable(norm or Normalize(1, max(values.shape[1], 2)), DEPTH_COLOURS)
    for colour, line in zip(colours.to_rgba(np.arange(1, values.shape[1] + 1)), values.T, strict=True):
        axes.plot(steps, line, color=colour, lw=1, marker="." if len(steps) == 1 else None)
    axes.set(xlabel="step", yscale="log")
    return colours


def integer_ticks(axis: Axis) -> None:
    """Put ticks at whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing, in as many columns as fit."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    columns = min(max(60 // (longest + 6), 1), 4)
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(**place, ncols=columns, handlelength=1.5, columnspacing=1.2)
