"""Accuracy of answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from cod_lightning.kernels.loss import TokenLoss


class AnswerAccuracy(Metric):
    """Share of rows whose every target is the likeliest token: greedy decoding of the prompt gives just the answer.

    One forward pass decides it, and it needs no list of the other answers. A row without targets does not count.
    """

    full_state_update = False
    right: Tensor
    rows: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, found: TokenLoss) -> None:
        """Add the rows of a loss that was taken without gradients."""
        assert found.hits is not None
        self.right += ((found.hits == found.counts) & (found.counts > 0)).sum()
        self.rows += (found.counts > 0).sum()

    def compute(self) -> float:
        return int(self.right) / max(int(self.rows), 1)
