"""Intervals, p-values and corrections against values of scipy and of tables."""

import math

import numpy as np
import pytest

from cod_lightning.paper.statistics import Difference, Sample, holm, t_quantile, t_tails


@pytest.mark.parametrize(("degrees", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042)])
def test_quantiles_are_those_of_students_t(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=5e-4)
    assert t_tails(t, degrees) == pytest.approx(0.05, abs=5e-5)


def test_a_sample_has_the_standard_deviation_of_n_minus_1():
    assert Sample.of([1.0, 2.0, 4.0]) == Sample(3, pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert Sample.of([1.0]).sd is None


def test_the_interval_is_that_of_the_paired_t_test():
    difference = Difference.of([-0.4, -0.3, -0.4])  # mean -11/30, sd 0.1 / sqrt(3), 2 degrees of freedom
    assert difference.mean == pytest.approx(-11 / 30)
    assert difference.margin == pytest.approx(4.3027 * (0.1 / math.sqrt(3)) / math.sqrt(3), rel=1e-4)
    assert difference.p_value == pytest.approx(0.0081634, rel=1e-3)
    assert difference.beyond_noise


def test_the_interval_excludes_zero_exactly_if_p_is_below_5_percent():
    for values in ([0.1, 0.2, 0.6], [0.1, 0.2, 0.3], [1.0, -1.0, 0.0], [0.5, 0.5, 0.5]):
        difference = Difference.of(values)
        assert difference.beyond_noise == (difference.p_value < 0.05)


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3001]])
def test_fewer_than_three_seeds_have_no_interval(values):
    difference = Difference.of(values)
    assert (difference.margin, difference.p_value, difference.beyond_noise) == (None, None, False)


def test_holm_compares_the_smallest_with_the_level_over_all_and_stops_at_the_first_failure():
    assert holm({"a": 0.01, "b": 0.02, "c": 0.04, "d": 0.03}) == {"a"}
    assert holm({"a": 0.01, "b": 0.015, "c": 0.02, "d": 0.04}) == {"a", "b", "c", "d"}
    assert holm({"a": 0.02, "b": 0.001, "c": 0.9}) == {"b", "a"}
    assert holm({}) == set()


def test_holm_takes_no_comparison_without_a_p_value():
    assert holm({"a": math.nan, "b": 0.9, "c": 0.01}) == {"c"}


def test_a_p_value_is_not_negative():
    assert 0 <= Difference(7, 1.0, 1.4e-4).p_value < 1e-15
