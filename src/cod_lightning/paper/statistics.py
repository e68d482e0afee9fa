"""Means over seeds, paired differences with their 95 % interval, and Holm's correction for many comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

S = TypeVar("S", bound="Sample")
K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
V = TypeVar("V")

LEVEL = 0.05
"""Level of intervals, and of the family-wise error in Holm's correction."""
MIN_SEEDS = 3
"""Pairs of seeds that an interval needs."""
SAME, OPPOSITE, NOISE, FEW_SEEDS = "same", "opposite", "within noise", f"fewer than {MIN_SEEDS} seeds"
UNLIKE, UNCLEAR = "only one trained", "unclear in the paper"
"""Directions of a difference compared with the paper's. `UNLIKE`: the row did not train here, or not in the paper;
`UNCLEAR`: the published difference is within the paper's own noise."""


@dataclass(frozen=True)
class Sample:
    """Values over seeds."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation with n - 1 in the denominator; None for a single value."""

    @classmethod
    def of(cls: type[S], values: Sequence[float]) -> S:
        return cls(len(values), fmean(values), stdev(values) if len(values) > 1 else None)

    @property
    def spread(self) -> float | None:
        """The number that follows ± in the report."""
        return self.sd

    def format(self, mean: str, spread: str) -> str:
        """Mean ± spread, each in a format such as ".3g"; the mean alone for one seed."""
        return f"{self.mean:{mean}}" + ("" if self.spread is None else f" ± {self.spread:{spread}}")


@dataclass(frozen=True)
class Difference(Sample):
    """Differences between runs of the same seed, which share their initial random draws and their batches."""

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval of the mean (Student's t); None below three seeds."""
        if self.sd is None or self.n < MIN_SEEDS:
            return None
        return t_quantile(self.n - 1) * self.sd / math.sqrt(self.n)

    @property
    def spread(self) -> float | None:
        return self.margin

    @property
    def beyond_noise(self) -> bool:
        """Whether the 95 % interval excludes zero."""
        return self.margin is not None and abs(self.mean) > self.margin

    @property
    def p_value(self) -> float | None:
        """Two-sided p-value of the paired t-test; None below three seeds."""
        if self.sd is None or self.n < MIN_SEEDS:
            return None
        if self.sd == 0:
            return float(self.mean == 0)
        return t_tails(abs(self.mean) * math.sqrt(self.n) / self.sd, self.n - 1)

    def direction(self, published: float) -> str:
        """Whether the difference has the sign of a published one."""
        if self.margin is None:
            return FEW_SEEDS
        if not self.beyond_noise:
            return NOISE
        return SAME if (self.mean > 0) == (published > 0) else OPPOSITE


def grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    """The values of every key, both in their order."""
    groups: dict[K, list[V]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def with_enough_seeds(items: Sequence[T], seeds: Callable[[T], int]) -> Sequence[T]:
    """The items of at least three seeds if two have three, else those of two if two have, else all."""
    for least in (MIN_SEEDS, 2):
        several = [item for item in items if seeds(item) >= least]
        if len(several) > 1:
            return several
    return items


def t_tails(t: float, degrees: int) -> float:
    """Probability that Student's t is beyond ±t (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    inside = math.sin(angle) * total
    return max(1 - (2 / math.pi * (angle + inside) if odd else inside), 0.0)  # rounding


def t_quantile(degrees: int) -> float:
    """The t whose tails hold `LEVEL` of the probability, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tails(middle, degrees) > LEVEL else (low, middle)
    return high


def holm(p_values: Mapping[K, float]) -> set[K]:
    """The tests that stay significant after Holm's step-down correction, which needs no independence of the tests."""
    significant: set[K] = set()
    in_order = sorted(p_values.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    for rank, (key, p) in enumerate(in_order):
        if not p <= LEVEL / (len(p_values) - rank):
            break
        significant.add(key)
    return significant
