"""Angular distance between the inputs of layers (Figures 2, 3 and 7; Gromov et al., arXiv 2403.17887)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, Images, ModelAdapter
from cod_lightning.measure.batches import hidden_states, iter_batches
from cod_lightning.measure.options import require_choice
from cod_lightning.measure.result import Mean, Progress, figure, heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Which = Literal["all", "last"]
Scale = Literal["raw", "released"]
CHUNK = 64
"""Tokens of which all layers exist in float64 at one time: 70 MB in a model of 32 layers and width 4096."""


@dataclass(frozen=True)
class AngularDistance:
    """d(l, l + n) for all layers l and distances n, from 0 (same direction) through 0.5 (orthogonal) to 1."""

    model: str
    distances: list[list[float | None]]
    """Of layers l and l + n at [n - 1][l - 1]; None where there is no layer l + n. L + 1 is the last block's output."""
    tokens: int
    """Number of tokens averaged over."""
    token: str
    normalise: str

    def rows(self) -> list[dict[str, Any]]:
        """One row for each pair of layers."""
        return [
            {"layer": layer, "n": n, "distance": distance}
            for n, row in enumerate(self.distances, start=1)
            for layer, distance in enumerate(row, start=1)
            if distance is not None
        ]

    def plot(self) -> Figure:
        """Layers to the right, distances between them upwards, as in Figure 2."""
        made, (axes,) = figure(self.model)
        label = "scaled for each n" if self.normalise == "released" else "angle / pi"
        heat_map(axes, self.distances, "layer", "layers further on, n", f"angular distance ({label})")
        return made


@torch.no_grad()
def angular_distance(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    tokens: int = 256 * 1024,
    token: Which = "all",
    normalise: Scale = "raw",
) -> AngularDistance:
    """d(l, l + n) = arccos(cos(x_l, x_{l+n})) / pi of the inputs x_l of the layers, averaged over tokens.

    x_{L+1}, what the last block puts out, is taken before the final norm.

    Args:
        model: in any dtype; angles are computed in float64.
        batches: tokens [rows, length] each.
        pad_id: tokens that do not count; they follow the others in a row.
        progress: called after each batch.
        tokens: stop after so many; the paper takes 256K.
        token: "all" of a row, as the paper says, or its "last" that is not a pad, as Gromov et al. do.
        normalise: "raw" angles, or scaled for each n as in the released code (see `released`).

    Raises:
        UserError: an option is unknown, or there is no token.
    """
    require_choice(Which, token=token)
    require_choice(Scale, normalise=normalise)
    if tokens < 1:
        raise UserError(f"tokens={tokens}: at least 1 is needed")
    depth, mean = model.depth, Mean()
    first, second = torch.triu_indices(depth + 1, depth + 1, offset=1)
    for batch, keep in iter_batches(model, batches, pad_id, progress):
        if mean.count >= tokens:
            break
        if token == "last" and isinstance(batch, Images):
            raise UserError("token=last: the last patch of an image is one like any other: token=all")
        keep = last(keep) if token == "last" else keep
        inputs = [x[: tokens - mean.count] for x in hidden_states(model, batch, keep)]
        for parts in zip(*(x.split(CHUNK) for x in inputs), strict=True):
            mean.add(angles(torch.stack(parts, dim=1))[:, first, second])
    pairs = dict(zip(zip(first.tolist(), second.tolist(), strict=True), mean.mean.tolist(), strict=True))
    matrix = [[pairs[layer, layer + n] for layer in range(depth + 1 - n)] for n in range(1, depth + 1)]
    if normalise == "released":
        matrix = [released(row) for row in matrix]
    padded = [[*row, *[None] * (depth - len(row))] for row in matrix]
    return AngularDistance(model.name, padded, mean.count, token, normalise)


def angles(x: Tensor) -> Tensor:
    """Angles over pi between vectors: [..., vectors, hidden] -> [..., vectors, vectors], in float64.

    As 2 arcsin(|u - v| / 2) of unit vectors: exactly 0 for equal ones, where an arccos is wrong by the root of the
    rounding error.
    """
    unit = F.normalize(x.double(), dim=-1)
    chord = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    return 2 / math.pi * (chord / 2).clamp(max=1).asin()


def last(keep: Tensor) -> Tensor:
    """Of a mask [rows, length] only the last entry of each row that is set, if any."""
    return keep & (keep.flip(-1).cumsum(-1).flip(-1) == 1)


def released(values: list[float]) -> list[float]:
    """Values clipped at their 1st and 99th percentile and scaled to [0, 1]; 0 where all are the same.

    So the released code makes its figures: their colours compare layers at the same n, and are no angles.
    """
    x = torch.tensor(values, dtype=torch.float64)
    x = x.clamp(x.quantile(0.01), x.quantile(0.99))
    span = x.max() - x.min()
    return ((x - x.min()) / span if span > 0 else torch.zeros_like(x)).tolist()
