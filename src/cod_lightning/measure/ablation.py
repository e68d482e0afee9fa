"""Ablation of blocks: the loss with blocks removed or swapped, and the causal score.

Removal is the paper's performance drop (Figure 2), here of the loss. Swaps and causal score follow "When Does Sparsity
Mitigate the Curse of Depth in LLMs" (arXiv 2603.15389). The model is not trained afterwards, and the remaining blocks
keep their gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import at_least_fp32, error_over_sequences, iter_batches
from cod_lightning.measure.options import UpToDepth
from cod_lightning.measure.panels import HeatMap, Lines, Panel
from cod_lightning.measure.reordering import (
    LOSS_INCREASE,
    AblationResult,
    changed_losses,
    loss_columns,
    sequence_losses,
)
from cod_lightning.measure.result import Progress, Result, table_rows

Pairs = Literal["neighbours", "all"]


@dataclass(frozen=True)
class Removal(AblationResult):
    """Loss with each block removed alone."""

    losses: list[float]
    """Loss without block l at [l - 1]."""
    error: list[float] | None = None
    """Standard error of the rise of the loss over sequences, each with and without the block; NaN for one sequence.
    None: not measured, in results before version 0.2.0."""

    def series(self) -> dict[str, Sequence[Any]]:
        columns = loss_columns(self.losses, self.loss)
        errors = {} if self.error is None else {"error": self.error}
        return {"layer": range(1, len(self.losses) + 1), **columns, **errors}

    def panels(self) -> list[Panel]:
        errors = {} if self.error is None else {"removed": self.error}
        return [Lines(LOSS_INCREASE, {"removed": self.series()["delta_loss"]}, errors=errors)]


@dataclass(frozen=True)
class RunRemoval(AblationResult):
    """Loss with n contiguous blocks removed."""

    sizes: list[int]
    """The numbers n of removed blocks."""
    losses: list[list[float]]
    """Loss without blocks l to l + n - 1 at `[index of n][l - 1]`."""

    def series(self) -> dict[str, Sequence[Any]]:
        """One column per size; a larger size has fewer entries."""
        columns = zip(self.sizes, self.losses, strict=True)
        return {f"delta_loss_{n}": loss_columns(losses, self.loss)["delta_loss"] for n, losses in columns}

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"n": n, "first": first, **row}
            for n, losses in zip(self.sizes, self.losses, strict=True)
            for first, row in enumerate(table_rows(loss_columns(losses, self.loss)), start=1)
        ]

    def panels(self) -> list[Panel]:
        lines = {f"n = {n}": losses for n, losses in zip(self.sizes, self.series().values(), strict=True)}
        return [Lines(LOSS_INCREASE, lines, xlabel="first layer removed")]


@dataclass(frozen=True)
class Swaps(AblationResult):
    """Loss with two blocks swapped."""

    pairs: list[tuple[int, int]]
    """The swapped layers, counting from 1."""
    losses: list[float]
    """Loss with each pair swapped."""
    scores: list[float]
    """|loss - loss after| / loss of each pair."""
    score: float
    """Permutation score: mean over pairs."""

    def series(self) -> dict[str, Sequence[Any]]:
        first, second = zip(*self.pairs, strict=True)
        return {"layer": first, "with": second, **loss_columns(self.losses, self.loss), "score": self.scores}

    def title(self) -> str:
        return f"{super().title()}, permutation score {self.score:.3g}"

    def panels(self) -> list[Panel]:
        """A line if all pairs are neighbours, else a map."""
        label = "|loss - loss when swapped| / loss"
        if all(second == first + 1 for first, second in self.pairs):
            return [Lines(label, {"swapped": self.scores}, log=True, xlabel="layer swapped with the next")]
        scores = dict(zip(self.pairs, self.scores, strict=True))
        layers = range(1, max(second for _, second in self.pairs) + 1)
        matrix = [[scores.get((first, second)) for first in layers] for second in layers]
        return [HeatMap(matrix, "layer", "swapped with layer", label, log=True)]


@dataclass(frozen=True)
class CausalScore(Result):
    """Relative change of the update of each layer when an earlier layer is skipped."""

    tokens: int
    effects: list[list[float | None]]
    """Effect of skipping layer s on layer l at `[s - 1][l - 1]`; None if l <= s, or if the update of l is zero."""
    scores: list[float | None]
    """Mean effect of skipping layer s at [s - 1]; None if there is no later layer."""
    score: float | None
    """Mean over all pairs."""

    def series(self) -> dict[str, Sequence[Any]]:
        return {"layer": range(1, len(self.scores) + 1), "score": self.scores}

    def rows(self) -> list[dict[str, Any]]:
        """One row per skipped layer, with its effect on every later layer."""
        return [
            {"skipped": layer, "score": score, **{f"on_{later}": effect for later, effect in enumerate(row, start=1)}}
            for layer, (score, row) in enumerate(zip(self.scores, self.effects, strict=True), start=1)
        ]

    def title(self) -> str:
        return super().title() + ("" if self.score is None else f", causal score {self.score:.3g}")

    def panels(self) -> list[Panel]:
        return [HeatMap(self.effects, "later layer", "layer skipped", "relative change of the update", log=True)]


def removal(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Removal:
    """Remove each block alone: the paper's performance drop (Figures 2, 3 and 7), here of the loss in nats a token.

    The model is not trained afterwards, and the other blocks keep their gains.
    """
    layers = range(1, model.depth + 1)
    orders = [layers, *([other for other in layers if other != layer] for layer in layers)]
    sums, counts = sequence_losses(model, orders, batches, pad_id, progress)
    loss, *losses = (sums.sum(1) / counts.sum()).tolist()
    errors = [error_over_sequences(without - sums[0], counts) for without in sums[1:]]
    return Removal(model.name, int(counts.sum()), loss, losses, errors)


def run_removal(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    sizes: UpToDepth = None,
) -> RunRemoval:
    """Remove n contiguous blocks, from every first block.

    Options:
        sizes: the n; None: those of 1, 2 and 4 that are less than the depth.
    """
    depth = model.depth
    if sizes is None:
        sizes = [size for size in (1, 2, 4) if size < depth] or [1]
    runs = [(n, first) for n in sizes for first in range(1, depth - n + 2)]
    orders = [[*range(1, first), *range(first + n, depth + 1)] for n, first in runs]
    loss, tokens, losses = changed_losses(model, orders, batches, pad_id, progress)
    remaining = iter(losses)
    by_size = [list(islice(remaining, depth - n + 1)) for n in sizes]
    return RunRemoval(model.name, tokens, loss, list(sizes), by_size)


def swaps(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    pairs: Pairs = "neighbours",
) -> Swaps:
    """Swap two blocks ("When Does Sparsity Mitigate the Curse of Depth in LLMs", arXiv 2603.15389).

    Options:
        pairs: "neighbours", or "all" pairs; the published permutation score is the mean over all.
    """
    layers = range(1, model.depth + 1)
    chosen = [pair for pair in combinations(layers, 2) if pairs == "all" or pair[1] == pair[0] + 1]
    orders = [[{a: b, b: a}.get(layer, layer) for layer in layers] for a, b in chosen]
    loss, tokens, losses = changed_losses(model, orders, batches, pad_id, progress)
    scores = [abs(loss - swapped) / loss for swapped in losses]
    return Swaps(model.name, tokens, loss, chosen, losses, scores, fmean(scores))


@torch.no_grad()
def causal_score(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> CausalScore:
    """Skip each layer s and measure the change of the update h_{l+1} - h_l of every later layer l (arXiv 2603.15389).

    The effect is the mean over tokens of |change of the update| divided by the mean of |update|, norms over the hidden
    dimension. A mean of quotients would be dominated by the tokens with the smallest updates. The hidden states of
    all layers are in memory for one batch.
    """
    depth, count = model.depth, 0
    changes = torch.zeros(depth, depth, dtype=torch.float64, device=model.device)
    norms = torch.zeros(depth, dtype=torch.float64, device=model.device)
    for tokens, mask in iter_batches(model, batches, pad_id, progress):
        inputs, blocks = model.block_functions(tokens, mask)
        states = [*inputs, blocks[-1](inputs[-1])]

        def update(before: Tensor, after: Tensor, mask: Tensor = mask) -> Tensor:
            return at_least_fp32(after[mask]) - at_least_fp32(before[mask])

        for later in range(depth):
            norms[later] += update(states[later], states[later + 1]).norm(dim=-1).double().sum()
        for skipped in range(depth - 1):
            x = states[skipped]
            for later in range(skipped + 1, depth):
                y = blocks[later](x)
                change = update(x, y) - update(states[later], states[later + 1])
                changes[skipped, later] += change.norm(dim=-1).double().sum()
                x = y
        count += int(mask.sum())
    ratios, has_update = (changes / norms).tolist(), (norms > 0).tolist()
    effects = [
        [ratios[s][later] if later > s and has_update[later] else None for later in range(depth)] for s in range(depth)
    ]
    known = [[effect for effect in row if effect is not None] for row in effects]
    pairs = [effect for row in known for effect in row]
    scores = [fmean(row) if row else None for row in known]
    return CausalScore(model.name, count, effects, scores, fmean(pairs) if pairs else None)
