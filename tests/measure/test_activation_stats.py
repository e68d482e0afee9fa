from dataclasses import replace

import pytest
import torch
from builders import DEPTH, PAD, silence, tokens
from torch import nn

from cod_lightning.measure.activation_stats import PLACES, activation_stats, token_statistics
from cod_lightning.measure.massive_activations import MassiveActivation, MassiveActivationFinder

TOKENS = tokens(5, 7)


def close(actual, expected, rtol=2e-5, atol=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), rtol=rtol, atol=atol
    )


@torch.no_grad()
def activations(model, place):
    """[layers, tokens, hidden] in float64."""
    layers = {}
    model.logits(TOKENS, lambda name, layer, x: name == place and layers.__setitem__(layer, x.double().flatten(0, 1)))
    return torch.stack(list(layers.values()))


@pytest.mark.parametrize("place", PLACES)
def test_statistics_are_those_of_their_definitions(model, place):
    statistics, x = getattr(activation_stats(model, TOKENS.split(2)), place), activations(model, place)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).sum(-1) / 15
    close(statistics.variance, variance.mean(-1))
    close(statistics.variance_error, variance.std(-1) / 35**0.5)
    close(statistics.mean, mean.mean((-1, -2)))
    close(statistics.rms, (x**2).mean(-1).sqrt().mean(-1))
    close(statistics.kurtosis, (16 * ((x - mean) ** 4).sum(-1) / ((x - mean) ** 2).sum(-1) ** 2).mean(-1))
    close(statistics.maximum, x.abs().amax((-1, -2)))


def test_statistics_of_known_vectors():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[4 / 3, 0, 1, 1], [4, 1, 2, 7 / 3], [0, 2, 2, 0]])
    torch.testing.assert_close(token_statistics(x), expected)


def test_the_kurtosis_of_a_gaussian_is_3_at_any_scale():
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert float(token_statistics(x)[3]) == pytest.approx(3, abs=0.02)
    torch.testing.assert_close(token_statistics(1e15 * x)[3], token_statistics(x)[3])


def test_without_a_padding_token_all_tokens_count(causal_lm):
    assert activation_stats(causal_lm("ours"), [torch.full((6, 10), PAD)]).tokens == 60


def test_a_branch_that_adds_nothing_has_only_zeros(causal_lm):
    model = causal_lm("llama")
    nn.init.zeros_(model.blocks[1].self_attn.o_proj.weight)
    attention = activation_stats(model, [TOKENS]).attention
    assert [values[1] for values in vars(attention).values()] == [0] * 11


def test_the_table_has_a_row_for_each_place_in_each_layer(causal_lm):
    result = activation_stats(causal_lm("ours", depth=2), [TOKENS])
    assert [(row["layer"], row["of"]) for row in result.rows()] == [(n, place) for n in (1, 2) for place in PLACES]
    assert result.rows()[5]["kurtosis"] == result.ffn.kurtosis[1]


@pytest.fixture
def planted(causal_lm):
    """Blocks add nothing; token 5 has variance 10^7 and is massive in channel 3, all others have variance 1."""
    model = causal_lm("llama")
    silence(model, range(1, DEPTH + 1))
    with torch.no_grad():
        model.model.model.embed_tokens.weight.copy_(torch.tensor([1.0, -1.0] * 8) * (15 / 16) ** 0.5)
        model.model.model.embed_tokens.weight[5] = 0
        model.model.model.embed_tokens.weight[5, 3] = -4e4
    return replace(model, decode=lambda token: f"<{token}>")


@pytest.fixture
def sequences():
    """20 sequences of 10 tokens; token 5 is first in two of them."""
    batch = torch.full((20, 10), 7)
    batch[[4, 11], 0] = 5
    return batch


def test_the_median_over_tokens_is_that_without_massive_tokens(planted, sequences):
    residual = activation_stats(planted, sequences.split(8)).residual
    close(residual.variance, [(2 * 1e8 + 198) / 200] * DEPTH)
    close(residual.variance_median + residual.variance_p95, [1.0] * 2 * DEPTH)
    close(residual.variance_top_share, [2e8 / (2e8 + 198)] * DEPTH)
    close(residual.variance_first, [(2 * 1e8 + 18) / 20] * DEPTH)
    close(residual.variance_later, [1.0] * DEPTH)


def test_a_sequence_of_one_token_has_no_later_ones(causal_lm):
    result = activation_stats(causal_lm("ours", depth=1), [tokens(3, 1)])
    assert result.to_dict()["residual"]["variance_later"] == [None]
    assert result.residual.variance_first == pytest.approx(result.residual.variance)


def test_a_massive_activation_is_named(planted, sequences):
    result = activation_stats(planted, [torch.cat([torch.full((1, 10), 7), sequences]), sequences[5:]])
    assert result.massive_channels == 1
    layers = list(range(1, DEPTH + 1))
    expected = MassiveActivation(3, 1, row=5, position=0, token=5, text="<5>", value=-4e4, tokens=3, layers=layers)
    assert result.massive == [expected]


def test_rows_count_batches_of_padding_alone(planted, sequences):
    padding = torch.full((3, 10), 0)
    (found,) = activation_stats(planted, [padding, sequences], pad_id=0).massive
    assert found.row == 3 + 4


@pytest.mark.parametrize(("value", "others", "massive"), [(99, 0.001, 0), (101, 0.001, 1), (101, 0.2, 0)])
def test_a_massive_activation_is_above_100_and_1000_medians(causal_lm, value, others, massive):
    x = torch.full((1, 3, 16), others)
    x[0, 1, 2] = value
    finder = MassiveActivationFinder()
    finder.add(1, x, torch.ones(1, 3, dtype=torch.bool), tokens(1, 3))
    assert finder.largest_channels(None)[1] == massive


def test_massive_activations_are_compared_by_magnitude():
    finder, mask = MassiveActivationFinder(), torch.ones(1, 3, dtype=torch.bool)
    for layer, entries in ((1, {2: -200, 5: 300}), (2, {2: -900}), (2, {2: -150})):
        x = torch.full((1, 3, 16), 0.001)
        for channel, value in entries.items():
            x[0, 1, channel] = value
        finder.add(layer, x, mask, tokens(1, 3))
    listed, _ = finder.largest_channels(None)
    assert [(each.channel, each.layer, each.value) for each in listed] == [(2, 2, -900), (5, 1, 300)]
