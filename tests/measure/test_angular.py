import math

import numpy as np
import pytest
import torch
from torch import nn

from cod_lightning.errors import UserError
from cod_lightning.measure.angular import angles, angular_distance, last, released
from cod_lightning.measure.result import save

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
PAD = 0


def tokens(rows=5, length=7):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(0))


def inputs(model, batch):
    """Inputs of all layers and output of the last [layers + 1, rows, length, hidden], in float64."""
    seen = {}
    with torch.no_grad():
        model.logits(batch, lambda what, layer, x: seen.__setitem__((what, layer), x.double()))
    return torch.stack([seen["embedding", 0], *(seen["residual", layer] for layer in range(1, model.depth + 1))])


def by_hand(x, n, layer):
    """Arccos of the cosine, over pi, of the inputs of two layers [layers + 1, tokens, hidden], averaged over tokens."""
    u, v = x[layer - 1], x[layer + n - 1]
    cosine = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))
    return float((cosine.clamp(-1, 1).arccos() / math.pi).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_definition(causal_lm, family):
    model = causal_lm(family)
    found = angular_distance(model, tokens().split(2))
    x = inputs(model, tokens()).flatten(1, 2)
    assert found.tokens == 35
    for n in range(1, 5):
        for layer in range(1, 5):
            distance = found.distances[n - 1][layer - 1]
            if layer + n > 5:
                assert distance is None
            else:
                assert distance == pytest.approx(by_hand(x, n, layer), rel=1e-5)
                assert 0.01 < distance < 1


def test_known_angles():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1e-9]])
    expected = [0, 0, 0.5, 1, 1e-9 / math.pi]
    assert angles(x)[0].tolist() == pytest.approx(expected, rel=1e-7, abs=0)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert angles(torch.cat([x, x]))[:3, 3:].diagonal().tolist() == [0, 0, 0]


@pytest.mark.parametrize("family", ["ours", "ours-lns", "llama"])
def test_blocks_that_add_nothing(causal_lm, family):
    model = causal_lm(family)
    for block in model.blocks[1:3]:
        nn.init.zeros_(block.self_attn.o_proj.weight)
        nn.init.zeros_(block.mlp.down_proj.weight)
    found = angular_distance(model, [tokens()]).distances
    assert (found[0][1], found[0][2], found[1][1]) == (0, 0, 0)
    assert found[0][0] == pytest.approx(found[2][0], rel=1e-12)
    assert min(found[0][0], found[0][3]) > 0.01


@pytest.mark.parametrize("token", ["all", "last"])
@pytest.mark.parametrize("family", ["ours", "gpt2"])
def test_neither_pads_nor_batches_matter(causal_lm, family, token):
    model, batch = causal_lm(family), tokens()
    padded = torch.cat([batch, torch.full((5, 3), PAD)], dim=1)
    whole = angular_distance(model, [batch], PAD, token=token)
    assert whole.tokens == {"all": 35, "last": 5}[token]
    for batches in (batch.split(1), padded.split(2)):
        other = angular_distance(model, batches, PAD, token=token)
        assert other.tokens == whole.tokens
        for row, expected in zip(other.distances, whole.distances, strict=True):
            assert [value or 0 for value in row] == pytest.approx([value or 0 for value in expected], rel=1e-5)


def test_only_the_last_token_of_each_row(causal_lm):
    model, batch = causal_lm("llama"), tokens()
    batch[1, 4:] = PAD
    batch[2] = PAD
    ends = [(0, 6), (1, 3), (3, 6), (4, 6)]
    x = torch.stack([inputs(model, batch)[:, row, at] for row, at in ends], dim=1)
    found = angular_distance(model, batch.split(2), PAD, token="last")
    assert found.tokens == 4
    assert found.distances[1][2] == pytest.approx(by_hand(x, 2, 3), rel=1e-5)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert last(mask).int().tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_it_stops_after_a_number_of_tokens(causal_lm, size):
    model = causal_lm("qwen3")
    found = angular_distance(model, tokens().split(size), tokens=17)
    x = inputs(model, tokens()).flatten(1, 2)[:, :17]
    assert found.tokens == 17
    assert found.distances[0][1] == pytest.approx(by_hand(x, 1, 2), rel=1e-5)


def test_the_released_scaling(causal_lm):
    model = causal_lm("ours", depth=6)
    raw = angular_distance(model, [tokens()]).distances
    scaled = angular_distance(model, [tokens()], normalise="released").distances
    for n, (before, after) in enumerate(zip(raw, scaled, strict=True), start=1):
        row = np.array(before[: 7 - n])
        row = np.clip(row, np.percentile(row, 1), np.percentile(row, 99))
        expected = (row - row.min()) / (row.max() - row.min()) if n < 6 else [0]
        assert after[: 7 - n] == pytest.approx(expected, abs=1e-12)
        assert after[7 - n :] == [None] * (n - 1)
    assert released([0.0, *[1.0] * 300, *[2.0] * 300, 9.0]) == [0.0] * 301 + [1.0] * 301


def test_a_model_in_bfloat16(causal_lm):
    model = causal_lm("llama")
    exact = angular_distance(model, [tokens()]).distances
    model.model.bfloat16()
    assert angular_distance(model, [tokens()]).distances[0] == pytest.approx(exact[0], abs=0.02)


def test_more_tokens_than_a_chunk(causal_lm):
    model, batch = causal_lm("ours", depth=2), tokens(rows=3, length=50)
    x = inputs(model, batch).flatten(1, 2)
    found = angular_distance(model, [batch])
    assert found.tokens == 150
    assert found.distances[0][1] == pytest.approx(by_hand(x, 1, 2), rel=1e-5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"token": "lst"}, r"token='lst': did you mean 'last'\? known: all, last"),
        ({"normalise": "relative"}, r"normalise='relative': .*known: raw, released"),
        ({"tokens": 0}, "tokens=0: at least 1"),
    ],
)
def test_an_unknown_option_is_refused(causal_lm, option, message):
    with pytest.raises(UserError, match=message):
        angular_distance(causal_lm("ours", depth=2), [tokens()], **option)


@pytest.mark.parametrize("normalise", ["raw", "released"])
def test_it_is_saved_and_tells_its_progress(causal_lm, tmp_path, normalise):
    calls = []
    found = angular_distance(
        causal_lm("ours", depth=3), tokens().split(2), None, lambda *call: calls.append(call), normalise=normalise
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    rows = found.rows()
    assert [(row["layer"], row["n"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3)]
    assert rows[4]["distance"] == found.distances[1][1]
    assert all(path.stat().st_size for path in save(found, tmp_path, "angular"))
