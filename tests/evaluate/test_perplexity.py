"""Perplexity against a transcription of the released evaluation."""

import math

import pytest
import torch

from cod_lightning.evaluate.perplexity import Perplexity
from cod_lightning.kernels.loss import perplexity_of

SIZES = pytest.mark.parametrize(
    ("sequences", "batch", "ranks"), [(24, 4, 1), (25, 4, 1), (40, 4, 2), (37, 4, 3), (5, 64, 1)]
)


def released_perplexity(losses, targets, batch, ranks):
    """The released loop: each rank sums the mean losses of its batches and counts the batches from one."""
    results = []
    for rank in range(ranks):
        loss, batches = 0.0, 1
        rank_losses, rank_targets = losses[rank::ranks], targets[rank::ranks]
        for first in range(0, len(rank_losses), batch):
            loss += float(rank_losses[first : first + batch].sum() / rank_targets[first : first + batch].sum())
            batches += 1
        results.append(loss / batches)
    return math.exp(sum(results) / ranks)


@pytest.fixture(params=["forward", "shuffled"])
def evaluated(request, sequences, batch, ranks):
    """Losses and targets, and the results of a metric updated in batches of 7 with one padding sequence each."""
    generator = torch.Generator().manual_seed(sequences)
    targets = torch.randint(1, 20, (sequences,), generator=generator)
    losses = torch.rand(sequences, generator=generator, dtype=torch.float64) * 5 * targets
    shuffled = torch.randperm(sequences, generator=generator)
    metric = Perplexity(sequences, batch, ranks)
    for part in (torch.arange(sequences) if request.param == "forward" else shuffled).split(7):
        index = torch.cat((part, torch.tensor([-1])))
        metric.update(torch.cat((losses[part], torch.tensor([99.0]))), torch.cat((targets[part], index[-1:])), index)
    return losses, targets, metric.compute()


@SIZES
def test_the_loss_is_the_mean_over_all_targets(evaluated):
    losses, targets, results = evaluated
    assert results["val_tokens"] == targets.sum()
    assert results["val_loss"] == pytest.approx(float(losses.sum() / targets.sum()), rel=1e-12)
    assert results["ppl"] == pytest.approx(math.exp(float(losses.sum() / targets.sum())), rel=1e-12)


@SIZES
def test_the_paper_protocol_is_the_released_loop(evaluated, batch, ranks):
    losses, targets, results = evaluated
    expected = released_perplexity(losses, targets, batch, ranks)
    assert results["ppl_paper_protocol"] == pytest.approx(expected, rel=1e-12)


def test_the_paper_protocol_is_low_by_one_batch_in_n_plus_one():
    metric = Perplexity(sequences=91 * 128 * 4, paper_batch=128, paper_ranks=4)
    index = torch.arange(91 * 128 * 4)
    metric.update(torch.full((len(index),), 30.0, dtype=torch.float64), torch.full((len(index),), 10), index)
    results = metric.compute()
    assert results["val_loss"] == pytest.approx(3.0)
    assert math.log(results["ppl_paper_protocol"]) == pytest.approx(3.0 * 91 / 92)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_stay_exact_in_a_half_precision_model(dtype):
    parent = torch.nn.Module()
    parent.metric = Perplexity(sequences=4000, paper_batch=64)
    parent.to(dtype)
    index = torch.arange(4000)
    for _ in range(2):
        parent.metric.update(torch.full((4000,), 39.216), torch.full((4000,), 10), index)
        assert parent.metric.compute()["val_loss"] == pytest.approx(3.9216, rel=1e-6)
        parent.metric.reset()


def test_no_targets_are_an_error():
    metric = Perplexity(4, 2)
    metric.update(torch.ones(2), torch.ones(2, dtype=torch.int64), torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match="no validation tokens"):
        metric.compute()


def test_an_overflowing_perplexity_is_infinite():
    assert perplexity_of(800.0) == math.inf
