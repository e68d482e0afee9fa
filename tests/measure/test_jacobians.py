"""Jacobians and estimates of them against planted matrices and against torch."""

from statistics import stdev

import pytest
import torch
from builders import PAD, PlantedModel, decoder, silence, tokens
from torch import nn

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.jacobian_products import (
    differentiable,
    estimate_statistics,
    full_jacobian,
    jvp_and_vjp,
    largest_singular_value,
    vjp,
)
from cod_lightning.measure.jacobians import (
    STATISTICS,
    MeanJacobian,
    jacobian,
    jacobian_growth,
    mean_jacobian,
    sample_positions,
)
from cod_lightning.measure.registry import MEASURES

WIDTH = 6


def matrix(seed):
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))


MATRICES = [matrix(1), matrix(2)]


class LinearBlock(nn.Module):
    """y_t = scale_t (W x_t + sum of V x_s over s < t); V = 0 without mixing."""

    def __init__(self, weight, mixing, scale):
        super().__init__()
        self.self_attn = self.mlp = nn.Identity()
        self.weight, self.mixing, self.scale = weight, mixing, scale

    def forward(self, x):
        y = x @ self.weight.T
        if self.mixing is not None:
            y = y + (x.cumsum(1) - x) @ self.mixing.T
        return y if self.scale is None else self.scale[:, :, None] * y


def linear_model(mixing=(None, None), scale=None):
    """Blocks with the Jacobians `MATRICES`."""
    blocks = [LinearBlock(weight, mix, scale) for weight, mix in zip(MATRICES, mixing, strict=True)]
    return ModelAdapter(PlantedModel(blocks, WIDTH))


@pytest.fixture
def planted():
    return linear_model([matrix(3), matrix(4)])


def definition(matrices):
    """The statistics of Jacobians [tokens, d, d], written out."""
    d, diagonal = matrices.shape[-1], matrices.diagonal(dim1=1, dim2=2)
    square = matrices.square().sum((1, 2)).mean()
    statistics = (
        (square / d).sqrt(),
        ((matrices - torch.eye(d)).square().sum((1, 2)).mean() / d).sqrt(),
        diagonal.mean(),
        (diagonal.square().sum(1).mean() / square).sqrt(),
        torch.linalg.svdvals(matrices)[:, 0].mean(),
    )
    return dict(zip(STATISTICS, map(float, statistics), strict=True))


def test_estimates_are_within_their_standard_errors(planted):
    result = jacobian(planted, [tokens(32)], probes=64, tokens=7, iterations=60)
    for layer, weight in enumerate(MATRICES):
        for name, value in definition(weight[None]).items():
            assert getattr(result, name)[layer] == pytest.approx(value, abs=4 * result.errors[name][layer] + 1e-4), name
            assert result.errors[name][layer] < 0.02
    assert (result.tokens, result.probes) == (224, 64)


def test_estimates_from_two_probes_are_unbiased():
    weight, x = matrix(5).double(), torch.zeros(200_000, 1, WIDTH)
    estimates = estimate_statistics(lambda v: v @ weight, x, 2, torch.Generator().manual_seed(0))
    known = definition(weight[None])
    diagonal = weight.diagonal().square().mean()
    truth = (known["frobenius"] ** 2, known["distance"] ** 2, known["mean_diagonal"], float(diagonal))
    for values, value in zip(estimates.T, truth, strict=True):
        assert float(values.mean()) == pytest.approx(value, abs=4 * float(values.std()) / len(values) ** 0.5)


class TestLargestSingularValue:
    draw = torch.Generator().manual_seed(0)
    matrices = torch.eye(40).double() + 0.02 * torch.randn(3, 40, 40, generator=draw, dtype=torch.float64)
    start = torch.randn(3, 40, generator=draw, dtype=torch.float64)

    def estimate(self, matrices, iterations):
        return largest_singular_value(
            lambda v: torch.einsum("rij,rj->ri", matrices, v),
            lambda v: torch.einsum("rij,ri->rj", matrices, v),
            self.start[:, : matrices.shape[-1]],
            iterations,
        )

    def test_it_is_approached_from_below(self):
        exact = torch.linalg.matrix_norm(self.matrices, 2)
        steps = torch.stack([self.estimate(self.matrices, iterations) for iterations in range(0, 13, 3)])
        assert (steps.diff(dim=0) >= 0).all()
        assert (steps <= exact * (1 + 1e-12)).all()
        torch.testing.assert_close(steps[-1], exact, rtol=1e-3, atol=0)

    def test_more_iterations_than_dimensions_are_exact(self):
        small = self.matrices[:, :5, :5]
        torch.testing.assert_close(self.estimate(small, 20), torch.linalg.matrix_norm(small, 2))

    @pytest.mark.parametrize("factor", [7, 0])
    def test_a_multiple_of_the_identity_is_exact(self, factor):
        matrices = factor * torch.eye(40).double().expand(3, -1, -1)
        torch.testing.assert_close(self.estimate(matrices, 9), torch.full((3,), factor).double())

    def test_an_infinite_entry_gives_nan_for_its_row_only(self):
        matrices = self.matrices.clone()
        matrices[1, 2, 3] = torch.inf
        assert self.estimate(matrices, 2).isnan().tolist() == [False, True, False]


@pytest.fixture
def exact(monkeypatch):
    """Let `jacobian` compute every entry of J instead of estimates."""

    def statistics(vjp, x, probes, generator):
        matrices = full_jacobian(vjp, x)
        diagonal = matrices.diagonal(dim1=1, dim2=2)
        squares = [part.square().sum((1, 2)) / x.shape[-1] for part in (matrices, matrices - torch.eye(x.shape[-1]))]
        return torch.stack((*squares, diagonal.mean(1), diagonal.square().mean(1)), dim=1)

    def singular_value(forward, backward, start, iterations):
        return torch.linalg.matrix_norm(full_jacobian(backward, start), 2)

    monkeypatch.setattr("cod_lightning.measure.jacobians.estimate_statistics", statistics)
    monkeypatch.setattr("cod_lightning.measure.jacobians.largest_singular_value", singular_value)


@pytest.mark.usefixtures("exact")
def test_selected_layers_equal_those_among_all(causal_lm):
    model = causal_lm("ours")
    all_layers = jacobian(model, [tokens()], tokens=2)
    selected = jacobian(model, [tokens()], tokens=2, layers=[4, 2])
    assert selected.rows() == [all_layers.rows()[3], all_layers.rows()[1]]


@pytest.fixture
def torch_jacobians(model):
    """A model, a batch of one sequence, and Jacobians of its blocks [tokens, hidden, tokens, hidden] by autograd."""
    batch = tokens(1, 4)
    whole = [torch.autograd.functional.jacobian(block, x)[0, :, :, 0] for x, block in pairs(model, batch)]
    return model, batch, whole


def pairs(model, batch):
    """Inputs of blocks, with the blocks as functions."""
    return zip(*model.block_functions(batch), strict=True)


@pytest.mark.usefixtures("exact")
def test_jacobians_of_sampled_tokens_agree_with_torch(torch_jacobians):
    model, batch, jacobians = torch_jacobians
    result = jacobian(model, [batch], tokens=4)
    for layer, whole in enumerate(jacobians):
        for name, value in definition(whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()).items():
            assert getattr(result, name)[layer] == pytest.approx(value, rel=1e-5), name
    assert result.tokens == 4


def test_the_mean_jacobian_agrees_with_torch(torch_jacobians):
    model, batch, jacobians = torch_jacobians
    mean = mean_jacobian(model, [batch], layers=[1, 2, 3, 4], tokens=4)
    for matrix, whole in zip(mean.matrices, jacobians, strict=True):
        expected = whole.diagonal(dim1=0, dim2=2).mean(-1)
        torch.testing.assert_close(torch.tensor(matrix), expected, rtol=1e-4, atol=1e-5)


def test_products_with_the_jacobian_agree_with_torch(torch_jacobians):
    model, batch, jacobians = torch_jacobians
    for (x, block), whole in zip(pairs(model, batch), jacobians, strict=True):
        with differentiable(model.model):
            product = jvp_and_vjp(block, x)[0](torch.ones_like(x))
        torch.testing.assert_close(product[0], whole.double().sum((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["gpas", "deep_norm", "peri_ln", "mix_ln"])
def test_products_agree_with_forward_mode_under_every_wiring(strategy):
    model = decoder(strategy, depth=2)
    blocks = pairs(model, tokens(1, 3))
    for name, parameter in model.model.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, 0.7)
    with differentiable(model.model):
        for x, block in blocks:
            v = torch.randn_like(x)
            expected = torch.func.jvp(block, (x,), (v,))[1].double()
            torch.testing.assert_close(jvp_and_vjp(block, x)[0](v.double()), expected, rtol=1e-4, atol=1e-4)


def test_growth_agrees_with_torch(model):
    batch = tokens(24, 3)
    result = jacobian_growth(model, [batch], layers=[4, 2], probes=16, iterations=25)
    inputs, blocks = model.block_functions(batch)

    def stack(x, layer):
        for block in blocks[:layer]:
            x = block(x)
        return x.sum(0)  # rows do not mix, so the sum keeps their derivatives apart

    for index, layer in enumerate(result.layers):
        whole = torch.autograd.functional.jacobian(lambda x, layer=layer: stack(x, layer), inputs[0]).double()
        rows = whole.permute(2, 0, 1, 3, 4).reshape(24, 48, 48)
        sigma = torch.linalg.svdvals(rows)[:, 0].mean()
        assert result.spectral[index] == pytest.approx(float(sigma), rel=1e-2)
        norm = (rows.square().sum((1, 2)).mean() / 48).sqrt()
        assert result.frobenius[index] == pytest.approx(float(norm), rel=0.1)
    assert result.sequences == 24


class TestPadding:
    """Blocks multiply padding by a million, which reveals any use of it."""

    batch = tokens(4, 6)
    batch[0, 4:], batch[1, 1:], batch[2] = PAD, PAD, PAD
    scale = torch.where(batch == PAD, 1e6, 1.0)

    def test_it_is_not_in_jacobians(self):
        model = linear_model(scale=self.scale)
        result = jacobian(model, [self.batch], pad_id=PAD, tokens=6, iterations=60)
        assert result.tokens == 4 + 1 + 0 + 6
        assert max(result.frobenius + result.largest_singular_value) < 10

    def test_it_is_not_in_mean_jacobians(self):
        model = linear_model(scale=self.scale)
        mean = mean_jacobian(model, [self.batch], layers=[1], pad_id=PAD, tokens=6)
        torch.testing.assert_close(torch.tensor(mean.matrices[0]), MATRICES[0])

    def test_it_is_not_in_growth(self):
        model = linear_model(scale=self.scale[[0, 1, 3]])
        growth = jacobian_growth(model, [self.batch], pad_id=PAD, probes=200, iterations=60)
        product = MATRICES[1] @ MATRICES[0]
        assert growth.sequences == 3
        assert growth.spectral[1] == pytest.approx(float(torch.linalg.svdvals(product)[0]), rel=1e-4)
        assert growth.frobenius[1] == pytest.approx(float(product.norm() / WIDTH**0.5), rel=0.1)


def test_rows_are_weighted_by_their_length():
    keep = torch.tensor([[True] * 6, [True, False, False, True, False, False], [False] * 6])
    positions, weights = sample_positions(keep, 3, torch.Generator().manual_seed(0))
    assert weights.tolist() == [[2, 2, 2], [1, 1, 0], [0, 0, 0]]
    assert sorted(positions[1, :2].tolist()) == [0, 3]
    assert len(set(positions[0].tolist())) == 3


class TestLengths:
    """One of four tokens with J = W and one with J = 3 W are sampled: they count four times and once."""

    batch = tokens(2, 4)
    batch[1, 1:] = PAD
    scale = torch.tensor([[1.0], [3.0]]).expand(2, 4)

    @pytest.mark.usefixtures("exact")
    def test_means_and_errors_are_those_of_all_tokens(self):
        result = jacobian(linear_model(scale=self.scale), [self.batch], pad_id=PAD, layers=[1])
        known = definition(MATRICES[0][None])
        assert result.mean_diagonal == [pytest.approx(1.4 * known["mean_diagonal"], rel=1e-5)]
        assert result.frobenius == [pytest.approx(2.6**0.5 * known["frobenius"], rel=1e-5)]
        # 4 (1 - 1.4) and 1 (3 - 1.4), and of the squares 4 (1 - 2.6) and 1 (9 - 2.6), over 5, of two samples
        assert result.errors["mean_diagonal"] == [pytest.approx(abs(0.64 * known["mean_diagonal"]), rel=1e-5)]
        assert result.errors["frobenius"] == [pytest.approx(2.56 / (2 * 2.6**0.5) * known["frobenius"], rel=1e-5)]

    def test_the_mean_jacobian_is_that_of_all_tokens(self):
        mean = mean_jacobian(linear_model(scale=self.scale), [self.batch], pad_id=PAD, layers=[1])
        torch.testing.assert_close(torch.tensor(mean.matrices[0]), 1.4 * MATRICES[0])


def test_the_statistics_of_a_mean_jacobian_are_those_of_one_matrix():
    series = MeanJacobian("planted", 1, [1], [MATRICES[0].tolist()]).series()
    known = definition(MATRICES[0][None])
    for name in ("frobenius", "distance", "mean_diagonal", "diagonal_share"):
        assert series[name] == [pytest.approx(known[name], rel=1e-5)], name


def test_the_errors_of_growth_are_over_sequences():
    """Multiples 1, 2 and 4 of the identity, whose norms random vectors give exactly."""
    scale = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 5)
    model = ModelAdapter(PlantedModel([LinearBlock(torch.eye(WIDTH), None, scale)], WIDTH))
    growth = jacobian_growth(model, [tokens(3, 5)])
    assert (growth.spectral, growth.frobenius) == ([pytest.approx(7 / 3)], [pytest.approx(7**0.5)])
    assert growth.spectral_error == [pytest.approx(stdev([1, 2, 4]) / 3**0.5)]
    assert growth.frobenius_error == [pytest.approx(stdev([1, 4, 16]) / 3**0.5 / (2 * 7**0.5))]


def test_rows_of_a_full_jacobian_are_outputs():
    weight, x = matrix(7), torch.zeros(2, 1, WIDTH)
    with differentiable(nn.Identity()):
        product = vjp(lambda x: x @ weight.T, x)
        full = full_jacobian(lambda v: product(v[:, None])[:, 0], x)
    torch.testing.assert_close(full, weight.double().expand(2, -1, -1))


def test_the_seed_determines_the_result(causal_lm):
    first, second = (jacobian(causal_lm("ours"), [tokens()], probes=2, tokens=1, iterations=1) for _ in range(2))
    assert first == second


def test_the_mean_jacobian_has_five_layers_by_default(causal_lm):
    assert mean_jacobian(causal_lm("ours", depth=9), [tokens(1)]).layers == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("measure", ["jacobian", "jacobian_map", "gain"])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([5], r"layers=\[5\]: expected 1 to 4, the number of blocks, each once"),
        ([1, 1], "each once"),
        ([], "at least one"),
    ],
)
def test_bad_layers_are_errors(causal_lm, measure, layers, message):
    with pytest.raises(UserError, match=message):
        MEASURES[measure](causal_lm("ours"), [tokens()], None, None, layers=layers)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        ("jacobian", {"probes": 1}, "probes=1 must be at least 2"),
        ("jacobian", {"tokens": 0}, "tokens=0 must be at least 1"),
        ("jacobian_map", {"tokens": 0}, "tokens=0 must be at least 1"),
        ("gain", {"iterations": 0}, "iterations=0 must be at least 1"),
        ("gain", {"probes": 0}, "probes=0 must be at least 1"),
    ],
)
def test_bad_options_are_errors(causal_lm, measure, options, message):
    with pytest.raises(UserError, match=message):
        MEASURES[measure](causal_lm("ours"), [tokens()], None, None, **options)


def test_the_jacobian_of_a_silent_block_is_the_identity(causal_lm):
    model = causal_lm("llama")
    silence(model, range(1, 5))
    result = jacobian(model, [tokens()], tokens=2, iterations=2)
    for name, value in zip(STATISTICS, (1, 0, 1, 1, 1), strict=True):
        assert getattr(result, name) == pytest.approx([value] * 4, abs=1e-6), name
        assert result.errors[name] == pytest.approx([0] * 4, abs=1e-6), name


def test_gradients_do_not_grow_over_silent_blocks(causal_lm):
    model = causal_lm("ours")
    silence(model, range(1, 5))
    growth = jacobian_growth(model, [tokens()], iterations=2, probes=2)
    assert growth.spectral == pytest.approx([1] * 4, abs=1e-6)
    assert growth.frobenius == pytest.approx([1] * 4, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "layers"), [({}, [1, 2, 3, 4, 5, 6, 7, 9]), ({"layers": range(1, 10)}, [*range(1, 10)])]
)
def test_the_growth_is_measured_at_eight_layers_or_at_all(causal_lm, options, layers):
    growth = jacobian_growth(causal_lm("ours", depth=9), [tokens(1)], probes=1, iterations=1, **options)
    assert growth.layers == layers


@pytest.mark.usefixtures("exact")
def test_other_tokens_do_not_enter_an_exact_jacobian(planted):
    result = jacobian(planted, [tokens()], tokens=3)
    for layer, weight in enumerate(MATRICES):
        for name, value in definition(weight[None]).items():
            assert getattr(result, name)[layer] == pytest.approx(value, rel=1e-5), name
    assert result.tokens == 12


def test_other_tokens_do_not_enter_the_mean_jacobian(planted):
    mean = mean_jacobian(planted, [tokens()], layers=[2, 1])
    torch.testing.assert_close(torch.tensor(mean.matrices), torch.stack(MATRICES[::-1]))


def test_estimates_agree_with_exact_statistics(model, request):
    batches = [tokens(16, 7, seed) for seed in (0, 1)]
    estimated = jacobian(model, batches, probes=16, tokens=1, iterations=30)
    request.getfixturevalue("exact")
    known = jacobian(model, batches, tokens=1)
    for name in STATISTICS:
        for layer in range(4):
            bound = 4 * estimated.errors[name][layer] + 1e-5
            assert getattr(estimated, name)[layer] == pytest.approx(getattr(known, name)[layer], abs=bound), name
