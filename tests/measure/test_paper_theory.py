"""Lemmas, bounds and fits on planted sequences and against loops written out."""

import math
from copy import deepcopy

import pytest
import torch
from builders import decoder, tiny_model, tokens

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.jacobians import jacobian_growth
from cod_lightning.measure.paper_theory import (
    Shapes,
    bound_constants,
    embedding_variance,
    fit_bound,
    fit_lemma,
    growth,
    has_lns,
    lemma,
    log_gain_bound,
    log_m,
    measured_theory,
    recursion,
    shapes_of,
    theory,
)
from cod_lightning.measure.weight_sparsity import linear_weights
from cod_lightning.nn.apply import apply
from cod_lightning.nn.strategies import block
from cod_lightning.nn.strategy_lookup import STRATEGIES

VARIANCES = [0.4, 0.9, 2.5, 3.0, 7.0, 11.0, 30.0]


def test_exponential_growth_is_fitted():
    variances = [3 * math.exp(0.4 * layer) for layer in range(1, 13)]
    fit = growth(variances)
    assert (fit.rate, fit.rate_r2) == (pytest.approx(0.4), pytest.approx(1))
    assert fit.exponential == pytest.approx(variances)
    assert fit.power_r2 < 0.95


def test_polynomial_growth_is_fitted():
    variances = [0.2 * layer**1.7 for layer in range(1, 13)]
    fit = growth(variances)
    assert (fit.power, fit.power_r2) == (pytest.approx(1.7), pytest.approx(1))
    assert fit.polynomial == pytest.approx(variances)
    assert fit.rate_r2 < 0.95


def test_constant_variances_do_not_grow():
    fit = growth([2.0] * 5)
    assert (fit.rate, fit.power, fit.rate_r2, fit.power_r2) == (0, 0, 1, 1)


@pytest.mark.parametrize("lns", [False, True])
def test_products_are_those_of_a_loop(lns):
    for layer in range(1, len(VARIANCES) + 1):
        variance, bound = VARIANCES[0], 1.0
        for k in range(1, layer):
            sigma = math.sqrt(VARIANCES[k - 1])
            variance *= 1 + 0.7 / ((math.sqrt(k) if lns else 1) * sigma)
            by = k if lns else 1
            bound *= 1 + 3.0 / (by * sigma) + 5.0 / (by**2 * sigma**2)
        assert lemma(VARIANCES, lns, 0.7)[layer - 1] == pytest.approx(variance)
        assert log_gain_bound(VARIANCES, 3.0, 5.0, lns)[layer - 1] == pytest.approx(math.log(bound))


@pytest.mark.parametrize("lns", [False, True])
@pytest.mark.parametrize("c", [0.05, 1.0, 40.0])
def test_variances_that_obey_the_lemma_give_its_constant_back(lns, c):
    values = [0.5]
    while len(values) < 20:
        values.append(lemma([*values, 1.0], lns, c)[-1])  # of the variances before it alone
    assert lemma(values, lns, c) == pytest.approx(values)
    assert fit_lemma(values, lns) == pytest.approx(c)


@pytest.mark.parametrize("lns", [False, True])
def test_the_recursion_obeys_its_lemma(lns):
    values = recursion(0.5, 20, lns)
    assert lemma(values, lns) == pytest.approx(values)


def test_the_recursion_grows_quadratically_and_linearly_under_lns():
    assert recursion(1.0, 100_000)[-1] == pytest.approx((100_000 / 2) ** 2, rel=0.01)
    assert recursion(1.0, 100_000, lns=True)[-1] == pytest.approx(100_000, rel=0.02)


@pytest.mark.parametrize("lns", [False, True])
@pytest.mark.parametrize(("a", "b"), [(2.0, 0.5), (0.3, 0.0), (0.0, 4.0), (1e3, 1e5)])
def test_constants_of_a_planted_bound_are_recovered(lns, a, b):
    gains = [7 * math.exp(value) for value in log_gain_bound(VARIANCES, a, b, lns)]
    assert fit_bound(VARIANCES, gains, lns) == pytest.approx((a, b), rel=1e-4, abs=1e-6)


def test_fits_do_not_go_below_zero():
    falling = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert fit_lemma(falling) == 0
    assert fit_bound([1.0] * 5, falling) == (0, 0)


def test_bounds_under_linear_growth():
    linear = [float(layer) for layer in range(1, 40_001)]
    bound = log_gain_bound(linear, 2.0, 0.0)
    assert bound[-1] - bound[9_999] == pytest.approx(2 * 2 * (200 - 100), rel=0.02)
    bound = log_gain_bound(linear, 2.0, 0.0, lns=True)
    assert bound[-1] - bound[9_999] < 2 * 2 / 100


def test_log_m_is_a_truncated_series_and_a_lower_bound():
    for a, b in ((0.3, 0.2), (2.0, 0.0), (0.0, 1.5)):
        terms = [a * math.exp(-layer) + b * math.exp(-2 * layer) for layer in range(1, 60)]
        assert log_m(a, b) == pytest.approx(sum(u - u**2 / 2 for u in terms))
        assert log_m(a, b) < log_gain_bound([math.exp(2 * layer) for layer in range(1, 60)], a, b)[-1]
    assert math.exp(log_m(1, 1)) == pytest.approx(1.8194, abs=1e-4)


def test_constants_from_shapes():
    a, b = bound_constants(Shapes(hidden=16, intermediate=64, heads=4, length=4, std=0.5))
    n = 2 * 16 * 4 * (2 + 2 + 0.5)
    assert a == pytest.approx(0.25 * (4 + 8) ** 2 + n * 0.25 * (16 * 2 + 1 + 0.5))
    assert b == pytest.approx(n * 0.0625 * 16 * 2)
    wide = Shapes(hidden=16, intermediate=64, heads=4, length=4, std=0.5, head_dim=9)
    assert bound_constants(wide)[1] == pytest.approx(n * 0.0625 * 16 * 3)


class TestTheory:
    variances = tuple(0.01 * 1.3**layer for layer in range(80))
    gains = tuple(1.1**layer for layer in range(1, 80))
    shapes = Shapes(hidden=4096, intermediate=11008, heads=32, length=4096, std=0.02)

    @pytest.fixture(params=[False, True], ids=["pre_ln", "lns"])
    def lns(self, request):
        return request.param

    @pytest.fixture
    def result(self, lns):
        return theory(self.variances, self.gains, lns=lns, shapes=self.shapes, model="planted")

    def test_growth_is_fitted(self, result):
        assert result.growth.rate == pytest.approx(math.log(1.3))

    def test_the_bound_from_shapes_may_overflow_a_float(self, result, lns):
        assert result.shape_log_bound == log_gain_bound(self.variances, *bound_constants(self.shapes), lns)
        assert max(result.shape_log_bound) > 710

    def test_m_is_reported_for_pre_ln_only(self, result, lns):
        assert (result.log_m is None) == lns

    def test_the_fitted_bound_starts_at_the_first_gain(self, result):
        assert result.fitted_log_bound[0] == pytest.approx(math.log(1.1))
        assert len(result.fitted_log_bound) == 79

    def test_the_table_leaves_out_missing_gains(self, result):
        rows = result.rows()
        assert len(rows) == 80
        assert "gain" in rows[78]
        assert "gain" not in rows[79]

    def test_the_figure_has_a_panel_for_each_bound(self, result, lns):
        assert len(result.panels()) == 3
        assert len(theory(VARIANCES, VARIANCES, lns=lns).panels()) == 2


def test_constant_variances_are_drawn(tmp_path):
    assert len(theory([1.0] * 5, [1.0] * 4).save(tmp_path, "theory")) == 4


@pytest.mark.parametrize(
    ("variances", "gains", "message"),
    [
        ([1.0, 0.0, 2.0], [1.0] * 3, "variances=.*: expected positive"),
        (VARIANCES, [1.0, math.nan, 2.0], "gains=.*: expected positive"),
        (VARIANCES, [1.0] * 8, "8 gains for 7 variances: expected 3 to 7"),
    ],
)
def test_bad_input_is_an_error(variances, gains, message):
    with pytest.raises(UserError, match=message):
        theory(variances, gains)


def test_lns_is_detected_in_our_models(causal_lm):
    assert (has_lns(causal_lm("ours-lns")), has_lns(causal_lm("llama"))) == (True, False)


def test_lns_is_detected_in_models_that_it_is_applied_to(causal_lm):
    assert has_lns(ModelAdapter(apply(deepcopy(causal_lm("llama").model), "lns")))


@pytest.mark.parametrize(("strategy", "options"), [("lns", {"position": "only_ffn"}), ("pre_ln", {}), ("halved", {})])
def test_other_gains_than_those_of_lns_are_not_lns(strategy, options, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "halved", lambda layer, depth: block(gain=0.5))
    assert not has_lns(decoder(strategy, **options))


def test_the_first_variance_is_that_of_the_embeddings(causal_lm):
    model, tokens = causal_lm("llama"), torch.randint(3, 37, (3, 6))
    tokens[1, 4:] = 0
    x = model.model.model.embed_tokens(tokens)[tokens != 0].detach().double()
    assert embedding_variance(model, [tokens[:2], tokens[2:]], 0) == pytest.approx(float(x.var(-1).mean()), rel=1e-5)


def test_the_first_variance_is_that_of_the_normalised_embeddings_of_peri_ln():
    assert embedding_variance(decoder("peri_ln"), [torch.randint(3, 37, (3, 6))], 0) == pytest.approx(1, rel=0.1)


def test_shapes_are_read_from_the_model(causal_lm):
    shapes = shapes_of(causal_lm("llama"), 6)
    assert (shapes.hidden, shapes.intermediate, shapes.heads, shapes.length) == (16, 24, 2, 6)
    assert math.isclose(shapes.std, 0.3, rel_tol=0.05)


@torch.no_grad()
def test_the_standard_deviation_is_around_the_mean_of_the_weights(causal_lm):
    model = causal_lm("llama")
    before = shapes_of(model, 6).std
    for block_ in model.blocks:
        for weight in linear_weights(block_).values():
            weight += 1
    assert shapes_of(model, 6).std == pytest.approx(before, rel=1e-4)


def test_the_constants_are_those_of_the_width_of_a_head_and_the_length_of_a_sequence():
    model = ModelAdapter(tiny_model("qwen3", head_dim=4))  # hidden size over heads is 8
    shapes = shapes_of(model, 6)
    assert shapes.head_dim == 4
    assert measured_theory(model, [tokens(3, 6) % 32], None, None).shape_constants == list(bound_constants(shapes))


def test_the_gains_are_the_spectral_norms_of_the_first_two_sequences():
    model, batch = decoder("pre_ln"), tokens(3, 6)
    expected = jacobian_growth(model, [batch[:2]], layers=[1, 2, 3, 4]).spectral
    assert measured_theory(model, [batch], None, None).gains == pytest.approx(expected)
