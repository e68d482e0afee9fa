"""What is measured while training: statistics of the probe, and the first value that is not finite."""

import pytest
import torch
from builders import PAD, tokens

from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.activation_stats import PLACES, activation_stats
from cod_lightning.measure.training import first_bad_layer, plot_variance, probe_statistics

TOKENS = tokens(5, 7)


@pytest.fixture
def decoder(causal_lm):
    return causal_lm("ours-lns").model


def test_a_training_run_records_the_same_variance(causal_lm):
    padded = TOKENS.clone()
    padded[2, 4:] = PAD
    expected = activation_stats(causal_lm("ours"), [padded], PAD)
    recorded = probe_statistics(causal_lm("ours").model, padded, PAD)
    for place in PLACES:
        assert getattr(recorded, place) == pytest.approx(getattr(expected, place).variance, rel=2e-5)


def test_gradient_norms_are_those_of_a_training_step(decoder):
    norms = probe_statistics(decoder, TOKENS).gradient_norm
    loss = decoder(TOKENS, next_tokens(TOKENS))
    (loss.total / loss.counts.sum()).backward()
    expected = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm() for block in decoder.blocks]
    torch.testing.assert_close(torch.tensor(norms), torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_a_padding_token_outside_of_the_vocabulary_does_not_count(decoder):
    outside = torch.cat([TOKENS, torch.full_like(TOKENS, 10_000)])
    statistics = probe_statistics(decoder, outside, 10_000)
    assert statistics.residual == pytest.approx(probe_statistics(decoder, TOKENS).residual)


def test_measuring_leaves_no_gradients(decoder):
    probe_statistics(decoder, TOKENS)
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_frozen_block_has_gradient_norm_zero(decoder):
    decoder.blocks[1].requires_grad_(False)
    norms = probe_statistics(decoder, TOKENS).gradient_norm
    assert [norm > 0 for norm in norms] == [True, False, True, True]


def test_a_compiled_decoder_is_measured_uncompiled(decoder):
    expected, calls = probe_statistics(decoder, TOKENS), []
    for block in decoder.blocks:
        block.compile(backend=lambda graph, example: calls.append(graph) or graph.forward)
    assert probe_statistics(decoder, TOKENS) == expected
    assert not calls


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.2.self_attn.o_proj.weight", "layer 3 attention"),
        ("model.layers.1.mlp.up_proj.weight", "layer 2 ffn"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_the_first_layer_with_a_nan_is_named(decoder, name, place):
    decoder.get_parameter(name).data.fill_(float("nan"))
    assert first_bad_layer(decoder, TOKENS, next_tokens(TOKENS)) == place


def test_a_finite_decoder_has_no_bad_layer(decoder):
    assert first_bad_layer(decoder, TOKENS, next_tokens(TOKENS)) is None


def test_the_plot_has_one_line_per_layer():
    figure = plot_variance([0, 10, 20], [[0.1, 0.2, 0.4], [0.2, 0.3, 0.9], [0.3, 0.5, 2.0]])
    lines = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert lines == [[0.1, 0.2, 0.3], [0.2, 0.3, 0.5], [0.4, 0.9, 2.0]]
