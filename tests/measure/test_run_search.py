"""The search for the longest run of blocks that can go."""

import math

import pytest
from builders import learn, silence, tokens

from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import removal, run_removal
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.run_search import longest_run, perplexity_rise

BATCH = tokens(seed=1)


@pytest.fixture
def model(causal_lm):
    """Blocks 2 to 4 of six add nothing; the loss needs each of the others."""
    model = causal_lm("llama", depth=6)
    silence(model, [2, 3, 4])
    learn(model, BATCH)
    return model


def test_silent_blocks_are_found_as_one_run(model):
    result = longest_run(model, BATCH.split(2), limits=[0.001])
    assert result.blocks == [3]
    assert result.first[2] == 2
    assert result.removable == [0, 1, 1, 1, 0, 0]
    assert result.losses[:3] == pytest.approx([result.loss] * 3)


def test_every_run_is_found_with_a_wide_search(causal_lm):
    model = causal_lm("ours")
    result = longest_run(model, [BATCH], limits=[1e9], width=9)
    exact = run_removal(model, [BATCH], sizes=[1, 2, 3, 4])
    assert result.losses == pytest.approx([min(losses) for losses in exact.losses])
    assert result.blocks == [4]


def test_the_removal_of_single_blocks_is_used(model):
    fields = removal(model, [BATCH]).to_dict() | {"losses": [9.0] * 6}
    result = longest_run(model, [BATCH], removal=fields)
    assert (result.first, result.losses, result.blocks) == ([1], [9.0], [0, 0, 0])


def test_a_model_whose_loss_is_nan_has_no_run_that_can_go(model):
    model.model.model.norm.weight.data.fill_(math.nan)
    result = longest_run(model, [BATCH], removal=removal(model, [BATCH]).to_dict())
    assert result.blocks == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width=0 must be at least 1"),
        ({"limits": []}, "give at least one"),
        ({"limits": (1.0, 0.0)}, r"limits=\[1.0, 0.0\] must be greater than 0"),
    ],
)
def test_bad_options_are_an_error(model, options, message):
    with pytest.raises(UserError, match=message):
        MEASURES["longest_run"](model, [BATCH], None, None, **options)


def test_the_rise_of_the_perplexity_is_in_percent():
    assert perplexity_rise(2 + math.log(1.1), 2) == pytest.approx(10)
    assert perplexity_rise(1e4, 2) == math.inf
