"""Validation loss and perplexity: exact, and by the protocol of the paper's released evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from cod_lightning.kernels.loss import perplexity_of


class Perplexity(Metric):
    """Loss per token over all sequences, and the perplexity that the released evaluation would print for them.

    The released evaluation averages the mean losses of N batches but divides by N + 1, then averages over the ranks.
    Its perplexity is too low, by an amount that depends on the batch size and the number of GPUs. Both are arguments
    here, so the result does not depend on how the sequences are batched.

    Args:
        sequences: number of validation sequences, over all ranks.
        paper_batch: sequences per batch on one rank in the emulated evaluation.
        paper_ranks: its number of ranks.
    """

    full_state_update = False
    losses: Tensor
    targets: Tensor

    def __init__(self, sequences: int, paper_batch: int, paper_ranks: int = 1):
        super().__init__()
        self.paper_batch, self.paper_ranks = paper_batch, paper_ranks
        self.paper_batches = math.ceil(math.ceil(sequences / paper_ranks) / paper_batch)
        shape = (paper_ranks * self.paper_batches,)
        self.add_state("losses", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Move with the model but keep the dtype: sums in bfloat16 would be wrong by percents."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)

    def update(self, loss: Tensor, targets: Tensor, index: Tensor) -> None:
        """Add sequences.

        Args:
            loss: summed loss of each sequence in nats [sequences].
            targets: number of targets of each sequence [sequences].
            index: position of each sequence in the validation set [sequences]; -1 marks padding of a batch.
        """
        keep = index >= 0
        loss, targets, index = loss[keep], targets[keep], index[keep]
        batch = index % self.paper_ranks * self.paper_batches + index // self.paper_ranks // self.paper_batch
        self.losses.index_add_(0, batch, loss.to(self.losses.dtype))
        self.targets.index_add_(0, batch, targets)

    def compute(self) -> dict[str, float]:
        """Return `val_loss` in nats per token, `ppl`, `ppl_paper_protocol`, and `val_tokens`, the number of targets.

        Raises:
            ValueError: there are no targets.
        """
        targets = int(self.targets.sum())
        if targets == 0:
            raise ValueError("no validation tokens: call update first")
        loss = float(self.losses.sum()) / targets
        means = (self.losses / self.targets.clamp(min=1)).view(self.paper_ranks, self.paper_batches)
        batches = (self.targets > 0).view(self.paper_ranks, self.paper_batches).sum(-1)
        paper_loss = float((means.sum(-1) / (batches + 1)).mean())
        return {
            "val_loss": loss,
            "ppl": perplexity_of(loss),
            "ppl_paper_protocol": perplexity_of(paper_loss),
            "val_tokens": targets,
        }
