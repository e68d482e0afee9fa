import pytest
import torch

from cod_lightning.evaluate.exact_match import ExactMatch
from cod_lightning.kernels.loss import IGNORE, linear_cross_entropy

TARGETS = torch.tensor([[1, 2, 3], [IGNORE, 2, 3], [1, 2, 4], [IGNORE] * 3])
"""Targets: correct, correct after a prompt, one token wrong, no answer."""


@pytest.fixture
def metric():
    return ExactMatch()


@torch.no_grad()
def add(metric, targets):
    """Update with a model that predicts 1, 2, 3 for every sequence."""
    logits = torch.eye(5)[torch.tensor([[1, 2, 3]] * len(targets))]
    metric.update(linear_cross_entropy(logits, torch.eye(5), targets))


def test_an_answer_matches_if_all_its_tokens_are_most_likely(metric):
    add(metric, TARGETS)
    assert metric.compute() == 2 / 3


def test_batches_add_up(metric):
    add(metric, TARGETS)
    add(metric, TARGETS[2:])
    assert metric.compute() == 2 / 4


def test_counts_stay_integers_in_half_precision(metric):
    assert metric.to(torch.bfloat16).sequences.dtype == torch.int64
