"""Variance, mean, size and outliers of the residual stream and of what attention and FFN add to it, layer by layer.

The variance is the one of `layers.py`, over the hidden dimension of each token; here it is averaged over any number of
tokens, with its standard error, for any model that is `ModelAdapter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import at_least_fp32, iter_batches
from cod_lightning.measure.result import Lines, Mean, Panel, Progress, Result, table_rows

PLACES = ("residual", "attention", "ffn")


@dataclass(frozen=True)
class Statistics:
    """One number per layer, first layer first; taken over the hidden dimension, averaged over tokens."""

    variance: list[float]
    """Unbiased variance."""
    variance_error: list[float]
    """Standard error of the variance's mean over tokens, as if these were independent."""
    mean: list[float]
    rms: list[float]
    """Root mean square."""
    kurtosis: list[float]
    """E[(x - m)^4] / E[(x - m)^2]^2: 3 for a Gaussian, at least 1; 0 for a token that does not vary."""
    maximum: list[float]
    """Largest absolute value of any token, not averaged."""


@dataclass(frozen=True)
class Moments(Result):
    """Statistics of the stream behind each block, and of what its attention and its FFN add (Figures 4 and 9)."""

    tokens: int
    residual: Statistics
    attention: Statistics
    ffn: Statistics

    def series(self) -> dict[str, Sequence[Any]]:
        layers = {"layer": range(1, len(self.residual.variance) + 1)}
        return layers | {f"{place}_{name}": values for place in PLACES for name, values in vars(self.at(place)).items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each place in each layer."""
        tables = [table_rows(vars(self.at(place))) for place in PLACES]
        return [
            {"layer": layer, "of": place, **row}
            for layer, rows in enumerate(zip(*tables, strict=True), start=1)
            for place, row in zip(PLACES, rows, strict=True)
        ]

    def panels(self) -> list[Panel]:
        labels = {"variance": "variance", "kurtosis": "kurtosis", "maximum": "largest absolute value"}
        return [
            Lines(label, {place: getattr(self.at(place), name) for place in PLACES}, log=name != "kurtosis")
            for name, label in labels.items()
        ]

    def at(self, place: str) -> Statistics:
        return getattr(self, place)


@torch.no_grad()
def moments(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Moments:
    """Measure every layer of `model`; statistics are in float32, or float64 where the model is, sums in float64.

    Args:
        model: in any dtype.
        batches: tokens [rows, length] each.
        pad_id: tokens that do not count; they follow the others in a row.
        progress: called after each batch.

    Raises:
        UserError: there is no token.
    """
    means = {(what, layer): Mean() for what in PLACES for layer in range(1, model.depth + 1)}
    largest = dict.fromkeys(means, 0.0)
    count = 0
    for tokens, keep in iter_batches(model, batches, pad_id, progress):

        def hook(name: str, layer: int, x: Tensor, keep: Tensor = keep) -> None:
            if name in PLACES:
                x = at_least_fp32(x[keep])
                means[name, layer].add(token_moments(x))
                largest[name, layer] = max(largest[name, layer], float(x.abs().max()))

        model.logits(tokens, hook)
        count += int(keep.sum())

    def statistics(what: str) -> Statistics:
        layers = [means[what, layer] for layer in range(1, model.depth + 1)]
        variance, mean, rms, kurtosis = torch.stack([layer.mean for layer in layers], dim=1).tolist()
        errors = [float(layer.error[0]) for layer in layers]
        maximum = [largest[what, layer] for layer in range(1, model.depth + 1)]
        return Statistics(variance, errors, mean, rms, kurtosis, maximum)

    return Moments(model.name, count, *(statistics(what) for what in PLACES))


def token_moments(x: Tensor) -> Tensor:
    """Unbiased variance, mean, RMS and kurtosis over the last dimension: [..., hidden] -> [..., 4]."""
    mean = x.mean(-1, keepdim=True)
    deviation = (x - mean).square().mean(-1, keepdim=True).sqrt()
    # The quotient comes before the fourth power, which in float32 overflows from 4e9.
    kurtosis = torch.where(deviation > 0, (x - mean) / deviation, 0).pow(4).mean(-1)
    return torch.stack([x.var(-1), mean.squeeze(-1), x.square().mean(-1).sqrt(), kurtosis], dim=-1)
