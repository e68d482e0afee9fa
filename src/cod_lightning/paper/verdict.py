"""The verdict that opens the report: which claims hold at which scale, generated from the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cod_lightning.page import render
from cod_lightning.paper.claims import SCALES, Column, Comparison, Experiment, columns
from cod_lightning.paper.findings import finding_results
from cod_lightning.paper.statistics import LEVEL, NOISE, ONE_SEED, OPPOSITE, SAME, Difference, holm
from cod_lightning.paper.tables import join

MOST_WORDS = 150
DIRECTIONS = (SAME, OPPOSITE, NOISE, ONE_SEED)
MIXED = "mixed"
"""Direction of a row that has the sign of some published columns only."""

Targets = Mapping[str, Mapping[str, Sequence[Experiment]]]
"""Experiments by target and scale (`claims.by_target`)."""


@dataclass(frozen=True)
class Test:
    """One comparison of ours with a claim of the paper."""

    key: tuple[str, ...]
    """Comparisons with the same key are one test, whichever tables list them."""
    target: str
    column: str
    label: str
    """The row of a table, or the finding about a figure."""
    statement: str
    """The paper's claim in words."""
    direction: str | None
    """Direction compared with the paper; None if the paper prints no figure."""
    difference: Difference

    @property
    def with_interval(self) -> str:
        """The claim with our difference; without spaces, as the words of the verdict are counted."""
        margin = "" if self.difference.margin is None else f"±{self.difference.margin:.2g}"
        return f"{self.statement} ({self.difference.mean:+.2g}{margin})"


def tests_of(target: str, column: Column) -> Iterator[Test]:
    """Comparisons in a column: rows of a table in its headline metric, and findings about a figure."""
    for comparison in column.compare(column.headline) if column.headline else ():
        for published in comparison.published:
            if comparison.difference:
                name = comparison.row.label.removeprefix("+ ")
                better = ((published.difference or 0) < 0) == comparison.metric.lower_is_better
                claim = f"{name} {'beats' if better else 'loses to'} {column.baseline.label}"
                label = comparison.row.label + " (did not train here)" * bool(comparison.untrained)
                heading = published.experiment.heading
                yield Test(comparison.test, target, heading, label, claim, published.direction, comparison.difference)
    for result in finding_results(column):
        if result.direction and result.difference:
            claim = result.statement
            yield Test(result.test, target, column.heading, claim, claim, result.direction, result.difference)


@dataclass(frozen=True)
class ScaleSummary:
    """All comparisons at one scale."""

    scale: str
    setting: str
    headline: Comparison | None
    """LNS compared with Pre-LN in the first table that has both."""
    tests: list[Test]
    varied: list[str]
    """LNS compared with Pre-LN over each setting that an experiment varies."""

    @property
    def rank(self) -> tuple[int, int]:
        """Key that orders scales: a headline with an interval first, then the larger scale."""
        ours = self.headline.difference if self.headline else None
        return (0 if ours is None else 1 if ours.margin is None else 2, -SCALES.index(self.scale))

    @cached_property
    def unique(self) -> dict[tuple[str, ...], Difference]:
        """Differences with an interval, without repeated tests."""
        return {test.key: test.difference for test in self.tests if test.difference.margin is not None}

    @property
    def beyond_noise(self) -> int:
        return sum(difference.beyond_noise for difference in self.unique.values())

    @property
    def expected_by_chance(self) -> float:
        """Expected number of intervals that exclude zero if no difference is real."""
        return LEVEL * len(self.unique)

    @property
    def chance_of_one(self) -> float:
        """Probability that at least one excludes zero if no difference is real and tests are independent."""
        return 1 - (1 - LEVEL) ** len(self.unique)

    @cached_property
    def significant_tests(self) -> set[tuple[str, ...]]:
        """Tests that stay significant after Holm's correction."""
        return holm({key: p for key, d in self.unique.items() if (p := d.p_value) is not None})

    @property
    def survivor_labels(self) -> list[str]:
        labels = (test.label.removeprefix("+ ") for test in self.tests if test.key in self.significant_tests)
        return list(dict.fromkeys(labels))

    @cached_property
    def by_direction(self) -> dict[str, list[str]]:
        """Claims by direction, those about LNS first, then other findings about figures; without the headline."""
        by_key: dict[tuple[str, ...], list[Test]] = {}
        for test in sorted(self.tests, key=lambda test: ("LNS" not in test.statement, "Figure" not in test.target)):
            if test.direction and (self.headline is None or test.key != self.headline.test):
                by_key.setdefault(test.key, []).append(test)
        grouped: dict[str, list[str]] = {}
        for tests in by_key.values():
            directions = {test.direction for test in tests}
            direction = str(tests[0].direction) if len(directions) == 1 else MIXED
            grouped.setdefault(direction, []).append(tests[0].label if direction == MIXED else tests[0].with_interval)
        return {name: list(dict.fromkeys(grouped[name])) for name in (*DIRECTIONS, MIXED) if name in grouped}


def summarize(targets: Targets) -> list[ScaleSummary]:
    """One summary for each scale with a comparison, the largest scale first."""
    summaries = []
    for scale in SCALES:
        tests, headline, setting = list[Test](), None, ""
        for target, scales in targets.items():
            for column in columns(scales.get(scale, ())):
                tests += tests_of(target, column)
                if headline is None and "axis" not in column.first.paper:
                    headline, setting = lns_comparison(column), column.first.setting
        if tests:
            summaries.append(ScaleSummary(scale, setting, headline, tests, list(varied_settings(targets, scale))))
    return summaries


def lns_comparison(column: Column) -> Comparison | None:
    """Compare LNS with Pre-LN in a column of losses."""
    if column.headline is None or not column.headline.lower_is_better or column.baseline.name != "pre_ln":
        return None
    return next((c for c in column.compare(column.headline) if c.row.name == "lns" and c.difference), None)


def varied_settings(targets: Targets, scale: str) -> Iterator[str]:
    """LNS less Pre-LN along each varied setting with two values or more."""
    for target, scales in targets.items():
        group = columns(scales.get(scale, ())) if "axis" in scales["paper"][0].paper else []
        compared = ((column.heading, lns_comparison(column)) for column in group)
        differences = [(heading, c.difference) for heading, c in compared if c and c.difference]
        if len(differences) > 1:
            values = [f"{d.mean:+.2g}" + ("" if d.margin is None else f"±{d.margin:.2g}") for _, d in differences]
            yield f"{target} ({differences[0][0]} to {differences[-1][0]}): {', '.join(values)}"


def verdict(targets: Targets, summaries: Sequence[ScaleSummary]) -> str:
    """At most `MOST_WORDS` words: the headline at every scale, other claims at one scale, and untried targets."""
    untried: dict[str, list[str]] = {}
    for target, scales in targets.items():
        kind, _, number = target.partition(" ")
        if kind in ("Table", "Figure") and not has_runs(scales):
            untried.setdefault(kind, []).append(number)
    no_scale = [scale for scale in SCALES if scale not in {summary.scale for summary in summaries}]
    main = max(summaries, key=lambda summary: summary.rank, default=None)
    text = ""
    for most in range(12, 0, -1):
        text = render(
            Path(__file__).with_name("verdict.md.j2"),
            summaries=summaries,
            untried=[f"{kind}{'s' * (len(n) > 1)} {join(n)}" for kind, n in untried.items()],
            untried_scales=no_scale,
            main=main,
            lists={name: shorten(claims, most) for name, claims in main.by_direction.items()} if main else {},
        )
        if len(text.split()) <= MOST_WORDS:
            break
    return text


def has_runs(scales: Mapping[str, Sequence[Experiment]]) -> bool:
    return any(row.runs for experiments in scales.values() for e in experiments for row in e.rows)


def shorten(words: Sequence[str], most: int) -> list[str]:
    """The first `most` words, and how many are left out."""
    rest = len(words) - most
    return [*words[:most], f"{rest} more"] if rest > 0 else list(words)
