"""Losses of a model whose blocks are removed or reordered, and results of them.

An order is the layers that run, from 1, first to last; `[1, 2, 4]` is a model of four blocks without its third. Numbers
above the depth are changed blocks; with one of them, `[1, 2, 5, 4]` has it in the place of the third.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.kernels.loss import IGNORE, perplexity_of
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import iter_targets, log_probabilities, step_counter, token_chunks
from cod_lightning.measure.result import Progress, Result

LOSS_INCREASE = "rise of the loss when removed (nats)"
Blocks: TypeAlias = list[Callable[[Tensor], Tensor]]
"""Functions of hidden states [batch, length, hidden]."""


def no_blocks(blocks: Blocks) -> Blocks:
    """The changed blocks of a model that is only reordered."""
    return []


@dataclass(frozen=True)
class AblationResult(Result):
    """Loss in nats per target; subclasses add the losses of the changed model."""

    tokens: int
    """Number of targets."""
    loss: float
    """Loss of the whole model."""


def loss_columns(losses: Sequence[float], whole: float) -> dict[str, list[float]]:
    """Columns of the table for losses of a changed model and the loss of the whole model."""
    return {
        "loss": list(losses),
        "delta_loss": [loss - whole for loss in losses],
        "perplexity": [perplexity_of(loss) for loss in losses],
    }


def mean_loss(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> tuple[float, int]:
    """Mean loss in nats per target, a next token or an image's label, and the number of targets."""
    loss, tokens, _ = changed_losses(model, [], batches, pad_id, progress)
    return loss, tokens


def changed_losses(
    model: ModelAdapter,
    orders: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    changed: Callable[[Blocks], Blocks] = no_blocks,
) -> tuple[float, int, list[float]]:
    """The mean loss and the number of targets of the model, and its mean loss with only the blocks of each order.

    `changed` is as for `sequence_losses`.
    """
    whole = range(1, model.depth + 1)
    sums, counts = sequence_losses(model, [whole, *orders], batches, pad_id, progress, changed)
    loss, *losses = (sums.sum(1) / counts.sum()).tolist()
    return loss, int(counts.sum()), losses


@torch.no_grad()
def sequence_losses(
    model: ModelAdapter,
    orders: Sequence[Sequence[int]],
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    changed: Callable[[Blocks], Blocks] = no_blocks,
) -> tuple[Tensor, Tensor]:
    """The summed loss of every sequence with only the blocks of each order, and the number of its targets, on the CPU.

    Every block keeps the mask and the positions of its own layer. Removing every block alone costs about half the
    blocks' time in as many forward passes, and one head for each. The inputs of all blocks are in memory for one batch.

    Args:
        model: in evaluation mode.
        orders: the layers of each model.
        batches: tokens or images.
        pad_id: padding token; None: there is no padding.
        progress: called after each order of each batch.
        changed: maps the blocks of a batch to changed ones, which the numbers above the depth mean in an order.

    Returns:
        Losses [orders, sequences] in nats and float64, and numbers of targets [sequences].

    Raises:
        UserError: there is no target.
    """
    distinct = sorted({tuple(layers) for layers in orders})  # neighbours share the outputs of their first blocks
    sums: dict[tuple[int, ...], list[Tensor]] = {layers: [] for layers in distinct}
    counts = []
    batches_with_targets = list(iter_targets(model, batches, pad_id))
    advance = step_counter(progress, len(batches_with_targets) * len(distinct))
    for batch, targets in batches_with_targets:
        counts.append((targets != IGNORE).sum(dim=1).cpu())
        # The input of every block is known, so that only the blocks after a removed one run again.
        states, blocks = model.block_functions(batch)
        blocks = [*blocks, *changed(blocks)]
        previous = tuple(range(1, model.depth))
        for layers in distinct:
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(previous, layers, strict=False)))
            del states[shared + 1 :]
            for layer in layers[shared:]:
                states.append(blocks[layer - 1](states[-1]))
            sums[layers].append(summed_losses(model, states[-1], targets).cpu())
            previous = layers
            advance()
    return torch.stack([torch.cat(sums[tuple(layers)]) for layers in orders]), torch.cat(counts)


def summed_losses(model: ModelAdapter, x: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of every sequence [batch], in nats and float64, from final states [batch, length, hidden]."""
    mask = targets != IGNORE
    x, labels = x[mask], targets[mask]
    losses = [
        F.nll_loss(log_probabilities(model, x[chunk]), labels[chunk], reduction="none").double()
        for chunk in token_chunks(model, len(labels))
    ]
    return torch.stack([part.sum() for part in torch.cat(losses).split(mask.sum(dim=1).tolist())])
