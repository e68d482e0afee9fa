"""Lemmas, bounds and fits on planted sequences and against loops written out."""

import json
import math

import pytest
import torch

from cod_lightning.errors import UserError
from cod_lightning.measure.result import save
from cod_lightning.measure.theory import (
    Shapes,
    constants,
    embedding_variance,
    fit_bound,
    fit_lemma,
    growth,
    has_lns,
    lemma,
    log_bound,
    log_m,
    recursion,
    shapes_of,
    theory,
)

VARIANCES = [0.4, 0.9, 2.5, 3.0, 7.0, 11.0, 30.0]


def test_an_exponential_and_a_power_are_told_apart():
    found = growth([3 * math.exp(0.4 * layer) for layer in range(1, 13)])
    assert found.rate == pytest.approx(0.4)
    assert found.rate_r2 == pytest.approx(1)
    assert found.power_r2 < 0.95
    assert found.exponential == pytest.approx([3 * math.exp(0.4 * layer) for layer in range(1, 13)])
    found = growth([0.2 * layer**1.7 for layer in range(1, 13)])
    assert found.power == pytest.approx(1.7)
    assert found.power_r2 == pytest.approx(1)
    assert found.rate_r2 < 0.95
    assert found.polynomial == pytest.approx([0.2 * layer**1.7 for layer in range(1, 13)])
    flat = growth([2.0] * 5)
    assert (flat.rate, flat.power, flat.rate_r2, flat.power_r2) == (0, 0, 1, 1)


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
        assert log_bound(VARIANCES, 3.0, 5.0, lns)[layer - 1] == pytest.approx(math.log(bound))


@pytest.mark.parametrize("lns", [False, True])
@pytest.mark.parametrize("c", [0.05, 1.0, 40.0])
def test_the_recursion_obeys_its_lemma_and_gives_its_constant_back(lns, c):
    values = recursion(0.5, 20, lns, c)
    assert lemma(values, lns, c) == pytest.approx(values)
    assert fit_lemma(values, lns) == pytest.approx(c)


def test_the_recursion_grows_quadratically_and_linearly_under_lns():
    assert recursion(1.0, 100_000)[-1] == pytest.approx((100_000 / 2) ** 2, rel=0.01)
    assert recursion(1.0, 100_000, lns=True)[-1] == pytest.approx(100_000, rel=0.02)


@pytest.mark.parametrize("lns", [False, True])
@pytest.mark.parametrize(("a", "b"), [(2.0, 0.5), (0.3, 0.0), (0.0, 4.0), (1e3, 1e5)])
def test_constants_of_a_planted_bound_are_found(lns, a, b):
    gains = [7 * math.exp(value) for value in log_bound(VARIANCES, a, b, lns)]
    assert fit_bound(VARIANCES, gains, lns) == pytest.approx((a, b), rel=1e-4, abs=1e-6)


def test_fits_do_not_go_below_zero():
    falling = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert fit_lemma(falling) == 0
    assert fit_bound([1.0] * 5, falling) == (0, 0)


def test_bounds_under_linear_growth():
    linear = [float(layer) for layer in range(1, 40_001)]
    bound = log_bound(linear, 2.0, 0.0)
    assert bound[-1] - bound[9_999] == pytest.approx(2 * 2 * (200 - 100), rel=0.02)
    bound = log_bound(linear, 2.0, 0.0, lns=True)
    assert bound[-1] - bound[9_999] < 2 * 2 / 100


def test_m_is_the_series_that_it_cuts_off():
    for a, b in ((0.3, 0.2), (2.0, 0.0), (0.0, 1.5)):
        terms = [a * math.exp(-layer) + b * math.exp(-2 * layer) for layer in range(1, 60)]
        assert log_m(a, b) == pytest.approx(sum(u - u**2 / 2 for u in terms))
        assert log_m(a, b) < log_bound([math.exp(2 * layer) for layer in range(1, 60)], a, b)[-1]
    assert math.exp(log_m(1, 1)) == pytest.approx(1.8194, abs=1e-4)


def test_constants_from_shapes():
    a, b = constants(Shapes(hidden=16, intermediate=64, heads=4, length=4, std=0.5))
    n = 2 * 16 * 4 * (2 + 2 + 0.5)
    assert a == pytest.approx(0.25 * (4 + 8) ** 2 + n * 0.25 * (16 * 2 + 1 + 0.5))
    assert b == pytest.approx(n * 0.0625 * 16 * 2)


@pytest.mark.parametrize("lns", [False, True])
def test_a_theory_is_put_together_and_saved(tmp_path, lns):
    shapes = Shapes(hidden=4096, intermediate=11008, heads=32, length=4096, std=0.02)
    variances = [0.01 * 1.3**layer for layer in range(80)]
    gains = [1.1**layer for layer in range(1, 80)]
    found = theory(variances, lns=lns, shapes=shapes, gains=gains, model="planted")
    assert found.growth.rate == pytest.approx(math.log(1.3))
    assert found.shape_log_bound == log_bound(variances, *constants(shapes), lns)
    assert max(found.shape_log_bound) > 710  # e to this is no float
    assert (found.log_m is None) == lns
    assert found.fitted_log_bound[0] == pytest.approx(math.log(1.1))
    assert len(found.fitted_log_bound) == 79
    assert any("Lemma 4.1" in remark and "3/2 - epsilon/2" in remark for remark in found.disagreements) == lns
    assert any("Theorem 3.3" in remark for remark in found.disagreements) != lns
    rows = found.rows()
    assert len(rows) == 80
    assert "gain" in rows[78]
    assert "gain" not in rows[79]
    paths = save(found, tmp_path, "theory")
    assert json.loads(paths[0].read_text())["growth"]["rate"] == found.growth.rate
    assert len(save(theory(VARIANCES, lns=lns), tmp_path, "bare")) == 3


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match=r"2 variances: .* at least 3"):
        theory([1.0, 2.0])
    with pytest.raises(UserError, match="variances: all must be positive"):
        theory([1.0, 0.0, 2.0])
    with pytest.raises(UserError, match="gains: all must be positive"):
        theory(VARIANCES, gains=[1.0, math.nan, 2.0])
    with pytest.raises(UserError, match="8 gains for 7 variances: give from 3 to 7"):
        theory(VARIANCES, gains=[1.0] * 8)


def test_lns_is_seen_in_our_models(causal_lm):
    assert (has_lns(causal_lm("ours-lns")), has_lns(causal_lm("llama"))) == (True, False)


def test_the_first_variance_is_that_of_the_embeddings(causal_lm):
    model, tokens = causal_lm("llama"), torch.randint(3, 37, (3, 6))
    tokens[1, 4:] = 0
    x = model.model.model.embed_tokens(tokens)[tokens != 0].detach().double()
    assert embedding_variance(model, [tokens[:2], tokens[2:]], 0) == pytest.approx(float(x.var(-1).mean()), rel=1e-5)


def test_shapes_are_read_from_the_model(causal_lm):
    shapes = shapes_of(causal_lm("llama"), 6)
    assert (shapes.hidden, shapes.intermediate, shapes.heads, shapes.length) == (16, 24, 2, 6)
    assert math.isclose(shapes.std, 0.3, rel_tol=0.05)
