import math

import numpy as np
import pytest
import torch
from builders import DEPTH, PAD, padded_batches, residual_stream, tokens

from cod_lightning.errors import UserError
from cod_lightning.measure.angular_distances import angles, angular_distance, last_token, scale_as_released
from cod_lightning.measure.registry import MEASURES


@pytest.fixture
def batch():
    return tokens(5, 7)


def definition(x, n, layer):
    """Arccos of the cosine, over pi, of the inputs of two layers [layers + 1, tokens, hidden], averaged over tokens."""
    cosine = torch.cosine_similarity(x[layer - 1], x[layer + n - 1], dim=-1)
    return pytest.approx(float((cosine.clamp(-1, 1).arccos() / math.pi).mean()), rel=1e-5)


def test_distances_follow_their_definition(model, batch):
    result = angular_distance(model, batch.split(2))
    x = residual_stream(model, batch).flatten(1, 2)
    for n in range(1, 5):
        assert result.distances[n - 1][: 5 - n] == [definition(x, n, layer) for layer in range(1, 6 - n)]
        assert result.distances[n - 1][5 - n :] == [None] * (n - 1)
    assert result.tokens == 35


def test_known_angles():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1e-6]])
    assert angles(x)[0].tolist() == pytest.approx([0, 0, 0.5, 1, 1e-6 / math.pi], abs=1e-10)


@pytest.mark.parametrize("size", [3, 50, 4096])
def test_the_angle_between_equal_vectors_is_exactly_zero(size):
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    assert angles(torch.cat([x, x]))[:3, 3:].diagonal().tolist() == [0, 0, 0]


def test_last_takes_one_token_of_each_row(causal_lm, batch):
    model = causal_lm("llama")
    batch[1, 4:] = PAD
    batch[2] = PAD
    rows, positions = [0, 1, 3, 4], [6, 3, 6, 6]
    result = angular_distance(model, batch.split(2), PAD, token="last")
    assert result.tokens == 4
    assert result.distances[1][2] == definition(residual_stream(model, batch)[:, rows, positions], 2, 3)


def test_the_last_token_is_the_one_before_the_padding():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert last_token(mask).int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_measuring_stops_after_the_requested_tokens(causal_lm, batch, size):
    model = causal_lm("qwen3")
    result = angular_distance(model, batch.split(size), tokens=17)
    assert result.tokens == 17
    assert result.distances[0][1] == definition(residual_stream(model, batch).flatten(1, 2)[:, :17], 1, 2)


def test_released_scales_each_n(causal_lm, batch):
    model = causal_lm("ours", depth=6)
    raw = angular_distance(model, [batch]).distances
    scaled = angular_distance(model, [batch], normalise="released").distances
    for n, (before, after) in enumerate(zip(raw, scaled, strict=True), start=1):
        row = np.zeros(6)  # the released code adds distances to a list of zeros, one for each layer
        row[: 7 - n] = before[: 7 - n]
        row = np.clip(row, np.percentile(row, 1), np.percentile(row, 99))
        expected = (row - row.min()) / (row.max() - row.min())
        assert after[: 7 - n] == pytest.approx(expected[: 7 - n], abs=1e-12)
        assert after[7 - n :] == [None] * (n - 1)


def test_released_clips_at_percentiles():
    assert scale_as_released([0.0, *[1.0] * 300, *[2.0] * 300, 9.0], 602) == [0.0] * 301 + [1.0] * 301


def test_more_tokens_than_a_chunk_are_measured(causal_lm):
    model, batch = causal_lm("ours", depth=2), tokens(3, 50)
    result = angular_distance(model, [batch])
    assert result.tokens == 150
    assert result.distances[0][1] == definition(residual_stream(model, batch).flatten(1, 2), 1, 2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"token": "lst"}, r"token='lst' does not exist: did you mean 'last'\? known: all, last"),
        ({"normalise": "relative"}, r"normalise='relative' does not exist: .*known: raw, released"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
    ],
)
def test_bad_options_are_errors(causal_lm, batch, option, message):
    with pytest.raises(UserError, match=message):
        MEASURES["angular"](causal_lm("ours", depth=2), [batch], None, None, **option)


def test_the_table_has_a_row_for_each_pair(causal_lm, batch):
    result = angular_distance(causal_lm("ours", depth=3), [batch])
    rows = result.rows()
    assert [(row["layer"], row["n"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]
    assert rows[4]["distance"] == result.distances[1][1]


def test_the_last_token_of_an_encoder_attends_to_the_others(causal_lm):
    model, batch = causal_lm("bert"), padded_batches()[0]
    kept = [row[row != PAD] for row in batch]
    states = [residual_stream(model, row[None]).flatten(1, 2)[:, -1:] for row in kept]
    expected = [definition(torch.cat(states, dim=1), 1, layer) for layer in range(1, DEPTH + 1)]
    assert angular_distance(model, [batch], PAD, token="last").distances[0] == expected
