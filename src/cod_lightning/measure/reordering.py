"""Losses of a model whose blocks are removed or reordered.

An order is the layers that run, from 1, first to last; `[1, 2, 4]` is a model of four blocks without its third.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.kernels.loss import IGNORE
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import iter_targets, step_counter
from cod_lightning.measure.logit_lens import log_probabilities, token_chunks
from cod_lightning.measure.result import Progress


def changed_losses(
    model: ModelAdapter,
    orders: Sequence[Sequence[int]],
    batches: Iterable[Batch],
    pad_id: int | None,
    progress: Progress | None,
) -> tuple[float, int, list[float]]:
    """Return the loss and the number of targets of the model, and its loss with its layers in each of `orders`."""
    whole = tuple(range(1, model.depth + 1))
    losses, tokens = order_losses(model, [whole, *orders], batches, pad_id, progress)
    return losses[whole], tokens, [losses[tuple(order)] for order in orders]


def order_losses(
    model: ModelAdapter,
    orders: Iterable[Sequence[int]],
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[tuple[int, ...], float], int]:
    """Return the mean loss per target of the model with only the blocks of each order, and the number of targets.

    Orders and cost are as for `sequence_losses`.
    """
    losses, counts = sequence_losses(model, orders, batches, pad_id, progress)
    target_count = int(counts.sum())
    return {layers: float(sums.sum()) / target_count for layers, sums in losses.items()}, target_count


@torch.no_grad()
def sequence_losses(
    model: ModelAdapter,
    orders: Iterable[Sequence[int]],
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
) -> tuple[dict[tuple[int, ...], Tensor], Tensor]:
    """Return the summed loss of every sequence in the model with only the blocks of each order, and numbers of targets.

    Both are [sequences], on the CPU. Orders are layers, from 1. Every block keeps the mask and the positions of its
    own layer. Removing every block alone costs about half the blocks' time in as many forward passes, and one head for
    each.
    """
    distinct = sorted({tuple(layers) for layers in orders})  # neighbours share their first blocks' outputs
    sums: dict[tuple[int, ...], list[Tensor]] = {layers: [] for layers in distinct}
    counts = []
    batches_with_targets = list(iter_targets(model, batches, pad_id))
    advance = step_counter(progress, len(batches_with_targets) * len(distinct))
    for tokens, targets in batches_with_targets:
        counts.append((targets != IGNORE).sum(dim=1).cpu())
        # the stream before every block is there already, so that only the blocks after a removed one run again
        outputs, blocks = model.block_functions(tokens)
        previous = tuple(range(1, model.depth))
        for layers in distinct:
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(previous, layers, strict=False)))
            del outputs[shared + 1 :]
            with torch.compiler.set_stance("force_eager"):
                for layer in layers[shared:]:
                    outputs.append(blocks[layer - 1](outputs[-1]))
            sums[layers].append(summed_losses(model, outputs[-1], targets).cpu())
            previous = layers
            advance()
    return {layers: torch.cat(parts) for layers, parts in sums.items()}, torch.cat(counts)


def summed_losses(model: ModelAdapter, x: Tensor, targets: Tensor) -> Tensor:
    """The summed loss of every sequence [batch], in nats and float64.

    Args:
        model: in any dtype.
        x: final hidden states [batch, length, hidden].
        targets: [batch, length]; `IGNORE` does not count.
    """
    mask = targets != IGNORE
    x, labels = x[mask], targets[mask]
    losses = [
        F.nll_loss(log_probabilities(model, x[chunk]), labels[chunk], reduction="none").double()
        for chunk in token_chunks(model, len(labels))
    ]
    return torch.stack([part.sum() for part in torch.cat(losses).split(mask.sum(dim=1).tolist())])
