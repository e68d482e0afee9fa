"""Contributions of attention and FFN, and the loss without them."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from builders import decoder, residual_stream, silence, tokens

from cod_lightning.measure.ablation import removal
from cod_lightning.measure.sublayers import contribution, sublayer_removal
from cod_lightning.nn.layouts import find_sites

BATCH = tokens(5, 7)


def test_contributions_are_those_of_their_definitions(model):
    added = {}
    with torch.no_grad():
        model.logits(BATCH, lambda name, layer, x: added.__setitem__((name, layer), x.double()))
    result, stream = contribution(model, BATCH.split(2)), residual_stream(model, BATCH)
    for layer in (1, 4):
        x, y, a, m = stream[layer - 1], stream[layer], added["attention", layer], added["ffn", layer]
        for name, new, old in (("attention", a, x), ("ffn", m, x + a), ("block", y - x, x)):
            norm, cosine = new.norm(dim=-1) / old.norm(dim=-1), F.cosine_similarity(new, old, dim=-1)
            assert getattr(result, name)[layer - 1] == pytest.approx(float(norm.mean()), rel=1e-4)
            assert getattr(result, f"{name}_cosine")[layer - 1] == pytest.approx(float(cosine.mean()), abs=1e-5)
            assert result.errors[name][layer - 1] == pytest.approx(float(norm.std()) / 35**0.5, rel=1e-3)
            error = result.errors[f"{name}_cosine"][layer - 1]
            assert error == pytest.approx(float(cosine.std()) / 35**0.5, rel=1e-3)


@pytest.mark.parametrize("name", ["peri_ln", "x0_mix"])
@torch.no_grad()
def test_contributions_are_relative_to_the_stream_that_they_are_added_to(name):
    model, added = decoder(name), {}
    for block in model.blocks:
        if block.embedding_skip is not None:
            block.embedding_skip.copy_(torch.tensor([0.2, 0.9]))
    model.logits(BATCH, lambda part, layer, x: added.__setitem__((part, layer), x))
    result = contribution(model, BATCH.split(2))
    for layer in (1, 3):
        a, m, y = (added[part, layer] for part in ("attention", "ffn", "residual"))
        x = y - a - m
        assert result.attention[layer - 1] == pytest.approx(float((a.norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-3)
        assert result.ffn[layer - 1] == pytest.approx(float((m.norm(dim=-1) / (x + a).norm(dim=-1)).mean()), rel=1e-3)


@torch.no_grad()
def test_a_norm_with_a_bias_goes_with_its_sublayer():
    model = decoder("dyt", base="sandwich_ln")
    for block in model.blocks:
        block.ffn_residual.branch_norm.bias.normal_()
    without = deepcopy(model)
    without.blocks[1].ffn_residual.branch_norm.weight.zero_()
    without.blocks[1].ffn_residual.branch_norm.bias.zero_()
    expected = sublayer_removal(without, [BATCH]).loss
    assert sublayer_removal(model, [BATCH]).ffn[1] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_a_sublayer_that_adds_nothing_already_changes_nothing(model):
    whole = removal(model, [BATCH])
    result = sublayer_removal(model, BATCH.split(2))
    assert result.loss == pytest.approx(whole.loss)
    silence(model, [3])
    silent = sublayer_removal(model, [BATCH])
    assert (silent.attention[2], silent.ffn[2]) == (pytest.approx(silent.loss), pytest.approx(silent.loss))
    assert silent.loss == pytest.approx(whole.losses[2], rel=1e-5)
    assert abs(silent.attention[1] - silent.loss) > 1e-4 < abs(silent.ffn[1] - silent.loss)


@torch.no_grad()
def test_removing_both_sublayers_removes_the_block(causal_lm):
    model = causal_lm("llama")
    expected = removal(model, [BATCH]).losses[1]
    torch.nn.init.zeros_(model.blocks[1].self_attn.o_proj.weight)
    assert sublayer_removal(model, [BATCH]).ffn[1] == pytest.approx(expected, rel=1e-5)


def test_no_hook_remains(causal_lm):
    model = causal_lm("llama")
    sublayer_removal(model, [BATCH])
    assert not any(site.branch._forward_hooks for site in find_sites(model.model, model.layout))
