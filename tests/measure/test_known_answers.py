"""Planted models with known answers, measured with every measure."""

import math
from itertools import pairwise

import pytest
import torch
from builders import PlantedModel, learn, tokens
from torch import nn

from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.pruning import prune
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.weight_sparsity import linear_weights

SILENT = 3
"""The layer that adds nothing."""
BATCH = tokens(seed=1)


def measure(model, name, **options):
    return MEASURES[name](model, [BATCH], None, lambda done, total: None, **options)


@pytest.fixture(scope="module", params=["ours-lns", "llama", "gpt2"])
def model(request, causal_lm):
    """A model with one silent block; the others have outlier weights and are trained."""
    model = causal_lm(request.param)
    with torch.no_grad():
        for layer, block in enumerate(model.blocks, start=1):
            for weight in linear_weights(block).values():
                if layer != SILENT:
                    weight[0] *= 6
            for name, parameter in block.named_parameters():
                if layer == SILENT and ("layernorm" in name or "ln_" in name):
                    parameter.zero_()
    learn(model, BATCH, steps=40)
    return model


def steps(values):
    """Change of the signal by each block after the first."""
    return [None, *(abs(after - before) for before, after in pairwise(values))]


def loss_changes(result):
    return [abs(loss - result.loss) for loss in result.losses]


SIGNALS = {
    "variance of attention": lambda model: measure(model, "variance").attention.variance,
    "variance of ffn": lambda model: measure(model, "variance").ffn.variance,
    "variance of the residual stream": lambda model: steps(measure(model, "variance").residual.variance),
    "jacobian": lambda model: measure(model, "jacobian").distance,
    "jacobian map": lambda model: measure(model, "jacobian_map", layers=[1, 2, 3, 4]).series()["distance"],
    "gain": lambda model: steps([math.log(gain) for gain in measure(model, "gain", iterations=50).spectral]),
    "angular distance": lambda model: measure(model, "angular").distances[0],
    "removal": lambda model: loss_changes(measure(model, "removal")),
    "linear replacement": lambda model: loss_changes(measure(model, "linear_replacement")),
    "causal score": lambda model: measure(model, "causal").scores,
    "block influence": lambda model: measure(model, "influence").influence,
    "loss of the logit lens": lambda model: steps(measure(model, "readout").loss),
    "kl of the logit lens": lambda model: steps(measure(model, "readout").kl),
    "js of the logit lens": lambda model: steps(measure(model, "readout").js),
    "shapley value": lambda model: measure(model, "importance").shapley,
    "leave one out": lambda model: measure(model, "importance").leave_one_out,
}


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_signal_is_zero_at_the_silent_block_only(model, signal):
    values = SIGNALS[signal](model)
    others = [value for layer, value in enumerate(values, start=1) if value is not None and layer != SILENT]
    assert abs(values[SILENT - 1]) < 1e-4
    assert min(others) > 50 * abs(values[SILENT - 1])


def test_the_silent_block_turns_the_stream_least(model):
    assert measure(model, "influence").best[0] == (SILENT, SILENT)


def test_swapping_the_silent_block_changes_nothing(model):
    result = measure(model, "swaps")
    scores = dict(zip(result.pairs, result.scores, strict=True))
    assert max(scores[2, 3], scores[3, 4]) < 1e-5
    assert scores[1, 2] > 1e-3


def test_the_silent_block_has_no_outliers(model):
    ratios = measure(model, "sparsity").outlier_ratio
    assert ratios[SILENT - 1] == 0 < sorted(ratios)[1]


@pytest.mark.parametrize("signal", ["owl", "alpha", "alpha_pruning"])
def test_the_silent_block_gets_the_highest_sparsity(model, signal):
    values = getattr(measure(model, "sparsity"), signal)
    assert values.index(max(values)) == SILENT - 1


@pytest.mark.parametrize("by", ["influence", "streamline", "removal"])
def test_pruning_one_block_removes_the_silent_one(model, by, tmp_path):
    result = prune(model, [BATCH], by=by, blocks=1, folder=tmp_path / by, export=lambda *_: None)
    assert result.removed == [SILENT]
    assert result.loss_after == pytest.approx(result.loss_before, rel=1e-6)


class Growing(nn.Module):
    """A block laid out as in `transformers`, whose output is its input times a constant."""

    def __init__(self, width, factor):
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for part in (self.self_attn, self.mlp):
            nn.init.eye_(part.weight).data.mul_(math.sqrt(factor) - 1)

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


@pytest.fixture(scope="module", params=[0.25, 1.0])
def rate(request):
    """Growth of the logarithm of the variance per layer."""
    return request.param


@pytest.fixture
def growing(rate):
    torch.manual_seed(0)
    blocks = [Growing(8, math.exp(rate / 2)) for _ in range(7)]
    return ModelAdapter(PlantedModel(blocks, 8).eval(), "planted")


def test_the_variance_grows_by_the_rate(growing, rate):
    variance = measure(growing, "variance").residual.variance
    growth = [math.log(after / before) for before, after in pairwise(variance)]
    assert growth == pytest.approx([rate] * 6, rel=1e-4)


def test_the_theory_fits_the_rate(growing, rate):
    growth = measure(growing, "theory").growth
    assert growth.rate == pytest.approx(rate, rel=1e-4)
    assert growth.rate_r2 == pytest.approx(1)
    assert growth.power_r2 < 0.98


def test_gradients_grow_by_half_the_rate(growing, rate):
    gains = [math.log(gain) for gain in measure(growing, "theory").gains]
    assert gains == pytest.approx([rate / 2 * layer for layer in range(1, 8)], rel=1e-3)


def test_a_multiple_of_its_input_does_not_turn_the_stream(growing):
    assert measure(growing, "angular").distances[0] == pytest.approx([0] * 7, abs=1e-6)
