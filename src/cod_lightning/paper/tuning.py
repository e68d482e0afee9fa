"""Every strategy at its own best learning rate, beside the baseline at its own best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cod_lightning.paper.claims import Column, Metric, ReportRow
from cod_lightning.paper.statistics import Difference, with_enough_seeds

GOOD_RATE_MARGIN = 0.05
"""A learning rate is good for a strategy if its losses are on average at most so many nats above those of the best,
on the seeds of both."""


@dataclass(frozen=True)
class Tuned:
    """A row at the learning rate of its lowest mean loss (`mean_losses`)."""

    row: ReportRow
    rate: str
    """Heading of the column of that rate."""
    losses: Mapping[int, float]
    """Final validation losses at that rate by seed, in nats; infinite for a run that failed."""
    difference: Difference | None
    """To the baseline at its own best rate, paired by seed; None for the baseline, and without a common seed."""
    rates: tuple[str, ...]
    """Headings of the rates that were run."""
    compared: tuple[str, ...]
    """Headings of those with enough seeds to be the best."""
    good: tuple[str, ...]
    """Headings of those that are good, see `GOOD_RATE_MARGIN`."""

    @property
    def edge(self) -> str:
        """Whether a better rate may lie beyond those that are compared, in words."""
        for rates, lower, higher in (
            (self.rates, "no lower one run", "no higher one run"),
            (self.compared, "lower ones: fewer seeds", "higher ones: fewer seeds"),
        ):
            if self.rate in (rates[0], rates[-1]):
                return lower if self.rate == rates[0] else higher
        return ""


def tuned_rows(columns: Sequence[Column]) -> list[Tuned]:
    """The rows that were run at several rates, by their difference; the rate is chosen by the losses that are compared.

    A run that diverged, or whose loss is not finite, is the worst.

    Args:
        columns: one for each learning rate, with the same rows.
    """
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for column in columns:
        for row in column.rows:
            failed = {run.seed: math.inf for run in row.runs if run.failure}
            if by_seed := failed | Metric("val_loss").by_seed(row):
                losses.setdefault(row.name, {})[column.heading] = by_seed
    means = {name: mean_losses(rates) for name, rates in losses.items() if len(rates) > 1}
    best = {name: min(rates, key=lambda rate: rates[rate]) for name, rates in means.items()}
    baseline, rows = columns[0].baseline.name, {row.name: row for row in columns[0].rows}
    base = losses[baseline][best[baseline]] if baseline in best else {}
    tuned = []
    for name in best:
        rate, values = best[name], losses[name][best[name]]
        pairs = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
        compared = pairs and name != baseline and all(map(math.isfinite, pairs))
        difference = Difference.of(pairs) if compared else None
        good = tuple(other for other, by_seed in losses[name].items() if excess(by_seed, values) <= GOOD_RATE_MARGIN)
        tuned.append(Tuned(rows[name], rate, values, difference, tuple(losses[name]), tuple(means[name]), good))

    def to_baseline(row: Tuned) -> float:
        otherwise = 0.0 if row.row.name == baseline else math.inf
        return row.difference.mean if row.difference else otherwise

    return sorted(tuned, key=to_baseline)


def excess(losses: Mapping[int, float], best: Mapping[int, float]) -> float:
    """Mean of the losses above the best ones on the seeds of both; infinite without one, or if a run failed."""
    seeds = losses.keys() & best.keys()
    if not seeds or not all(map(math.isfinite, losses.values())):
        return math.inf
    return fmean(losses[seed] - best[seed] for seed in seeds)


def mean_losses(rates: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Mean loss at each rate over the seeds that all have, or else over its own; infinite if a run failed.

    Rates without a failed run that have fewer seeds than others are left out as in `with_enough_seeds`.
    """
    whole = [rate for rate, by_seed in rates.items() if all(map(math.isfinite, by_seed.values()))]
    compared = with_enough_seeds(whole, lambda rate: len(rates[rate]))
    common = set.intersection(*(set(rates[rate]) for rate in compared)) if compared else set()
    means = {rate: fmean(rates[rate][seed] for seed in common or rates[rate]) for rate in compared}
    return {rate: means.get(rate, math.inf) for rate in rates if rate in means or rate not in whole}
