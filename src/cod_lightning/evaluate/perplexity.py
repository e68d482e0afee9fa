"""Validation loss and perplexity, exact and as the released evaluation computes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric


class Perplexity(Metric):
    """Loss per token over all rows, and the figure that the released evaluation would print for the same rows.

    The released evaluation averages the mean losses of N batches but divides by N + 1, then averages over the ranks.
    It is low by a factor N / (N + 1) that depends on the batch size and on the number of GPUs, so both are arguments
    here and independent of what the rows are evaluated on.

    Args:
        rows: number of validation rows, over all ranks.
        paper_batch: rows per batch on one rank in the evaluation that is emulated.
        paper_ranks: its number of ranks.
    """

    full_state_update = False
    losses: Tensor
    targets: Tensor

    def __init__(self, rows: int, paper_batch: int, paper_ranks: int = 1):
        super().__init__()
        self.rows, self.paper_batch, self.paper_ranks = rows, paper_batch, paper_ranks
        self.paper_batches = math.ceil(math.ceil(rows / paper_ranks) / paper_batch)
        shape = (paper_ranks * self.paper_batches,)
        self.add_state("losses", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("targets", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Follow the model to its device but not to its precision: sums in bfloat16 are off by percents."""
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)

    def update(self, loss: Tensor, targets: Tensor, index: Tensor) -> None:
        """Add rows.

        Args:
            loss: summed loss of each row in nats [rows].
            targets: number of targets of each row [rows].
            index: number of each row in the validation set [rows]; -1 marks a row that only fills a batch.
        """
        keep = index >= 0
        loss, targets, index = loss[keep], targets[keep], index[keep]
        batch = index % self.paper_ranks * self.paper_batches + index // self.paper_ranks // self.paper_batch
        self.losses.index_add_(0, batch, loss.to(self.losses.dtype))
        self.targets.index_add_(0, batch, targets)

    def compute(self) -> dict[str, float]:
        """`val_loss` in nats per token, `ppl` = exp(val_loss), `ppl_paper_protocol`, and `val_tokens`, the targets.

        Raises:
            ValueError: no row has been added.
        """
        targets = int(self.targets.sum())
        if targets == 0:
            raise ValueError("no validation token was seen")
        loss = float(self.losses.sum()) / targets
        means = (self.losses / self.targets.clamp(min=1)).view(self.paper_ranks, self.paper_batches)
        batches = (self.targets > 0).view(self.paper_ranks, self.paper_batches).sum(-1)
        paper = float((means.sum(-1) / (batches + 1)).mean())
        return {
            "val_loss": loss,
            "ppl": exp(loss),
            "ppl_paper_protocol": exp(paper),
            "val_tokens": targets,
        }


def exp(loss: float) -> float:
    """Return e^loss, infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 709 else math.inf
