"""Importance of blocks: their effect on the residual stream's direction, and on the loss.

Block influence is ShortGPT's, with LLM-Streamline's contiguous blocks. Layer importance is the blocks' Shapley values
beside leave-one-out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import RunningMean, at_least_fp32, hidden_states, iter_batches
from cod_lightning.measure.options import Positive
from cod_lightning.measure.panels import HeatMap, Lines, Panel
from cod_lightning.measure.reordering import changed_losses
from cod_lightning.measure.result import Progress, Result


@dataclass(frozen=True)
class BlockInfluence(Result):
    """Cosine distance of the residual stream across blocks; x_l is the input of block l."""

    tokens: int
    influence: list[float]
    """BI_l = 1 - E_t[cos(x_{l,t}, x_{l+1,t})] of each block l (ShortGPT); 0 to 2."""
    error: list[float]
    """Standard error over tokens."""
    distance: list[list[float | None]]
    """1 - E_t[cos(x_{l,t}, x_{l+n,t})] at `[n - 1][l - 1]`; None where fewer than n blocks follow (LLM-Streamline)."""
    best: list[tuple[int, int]]
    """First and last of the n contiguous blocks with the smallest distance, at [n - 1]: LLM-Streamline removes them."""

    def series(self) -> dict[str, Sequence[Any]]:
        return {"layer": range(1, len(self.influence) + 1), "influence": self.influence, "error": self.error}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each group of contiguous blocks."""
        return [
            {"first": first, "n": n, "distance": value, "best": best[0] == first}
            | ({"error": self.error[first - 1]} if n == 1 else {})
            for n, (row, best) in enumerate(zip(self.distance, self.best, strict=True), start=1)
            for first, value in enumerate(row, start=1)
            if value is not None
        ]

    def panels(self) -> list[Panel]:
        best = [first for first, _ in self.best], range(1, len(self.best) + 1)
        return [
            Lines("block influence, 1 - mean cosine", {"BI": self.influence}, log=True, errors={"BI": self.error}),
            HeatMap(
                self.distance,
                "first block",
                "number of blocks",
                "1 - mean cosine",
                log=True,
                points={"best run of its length": best},
            ),
        ]


@torch.no_grad()
def block_influence(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    longest: Annotated[int | None, ("to_depth", True)] = None,
) -> BlockInfluence:
    """Average the cosine between the residual stream before and after all contiguous blocks.

    The cosine of unit vectors u and v is computed as 1 - |u - v|^2 / 2, which is accurate where they are close.

    Options:
        longest: maximum number of contiguous blocks; None: all.
    """
    depth = model.depth
    longest = depth if longest is None else longest
    pairs = [(first, first + n) for n in range(1, longest + 1) for first in range(depth - n + 1)]
    means = RunningMean()
    for tokens, mask in iter_batches(model, batches, pad_id, progress):
        units = [F.normalize(at_least_fp32(x), dim=-1) for x in hidden_states(model, tokens, mask)]
        means.add(torch.stack([(units[i] - units[j]).square().sum(-1) / 2 for i, j in pairs], dim=-1))
    mean, error = dict(zip(pairs, means.mean.tolist(), strict=True)), means.error.tolist()
    lengths = range(1, longest + 1)
    best = [min(range(1, depth - n + 2), key=lambda first, n=n: mean[first - 1, first - 1 + n]) for n in lengths]
    return BlockInfluence(
        model=model.name,
        tokens=means.count,
        influence=[mean[layer, layer + 1] for layer in range(depth)],
        error=error[:depth],
        distance=[[mean.get((first, first + n)) for first in range(depth)] for n in lengths],
        best=[(first, first + n - 1) for n, first in zip(lengths, best, strict=True)],
    )


@dataclass(frozen=True)
class LayerImportance(Result):
    """Reduction of the loss per token by each block, in nats; the value of a coalition is minus its model's loss."""

    tokens: int
    """Number of targets."""
    shapley: list[float]
    """Mean over orders of the blocks of the reduction when a block joins those before it; the values add up to
    `empty_loss - loss`."""
    error: list[float]
    """Standard error over the sampled orders; NaN for a single order."""
    leave_one_out: list[float]
    """Loss without the block minus loss of the whole model."""
    loss: float
    """Loss of the whole model."""
    empty_loss: float
    """Loss of final norm and head applied to the embeddings."""
    permutations: int | None
    """Number of sampled orders; None: all, as in some older results."""

    def panels(self) -> list[Panel]:
        lines = {"Shapley value": self.shapley, "leave one out": self.leave_one_out}
        return [Lines("reduction of the loss (nats)", lines, errors={"Shapley value": self.error})]


@torch.no_grad()
def layer_importance(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    permutations: Positive = 20,
    seed: int = 0,
) -> LayerImportance:
    """Compute the blocks' Shapley values and leave-one-out; a block outside a coalition becomes the identity.

    Each sampled order costs one loss per block and batch. `cod.measure` and the command `measure` read the first 16
    sequences.

    Options:
        permutations: number of sampled orders.
        seed: seed of the sampled orders.
    """
    depth, whole = model.depth, tuple(range(1, model.depth + 1))
    generator = torch.Generator().manual_seed(seed)
    orders = [(torch.randperm(depth, generator=generator, device="cpu") + 1).tolist() for _ in range(permutations)]
    without = [tuple(other for other in whole if other != layer) for layer in whole]
    needed = [*without, *(tuple(sorted(order[:size])) for order in orders for size in range(depth + 1))]
    loss, tokens, changed = changed_losses(model, needed, batches, pad_id, progress)
    losses = dict(zip(needed, changed, strict=True))

    def marginal(layer: int, coalition: Collection[int]) -> float:
        return losses[tuple(sorted(coalition))] - losses[tuple(sorted([*coalition, layer]))]

    means = RunningMean()
    samples = [[marginal(layer, order[: order.index(layer)]) for layer in whole] for order in orders]
    means.add(torch.tensor(samples, dtype=torch.float64, device="cpu"))
    return LayerImportance(
        model=model.name,
        tokens=tokens,
        shapley=means.mean.tolist(),
        error=means.error.tolist(),
        leave_one_out=[marginal(layer, others) for layer, others in zip(whole, without, strict=True)],
        loss=loss,
        empty_loss=losses[()],
        permutations=permutations,
    )
