"""Jacobians against planted ones, against torch's own, and estimates against exact figures."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.jacobian import (
    STATISTICS,
    differentiable,
    end_to_end_gain,
    entries,
    jacobian,
    largest_singular_value,
    mean_jacobian,
    probed,
    products,
    sampled,
    transposed,
)
from cod_lightning.measure.result import save
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
WIDTH, PAD = 6, 0


def tokens(rows=3, length=7, seed=0):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(seed))


def weight(seed):
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))


class LinearBlock(nn.Module):
    """y_t = scale_t (W x_t + sum of V x_s over s < t)."""

    def __init__(self, inside, across, scale):
        super().__init__()
        self.inside, self.across, self.scale = inside, across, scale

    def forward(self, x):
        earlier = x.cumsum(1) - x
        scale = torch.ones(x.shape[:2]) if self.scale is None else self.scale
        return scale[:, :, None] * (x @ self.inside.T + earlier @ self.across.T)


class Linear(nn.Module):
    def __init__(self, inside, across, scale=None):
        super().__init__()
        self.embedding = nn.Embedding(37, WIDTH)
        blocks = [LinearBlock(*parts, scale) for parts in zip(inside, across, strict=True)]
        self.model = nn.Module()
        self.model.layers, self.model.norm = nn.ModuleList(blocks), nn.Identity()
        self.lm_head = nn.Linear(WIDTH, 37, bias=False)

    def forward(self, input_ids, use_cache):
        x = self.embedding(input_ids)
        for block in self.model.layers:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(x))


def expected(matrix):
    """The statistics of one matrix, written out."""
    d, diagonal = len(matrix), matrix.diagonal()
    return {
        "frobenius": matrix.norm() / d**0.5,
        "distance": (matrix - torch.eye(d)).norm() / d**0.5,
        "mean_diagonal": matrix.trace() / d,
        "diagonal_share": diagonal.norm() / matrix.norm(),
        "largest_singular_value": torch.linalg.svdvals(matrix)[0],
    }


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_add_nothing_are_the_identity(causal_lm, family, exact):
    model = causal_lm(family)
    for name, parameter in model.model.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
            nn.init.zeros_(parameter)
    found = jacobian(model, [tokens()], exact=exact, tokens=2, iterations=2)
    for name, value in dict(zip(STATISTICS, (1, 0, 1, 1, 1), strict=True)).items():
        assert getattr(found, name) == pytest.approx([value] * 4, abs=1e-6), name
        assert found.errors[name] == pytest.approx([0] * 4, abs=1e-6), name
    gain = end_to_end_gain(model, [tokens()], iterations=2, probes=2)
    assert gain.spectral == pytest.approx([1] * 4, abs=1e-6)
    assert gain.frobenius == pytest.approx([1] * 4, abs=1e-6)


def test_a_planted_matrix_is_found_whatever_other_tokens_add():
    matrices = [weight(1), weight(2)]
    model = ModelAdapter(Linear(matrices, [weight(3), weight(4)]))
    exact = jacobian(model, [tokens()], exact=True, tokens=3)
    probes = jacobian(model, [tokens(32)], probes=64, tokens=7, iterations=60)
    mean = mean_jacobian(model, [tokens()], layers=[2, 1])
    for layer, matrix in enumerate(matrices):
        torch.testing.assert_close(torch.tensor(mean.matrices[1 - layer]), matrix)
        for name, value in expected(matrix).items():
            assert getattr(exact, name)[layer] == pytest.approx(float(value), rel=1e-5), name
            near = 4 * probes.errors[name][layer] + 1e-4
            assert getattr(probes, name)[layer] == pytest.approx(float(value), abs=near), name
            assert probes.errors[name][layer] < 0.02
    assert (exact.tokens, exact.probes, probes.tokens, probes.probes) == (9, None, 224, 64)


def test_the_estimates_of_squares_are_unbiased_with_two_probes():
    matrix, x = weight(5).double(), torch.zeros(200_000, 1, WIDTH)
    found = probed(lambda v: v @ matrix, x, 2, torch.Generator().manual_seed(0))
    figures = expected(matrix)
    truth = (
        figures["frobenius"] ** 2,
        figures["distance"] ** 2,
        figures["mean_diagonal"],
        matrix.diagonal().square().mean(),
    )
    for values, value in zip(found.T, truth, strict=True):
        assert float(values.mean()) == pytest.approx(float(value), abs=4 * float(values.std()) / len(values) ** 0.5)


def test_the_largest_singular_value_is_met_from_below():
    draw = torch.Generator().manual_seed(0)
    near_identity = torch.eye(40).double() + 0.02 * torch.randn(3, 40, 40, generator=draw, dtype=torch.float64)
    start = torch.randn(3, 40, generator=draw, dtype=torch.float64)

    def found(matrices, iterations, start=start):
        return largest_singular_value(
            lambda v: torch.einsum("rij,rj->ri", matrices, v),
            lambda v: torch.einsum("rij,ri->rj", matrices, v),
            start,
            iterations,
        )

    exact = torch.linalg.matrix_norm(near_identity, 2)
    steps = torch.stack([found(near_identity, iterations) for iterations in range(0, 13, 3)])
    assert (steps.diff(dim=0) >= 0).all()
    assert (steps <= exact * (1 + 1e-12)).all()
    torch.testing.assert_close(steps[-1], exact, rtol=1e-3, atol=0)
    # More iterations than the space has dimensions, or the matrix different singular values.
    torch.testing.assert_close(
        found(near_identity[:, :5, :5], 20, start[:, :5]).double(),
        torch.linalg.matrix_norm(near_identity[:, :5, :5], 2),
    )
    torch.testing.assert_close(found(7 * torch.eye(40).double().expand(3, -1, -1), 9), torch.full((3,), 7.0).double())
    assert found(torch.zeros(3, 40, 40).double(), 2).tolist() == [0, 0, 0]
    near_identity[1, 2, 3] = torch.inf
    assert found(near_identity, 2).isnan().tolist() == [False, True, False]


def test_chosen_blocks_are_measured_as_all_are(causal_lm):
    model = causal_lm("ours")
    every = jacobian(model, [tokens()], exact=True, tokens=2)
    some = jacobian(model, [tokens()], exact=True, tokens=2, layers=[4, 2])
    assert (every.layers, some.layers) == ([1, 2, 3, 4], [4, 2])
    assert some.rows() == [every.rows()[3], every.rows()[1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_probes_agree_with_every_entry(causal_lm, family):
    model, batches = causal_lm(family), [tokens(16, seed=seed) for seed in (0, 1)]
    exact = jacobian(model, batches, exact=True, tokens=1)
    probes = jacobian(model, batches, probes=16, tokens=1, iterations=30)
    for name in STATISTICS:
        for layer in range(4):
            near = 4 * probes.errors[name][layer] + 1e-5
            assert getattr(probes, name)[layer] == pytest.approx(getattr(exact, name)[layer], abs=near), (name, layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_agrees_with_torch(causal_lm, family):
    model, batch = causal_lm(family), tokens(1, 4)
    inputs, functions = model.block_functions(batch)
    matrices = []
    for x, function in zip(inputs, functions, strict=True):
        whole = torch.autograd.functional.jacobian(function, x)
        matrices.append(torch.stack([whole[0, t, :, 0, t] for t in range(4)]).double())
        with differentiable():
            forward = products(function, x)[0](torch.ones_like(x))
        torch.testing.assert_close(forward, whole.double().sum((3, 4, 5)), rtol=1e-4, atol=1e-4)
    found = jacobian(model, [batch], exact=True, tokens=4)
    for layer, matrix in enumerate(matrices):
        square = matrix.square().sum((1, 2)).mean()
        assert found.frobenius[layer] == pytest.approx(float((square / 16).sqrt()), rel=1e-5)
        away = (matrix - torch.eye(16)).square().sum((1, 2)).mean()
        assert found.distance[layer] == pytest.approx(float((away / 16).sqrt()), rel=1e-5)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        assert found.mean_diagonal[layer] == pytest.approx(float(diagonal.mean()), rel=1e-5)
        share = (diagonal.square().sum(1).mean() / square).sqrt()
        assert found.diagonal_share[layer] == pytest.approx(float(share), rel=1e-5)
        sigma = torch.linalg.svdvals(matrix)[:, 0].mean()
        assert found.largest_singular_value[layer] == pytest.approx(float(sigma), rel=1e-5)
    mean = mean_jacobian(model, [batch], layers=[1, 2, 3, 4], tokens=4)
    torch.testing.assert_close(
        torch.tensor(mean.matrices).double(), torch.stack(matrices).mean(1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("strategy", ["gpas", "deep_norm", "peri_ln", "mix_ln"])
def test_both_directions_are_those_of_one_matrix_under_every_wiring(strategy):
    config = DecoderConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=37, init_std=0.3
    )
    model = ModelAdapter(build_decoder(config, build_all({"name": strategy}, 2), seed=0))
    inputs, functions = model.block_functions(tokens(1, 3))
    for name, parameter in model.model.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.7)
    with differentiable():
        for x, function in zip(inputs, functions, strict=True):
            v = torch.randn_like(x)
            expected = torch.func.jvp(function, (x,), (v,))[1].double()
            torch.testing.assert_close(products(function, x)[0](v.double()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gain_of_the_stack(causal_lm, family):
    model, batch = causal_lm(family), tokens(24, 3)
    found = end_to_end_gain(model, [batch], layers=[4, 2], probes=16, iterations=25)
    inputs, functions = model.block_functions(batch)

    def stack(x, layer):
        for function in functions[:layer]:
            x = function(x)
        return x.sum(0)  # rows do not mix, so this keeps their derivatives apart

    for place, layer in enumerate(found.layers):
        whole = torch.autograd.functional.jacobian(lambda x, layer=layer: stack(x, layer), inputs[0]).double()
        rows = whole.permute(2, 0, 1, 3, 4).reshape(24, 48, 48)
        sigma = torch.linalg.svdvals(rows)[:, 0].mean()
        assert found.spectral[place] == pytest.approx(float(sigma), rel=1e-2)
        size = (rows.square().sum((1, 2)).mean() / 48).sqrt()
        assert found.frobenius[place] == pytest.approx(float(size), rel=0.1)
    assert found.sequences == 24


def test_pads_are_never_measured():
    batch = tokens(4, 6)
    batch[0, 4:], batch[1, 1:], batch[2] = PAD, PAD, PAD
    scale = torch.where(batch == PAD, 1e6, 1.0)
    matrices = [weight(1), weight(2)]
    model = ModelAdapter(Linear(matrices, [torch.zeros(WIDTH, WIDTH)] * 2, scale))
    for exact in (True, False):
        found = jacobian(model, [batch], pad_id=PAD, exact=exact, tokens=6, iterations=60)
        assert found.tokens == 4 + 1 + 0 + 6
        assert max(found.frobenius + found.largest_singular_value) < 10
    mean = mean_jacobian(model, [batch], layers=[1], pad_id=PAD, tokens=6)
    torch.testing.assert_close(torch.tensor(mean.matrices[0]), matrices[0])
    rows = [0, 1, 3]
    model = ModelAdapter(Linear(matrices, [torch.zeros(WIDTH, WIDTH)] * 2, scale[rows]))
    gain = end_to_end_gain(model, [batch], pad_id=PAD, probes=200, iterations=60)
    assert gain.sequences == 3
    assert gain.spectral[1] == pytest.approx(float(torch.linalg.svdvals(matrices[1] @ matrices[0])[0]), rel=1e-4)
    assert gain.frobenius[1] == pytest.approx(float((matrices[1] @ matrices[0]).norm() / WIDTH**0.5), rel=0.1)


def test_every_token_weighs_the_same_however_long_its_row():
    keep = torch.tensor([[True] * 6, [True, False, False, True, False, False], [False] * 6])
    positions, weights = sampled(keep, 3, torch.Generator().manual_seed(0))
    assert weights.tolist() == [[2, 2, 2], [1, 1, 0], [0, 0, 0]]
    assert sorted(positions[1, :2].tolist()) == [0, 3]
    assert len(set(positions[0].tolist())) == 3


def test_results_are_saved_and_progress_is_told(causal_lm, tmp_path):
    model, batches, told = causal_lm("ours"), [tokens(), tokens(2, 5)], []
    options = {"progress": lambda done, total: told.append((done, total))}
    found = [
        jacobian(model, batches, probes=2, tokens=1, iterations=1, **options),
        mean_jacobian(model, batches, layers=[1, 4], **options),
        end_to_end_gain(model, batches, probes=1, iterations=1, layers=[3, 4], **options),
    ]
    counts = [(done, 8) for done in range(1, 9)], [(done, 4) for done in range(1, 5)]
    assert told == [*counts[0], *counts[1], *counts[1]]
    for number, result in enumerate(found):
        assert len(save(result, tmp_path, f"result{number}")) == 3
        assert len(result.rows()) == (4, 2, 2)[number]
    assert found[0] == jacobian(model, batches, probes=2, tokens=1, iterations=1)


def test_what_cannot_be_measured_is_refused(causal_lm):
    model, batch = causal_lm("ours"), tokens()
    pads = torch.zeros_like(batch)
    with pytest.raises(UserError, match=r"probes=1: .* at least 2"):
        jacobian(model, [batch], probes=1)
    with pytest.raises(UserError, match="tokens=0: expected at least 1"):
        jacobian(model, [batch], tokens=0)
    with pytest.raises(UserError, match=r"hidden size 16 is more than widest=8; .* raise widest"):
        mean_jacobian(model, [batch], layers=[1], widest=8)
    for measure in (mean_jacobian, jacobian, end_to_end_gain):
        with pytest.raises(UserError, match="layers 1 to 4, not 5"):
            measure(model, [batch], layers=[5])
    with pytest.raises(UserError, match="each once"):
        end_to_end_gain(model, [batch], layers=[1, 1])
    for measure in (jacobian, end_to_end_gain):
        with pytest.raises(UserError, match="hold only pads"):
            measure(model, [pads], pad_id=0)
    with pytest.raises(UserError, match="hold only pads"):
        mean_jacobian(model, [pads], layers=[1], pad_id=0)


def test_entries_are_in_the_order_of_derivatives():
    matrix, x = weight(7), torch.zeros(2, 1, WIDTH)
    with differentiable():
        pull = transposed(lambda x: x @ matrix.T, x)
        found = entries(lambda v: pull(v[:, None])[:, 0], x)
    torch.testing.assert_close(found, matrix.double().expand(2, -1, -1))
