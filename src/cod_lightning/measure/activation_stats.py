"""Statistics of the residual stream and of what attention and FFN add to it, layer by layer (Figures 4 and 9).

The paper does not define its "output variance". Here it is the unbiased variance over the hidden dimension of each
token, averaged over tokens, as in its authors' later code. In trained models a few tokens, often the first of a
sequence, may carry most of that mean: the median and the 95th percentile over tokens say what the others do, and
`massive_activations` names the channels that cause it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import RunningMean, at_least_fp32, iter_batches
from cod_lightning.measure.massive_activations import MAGNITUDE, MassiveActivation, MassiveActivationFinder
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.registry import PLACES
from cod_lightning.measure.result import Progress, Result, table_rows

TOP = 0.01
"""Share of the tokens with the largest variance in `Statistics.variance_top_share`."""


@dataclass(frozen=True)
class Statistics:
    """One value per layer, in order: each statistic is taken over the hidden dimension and averaged over tokens.

    Results of earlier versions have no quantiles: their lists are empty.
    """

    variance: list[float]
    """Unbiased variance, mean over tokens: the paper's."""
    variance_error: list[float]
    """Standard error of the mean variance, as if tokens were independent."""
    mean: list[float]
    rms: list[float]
    """Root mean square."""
    kurtosis: list[float]
    """E[(x - m)^4] / E[(x - m)^2]^2: 3 for a Gaussian, at least 1; 0 for a token of variance zero."""
    maximum: list[float]
    """Largest absolute value of any token, not averaged."""
    variance_median: list[float] = field(default_factory=list)
    """Median over tokens of the variance."""
    variance_p95: list[float] = field(default_factory=list)
    """95th percentile over tokens of the variance."""
    variance_top_share: list[float] = field(default_factory=list)
    """Share of the mean variance that the 1% of tokens with the largest variance carry, at least one token; 0 if all
    variances are zero."""
    variance_first: list[float] = field(default_factory=list)
    """Mean variance of the first token of each sequence."""
    variance_later: list[float] = field(default_factory=list)
    """Mean variance of all other tokens; NaN without any."""


@dataclass(frozen=True)
class ActivationStats(Result):
    """Statistics of each block's output, and of the branches of attention and FFN."""

    tokens: int
    residual: Statistics
    attention: Statistics
    ffn: Statistics
    massive: list[MassiveActivation] = field(default_factory=list)
    """The channels with massive activations in the residual stream, largest first, at most `MAX_CHANNELS`."""
    massive_channels: int = 0
    """The number of such channels."""

    def series(self) -> dict[str, Sequence[Any]]:
        layers = {"layer": range(1, len(self.residual.variance) + 1)}
        return layers | {f"{place}_{name}": values for place in PLACES for name, values in self.columns(place).items()}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each place in each layer."""
        tables = [table_rows(self.columns(place)) for place in PLACES]
        return [
            {"layer": layer, "of": place, **row}
            for layer, rows in enumerate(zip(*tables, strict=True), start=1)
            for place, row in zip(PLACES, rows, strict=True)
        ]

    def panels(self) -> list[Panel]:
        labels = {"variance": "mean variance", "kurtosis": "kurtosis", "maximum": "largest absolute value"}
        over_tokens = {
            "mean": self.residual.variance,
            "median": self.residual.variance_median,
            "95th percentile": self.residual.variance_p95,
            "first tokens": self.residual.variance_first,
        }
        return [
            *(
                Lines(label, {place: getattr(getattr(self, place), name) for place in PLACES}, log=name != "kurtosis")
                for name, label in labels.items()
            ),
            Lines(
                "variance of the residual stream", {name: each for name, each in over_tokens.items() if each}, log=True
            ),
        ]

    def columns(self, place: str) -> dict[str, list[float]]:
        """The statistics at a place that are there."""
        return {name: values for name, values in vars(getattr(self, place)).items() if values}


@torch.no_grad()
def activation_stats(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> ActivationStats:
    """The variance of the residual stream and of both branches after every layer (Figures 4, 8 and 9), and more.

    It is the unbiased variance over the hidden dimension of each token, averaged over tokens. Statistics are in
    float32, or float64 if the model is, and sums in float64.

    The variance of every token at every place and layer is in memory, but no activations of more than one batch.
    """
    places = [(place, layer) for place in PLACES for layer in range(1, model.depth + 1)]
    means, largest = RunningMean(), torch.zeros(len(places), device="cpu")
    variances: list[Tensor] = []
    first: list[Tensor] = []
    massive = MassiveActivationFinder()
    # Of the current batch; the next one overwrites every entry.
    found: dict[tuple[str, int], Tensor] = {}
    maxima: dict[tuple[str, int], Tensor] = {}

    def advance(done: int, total: int) -> None:
        massive.rows += len(batches[done - 1])  # also of padding alone, which is not run
        if progress is not None:
            progress(done, total)

    for batch, mask in iter_batches(model, batches, pad_id, advance):

        def hook(name: str, layer: int, x: Tensor, batch: Batch = batch, mask: Tensor = mask) -> None:
            if name not in PLACES:
                return
            tokens = at_least_fp32(x.flatten(0, 1) if mask.all() else x[mask])
            found[name, layer], maxima[name, layer] = token_statistics(tokens), tokens.abs().amax()
            if name == "residual" and maxima[name, layer] > MAGNITUDE:
                massive.add(layer, x, mask, batch)

        model.run(batch, hook, mask)
        statistics = torch.stack([found[place] for place in places], dim=1)
        means.add(statistics)
        variances.append(statistics[:, :, 0].double().cpu())
        largest = torch.maximum(largest, torch.stack([maxima[place] for place in places]).cpu())
        first.append((mask & (mask.cumsum(1) == 1))[mask].cpu())
    is_first, by_token = torch.cat(first).numpy(), torch.cat(variances).numpy()

    def statistics_at(place: str) -> Statistics:
        at = [index for index, (name, _) in enumerate(places) if name == place]
        variance, mean, rms, kurtosis = means.mean[at].T.tolist()
        spread = [summarise_tokens(by_token[:, index], is_first) for index in at]
        columns = [list(column) for column in zip(*spread, strict=True)]
        errors, maximum = means.error[at, 0].tolist(), largest[at].tolist()
        return Statistics(variance, errors, mean, rms, kurtosis, maximum, *columns)

    channels = massive.largest_channels(model.decode)
    return ActivationStats(model.name, len(is_first), *map(statistics_at, PLACES), *channels)


def summarise_tokens(variance: np.ndarray, is_first: np.ndarray) -> tuple[float, ...]:
    """Median, 95th percentile, share of the largest `TOP`, and means of the first and the other tokens [tokens]."""
    median, p95 = np.quantile(variance, [0.5, 0.95]).tolist()
    top = max(round(TOP * len(variance)), 1)
    total = float(variance.sum())
    share = float(np.partition(variance, -top)[-top:].sum()) / total if total else 0.0
    others = variance[~is_first]
    return median, p95, share, float(variance[is_first].mean()), float(others.mean()) if len(others) else math.nan


def token_variance(x: Tensor) -> Tensor:
    """Unbiased variance over the hidden dimension, at least in float32: [..., hidden] -> [...]."""
    return at_least_fp32(x.detach()).var(-1)


def token_statistics(x: Tensor) -> Tensor:
    """Unbiased variance, mean, RMS and kurtosis over the last dimension: [..., hidden] -> [..., 4]."""
    size = x.shape[-1]
    mean = x.mean(-1, keepdim=True)
    squares = (x - mean).square_()
    moment = squares.mean(-1, keepdim=True)
    # Divide before the fourth power, which overflows from 4e9 in float32.
    kurtosis = squares.div_(moment.clamp(min=torch.finfo(x.dtype).tiny)).square_().mean(-1)
    mean, moment = mean.squeeze(-1), moment.squeeze(-1)
    return torch.stack([moment * (size / (size - 1)), mean, (moment + mean.square()).sqrt(), kurtosis], dim=-1)
