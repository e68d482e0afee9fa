"""The verdict that opens the report: which claims hold at which scale, generated from the runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cod_lightning.page import render
from cod_lightning.paper.claims import BASELINE, SCALES, Column, Comparison, Targets, group_columns
from cod_lightning.paper.findings import ClaimResult, finding_results
from cod_lightning.paper.statistics import LEVEL, OPPOSITE, SAME, UNCLEAR, Difference, grouped, holm, with_enough_seeds
from cod_lightning.paper.tables import untried_scales

MAX_WORDS = 150
OPEN = "open"
"""Direction of a claim that our runs neither confirm nor reverse, as within noise, or only for some published sizes."""
WORDS = {SAME: "hold", OPPOSITE: "opposite", OPEN: "open"}


def claim_results(column: Column) -> Iterator[ClaimResult]:
    """Comparisons in a column: rows of a table in its headline metric, and findings about a figure."""
    for c in column.compare(column.headline):
        for experiment, published in zip(column.experiments, c.published, strict=True):
            if c.difference:
                better = ((published.difference or 0) < 0) == c.metric.lower_is_better
                name = c.row.label.removeprefix("+ ")
                label = c.row.label + f": {c.metric.title}" * bool(column.first.axis)  # beside findings about layers
                yield ClaimResult(
                    key=c.key,
                    target=column.first.target,
                    column=experiment.heading,
                    label=label + (f" ({c.caveat})" if c.caveat else ""),
                    statement=f"{name} {'beats' if better else 'loses to'} {column.baseline.label}",
                    direction=c.direction(published),
                    difference=c.difference,
                    unit=c.metric.unit,
                    about_layers=False,
                )
    yield from finding_results(column)


@dataclass(frozen=True)
class Change:
    """LNS minus Pre-LN at another value of a setting than the usual one."""

    usual: str
    """Heading of the column with the runs of the headline, or else of the first."""
    usual_difference: Difference
    """LNS minus Pre-LN in that column, on all of its seeds."""
    other: str
    """Heading of the other column."""
    difference: Difference
    """LNS minus Pre-LN in the other column, on all of its seeds."""
    change: Difference
    """LNS minus Pre-LN in the other column minus that in the usual one, on the seeds of both."""
    of_rates: bool
    """Whether the setting is the learning rate."""
    key: tuple[str, ...]
    """Identifies the runs and the metric: changes with the same key are one statistical test."""


@dataclass(frozen=True)
class ScaleSummary:
    """All comparisons at one scale."""

    scale: str
    setting: str
    headline: Comparison | None
    """LNS compared with Pre-LN in the first table that has both; without a difference if all runs of one diverged."""
    target: str
    """That table."""
    caveat: str
    """Runs of these two that did not train or diverged, in words."""
    best: tuple[str, Difference] | None
    """The row of the headline's table with the lowest loss on the seeds of LNS, and LNS minus it."""
    claims: list[ClaimResult]
    changes: dict[str, list[Change]]
    """LNS compared with Pre-LN for each target that varies a setting."""

    @property
    def shown_changes(self) -> dict[str, list[Change]]:
        """The first and the last change of every target but the learning rates, which are compared each at its best.

        Changes without an interval are left out if others have one.
        """
        shown = {}
        for target, every in self.changes.items():
            changes = [each for each in every if each.difference.margin is not None] or every
            if not changes[0].of_rates:
                shown[target] = changes if len(changes) < 3 else [changes[0], changes[-1]]
        return shown

    @property
    def rank(self) -> tuple[int, int]:
        """Orders scales: a headline with an interval is best, then the larger scale."""
        ours = self.headline.difference if self.headline else None
        return (0 if ours is None else 1 if ours.margin is None else 2, -SCALES.index(self.scale))

    @cached_property
    def unique(self) -> dict[tuple[str, ...], Difference]:
        """Differences with an interval, without repeated tests."""
        return {claim.key: claim.difference for claim in self.claims if claim.difference.margin is not None}

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
    def significant(self) -> set[tuple[str, ...]]:
        """Tests that stay significant after Holm's correction."""
        return holm({key: p for key, d in self.unique.items() if (p := d.p_value) is not None})

    @property
    def significant_labels(self) -> list[str]:
        """The first label of each of these tests, with its column if another test has the same label."""
        first = {claim.key: claim for claim in reversed(self.claims) if claim.key in self.significant}
        tests = [label for label, _ in {(claim.label, claim.key) for claim in self.claims}]
        return [
            claim.label.removeprefix("+ ")
            + (f" ({claim.column})" if tests.count(claim.label) > 1 else "")
            + (", opposite" if claim.direction == OPPOSITE else "")
            for claim in reversed(first.values())
        ]

    @cached_property
    def by_direction(self) -> dict[str, list[ClaimResult]]:
        """One claim for each test, by direction; those about LNS first; without the headline."""
        headline = self.headline and self.headline.key
        others = [claim for claim in self.claims if claim.direction and claim.key != headline]
        others.sort(key=lambda claim: "LNS" not in claim.statement)
        by_direction: dict[str, list[ClaimResult]] = {SAME: [], OPPOSITE: [], OPEN: []}
        for claims in grouped((claim.key, claim) for claim in others).values():
            directions = {claim.direction for claim in claims} - {UNCLEAR}
            settled = directions in ({SAME}, {OPPOSITE})
            first = next((claim for claim in claims if claim.direction != UNCLEAR), claims[0])
            by_direction[str(first.direction) if settled else OPEN].append(first)
        return by_direction

    def tallies(self, examples: Collection[str] = ()) -> list[str]:
        """Numbers of claims about table rows and about layers, by direction; in brackets those that stay significant.

        Args:
            examples: directions of which a claim about layers is named.
        """
        lines = []
        for title, about_layers in (("Table rows", False), ("Layers", True)):
            parts = []
            for direction, every in self.by_direction.items():
                claims = [claim for claim in every if claim.about_layers == about_layers]
                significant = sum(claim.key in self.significant for claim in claims)
                part = f"{WORDS[direction]} {len(claims)}" + f" ({significant})" * (direction != OPEN)
                if claims and about_layers and direction in examples:
                    ours = claims[0].difference.format("+.2g", ".2g").replace(" ", "")
                    part += f", e.g. {claims[0].statement} ({ours} {claims[0].unit})"
                    part += " †" * (claims[0].key in self.significant)
                parts += [part] * bool(claims)
            lines += [f"{title}: {'; '.join(parts)}."] * bool(parts)
        return lines


def summarize(targets: Targets) -> list[ScaleSummary]:
    """One summary for each scale with a comparison, the largest scale first."""
    summaries = []
    for scale in SCALES:
        claims, headline, table, caveat, setting, best = list[ClaimResult](), None, "", "", "", None
        along: dict[str, list[tuple[Column, Comparison]]] = {}
        for target, scales in targets.items():
            for column in group_columns(scales.get(scale, ())):
                claims += claim_results(column)
                lns, of_both = lns_comparison(column)
                if column.first.axis and lns and lns.difference:
                    along.setdefault(target, []).append((column, lns))
                elif not column.first.axis and headline is None:
                    headline, caveat, table, setting = lns, of_both, target, column.first.setting
                    best = None if lns is None else lowest_row(column, lns)
        if claims or headline:
            usual = headline.key[:2] if headline else ()
            by_target = {target: changes_of(pairs, usual) for target, pairs in along.items()}
            # Families with the same runs are named once.
            same_runs = {str([each.key for each in several]): t for t, several in by_target.items() if several}
            changes = {target: by_target[target] for target in same_runs.values()}
            claims += [change_result(target, each) for target, several in changes.items() for each in several]
            summaries.append(ScaleSummary(scale, setting, headline, table, caveat, best, claims, changes))
    return summaries


def lowest_row(column: Column, lns: Comparison) -> tuple[str, Difference] | None:
    """The row of a column that is lowest below LNS, or least above it, on the seeds of both; and LNS minus that row.

    Rows of fewer seeds than others are left out as in `with_enough_seeds`. None if it is the baseline.
    """
    others = [c.row for c in column.compare(lns.metric) if c.row is not lns.row and not c.failures]
    pairs = [(row.label, d) for row in others if (d := lns.metric.paired_difference(lns.row, row))]
    best = max(with_enough_seeds(pairs, lambda pair: pair[1].n), key=lambda pair: pair[1].mean, default=None)
    return None if best and best[0] == column.baseline.label else best


def changes_of(pairs: Sequence[tuple[Column, Comparison]], usual: tuple[str, ...]) -> list[Change]:
    """The changes from the column whose runs are `usual`, or else the first, to every other column.

    Args:
        pairs: columns, each with the comparison of LNS in it.
        usual: the ids of the runs of LNS and Pre-LN under the usual setting.
    """
    start = next((pair for pair in pairs if pair[1].key[:2] == usual), pairs[0])
    column, lns = start
    changes = []
    for other, c in (pair for pair in pairs if pair is not start):
        seeds = lns.metric.common_seeds(lns.row, column.baseline, c.row, other.baseline)
        if lns.difference and c.difference and seeds:
            there = lns.metric.differences(lns.row, column.baseline, seeds)
            here = lns.metric.differences(c.row, other.baseline, seeds)
            change = Difference.of([after - before for before, after in zip(there, here, strict=True)])
            key = ("change", *lns.key, *c.key)
            of_rates = column.first.axis == "lr"
            changes.append(Change(column.heading, lns.difference, other.heading, c.difference, change, of_rates, key))
    return changes


def change_result(target: str, change: Change) -> ClaimResult:
    """The change of LNS minus Pre-LN with a setting, which the paper has no figure for."""
    span = f"{change.usual} to {change.other}"
    text = f"LNS minus Pre-LN changes with {target} ({span})"
    return ClaimResult(change.key, target, span, text, text, None, change.change, "nats", about_layers=False)


def lns_comparison(column: Column) -> tuple[Comparison | None, str]:
    """LNS compared with Pre-LN in a column of losses, and the caveats of both; None if there is nothing to say."""
    if column.headline is None or not column.headline.lower_is_better or column.baseline.name != BASELINE:
        return None, ""
    both = {c.row.name: c for c in column.compare(column.headline) if c.row.name in ("lns", BASELINE)}
    caveat = "; ".join(f"{c.row.label}: {c.caveat}" for c in both.values() if c.caveat)
    lns = both.get("lns")
    return (lns if lns and (lns.difference or (lns.row.runs and caveat)) else None), caveat


def verdict(targets: Targets, summaries: Sequence[ScaleSummary]) -> str:
    """The headline at every scale, other claims at one scale, and untried targets, in about `MAX_WORDS` words."""
    untried: dict[str, list[str]] = {}
    for target, scales in targets.items():
        kind, _, number = target.partition(" ")
        if kind in ("Table", "Figure") and not any(e.has_runs for group in scales.values() for e in group):
            untried.setdefault(kind, []).append(number)
    for examples in ((SAME, OPPOSITE), (OPPOSITE,), ()):
        text = render(
            Path(__file__).with_name("verdict.md.j2"),
            summaries=summaries,
            main=max(summaries, key=lambda summary: summary.rank, default=None),
            examples=examples,
            untried=untried,
            untried_scales=untried_scales(targets),
        )
        if len(text.split()) <= MAX_WORDS:
            break
    return text
