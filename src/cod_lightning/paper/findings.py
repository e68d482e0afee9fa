"""Statements of the paper about its figures, as numbers of our runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from cod_lightning.paper.claims import Column, Run, nearest_step
from cod_lightning.paper.statistics import Difference, Sample

Quantity = Callable[[Run], float | None]
"""A number of a run; None if it was not measured."""


# Quantities ----------------------------------------------------------------------------------------------------------


def measure(name: str, number: Callable[[Mapping[str, Any]], float]) -> Quantity:
    """A number computed from the result of a measure."""
    return lambda run: number(run.measures[name]) if name in run.measures else None


def recorded_variance(number: Callable[[list[int], np.ndarray], float]) -> Quantity:
    """A number computed from the recorded steps and the variance of the residual stream [steps, layers]."""

    def quantity(run: Run) -> float | None:
        layers = run.history.get("layers")
        return number(layers["step"], np.array(layers["variance"], dtype=float)) if layers else None

    return quantity


def variance_at(fraction: float) -> Callable[[list[int], np.ndarray], float]:
    """Variance after the last layer at a fraction of the run."""
    return lambda steps, variance: float(variance[nearest_step(steps, fraction)][-1])


def loss_increases(removal: Mapping[str, Any]) -> list[float]:
    """Increase of the loss without each block (nats)."""
    return [loss - removal["loss"] for loss in removal["losses"]]


def deeper_mean(values: Sequence[float | None]) -> float:
    """Mean over the deeper half of the layers."""
    known = [value for value in values if value is not None]
    return fmean(known[len(known) // 2 :])


def deeper_less_shallower(values: Sequence[float | None]) -> float:
    """Median over the deeper half of the layers minus that over the other half; no single layer dominates it."""
    known = [value for value in values if value is not None]
    return median(known[len(known) // 2 :]) - median(known[: len(known) // 2])


def largest_share(increases: Sequence[float]) -> float:
    """Share of the costliest block in the cost of all blocks; small if all blocks matter evenly."""
    return max(increases) / sum(map(abs, increases))


def diagonal_share(matrix: Sequence[Sequence[float]]) -> float:
    """Norm of the diagonal divided by the norm of the matrix."""
    array = np.array(matrix)
    return float(np.linalg.norm(np.diag(array)) / np.linalg.norm(array))


def final_loss(run: Run) -> float | None:
    return run.record.get("val_loss")


LAST_VARIANCE = recorded_variance(variance_at(1.0))
DEEP_ANGLE = measure("angular", lambda result: deeper_mean(result["distances"][0]))
DEEP_COST = measure("removal", lambda result: deeper_mean(loss_increases(result)))
LAYERS: dict[str, Quantity] = {
    "angular distance to the next layer, deeper half": DEEP_ANGLE,
    "increase of the loss without a block, deeper half (nats)": DEEP_COST,
}
VARIANCE: dict[str, Quantity] = {
    "variance after the last layer, end of the run": LAST_VARIANCE,
    "highest during the run": recorded_variance(lambda _, variance: float(variance[:, -1].max())),
    "last layer / first layer, end of the run": recorded_variance(
        lambda _, variance: float(variance[-1][-1] / variance[-1][0])
    ),
}
DEPTH = {"variance after the last layer": LAST_VARIANCE, **LAYERS}
QUANTITIES: dict[str, dict[str, Quantity]] = {
    **dict.fromkeys(("Figure 2", "Figure 3", "Figure 7", "Figure 10"), LAYERS),
    **dict.fromkeys(("Figure 4", "Figure 8"), VARIANCE),
    **dict.fromkeys(("Length", "Depth"), DEPTH),
    "Figure 5": {
        "distance of the Jacobian from I, second layer": measure("jacobian", lambda result: result["distance"][1]),
        "last layer": measure("jacobian", lambda result: result["distance"][-1]),
        "share of the diagonal in the mean Jacobian, last layer": measure(
            "jacobian_map", lambda result: diagonal_share(result["matrices"][-1])
        ),
    },
    "Figure 6": {"validation loss at the end": final_loss},
    "Theory": {
        "p of a variance ~ l^p": measure("theory", lambda result: result["growth"]["power"]),
        "its R^2": measure("theory", lambda result: result["growth"]["power_r2"]),
        "c of the lemma, fitted": measure("theory", lambda result: result["c"]),
        "gain to the last layer": measure("theory", lambda result: result["gains"][-1]),
    },
}
"""Quantities in the report, by figure."""


def quantities_of(column: Column) -> dict[str, Quantity]:
    """The quantities of a column's figure."""
    first = column.first
    if fractions := first.paper.get("fractions"):
        return {
            f"variance after the last layer at {part:.0%} of the run": recorded_variance(variance_at(part))
            for part in fractions
        }
    return QUANTITIES.get("Theory" if first.name == "theory" else first.target, {})


def quantity_rows(column: Column) -> list[list[str]]:
    """Label, mean ± sd of each quantity, and number of seeds of every row that has a quantity."""
    rows = []
    for row in column.rows:
        values = [[v for run in row.runs if (v := q(run)) is not None] for q in quantities_of(column).values()]
        if any(values):
            cells = [format_sample(Sample.of(seeds)) if seeds else "not measured" for seeds in values]
            rows.append([row.label, *cells, str(max(map(len, values)))])
    return rows


def format_sample(sample: Sample) -> str:
    return f"{sample.mean:.3g}" + ("" if sample.sd is None else f" ± {sample.sd:.2g}")


# Findings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """A statement about runs of one seed, as a number that is positive if the statement holds."""

    statement: str
    rows: tuple[str, ...]
    """Names of the compared rows."""
    number: Callable[..., float | None]
    """Maps one run of each row to the number; None if something was not measured."""


def combine(number: Callable[..., float], *quantities: Quantity) -> Callable[..., float | None]:
    """Apply `number` to one quantity of each run, unless one is missing."""

    def combined(*runs: Run) -> float | None:
        values = [quantity(run) for quantity, run in zip(quantities, runs, strict=True)]
        return None if None in values else number(*values)

    return combined


def smaller(statement: str, less: str, more: str, quantity: Quantity) -> Finding:
    """One row has less of a positive quantity than another: the logarithm of their ratio."""
    return Finding(statement, (less, more), combine(lambda a, b: math.log(b / a), quantity, quantity))


ANGLE_CHANGE = measure("angular", lambda result: deeper_less_shallower(result["distances"][0]))
COST_CHANGE = measure("removal", lambda result: deeper_less_shallower(loss_increases(result)))
LARGEST_SHARE = measure("removal", lambda result: largest_share(loss_increases(result)))
NEARER_TO_IDENTITY = measure("jacobian", lambda result: math.log(result["distance"][1] / result["distance"][-1]))
"""Compares the second block with the last: the first reads the embeddings and is far from I in any model."""
DEPTH_GROWTH = recorded_variance(lambda _, variance: math.log(variance[-1][-1] / variance[-1][0]))
TIME_GROWTH = recorded_variance(lambda steps, v: math.log(variance_at(0.3)(steps, v) / variance_at(0.05)(steps, v)))
"""Growth of the variance from 5 % to 30 % of the run, as in Figure 9."""


def depth_findings(row: str, label: str, sign: int) -> tuple[Finding, Finding]:
    """Deep blocks of a row do less (sign -1) or more (sign 1) than shallow ones."""
    word = "more" if sign > 0 else "less"
    return (
        Finding(f"{label}: removing deep blocks costs {word}", (row,), combine(lambda x: sign * x, COST_CHANGE)),
        Finding(f"{label}: deep blocks rotate the stream {word}", (row,), combine(lambda x: sign * x, ANGLE_CHANGE)),
    )


FINDINGS: dict[str, tuple[Finding, ...]] = {
    "Figure 2": (*depth_findings("pre_ln", "Pre-LN", -1), *depth_findings("post_ln", "Post-LN", 1)),
    "Figure 4": (
        smaller("LNS: less final variance than Pre-LN", "lns", "pre_ln", LAST_VARIANCE),
        smaller("LNS: less final variance than Scaled Initialization", "lns", "scaled_init", LAST_VARIANCE),
    ),
    "Figure 5": (Finding("Pre-LN: Jacobians approach I with depth", ("pre_ln",), NEARER_TO_IDENTITY),),
    "Figure 6": (smaller("LNS: lower final loss", "lns", "pre_ln", final_loss),),
    "Figure 7": (
        smaller("LNS: blocks matter more evenly than under Pre-LN", "lns", "pre_ln", LARGEST_SHARE),
        Finding(
            "LNS: deep blocks rotate the stream more than under Pre-LN",
            ("lns", "pre_ln"),
            combine(lambda lns, pre_ln: lns - pre_ln, DEEP_ANGLE, DEEP_ANGLE),
        ),
    ),
    "Figure 8": (smaller("LNS: less final variance", "after_branch", "pre_ln", LAST_VARIANCE),),
    "Figure 9": (
        Finding("Pre-LN: the variance grows with depth", ("pre_ln",), DEPTH_GROWTH),
        Finding("Pre-LN: the variance grows with training", ("pre_ln",), TIME_GROWTH),
    ),
    "Figure 10": depth_findings("language", "Pre-LN", -1),
}
"""Findings by figure. Figure 3 and the theorems state nothing that could be compared with a number."""


@dataclass(frozen=True)
class FindingResult:
    """A finding of the paper compared with ours."""

    statement: str
    difference: Difference | None
    """Difference, positive if the statement holds; None if it was not measured."""
    direction: str | None
    test: tuple[str, ...]
    """Identifies the comparison: findings with the same statement about the same runs are one test."""


def finding_results(column: Column) -> list[FindingResult]:
    """The findings of a column's figure about rows that were run."""
    results = []
    rows = {row.name: row for row in column.rows if row.runs}
    for finding in FINDINGS.get(column.first.target, ()):
        if not set(finding.rows) <= rows.keys():
            continue
        runs = [{run.seed: run for run in rows[name].runs} for name in finding.rows]
        seeds = sorted(set.intersection(*map(set, runs)))
        numbers = [number for seed in seeds if (number := finding.number(*(r[seed] for r in runs))) is not None]
        ours = Difference.of(numbers) if numbers else None
        test = (finding.statement, *(rows[name].run_id for name in finding.rows))
        results.append(FindingResult(finding.statement, ours, ours.direction(1.0) if ours else None, test))
    return results
