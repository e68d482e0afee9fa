"""One style for every figure: of measures, of training and of the report.

Import this module inside the function that draws: matplotlib takes half a second to import.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullFormatter

DPI = 120
FORMATS = ("png", "pdf")
"""Formats of a saved figure."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#888888")
"""Distinct for the colour-blind (Okabe and Ito, 2008), without its yellow."""
MARKERS = "os^DvP*X"
DEPTH_COLOURS = "viridis"
"""Colour map over depth."""
STRATEGY_STYLES = {
    "lns": ("LNS", COLOURS[0]),
    "pre_ln": ("Pre-LN", COLOURS[1]),
    "post_ln": ("Post-LN", COLOURS[2]),
    "mix_ln": ("Mix-LN", COLOURS[3]),
    "deep_norm": ("DeepNorm", COLOURS[4]),
    "sandwich_ln": ("Sandwich-LN", COLOURS[5]),
    "lns_scaled_init": ("LNS + Scaled Initialization", COLOURS[6]),
    "skip_init": ("SkipInit", COLOURS[7]),
    "group_ln": ("Group-LN", "#332288"),
    "admin": ("Admin", "#882255"),
    "scaled_init": ("Scaled Initialization", "#44aa99"),
    "ds_init": ("Depth-Scaled Initialization", "#aa4499"),
    "layer_scale": ("LayerScale", "#8c510a"),
    "peri_ln": ("Peri-LN", "#999933"),
    "gpas": ("GPAS", "#117733"),
    "lns_learnable": ("LNS, learnable", "#88ccee"),
    "deep_norm_released": ("DeepNorm, released constants", "#661100"),
    "lns_as_rates": ("LNS as rates", "#3182bd"),
    "lns_as_norm_weights": ("LNS as norm weights", "#6baed6"),
    "lns_init_only": ("LNS, initial weights only", "#e7ba52"),
    "lns_rate_only": ("LNS, rates only", "#8c6d31"),
    "complete_p": ("CompleteP", "#843c39"),
    "depth_mup": ("Depth-muP", "#d6616b"),
    "olmo2": ("OLMo 2", "#31a354"),
    "depth_scaled_sandwich": ("Depth-scaled sandwich", "#74c476"),
    "keel": ("KEEL", "#393b79"),
    "deep_loop": ("DeepLoop", "#6b6ecf"),
    "minicpm": ("MiniCPM", "#e6550d"),
    "granite": ("Granite", "#636363"),
    "esm_c": ("ESM C", "#756bb1"),
    "norm_preserving": ("Norm-preserving", "#9e9ac8"),
    "rezero": ("ReZero", "#7b4173"),
    "nf_residual": ("NF residual", "#ce6dbd"),
    "hybrid_norm": ("HybridNorm", "#5254a3"),
    "span_norm": ("SpanNorm", "#b5cf6b"),
    "qk_norm": ("QK-norm", "#17becf"),
    "x0_mix": ("x0 mixing", "#637939"),
    "dyt": ("DyT", "#a6761d"),
    "derf": ("Derf", "#1b9e77"),
    "bhyt": ("BHyT", "#7570b3"),
    "value_residual": ("Value residual", "#cedb9c"),
    "pro_res": ("ProRes", "#bd9e39"),
}
"""Label and colour of a strategy, the same in every figure."""
RUN = re.compile(r"(\w+)-seed(\d+)-[0-9a-f]{8}")
"""Name of a run: strategy, seed and id."""
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
    "pdf.fonttype": 42,
}

style = partial(matplotlib.style.context, ["default", STYLE])
"""`with style():` or `@style()` around code that draws; the importing program's matplotlib settings do not matter and
stay unchanged."""
METADATA = {
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
"""Formats of files, and what they leave out: equal figures give equal bytes."""


@style()
def figure_bytes(figure: Figure, suffix: str = "png") -> bytes:
    """The figure as a PNG or PDF file without a date or version; PDF files embed their fonts."""
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format=suffix, metadata=METADATA[suffix])
    return file.getvalue()


def run_labels(names: Iterable[str]) -> dict[str, str]:
    """Labels of models by their names: "LNS, seed 1" for lns-seed1-0a1b2c3d, other names as they are.

    Runs of the same strategy and seed are numbered.
    """
    labels, count = {}, Counter[str]()
    for name in names:
        labels[name] = name
        if match := RUN.fullmatch(name):
            label = f"{STRATEGY_STYLES.get(match[1], (match[1], None))[0]}, seed {match[2]}"
            count[label] += 1
            labels[name] = f"{label} ({count[label]})" if count[label] > 1 else label
    return labels


def strategy_colour(name: str) -> str | None:
    """The colour of a strategy, or of a run by its name; None for other names."""
    match = RUN.fullmatch(name)
    return STRATEGY_STYLES.get(match[1] if match else name, (name, None))[1]


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
    x: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw one line for each entry of `lines`, by its label in the legend.

    Args:
        axes: to draw on.
        lines: values of layers; None, and on a logarithmic axis a value that is not positive, leaves a gap.
        ylabel: the quantity and its unit.
        log: use a logarithmic y axis.
        x: layers of the values, for all lines or by label; None: layers 1, 2, ....
        errors: error bars of lines, by label.
    """
    labels, known = run_labels(lines), [strategy_colour(name) for name in lines]
    free = [colour for colour in COLOURS if colour not in known] or list(COLOURS)
    whole = True
    for index, (name, values) in enumerate(lines.items()):
        shown = [math.nan if value is None or (log and value <= 0) else value for value in values]
        own = x[name] if isinstance(x, Mapping) else x
        places = list(own or range(1, len(shown) + 1))[: len(shown)]
        whole = whole and all(float(place).is_integer() for place in places)
        options: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "ms": 3, "capsize": 2}
        if any(known):
            options["color"] = known[index] or free[known[:index].count(None) % len(free)]
            options["ls"] = ("-", "--", ":", "-.")[known[:index].count(known[index] or "") % 4]
        axes.errorbar(places, shown, (errors or {}).get(name), label=labels[name], **options)
    axes.set(xlabel="layer", ylabel=ylabel)
    if log:
        log_axis(axes.yaxis)
    if whole:
        integer_ticks(axes.xaxis)


def lines_by_depth(axes: Axes, steps: Sequence[int], values: Any, norm: Normalize | None = None) -> ScalarMappable:
    """Draw one line over the steps for each layer, coloured by depth, on a logarithmic axis.

    Args:
        axes: to draw on.
        steps: optimizer steps [measurements].
        values: [measurements, layers].
        norm: maps layers to colours; None: from the first layer to the last.

    Returns:
        The colours, for `depth_bar`.
    """
    values = np.asarray(values, dtype=float)
    colours = ScalarMappable(norm or Normalize(1, max(values.shape[1], 2)), DEPTH_COLOURS)
    for colour, line in zip(colours.to_rgba(np.arange(1, values.shape[1] + 1)), values.T, strict=True):
        axes.plot(steps, line, color=colour, lw=1, marker="." if len(steps) == 1 else None)
    axes.set(xlabel="step")
    integer_ticks(axes.xaxis)
    log_axis(axes.yaxis)
    return colours


def depth_bar(figure: Figure, colours: ScalarMappable, axes: Any) -> None:
    """Add the colour bar of layers beside the axes; the first and the last layer are labelled."""
    first, last = colours.get_clim()
    figure.colorbar(colours, ax=axes, label="layer", ticks=np.unique(np.linspace(first, last, 5).round()))


class PlainNumbers(Formatter):
    """Labels such as 0.1, 1 and 1,000, or powers of ten if a number on the axis is very small or large."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        if all(value == 0 or 1e-4 <= abs(value) < 1e6 for value in values):
            return [f"{value:,.6g}".replace("-", "\N{MINUS SIGN}") for value in values]
        powers = LogFormatterSciNotation()
        powers.create_dummy_axis()
        return ["0" if value == 0 else powers(value) for value in values]


class Decades(LogLocator):
    """Ticks at powers of ten; over less than two decades also at 2 and 5, and over less than half a decade evenly."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        if vmax < 3 * vmin:
            return MaxNLocator(5).tick_values(vmin, vmax)
        self.set_params(subs=(1, 2, 5) if vmax < 100 * vmin else (1,))
        return super().tick_values(vmin, vmax)


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, with plain labels that do not overlap."""
    set_scale = axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale
    set_scale("log")
    axis.set_major_locator(Decades(numticks=8))
    axis.set_major_formatter(PlainNumbers())
    axis.set_minor_formatter(NullFormatter())


def integer_ticks(axis: Axis) -> None:
    """Put ticks at whole numbers only, with separators of thousands."""
    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axis.set_major_formatter(PlainNumbers())


def legend_above(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing, in as many columns as fit."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    columns = min(max(60 // (longest + 6), 1), 4)
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(**place, ncols=columns, handlelength=1.5, columnspacing=1.2)
