"""What every measure returns: a small dataclass that is saved as JSON, CSV and a figure."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "csv", "png")]
    partial = [path.with_name(f".{path.name}.partial") for path in paths]
    partial[0].write_text(json.dumps(finite(asdict(result)), indent=1, allow_nan=False) + "\n")
    rows = result.rows()
    with open(partial[1], "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    result.plot().savefig(partial[2], dpi=120, format="png")
    for before, after in zip(partial, paths, strict=True):
        before.replace(after)
    return paths


def finite(value: Any) -> Any:
    """Numbers, or lists and dicts of them, with None for those that are infinite or not a number."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(width: float = 6.4, height: float = 4.0, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of its own, no state shared with pyplot, and its axes from left to right and top to bottom."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False).flat)


def layer_lines(
    axes: Axes,
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    log: bool = False,
    layers: Sequence[int] | None = None,
) -> None:
    """One line for each of `series`, over `layers`, or else over the layers from 1."""
    for name, values in series.items():
        axes.plot(layers or range(1, len(values) + 1), values, marker="o", ms=3, lw=1.4, label=name)
    axes.set(xlabel="layer", ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()


def heat_map(
    axes: Axes, matrix: Sequence[Sequence[float | None]], xlabel: str, ylabel: str, label: str, first: int = 1
) -> None:
    """A matrix with a colour bar; None is left blank. Rows, upwards, and columns are numbered from `first`."""
    values = torch.tensor([[float("nan") if value is None else value for value in row] for row in matrix])
    rows, columns = values.shape
    start = first - 0.5
    extent = (start, start + columns, start, start + rows)
    image = axes.imshow(values.numpy(), aspect="auto", origin="lower", interpolation="nearest", extent=extent)
    axes.set(xlabel=xlabel, ylabel=ylabel)
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
