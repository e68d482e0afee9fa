"""Angular distance between the inputs of layers (Figures 2, 3 and 7; Gromov et al., arXiv 2403.17887)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import RunningMean, hidden_states, iter_batches
from cod_lightning.measure.options import Positive
from cod_lightning.measure.panels import HeatMap, Panel
from cod_lightning.measure.result import Progress, Result

TokenChoice = Literal["all", "last"]
Normalisation = Literal["raw", "released"]
CHUNK = 64
"""Tokens whose hidden states of all layers are converted to float64 at once: 70 MB for 32 layers of width 4096."""


@dataclass(frozen=True)
class AngularDistance(Result):
    """d(l, l + n) for all layers l and distances n, from 0 (same direction) through 0.5 (orthogonal) to 1."""

    distances: list[list[float | None]]
    """Distance between l and l + n at `[n - 1][l - 1]`; None if there is no layer l + n. Layer L + 1 is the output."""
    tokens: int
    """Number of tokens in the average."""
    token: str
    normalise: str

    def series(self) -> dict[str, Sequence[Any]]:
        """The distance of each layer to the next."""
        return {"layer": range(1, len(self.distances) + 1), "distance": self.distances[0]}

    def rows(self) -> list[dict[str, Any]]:
        """One row per pair of layers."""
        return [
            {"layer": layer, "n": n, "distance": distance}
            for n, row in enumerate(self.distances, start=1)
            for layer, distance in enumerate(row, start=1)
            if distance is not None
        ]

    def panels(self) -> list[Panel]:
        """Layers to the right, distances between them upwards, as in Figure 2."""
        unit = "scaled for each n" if self.normalise == "released" else "angle / pi"
        return [HeatMap(self.distances, "layer", "layers further on, n", f"angular distance ({unit})")]


def angular_distance(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    tokens: Positive = 256 * 1024,
    token: TokenChoice = "all",
    normalise: Normalisation = "raw",
) -> AngularDistance:
    """Average d(l, l + n) = arccos(cos(x_l, x_{l+n})) / pi of the layers' inputs x_l over tokens.

    x_{L+1} is the last block's output before the final norm.

    Options:
        tokens: maximum number of tokens; the paper uses 256K.
        token: "all" of a sequence, as the paper says, or the "last" before the padding, as Gromov et al. do.
        normalise: "raw" angles, or "released": for each n clipped at the 1st and 99th percentile and scaled to [0, 1],
            as in the released code, so that colours compare layers at the same n.
    """
    if token == "last" and model.reads_images:
        raise UserError("token=last does not apply to the patches of an image; use token=all")
    depth, mean = model.depth, RunningMean()
    for batch, mask in iter_batches(model, batches, pad_id, progress):
        if mean.count >= tokens:
            break
        chosen = last_token(mask) if token == "last" else mask
        states = [x[: tokens - mean.count] for x in hidden_states(model, batch, mask, chosen)]
        for chunk in zip(*(x.split(CHUNK) for x in states), strict=True):
            mean.add(angles(torch.stack(chunk, dim=1)))
    matrix = [mean.mean.diagonal(n).tolist() for n in range(1, depth + 1)]
    if normalise == "released":
        matrix = [scale_as_released(row, depth) for row in matrix]
    padded = [[*row, *[None] * (depth - len(row))] for row in matrix]
    return AngularDistance(model.name, padded, mean.count, token, normalise)


def angles(x: Tensor) -> Tensor:
    """Return angles over pi between vectors [..., vectors, hidden] -> [..., vectors, vectors].

    In float64. Angles below 4e-8, by which rounding to float32 turns a vector, are 0.
    """
    unit = F.normalize(x.double(), dim=-1)
    cosine = unit @ unit.mT
    return cosine.masked_fill(cosine > 1 - 1e-15, 1).clamp(min=-1).acos() / math.pi


def last_token(mask: Tensor) -> Tensor:
    """Keep only the last True of each sequence in a mask [batch, length]."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)


def scale_as_released(distances: Sequence[float], depth: int) -> list[float]:
    """Clip the distances of one n at their 1st and 99th percentile and scale them to [0, 1]; 0 if all are equal.

    The figures of the released code are scaled like this: their colours compare layers at the same n and are no angles.
    The code has a distance of zero for each of `depth` layers that has no n-th layer after it, and scales it too.
    """
    x = torch.tensor([*distances, *[0.0] * (depth - len(distances))], dtype=torch.float64, device="cpu")
    x = x.clamp(x.quantile(0.01), x.quantile(0.99))
    span = x.max() - x.min()
    scaled = (x - x.min()) / span if span > 0 else torch.zeros_like(x)
    return scaled[: len(distances)].tolist()
