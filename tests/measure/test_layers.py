import pytest
import torch

from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.layers import first_bad_layer, layer_statistics, plot_variance
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all

DEPTH = 4
CONFIG = DecoderConfig(
    hidden_size=24, intermediate_size=32, num_hidden_layers=DEPTH, num_attention_heads=2, vocab_size=31
)


def decoder(norm="pre_ln"):
    return build_decoder(CONFIG, build_all({"name": norm}, DEPTH), seed=0)


def test_variance_is_taken_over_the_hidden_dimension_of_each_token_that_counts():
    model, tokens = decoder(), torch.randint(1, 31, (3, 10))
    tokens[2, 6:] = 0
    seen = {}
    model(tokens, hook=lambda what, layer, x: seen.__setitem__((what, layer), x.detach()))
    found = layer_statistics(model, tokens, pad_id=0)
    real = tokens != 0
    for what in ("residual", "attention", "ffn"):
        for layer in range(1, DEPTH + 1):
            x = seen[what, layer][real].double()
            variance = ((x - x.mean(-1, keepdim=True)) ** 2).sum(-1) / 23
            assert getattr(found, what)[layer - 1] == pytest.approx(float(variance.mean()), rel=1e-5)


def test_gradient_norms_equal_those_of_a_training_step_and_leave_no_trace():
    model, tokens = decoder("lns"), torch.randint(31, (3, 10))
    found = layer_statistics(model, tokens)
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = model(tokens, next_tokens(tokens))
    (loss.total / loss.counts.sum()).backward()
    for layer, block in enumerate(model.model.layers):
        norm = torch.cat([p.grad.flatten() for p in block.parameters()]).norm()
        assert found.gradient_norm[layer] == pytest.approx(float(norm), rel=1e-4)


def test_without_gradients_only_the_forward_pass_is_run():
    found = layer_statistics(decoder(), torch.randint(31, (2, 5)), gradients=False)
    assert found.gradient_norm == []
    assert len(found.residual) == DEPTH


def test_a_compiled_decoder_is_measured_uncompiled():
    model, tokens = decoder(), torch.randint(31, (2, 5))
    expected = layer_statistics(model, tokens)
    calls = []

    def backend(graph, example):
        calls.append(graph)
        return graph.forward

    for block in model.model.layers:
        block.compile(backend=backend)
    assert layer_statistics(model, tokens) == expected
    assert not calls


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.2.self_attn.o_proj.weight", "layer 3 attention"),
        ("model.layers.1.mlp.up_proj.weight", "layer 2 ffn"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_the_first_bad_layer_is_named(name, where):
    model = decoder()
    model.get_parameter(name).data.fill_(float("nan"))
    tokens = torch.randint(31, (2, 5))
    assert first_bad_layer(model, tokens, next_tokens(tokens)) == where


def test_a_sound_decoder_has_no_bad_layer():
    tokens = torch.randint(31, (2, 5))
    assert first_bad_layer(decoder(), tokens, next_tokens(tokens)) is None


def test_the_plot_has_one_line_per_layer():
    figure = plot_variance([0, 10, 20], [[0.1, 0.2, 0.4], [0.2, 0.3, 0.9], [0.3, 0.5, 2.0]])
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [
        [0.1, 0.2, 0.3],
        [0.2, 0.3, 0.5],
        [0.4, 0.9, 2.0],
    ]
