"""How much each block does: to the direction of the stream, to the prediction read from it, and to the loss.

The signals are ShortGPT's block influence with LLM-Streamline's contiguous blocks, the logit lens with DoLa's
divergence, and importance as the blocks' Shapley values beside plain leave-one-out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE, tokens_at_once
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import at_least_fp32, hidden_states, iter_batches, iter_targets
from cod_lightning.measure.result import Mean, Progress, figure, heat_map, layer_lines, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT_DEPTH = 16
"""Deepest model whose coalitions are all evaluated: 2^16 of them."""


@dataclass(frozen=True)
class BlockInfluence:
    """Directions of the stream before and after blocks."""

    model: str
    tokens: int
    influence: list[float]
    """BI_l = 1 - E_t[cos(x_{l,t}, x_{l+1,t})] of each block l, x_l being its input (ShortGPT); 0 to 2."""
    error: list[float]
    """Standard error over tokens."""
    distance: list[list[float | None]]
    """1 - E_t[cos(x_{l,t}, x_{l+n,t})] at [n - 1][l - 1]; None where no n blocks follow (LLM-Streamline)."""
    best: list[tuple[int, int]]
    """First and last of the n contiguous blocks that turn the stream least at [n - 1]: LLM-Streamline removes them."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each run of blocks, those of a single block first."""
        return [
            {"first": first, "n": n, "distance": value, "best": best[0] == first}
            | ({"error": self.error[first - 1]} if n == 1 else {})
            for n, (row, best) in enumerate(zip(self.distance, self.best, strict=True), start=1)
            for first, value in enumerate(row, start=1)
            if value is not None
        ]

    def plot(self) -> Figure:
        """Influence of each block, and the distance over every run with the best of each length marked."""
        made, (left, right) = figure(self.model, columns=2)
        layer_lines(
            left, {"BI": self.influence}, "block influence, 1 - mean cosine", log=True, errors={"BI": self.error}
        )
        heat_map(right, self.distance, "first block", "number of blocks", "1 - mean cosine", log=True)
        firsts = [first for first, _ in self.best]
        right.plot(firsts, range(1, len(firsts) + 1), "wo", mec="black", ms=4, label="best run of its length")
        legend(right)
        return made


@torch.no_grad()
def block_influence(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    longest: int | None = None,
) -> BlockInfluence:
    """Mean cosine between the stream before and after every run of contiguous blocks, over all tokens but pads.

    A cosine is taken as 1 - |u - v|^2 / 2 of unit vectors, which is exact where they are close.

    Args:
        model: any.
        batches: tokens [rows, length].
        pad_id: tokens that do not count.
        progress: told of every batch.
        longest: number of blocks in the longest run; None: all.

    Raises:
        UserError: there is no token, or no run so long.
    """
    depth = model.depth
    longest = depth if longest is None else longest
    if not 1 <= longest <= depth:
        raise UserError(f"longest={longest} is not a number of blocks: the model has 1 to {depth}")
    pairs = [(first, first + n) for n in range(1, longest + 1) for first in range(depth - n + 1)]
    means = Mean()
    for tokens, keep in iter_batches(model, batches, pad_id, progress):
        units = [F.normalize(at_least_fp32(x), dim=-1) for x in hidden_states(model, tokens, keep)]
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
class Readout:
    """What the final norm and the head predict from the output of each block, averaged over target tokens; in nats."""

    model: str
    tokens: int
    """Targets."""
    loss: list[float]
    """Cross-entropy of the next token (the logit lens)."""
    kl: list[float]
    """KL(final || layer) of the next-token distributions."""
    js: list[float]
    """Jensen-Shannon divergence between layer and final (DoLa); at most log 2."""

    def rows(self) -> list[dict[str, Any]]:
        values = zip(self.loss, self.kl, self.js, strict=True)
        return [{"layer": layer, "loss": a, "kl": b, "js": c} for layer, (a, b, c) in enumerate(values, start=1)]

    def plot(self) -> Figure:
        made, (left, right) = figure(self.model, columns=2)
        layer_lines(left, {"loss": self.loss}, "loss read from the layer (nats)")
        lines = {"KL(last || layer)": self.kl[:-1], "Jensen-Shannon": self.js[:-1]}
        layer_lines(right, lines, "divergence from the last layer (nats)", log=True)
        legend(right)
        return made


@torch.no_grad()
def readout(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Readout:
    """Read every block's output with the model's own final norm and head.

    Args:
        model: any.
        batches: tokens [rows, length].
        pad_id: tokens that are no targets.
        progress: told of every batch.

    Raises:
        UserError: there is no target.
    """
    means = Mean()
    for tokens, targets in iter_targets(model, batches, pad_id, progress):
        keep = targets != IGNORE
        outputs, wanted = hidden_states(model, tokens, keep)[1:], targets[keep]
        for part in chunks(model, len(wanted)):
            final = log_probabilities(model, outputs[-1][part])
            layers = [divergences(final, log_probabilities(model, x[part]), wanted[part]) for x in outputs]
            means.add(torch.stack(layers, dim=1))
    return Readout(model.name, means.count, *means.mean.T.tolist())


def divergences(final: Tensor, layer: Tensor, targets: Tensor) -> Tensor:
    """Loss, KL(final || layer) and Jensen-Shannon divergence of each token [tokens, 3], in nats.

    Args:
        final: log-probabilities [tokens, vocabulary].
        layer: likewise.
        targets: [tokens].
    """
    middle = torch.logaddexp(final, layer) - math.log(2)
    p, q = final.exp(), layer.exp()
    kl = (p * (final - layer)).sum(-1)
    js = ((p * (final - middle)).sum(-1) + (q * (layer - middle)).sum(-1)) / 2
    return torch.stack((-layer.gather(1, targets[:, None])[:, 0], kl, js), dim=-1)


@dataclass(frozen=True)
class LayerImportance:
    """What each block takes off the loss per token, in nats; the value of a set of blocks is minus its model's loss."""

    model: str
    tokens: int
    """Targets."""
    shapley: list[float]
    """Mean over orders of the blocks of what a block takes off when it joins those before it; adds up to
    `empty_loss - loss`."""
    error: list[float]
    """Standard error over the sampled orders; zero where all orders were taken."""
    leave_one_out: list[float]
    """Loss without the block minus loss with all."""
    loss: float
    """Of the whole model."""
    empty_loss: float
    """Of final norm and head on the embeddings."""
    permutations: int | None
    """Number of sampled orders; None: exact."""

    def rows(self) -> list[dict[str, Any]]:
        values = zip(self.shapley, self.error, self.leave_one_out, strict=True)
        return [
            {"layer": layer, "shapley": a, "error": b, "leave_one_out": c}
            for layer, (a, b, c) in enumerate(values, start=1)
        ]

    def plot(self) -> Figure:
        made, (axes,) = figure(self.model)
        lines = {"Shapley value": self.shapley, "leave one out": self.leave_one_out}
        layer_lines(axes, lines, "loss taken off (nats)", errors={"Shapley value": self.error})
        legend(axes)
        return made


@torch.no_grad()
def layer_importance(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    permutations: int | None = 20,
    seed: int = 0,
) -> LayerImportance:
    """Shapley values of the blocks and leave-one-out, blocks that are left out being replaced by the identity.

    Each sampled order costs one loss per block and batch, all orders 2^depth.

    Args:
        model: any.
        batches: tokens [rows, length].
        pad_id: tokens that are no targets.
        progress: told of every evaluated set of blocks.
        permutations: number of orders to sample; None: the exact values, for at most `EXACT_DEPTH` blocks.
        seed: of the orders.

    Raises:
        UserError: there is no target, no order, or too many blocks for exact values.
    """
    depth, whole = model.depth, tuple(range(1, model.depth + 1))
    if permutations is None and depth > EXACT_DEPTH:
        raise UserError(f"permutations=None takes 2^{depth} losses; expected at most {EXACT_DEPTH} blocks or a number")
    if permutations is not None and permutations < 1:
        raise UserError(f"permutations={permutations} must be positive, or None for exact values")
    generator = torch.Generator().manual_seed(seed)
    orders = [(torch.randperm(depth, generator=generator) + 1).tolist() for _ in range(permutations or 0)]
    leaving = [tuple(b for b in whole if b != layer) for layer in whole]
    if permutations is None:
        needed = {coalition for size in range(depth + 1) for coalition in combinations(whole, size)}
    else:
        needed = {tuple(sorted(order[:size])) for order in orders for size in range(depth + 1)} | set(leaving)
    losses, tokens = coalition_losses(model, needed, batches, pad_id, progress)

    def gain(layer: int, before: Collection[int]) -> float:
        return losses[tuple(sorted(before))] - losses[tuple(sorted([*before, layer]))]

    means = Mean()
    if permutations is None:
        ways = [math.factorial(size) * math.factorial(depth - 1 - size) for size in range(depth)]
        exact = [
            math.fsum(ways[size] * gain(layer, s) for size in range(depth) for s in combinations(others, size))
            for layer, others in zip(whole, leaving, strict=True)
        ]
        means.add(torch.tensor([exact], dtype=torch.float64) / math.factorial(depth))
    else:
        gains = [[gain(layer, order[: order.index(layer)]) for layer in whole] for order in orders]
        means.add(torch.tensor(gains, dtype=torch.float64))
    return LayerImportance(
        model=model.name,
        tokens=tokens,
        shapley=means.mean.tolist(),
        error=means.error.tolist(),
        leave_one_out=[gain(layer, rest) for layer, rest in zip(whole, leaving, strict=True)],
        loss=losses[whole],
        empty_loss=losses[()],
        permutations=permutations,
    )


@torch.no_grad()
def coalition_losses(
    model: ModelAdapter,
    coalitions: Collection[tuple[int, ...]],
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[tuple[int, ...], float], int]:
    """Mean loss per target of the model with only the blocks of each coalition, and the number of targets.

    Coalitions are ascending tuples of layers, from 1.
    """
    order = sorted(set(coalitions))  # neighbours begin with the same blocks, whose outputs are kept
    totals, targets_seen = dict.fromkeys(order, 0.0), 0
    known = list(iter_targets(model, batches, pad_id))
    for done, (tokens, targets) in enumerate(known):
        targets_seen += int((targets != IGNORE).sum())
        # each block with the masks of its own place: the stack would give it those of the place it moves up to
        inputs, blocks = model.block_functions(tokens)
        outputs, run = inputs[:1], ()
        del inputs
        for number, coalition in enumerate(order, start=1):
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(run, coalition, strict=False)))
            del outputs[shared + 1 :]
            with torch.compiler.set_stance("force_eager"):
                for layer in coalition[shared:]:
                    outputs.append(blocks[layer - 1](outputs[-1]))
            totals[coalition] += stream_loss(model, outputs[-1], targets)
            run = coalition
            if progress is not None:
                progress(done * len(order) + number, len(known) * len(order))
    return {coalition: total / targets_seen for coalition, total in totals.items()}, targets_seen


def stream_loss(model: ModelAdapter, x: Tensor, targets: Tensor) -> float:
    """Summed loss, in nats, of what the head reads from a stream [rows, length, hidden]; targets [rows, length]."""
    keep = targets != IGNORE
    x, wanted = x[keep], targets[keep]
    losses = [
        F.nll_loss(log_probabilities(model, x[part]), wanted[part], reduction="none").double().sum()
        for part in chunks(model, len(wanted))
    ]
    return float(sum(losses))


def log_probabilities(model: ModelAdapter, x: Tensor) -> Tensor:
    """Of the next token [tokens, vocabulary], at least in float32, read from a stream [tokens, hidden]."""
    logits = model.head(x.to(model.head_weight.dtype))
    return at_least_fp32(logits).log_softmax(-1)


def chunks(model: ModelAdapter, tokens: int) -> Iterator[slice]:
    """Parts of so many tokens whose logits may exist together."""
    size = tokens_at_once(model.device, len(model.head_weight))
    return (slice(first, first + size) for first in range(0, tokens, size))
