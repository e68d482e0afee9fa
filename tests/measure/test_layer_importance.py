import itertools
import math

import numpy as np
import pytest
import torch
from builders import PAD, loss_of_logits, padded_batches, residual_stream, silence

from cod_lightning.errors import UserError
from cod_lightning.measure.layer_importance import block_influence, layer_importance
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.reordering import changed_losses


@pytest.fixture
def cosines(model):
    """The cosine between the inputs of layers i and j of each token, by (i, j) from 0."""
    stream = [residual_stream(model, batch)[:, batch != PAD] for batch in padded_batches()]
    x = torch.cat(stream, dim=1)
    unit = x / x.norm(dim=-1, keepdim=True)
    return {(i, j): (unit[i] * unit[j]).sum(-1).numpy() for i, j in itertools.combinations(range(5), 2)}


def test_influence_is_one_minus_the_mean_cosine(model, cosines):
    result = block_influence(model, padded_batches(), PAD)
    for layer in range(4):
        values = 1 - cosines[layer, layer + 1]
        assert result.influence[layer] == pytest.approx(values.mean(), abs=1e-6)
        assert result.error[layer] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), abs=1e-6)
    assert result.tokens == len(cosines[0, 1])


def test_distances_span_all_contiguous_blocks(model, cosines):
    result = block_influence(model, padded_batches(), PAD)
    for n in range(1, 5):
        expected = [1 - cosines[layer, layer + n].mean() for layer in range(5 - n)]
        assert result.distance[n - 1][: 5 - n] == pytest.approx(expected, abs=1e-6)
        assert result.distance[n - 1][5 - n :] == [None] * (n - 1)


def test_the_best_blocks_have_the_smallest_distance(model, cosines):
    best = max(range(3), key=lambda i: cosines[i, i + 2].mean())
    result = block_influence(model, padded_batches(), PAD)
    assert result.best[1] == (best + 1, best + 2)
    assert result.best[3] == (1, 4)


def test_influence_can_be_limited_to_short_runs(causal_lm):
    model = causal_lm("ours")
    full, short = block_influence(model, padded_batches()), block_influence(model, padded_batches(), longest=2)
    assert (short.influence, short.distance, short.best) == (full.influence, full.distance[:2], full.best[:2])


def test_the_influence_table_has_a_row_for_each_run(causal_lm):
    result = block_influence(causal_lm("llama"), padded_batches())
    rows = result.rows()
    assert [(row["n"], row["first"]) for row in rows] == [(n, first) for n in range(1, 5) for first in range(1, 6 - n)]
    assert [(row["first"], row["first"] + row["n"] - 1) for row in rows if row["best"]] == result.best


def test_a_coalition_is_the_model_with_only_its_blocks(model):
    coalitions, blocks = [(2,), (1, 3), (1, 2, 3, 4)], model.blocks
    _, targets, losses = changed_losses(model, coalitions, padded_batches(), PAD)
    assert targets == sum(int((batch[:, 1:] != PAD).sum()) for batch in padded_batches())
    for coalition, loss in zip(coalitions, losses, strict=True):
        with model.with_blocks([blocks[layer - 1] for layer in coalition]):
            assert loss == pytest.approx(loss_of_logits(model, padded_batches(), PAD), rel=1e-5)


def test_the_empty_coalition_reads_the_embeddings(model):
    _, _, losses = changed_losses(model, [()], padded_batches(), PAD)
    silence(model, range(1, 5))
    assert losses == [pytest.approx(loss_of_logits(model, padded_batches(), PAD), rel=1e-5)]


@pytest.fixture
def marginals(model):
    """Losses by coalition, and the reductions of the loss by each block in all 24 orders [orders, layers]."""
    subsets = [s for size in range(5) for s in itertools.combinations(range(1, 5), size)]
    losses = dict(zip(subsets, changed_losses(model, subsets, padded_batches(), PAD)[2], strict=True))
    values = np.zeros((24, 4))
    for number, order in enumerate(itertools.permutations(range(1, 5))):
        for index, layer in enumerate(order):
            before, after = tuple(sorted(order[:index])), tuple(sorted(order[: index + 1]))
            values[number, layer - 1] = losses[before] - losses[after]
    return losses, values


def test_leave_one_out_is_the_loss_without_the_block(model, marginals):
    losses = marginals[0]
    result = layer_importance(model, padded_batches(), PAD, permutations=1)
    without = [losses[tuple(other for other in range(1, 5) if other != layer)] for layer in range(1, 5)]
    assert result.leave_one_out == pytest.approx([loss - losses[1, 2, 3, 4] for loss in without], abs=1e-9)


def test_sampled_shapley_values_are_within_their_errors(model, marginals):
    result = layer_importance(model, padded_batches(), PAD, permutations=200, seed=3)
    np.testing.assert_allclose(result.error, marginals[1].std(0) / math.sqrt(200), rtol=0.25)
    exact = marginals[1].mean(0)
    assert all(abs(a - b) < 5 * error for a, b, error in zip(result.shapley, exact, result.error, strict=True))
    assert result == layer_importance(model, padded_batches(), PAD, permutations=200, seed=3)


def test_shapley_values_add_up_to_the_loss(model):
    result = layer_importance(model, padded_batches(), PAD)
    assert math.fsum(result.shapley) == pytest.approx(result.empty_loss - result.loss, abs=1e-9)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        ("influence", {"longest": 5}, "longest=5: expected 1 to 4"),
        ("importance", {"permutations": 0}, "permutations=0 must be at least 1"),
    ],
)
def test_bad_options_are_errors(model, measure, options, message):
    with pytest.raises(UserError, match=message):
        MEASURES[measure](model, padded_batches(), PAD, None, **options)
