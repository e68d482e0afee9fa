"""What every measure returns: a small dataclass that is saved as JSON, CSV and a figure."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from cod_lightning.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Progress = Callable[[int, int], object]
"""Called with (done, of how many) as a long measure goes on."""


class Result(Protocol):
    """A frozen dataclass of numbers, strings, and lists or dicts of them."""

    def rows(self) -> list[dict[str, Any]]:
        """A table, mostly one row for each layer."""
        ...

    def plot(self) -> Figure:
        """The figure that shows it."""
        ...


def save(result: Any, folder: Path, name: str) -> list[Path]:
    """Write `name`.json, .csv and .png into `folder`, which is made where it is missing; each whole or not at all.

    What is infinite or not a number is null in the JSON, which knows neither.

    Raises:
        UserError: they cannot be written.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "csv", "png")]
    partial = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial[0].write_text(json.dumps(finite(asdict(result)), indent=1, allow_nan=False) + "\n")
        rows = result.rows()
        with open(partial[1], "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        result.plot().savefig(partial[2], dpi=120, format="png")
        for before, after in zip(partial, paths, strict=True):
            before.replace(after)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error
    return paths


def restored(value: Any, kind: Any) -> Any:
    """What `save` wrote of a type: its JSON value, with NaN again for the null of a number that is not finite.

    Args:
        value: as `json.loads` gives it.
        kind: a result's class, or the type of one of its fields.

    Raises:
        ValueError: it is of another type, or lacks a field.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        types = get_type_hints(kind)
        if missing := types.keys() - value.keys():
            raise ValueError(f"{min(missing)} is missing")
        return {name: restored(value[name], hint) for name, hint in types.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return [restored(part, inner[0]) for part in value]
    if origin is dict and isinstance(value, dict):
        return {name: restored(part, inner[1]) for name, part in value.items()}
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return restored(value, next(one for one in inner if one is not NoneType))
    if kind is float and value is None:
        return math.nan
    if (value in inner) if origin is Literal else type(value) in ((int, float) if kind is float else (kind,)):
        return value
    raise ValueError(f"{value!r} is not {kind}")


def finite(value: Any) -> Any:
    """Numbers, or lists and dicts of them, with None for those that are infinite or not a number."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(title: str, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of its own, no state shared with pyplot, and its axes from left to right and top to bottom.

    It is no wider than 13 inches, so that its text can be read where a page makes it 800 pixels wide.
    """
    from matplotlib.figure import Figure

    width = {1: 6.4, 2: 5.4}.get(columns, 13 / columns)
    made = Figure(figsize=(width * columns, 3.9 * rows), layout="constrained")
    made.suptitle(title)
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def layer_lines(
    axes: Axes,
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    log: bool = False,
    layers: Sequence[int] | None = None,
    errors: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """One line for each of `series`, over `layers` or else the layers from 1, with bars for the errors that there are.

    On a logarithmic axis what is zero or negative has no place and is left out.
    """
    for name, values in series.items():
        error = (errors or {}).get(name)
        places = layers or range(1, len(values) + 1)
        shown = [value if value > 0 or not log else math.nan for value in values]
        axes.errorbar(places, shown, error, marker="o", ms=3, lw=1.4, capsize=2, label=name)
    axes.set(xlabel="layer", ylabel=ylabel, yscale="log" if log else "linear")
    grid(axes)


def grid(axes: Axes) -> None:
    """A grid, and layers marked by whole numbers."""
    axes.grid(alpha=0.3)
    whole(axes.xaxis)


def whole(axis: Axis) -> None:
    """Ticks at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend(axes: Axes, columns: int = 3) -> None:
    """Above the axes, where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
    axes.legend(**place, ncols=columns, frameon=False, handlelength=1.5, columnspacing=1.2)


def heat_map(
    axes: Axes,
    matrix: Sequence[Sequence[float | None]],
    xlabel: str,
    ylabel: str,
    label: str,
    first: int = 1,
    log: bool = False,
    signed: bool = False,
) -> None:
    """A matrix with a colour bar; None is left blank. Rows, upwards, and columns are numbered from `first`.

    Args:
        axes: to draw on.
        matrix: [rows][columns].
        xlabel: of the columns.
        ylabel: of the rows.
        label: of the colours.
        first: number of the first row and column.
        log: colours are logarithmic; what is not positive gets that of the least positive value.
        signed: white is zero, and both signs reach equally far.
    """
    from matplotlib.colors import LogNorm

    values = torch.tensor([[float("nan") if value is None else value for value in row] for row in matrix])
    rows, columns = values.shape
    start = first - 0.5
    colours: dict[str, Any] = {}
    if log and (positive := values[values > 0]).numel():
        colours = {"norm": LogNorm(float(positive.min()), float(positive.max()), clip=True)}
    elif signed:
        most = float(values.abs().max())
        colours = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    extent = (start, start + columns, start, start + rows)
    image = axes.imshow(
        values.numpy(), aspect="auto", origin="lower", interpolation="nearest", extent=extent, **colours
    )
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.xaxis, axes.yaxis):
        whole(axis)
    axes.figure.colorbar(image, ax=axes, label=label)


class Mean:
    """Running weighted mean of vectors, and the standard error of that mean, in float64."""

    def __init__(self) -> None:
        self.weight = self.total = self.squares = 0.0
        self.count = 0

    def add(self, values: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add one sample for each entry of the first dimension of `values`, weighted by `weight` likewise."""
        values = values.detach().double().cpu()
        weights = torch.as_tensor(weight, dtype=torch.float64).cpu().expand(len(values))
        shape = (-1, *[1] * (values.ndim - 1))
        self.weight = self.weight + float(weights.sum())
        self.total = self.total + (values * weights.view(shape)).sum(0)
        self.squares = self.squares + (values.square() * weights.view(shape)).sum(0)
        self.count += int((weights > 0).sum())

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total / self.weight)

    @property
    def error(self) -> Tensor:
        """Standard error; zero for a single sample."""
        variance = torch.as_tensor(self.squares / self.weight - (self.total / self.weight) ** 2).clamp(min=0)
        return (variance / max(self.count - 1, 1)).sqrt() if self.count > 1 else torch.zeros_like(variance)
