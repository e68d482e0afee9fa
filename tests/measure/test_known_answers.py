"""Planted models whose answers are known, put before every measure at once."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.pruning import prune
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.sparsity import linear_weights

USELESS = 3


def tokens(rows=4, length=9):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(1))


def measured(model, name, **options):
    return MEASURES[name](model, [tokens()], None, lambda done, total: None, **options)


def plant(model):
    """Let the norms of one block pass nothing on; give the weights of the others outliers, and have them learn."""
    with torch.no_grad():
        for layer, block in enumerate(model.blocks, start=1):
            for _, weight in linear_weights(block).values():
                if layer != USELESS:
                    weight[0] *= 6
            for name, parameter in block.named_parameters():
                if layer == USELESS and ("layernorm" in name or "ln_" in name):
                    parameter.zero_()
    parameters = [parameter for parameter in model.model.parameters() if parameter.any()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(40):
        loss = F.cross_entropy(model.logits(tokens())[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["ours-lns", "llama", "gpt2"])
def test_a_useless_block_is_found_by_every_signal(causal_lm, family, tmp_path):
    model = causal_lm(family)
    plant(model)
    found = {name: measured(model, name) for name in MEASURES if name not in ("gain", "sparsity")}
    moments, removal, influence = found["variance"], found["removal"], found["influence"]
    linear, read, importance = found["linear_replacement"], found["readout"], found["importance"]
    exact = measured(model, "jacobian", exact=True)

    def steps(values):
        """What each block but the first changes."""
        return [math.nan, *(abs(after - before) for before, after in pairwise(values))]

    signals = {
        "variance of attention": moments.attention.variance,
        "variance of ffn": moments.ffn.variance,
        "residual stream": steps(moments.residual.variance),
        "jacobian, probes": found["jacobian"].distance,
        "jacobian, exact": exact.distance,
        "jacobian map": [row["distance"] for row in measured(model, "jacobian_map", layers=[1, 2, 3, 4]).rows()],
        "gain": steps([math.log(gain) for gain in measured(model, "gain", iterations=50).spectral]),
        "angular distance": found["angular"].distances[0],
        "removal": [loss - removal.loss for loss in removal.losses],
        "linear replacement": [abs(loss - linear.loss) for loss in linear.losses],
        "causal score": found["causal"].scores,
        "block influence": influence.influence,
        "logit lens": steps(read.loss),
        "kl": steps(read.kl),
        "jensen-shannon": steps(read.js),
        "shapley": importance.shapley,
        "leave one out": importance.leave_one_out,
    }
    for name, values in signals.items():
        known = {layer: value for layer, value in enumerate(values, start=1) if value is not None and value == value}
        useless = known.pop(USELESS)
        assert abs(useless) < 1e-4, name
        assert min(known.values()) > 50 * abs(useless), name
    assert influence.best[0] == (USELESS, USELESS)
    scores = dict(zip(found["swaps"].pairs, found["swaps"].scores, strict=True))
    assert max(scores[2, 3], scores[3, 4]) < 1e-5 < 1e-3 < scores[1, 2]
    runs = found["run_removal"]
    assert runs.losses[1][1:] == pytest.approx([removal.losses[1], removal.losses[3]], rel=1e-5)
    sparsity = measured(model, "sparsity", sparsity=0.5)
    assert sparsity.outlier_ratio[USELESS - 1] == 0 < sorted(sparsity.outlier_ratio)[1]
    for values in (sparsity.owl, sparsity.alpha, sparsity.alpha_pruning):
        assert values.index(max(values)) == USELESS - 1
    for by in ("influence", "streamline", "removal"):
        pruned = prune(model, [tokens()], by=by, blocks=1, folder=tmp_path / by, export=lambda *_: None)
        assert pruned.removed == [USELESS]
        assert pruned.loss_after == pytest.approx(pruned.loss_before, rel=1e-6)


class Growing(nn.Module):
    """A block of `transformers`' layout, whose output is its input times a constant."""

    def __init__(self, width, factor):
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for part in (self.self_attn, self.mlp):
            nn.init.eye_(part.weight).data.mul_(math.sqrt(factor) - 1)

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self, depth, factor, width=8):
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=2, intermediate_size=width)
        self.model = nn.Module()
        self.embedding = nn.Embedding(37, width)
        self.model.layers = nn.ModuleList(Growing(width, factor) for _ in range(depth))
        self.model.norm, self.lm_head = nn.Identity(), nn.Linear(width, 37, bias=False)

    def forward(self, input_ids, use_cache):
        x = self.embedding(input_ids)
        for block in self.model.layers:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_a_stack_of_exponential_variance_gives_its_exponent_back(rate):
    torch.manual_seed(0)
    model = ModelAdapter(Stack(7, math.exp(rate / 2)).eval(), "planted")
    variance = measured(model, "variance").residual.variance
    growth = [math.log(after / before) for before, after in pairwise(variance)]
    assert growth == pytest.approx([rate] * 6, rel=1e-4)
    found = measured(model, "theory")
    assert found.growth.rate == pytest.approx(rate, rel=1e-4)
    assert found.growth.rate_r2 == pytest.approx(1)
    assert found.growth.power_r2 < 0.98
    assert [math.log(gain) for gain in found.gains] == pytest.approx(
        [rate / 2 * layer for layer in range(1, 8)], rel=1e-3
    )
    assert measured(model, "angular").distances[0] == pytest.approx([0] * 7, abs=1e-6)
