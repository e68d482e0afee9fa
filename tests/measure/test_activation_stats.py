import pytest
import torch
from torch import nn

from cod_lightning.errors import UserError
from cod_lightning.measure.activation_stats import moments, token_moments
from cod_lightning.measure.layers import layer_statistics
from cod_lightning.measure.result import save

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
PAD = 0


def tokens(rows=5, length=7):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(0))


def close(actual, expected, rtol=2e-5, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(actual).double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_definitions(causal_lm, family):
    model, seen = causal_lm(family), {}
    found = moments(model, tokens().split(2))
    with torch.no_grad():
        model.logits(tokens(), lambda what, layer, x: seen.__setitem__((what, layer), x.double().flatten(0, 1)))
    assert found.tokens == 35
    for what in ("residual", "attention", "ffn"):
        x = torch.stack([seen[what, layer] for layer in range(1, 5)])  # [layers, tokens, hidden]
        statistics = getattr(found, what)
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).sum(-1) / 15
        kurtosis = 16 * ((x - mean) ** 4).sum(-1) / ((x - mean) ** 2).sum(-1) ** 2
        close(statistics.variance, variance.mean(-1))
        close(statistics.variance_error, variance.std(-1) / 35**0.5)
        close(statistics.mean, mean.mean((-1, -2)))
        close(statistics.rms, (x**2).mean(-1).sqrt().mean(-1))
        close(statistics.kurtosis, kurtosis.mean(-1))
        close(statistics.maximum, x.abs().amax((-1, -2)))


def test_the_variance_is_that_of_training(causal_lm):
    model = causal_lm("ours")
    expected = layer_statistics(model.model, tokens(), gradients=False)
    found = moments(model, [tokens()])
    for what in ("residual", "attention", "ffn"):
        close(getattr(found, what).variance, torch.tensor(getattr(expected, what)).double())


def test_known_moments():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[4 / 3, 0, 1, 1], [4, 1, 2, 7 / 3], [0, 2, 2, 0]])
    torch.testing.assert_close(token_moments(x), expected)
    gaussian = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert float(token_moments(gaussian)[3]) == pytest.approx(3, abs=0.02)
    torch.testing.assert_close(token_moments(1e15 * gaussian)[3], token_moments(gaussian)[3])


@pytest.mark.parametrize("family", ["ours", "gpt2"])
def test_neither_pads_nor_batches_matter(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    padded = torch.cat([batch, torch.full((5, 3), PAD)], dim=1)
    padded = torch.cat([padded, torch.full((1, 10), PAD)])
    whole = moments(model, [batch], PAD)
    for batches in (batch.split(1), [padded], padded.split(5)):
        other = moments(model, batches, PAD)
        assert other.tokens == whole.tokens
        for what in ("residual", "attention", "ffn"):
            for statistic, values in vars(getattr(whole, what)).items():
                close(getattr(getattr(other, what), statistic), torch.tensor(values).double())
    assert moments(model, [padded]).tokens == 60


def test_a_silent_sublayer(causal_lm):
    model = causal_lm("llama")
    nn.init.zeros_(model.blocks[1].self_attn.o_proj.weight)
    found = moments(model, [tokens()])
    assert [getattr(found.attention, what)[1] for what in vars(found.attention)] == [0] * 6
    assert all(value > 0 for value in (*found.residual.variance, *found.ffn.variance, *found.residual.kurtosis))


def test_a_model_in_bfloat16(causal_lm):
    model = causal_lm("llama")
    exact = moments(model, [tokens()])
    model.model.bfloat16()
    close(moments(model, [tokens()]).residual.variance, torch.tensor(exact.residual.variance).double(), rtol=0.1)


def test_it_is_saved_and_tells_its_progress(causal_lm, tmp_path):
    calls = []
    found = moments(causal_lm("ours", depth=2), tokens().split(2), progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    places = [(row["layer"], row["of"]) for row in found.rows()]
    assert places == [(layer, of) for layer in (1, 2) for of in ("residual", "attention", "ffn")]
    assert found.rows()[5]["kurtosis"] == found.ffn.kurtosis[1]
    assert len(found.plot().axes) == 3
    assert all(path.stat().st_size for path in save(found, tmp_path, "moments"))


def test_a_stream_of_unknown_length(causal_lm):
    calls = []
    moments(causal_lm("ours", depth=2), iter(tokens().split(3)), progress=lambda *call: calls.append(call))
    assert calls == [(1, 0), (2, 0)]


@pytest.mark.parametrize("batches", [[], [torch.full((2, 3), PAD)]])
def test_nothing_to_measure_on(causal_lm, batches):
    with pytest.raises(UserError, match="ours: no tokens to measure on"):
        moments(causal_lm("ours", depth=2), batches, PAD)
