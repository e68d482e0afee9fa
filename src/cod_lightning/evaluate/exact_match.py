"""Exact match of answers under greedy decoding."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from cod_lightning.kernels.loss import TokenLoss


class ExactMatch(Metric):
    """Share of sequences whose every target is the most likely token, so that greedy decoding gives the answer.

    One teacher-forced forward pass decides it. Sequences without targets do not count.
    """

    full_state_update = False
    matches: Tensor
    sequences: Tensor

    def __init__(self):
        super().__init__()
        self.add_state("matches", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sequences", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: TokenLoss) -> None:
        """Add the sequences of a loss that was computed without gradients, which has `correct`."""
        assert loss.correct is not None
        self.matches += ((loss.correct == loss.counts) & (loss.counts > 0)).sum()
        self.sequences += (loss.counts > 0).sum()

    def compute(self) -> float:
        return int(self.matches) / max(int(self.sequences), 1)
