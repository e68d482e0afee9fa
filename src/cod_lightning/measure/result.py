"""The result of a measure: a frozen dataclass that is saved as JSON, CSV and PNG.

Its fields are the keys of the JSON file. `series` and `panels` hold the contents of the table and of the figure as
data, so that a measure neither formats nor draws:

    @dataclass(frozen=True)
    class LogitLens(Result):
        tokens: int
        loss: list[float]
        kl: list[float]

        def panels(self) -> list[Panel]:
            return [
                Lines("loss (nats)", {"loss": self.loss}),
                Lines("divergence from the last layer (nats)", {"KL": self.kl}, log=True),
            ]

The table of this result has the columns layer, loss and kl. Override `series` if columns are computed from fields,
`rows` if a row is not a layer, and `title` if the figure names a score besides the model.
"""

from __future__ import annotations

import csv
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning.errors import UserError
from cod_lightning.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Progress = Callable[[int, int], object]
"""Called with (done, total) during a long measure; total is 0 if unknown."""
Values = Sequence[float | None]
Points = tuple[Sequence[float], Sequence[float]]
"""x and y of points."""


@dataclass(frozen=True)
class Lines:
    """A panel with lines over the layers."""

    ylabel: str
    """The quantity and its unit."""
    lines: Mapping[str, Values]
    """Values by label."""
    log: bool = False
    """Use a logarithmic y axis."""
    x: Sequence[float] | None = None
    """Layers of the values; None: 1, 2, ...."""
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
            axes.axhline(self.level[1], color="black", lw=1, ls=":", label=self.level[0])
        draw_points(axes, self.points)
        if len(self.lines) + len(self.points) + (self.level is not None) > 1:
            plots.legend_above(axes)


@dataclass(frozen=True)
class HeatMap:
    """A panel with a matrix [rows][columns], rows upwards; None is left blank."""

    matrix: Sequence[Values]
    xlabel: str
    ylabel: str
    label: str
    """Name of the colours."""
    first: int = 1
    """Number of the first row and column."""
    log: bool = False
    """Use logarithmic colours."""
    signed: bool = False
    """Use colours that are white at zero."""
    title: str = ""
    points: Mapping[str, Points] = field(default_factory=dict)
    """Single points by label."""

    def draw(self, axes: Axes) -> None:
        from cod_lightning import plots

        plots.heat_map(
            axes, self.matrix, self.xlabel, self.ylabel, self.label, first=self.first, log=self.log, signed=self.signed
        )
        axes.set_title(self.title)
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


@dataclass(frozen=True)
class Result(ABC):
    """Base of every result: numbers, strings, and lists or dicts of them."""

    model: str
    """Name of the measured model."""

    def series(self) -> dict[str, Sequence[Any]]:
        """Columns with one entry per layer, `layer` first: the table, and what a training run records of a measure.

        By default the fields that are lists; the field `layers`, where there is one, says which layers they are.
        """
        lists = {each.name: getattr(self, each.name) for each in fields(self)}
        lists = {name: values for name, values in lists.items() if isinstance(values, list)}
        layers = lists.pop("layers", None) or range(1, len(next(iter(lists.values()))) + 1)
        return {"layer": list(layers), **lists}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the table; by default one per layer, with the entries of `series`."""
        return table_rows(self.series())

    @abstractmethod
    def panels(self) -> list[Panel]:
        """Panels of the figure, from left to right."""

    def title(self) -> str:
        return self.model

    def plot(self) -> Figure:
        return draw_panels(self.panels(), self.title())


def draw_panels(panels: Sequence[Panel], title: str = "", shared_legend: bool = False) -> Figure:
    """Draw panels in rows of at most three; with `shared_legend`, the legend of the first is that of all.

    The figure is at most 13 inches wide, so that its text stays readable where a page scales it to 800 pixels.
    """
    from cod_lightning import plots

    columns = min(len(panels), 3)
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
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def save(result: Result, folder: Path, name: str) -> list[Path]:
    """Write `name`.json, .csv and .png into `folder`, which is created; each file whole or not at all.

    JSON has no NaN and no infinity: both become null.

    Raises:
        UserError: the folder cannot be written to.
    """
    from cod_lightning import plots

    rows, table = result.rows(), io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    contents = {
        "json": json.dumps(finite(asdict(result)), indent=1, allow_nan=False) + "\n",
        "csv": table.getvalue(),
        "png": plots.png(result.plot()),
    }
    paths = [folder / f"{name}.{suffix}" for suffix in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in zip(paths, contents.values(), strict=True):
            write_atomic(path, content)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error
    return paths


def table_rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Equally long columns as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def finite(value: Any) -> Any:
    """The value with None for every number in it that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
