"""Loss and perplexity against a transcription of the released evaluation."""

import math

import pytest
import torch

from cod_lightning.evaluate.perplexity import Perplexity


def released(losses, targets, batch, ranks):
    """The released loop: every rank sums the mean losses of its batches, starts counting batches at one, and the
    ranks' results are averaged."""
    results = []
    for rank in range(ranks):
        loss, batches = 0.0, 1
        mine, counts = losses[rank::ranks], targets[rank::ranks]
        for first in range(0, len(mine), batch):
            loss += float(mine[first : first + batch].sum() / counts[first : first + batch].sum())
            batches += 1
        results.append(loss / batches)
    return math.exp(sum(results) / ranks)


@pytest.mark.parametrize(("rows", "batch", "ranks"), [(24, 4, 1), (25, 4, 1), (40, 4, 2), (37, 4, 3), (5, 64, 1)])
@pytest.mark.parametrize("order", ["forward", "shuffled"])
def test_both_perplexities_whatever_the_batches_they_arrive_in(rows, batch, ranks, order):
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(1, 20, (rows,), generator=generator)
    losses = torch.rand(rows, generator=generator, dtype=torch.float64) * 5 * targets
    metric = Perplexity(rows, batch, ranks)
    index = torch.arange(rows) if order == "forward" else torch.randperm(rows, generator=generator)
    for part in index.split(7):
        filler = torch.tensor([-1])
        metric.update(
            torch.cat((losses[part], torch.tensor([99.0]))),
            torch.cat((targets[part], torch.tensor([3]))),
            torch.cat((part, filler)),
        )
    figures = metric.compute()
    assert figures["val_tokens"] == targets.sum()
    assert figures["val_loss"] == pytest.approx(float(losses.sum() / targets.sum()), rel=1e-12)
    assert figures["ppl"] == pytest.approx(math.exp(float(losses.sum() / targets.sum())), rel=1e-12)
    assert figures["ppl_paper_protocol"] == pytest.approx(released(losses, targets, batch, ranks), rel=1e-12)


def test_the_released_figure_is_low_by_one_batch_in_n_plus_one():
    metric = Perplexity(rows=91 * 128 * 4, paper_batch=128, paper_ranks=4)
    index = torch.arange(91 * 128 * 4)
    metric.update(torch.full((len(index),), 30.0, dtype=torch.float64), torch.full((len(index),), 10), index)
    figures = metric.compute()
    assert figures["val_loss"] == pytest.approx(3.0)
    assert math.log(figures["ppl_paper_protocol"]) == pytest.approx(3.0 * 91 / 92)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_stay_exact_in_a_model_of_low_precision(dtype):
    parent = torch.nn.Module()
    parent.metric = Perplexity(rows=4000, paper_batch=64)
    parent.to(dtype)
    index = torch.arange(4000)
    for _ in range(2):
        parent.metric.update(torch.full((4000,), 39.216), torch.full((4000,), 10), index)
        assert parent.metric.compute()["val_loss"] == pytest.approx(3.9216, rel=1e-6)
        parent.metric.reset()


def test_an_empty_validation_is_refused():
    metric = Perplexity(4, 2)
    metric.update(torch.ones(2), torch.ones(2, dtype=torch.int64), torch.tensor([-1, -1]))
    with pytest.raises(ValueError, match="no validation token"):
        metric.compute()
