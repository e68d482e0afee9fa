"""The result of a measure: a frozen dataclass that is saved as JSON, CSV, PNG and PDF.

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
`rows` if a row is not a layer, and `title` if the figure names a score.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_lightning.errors import UserError, os_message
from cod_lightning.files import write_atomic
from cod_lightning.measure.panels import Panel, draw_panels
from cod_lightning.page import Table, html_fragment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Progress = Callable[[int, int], object]
"""Called with (done, total) during a long measure."""


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
        """The name of the class in words, and the model."""
        from cod_lightning import plots

        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(self).__name__)
        return f"{words}: {plots.run_labels([self.model])[self.model]}"

    def plot(self, ax: Any = None) -> Figure:
        """Draw the panels.

        Args:
            ax: axes to draw on, one for each panel, or a single one, or an array of them; None: a new figure.

        Raises:
            UserError: the number of axes is not that of the panels.
        """
        panels = self.panels()
        if ax is None:
            return draw_panels(panels, self.title())
        axes = list(np.ravel(ax if hasattr(ax, "figure") else list(ax)))
        if len(axes) != len(panels):
            raise UserError(f"ax: {len(axes)} axes for {len(panels)} panels")
        for place, panel in zip(axes, panels, strict=True):
            panel.draw(place)
        return axes[0].get_figure(root=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as in the JSON file: numbers that are not finite are None."""
        return finite_or_none(asdict(self))

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write `name`.json, .csv, .png and .pdf into `folder`, which is created; each file whole or not at all.

        JSON has no NaN and no infinity: both become null.

        Raises:
            UserError: the folder cannot be written to.
        """
        from cod_lightning import plots

        folder, rows, table = Path(folder), self.rows(), io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        figure = self.plot()
        contents = {
            "json": json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n",
            "csv": table.getvalue(),
            **{suffix: plots.figure_bytes(figure, suffix) for suffix in plots.FORMATS},
        }
        paths = [folder / f"{name}.{suffix}" for suffix in contents]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, content in zip(paths, contents.values(), strict=True):
                write_atomic(path, content)
        except OSError as error:
            raise UserError(os_message(error, folder)) from error
        return paths

    def _repr_html_(self) -> str:
        """Figure and table, as a notebook shows a result; a long or wide table scrolls."""
        from cod_lightning import plots

        name = "result.png"
        picture = html_fragment(f"![{self.title()}]({name})", {name: plots.figure_bytes(self.plot())})
        return f'{picture}<div style="max-height: 30em; overflow: auto">{html_fragment(self.markdown(), {})}</div>'

    def markdown(self) -> str:
        """The table as Markdown, with four digits a number."""
        rows = self.rows()
        head = list(dict.fromkeys(key for row in rows for key in row))
        return str(Table(head, [[format_cell(row.get(key, "")) for key in head] for row in rows]))


def format_cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table_rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Equally long columns as rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def finite_or_none(value: Any) -> Any:
    """The value with None for every number in it that is infinite or NaN."""
    if isinstance(value, dict):
        return {key: finite_or_none(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
