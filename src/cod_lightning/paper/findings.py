"""Statements of the paper about its figures, as numbers of our runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from cod_lightning.measure.angular_distances import scale_as_released
from cod_lightning.measure.depth_report import differences
from cod_lightning.measure.paper_theory import growth
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


def depth_ratio(_: list[int], variance: np.ndarray) -> float:
    """Variance after the last layer divided by that after the first, at the end of the run."""
    return float(variance[-1][-1] / variance[-1][0])


def loss_increases(removal: Mapping[str, Any]) -> list[float]:
    """Increase of the loss without each block (nats); NaN where it is not finite."""
    return [math.nan if value is None else value for value in differences(removal)]


def halves(values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Values of the shallower and of the deeper half of the layers."""
    known = [math.nan if value is None else value for value in values]
    return known[: len(known) // 2], known[len(known) // 2 :]


def deeper_mean(values: Sequence[float | None]) -> float:
    return fmean(halves(values)[1])


def half_medians(values: Sequence[float | None]) -> tuple[float, float]:
    """Medians of the shallower and of the deeper half, which no single layer dominates; NaN if one layer has NaN."""
    shallower, deeper = halves(values)
    return float(np.median(shallower)), float(np.median(deeper))


def deeper_less_shallower(values: Sequence[float | None]) -> float:
    """Difference of the medians of both halves."""
    shallower, deeper = half_medians(values)
    return deeper - shallower


def rescaled(distances: Sequence[float | None]) -> list[float]:
    """Distances of the layers scaled as in the maps of the released code, where 1 is the largest of the model."""
    known = [value for value in distances if value is not None]
    return scale_as_released(known, len(known))


def largest_share(increases: Sequence[float]) -> float:
    """Share of the costliest block in the cost of all blocks but the first; small if they matter evenly.

    The first block reads the embeddings and is the costliest in any model.
    """
    return max(increases[1:]) / sum(map(abs, increases[1:]))


def deeper_share(increases: Sequence[float]) -> float:
    """Share of the deeper half in the cost of all blocks but the first; NaN unless they cost something together."""
    total = sum(increases[1:])
    return sum(halves(increases)[1]) / total if total > 0 else math.nan


def approach_to_identity(jacobian: Mapping[str, Any]) -> float:
    """Logarithm of the median distance from I in the shallower half over that in the deeper, without the first block.

    The first block reads the embeddings and is far from I in any model.
    """
    shallower, deeper = half_medians(jacobian["distance"][1:])
    return math.log(shallower / deeper)


def diagonal_share(matrix: Sequence[Sequence[float]]) -> float:
    """Norm of the diagonal divided by the norm of the matrix."""
    array = np.array(matrix)
    return float(np.linalg.norm(np.diag(array)) / np.linalg.norm(array))


def final_loss(run: Run) -> float | None:
    return run.record.get("val_loss")


LAST_VARIANCE = recorded_variance(variance_at(1.0))
DEPTH_RATIO = recorded_variance(depth_ratio)
DEEP_ANGLE = measure("angular", lambda result: deeper_mean(result["distances"][0]))
RESCALED_ANGLE = measure("angular", lambda result: deeper_mean(rescaled(result["distances"][0])))
DEEP_COST = measure("removal", lambda result: deeper_mean(loss_increases(result)))
ANGLE = {"angular distance to the next layer, deeper half": DEEP_ANGLE}
COST = {"increase of the loss without a block, deeper half (nats)": DEEP_COST}
GAIN_RATIO = measure("theory", lambda result: result["gains"][-1] / result["gains"][0])
LAYERS = {
    **ANGLE,
    "the same, scaled to [0, 1] as in the released code": RESCALED_ANGLE,
    **COST,
    "share of the deeper half in the cost of all blocks but the first": measure(
        "removal", lambda result: deeper_share(loss_increases(result))
    ),
}
VARIANCE: dict[str, Quantity] = {
    "variance after the last layer, end of the run": LAST_VARIANCE,
    "highest during the run": recorded_variance(lambda _, variance: float(variance[:, -1].max())),
    "last layer / first layer, end of the run": DEPTH_RATIO,
}
DEPTH = {"variance after the last layer": LAST_VARIANCE, **ANGLE, **COST}
QUANTITIES: dict[str, dict[str, Quantity]] = {
    **dict.fromkeys(("Figure 2", "Figure 3", "Figure 7", "Figure 10"), LAYERS),
    **dict.fromkeys(("Figure 4", "Figure 8"), VARIANCE),
    **dict.fromkeys(("Length", "Depth"), DEPTH),
    "Embedding scale": {
        "variance after the first layer": recorded_variance(lambda _, variance: float(variance[-1][0])),
        "variance after the last layer": LAST_VARIANCE,
        "last layer / first layer": DEPTH_RATIO,
        **LAYERS,
    },
    "Figure 5": {
        "median of |J - I| / sqrt(d) (Frobenius), shallower half without the first layer": measure(
            "jacobian", lambda result: half_medians(result["distance"][1:])[0]
        ),
        "deeper half": measure("jacobian", lambda result: half_medians(result["distance"][1:])[1]),
        "share of the diagonal in the mean Jacobian, last layer": measure(
            "jacobian_map", lambda result: diagonal_share(result["matrices"][-1])
        ),
    },
    "Figure 6": {"validation loss at the end": final_loss},
    "Theory": {
        "p of variance ~ l^p, from the embeddings (l = 1) on": measure(
            "theory", lambda result: result["growth"]["power"]
        ),
        "its R^2": measure("theory", lambda result: result["growth"]["power_r2"]),
        "p without the embeddings, from block l = 1 on": measure(
            "theory", lambda result: growth(result["variances"][1:]).power
        ),
        "c of the lemma, fitted": measure("theory", lambda result: result["c"]),
        "gain of the first layer": measure("theory", lambda result: result["gains"][0]),
        "gain to the last layer / to the first": GAIN_RATIO,
    },
}
"""Quantities in the report, by figure."""


def quantities_of(column: Column) -> dict[str, Quantity]:
    """The quantities of a column's figure."""
    if fractions := column.first.paper.get("fractions"):
        return {
            f"variance after the last layer at {part:.0%} of the run": recorded_variance(variance_at(part))
            for part in fractions
        }
    return QUANTITIES.get(findings_key(column), {})


def findings_key(column: Column) -> str:
    """The key of a column in `QUANTITIES`, `FINDINGS` and `layer_figures.DRAW`."""
    return "Theory" if column.first.name == "theory" else column.first.target


def quantity_rows(column: Column) -> list[list[str]]:
    """Label, mean ± sd of each quantity, and number of seeds of every row that has a quantity."""
    rows = []
    for row in column.rows:
        quantities = quantities_of(column).values()
        values = [[v for run in row.runs if (v := quantity(run)) is not None] for quantity in quantities]
        values = [list(filter(math.isfinite, seeds)) for seeds in values]
        if any(values):
            cells = [Sample.of(seeds).format(".3g", ".2g") if seeds else "not measured" for seeds in values]
            n = max(map(len, values))
            cells = [
                f"{cell} (n = {len(seeds)})" if 0 < len(seeds) < n else cell
                for cell, seeds in zip(cells, values, strict=True)
            ]
            rows.append([row.label, *cells, str(n)])
    return rows


def growth_over_blocks(columns: Sequence[Column]) -> list[str]:
    """p of variance ~ L^p after the last of L blocks, by row, over models of different depth and the seeds of all."""
    blocks = [column.first.axes["blocks"] for column in columns]
    parts = []
    for row in columns[0].rows:
        same_row = [other for column in columns for other in column.rows if other.name == row.name]
        values = [{run.seed: LAST_VARIANCE(run) or math.nan for run in other.runs} for other in same_row]
        by_seed = [{seed: value for seed, value in each.items() if math.isfinite(value)} for each in values]
        if len(same_row) == len(columns) > 1 and (seeds := set.intersection(*map(set, by_seed))):
            logs = np.log([[variances[seed] for seed in sorted(seeds)] for variances in by_seed])
            powers = np.polyfit(np.log(blocks), logs, 1)[0].tolist()
            parts.append(f"{row.label} {Difference.of(powers).format('.2f', '.2f')} (n = {len(powers)})")
    head = "Exponent p of variance ~ L^p after the last of L blocks (95 % interval; by Lemmas 3.2 and 4.1 at least 1)"
    return [f"{head}: {'; '.join(parts)}."] if parts else []


# Findings ------------------------------------------------------------------------------------------------------------


LOG_RATIO, NATS, ANGLE_UNIT = "log ratio", "nats", "angle / pi"
"""Units of findings; a log ratio is a natural logarithm."""


@dataclass(frozen=True)
class Finding:
    """A statement about runs of one seed, as a number that is positive if the statement holds."""

    statement: str
    rows: tuple[str, ...]
    """Names of the compared rows."""
    number: Callable[..., float]
    """Maps the quantity of each row to the number."""
    quantity: Quantity
    unit: str

    def evaluate(self, runs: Sequence[Run]) -> float | None:
        """The number for one run of each row; None if something was not measured, or the number is not finite."""
        try:
            values = [self.quantity(run) for run in runs]
            if None in values:
                return None
            number = self.number(*values)
        except (ValueError, ZeroDivisionError):  # the logarithm of a ratio with zero
            return None
        return number if math.isfinite(number) else None


def log_ratio(statement: str, smaller: str, larger: str, quantity: Quantity) -> Finding:
    """`smaller` has less of a positive quantity than `larger`: log(larger / smaller)."""
    return Finding(statement, (smaller, larger), lambda less, more: math.log(more / less), quantity, LOG_RATIO)


def difference(statement: str, smaller: str, larger: str, quantity: Quantity, unit: str) -> Finding:
    """`larger` has more of a quantity than `smaller`: larger - smaller."""
    return Finding(statement, (larger, smaller), lambda more, less: more - less, quantity, unit)


def positive(statement: str, row: str, quantity: Quantity, unit: str) -> Finding:
    """A quantity of one row is positive."""
    return Finding(statement, (row,), lambda value: value, quantity, unit)


def negative(statement: str, row: str, quantity: Quantity, unit: str) -> Finding:
    """A quantity of one row is negative."""
    return Finding(statement, (row,), lambda value: -value, quantity, unit)


ANGLE_CHANGE = measure("angular", lambda result: deeper_less_shallower(result["distances"][0]))
COST_CHANGE = measure("removal", lambda result: deeper_less_shallower(loss_increases(result)))
LARGEST_SHARE = measure("removal", lambda result: largest_share(loss_increases(result)))
NEARER_TO_IDENTITY = measure("jacobian", approach_to_identity)
DEPTH_GROWTH = recorded_variance(lambda steps, variance: math.log(depth_ratio(steps, variance)))
TIME_GROWTH = recorded_variance(lambda steps, v: math.log(variance_at(0.3)(steps, v) / variance_at(0.05)(steps, v)))
"""Growth of the variance from 5 % to 30 % of the run, as in Figure 9."""

LESS_VARIANCE = log_ratio("LNS: less final variance than Pre-LN", "lns", "pre_ln", LAST_VARIANCE)
LESS_GROWTH = log_ratio("LNS: less growth of the variance with depth than Pre-LN", "lns", "pre_ln", DEPTH_RATIO)
LAYERS_OF_LNS = (
    log_ratio("LNS: blocks matter more evenly than under Pre-LN", "lns", "pre_ln", LARGEST_SHARE),
    difference("LNS: removing deep blocks costs more than under Pre-LN", "pre_ln", "lns", DEEP_COST, NATS),
    difference("LNS: deep blocks rotate the stream more than under Pre-LN", "pre_ln", "lns", DEEP_ANGLE, ANGLE_UNIT),
    difference(
        "LNS: Jacobians approach I less with depth than under Pre-LN", "lns", "pre_ln", NEARER_TO_IDENTITY, LOG_RATIO
    ),
)
FINDINGS: dict[str, tuple[Finding, ...]] = {
    "Figure 2": (
        negative("Pre-LN: removing deep blocks costs less", "pre_ln", COST_CHANGE, NATS),
        negative("Pre-LN: deep blocks rotate the stream less", "pre_ln", ANGLE_CHANGE, ANGLE_UNIT),
        positive("Post-LN: removing deep blocks costs more", "post_ln", COST_CHANGE, NATS),
        positive("Post-LN: deep blocks rotate the stream more", "post_ln", ANGLE_CHANGE, ANGLE_UNIT),
    ),
    "Figure 4": (
        LESS_VARIANCE,
        log_ratio("LNS: less final variance than Scaled Initialization", "lns", "scaled_init", LAST_VARIANCE),
        LESS_GROWTH,
    ),
    "Figure 5": (positive("Pre-LN: Jacobians approach I with depth", "pre_ln", NEARER_TO_IDENTITY, LOG_RATIO),),
    "Figure 6": (log_ratio("LNS: lower final loss", "lns", "pre_ln", final_loss),),
    "Figure 7": LAYERS_OF_LNS,
    "Figure 8": (log_ratio("ViT, LNS after Attn/MLP: less final variance", "after_branch", "pre_ln", LAST_VARIANCE),),
    "Figure 9": (
        positive("Pre-LN: the variance grows with depth", "pre_ln", DEPTH_GROWTH, LOG_RATIO),
        positive("Pre-LN: the variance grows with training", "pre_ln", TIME_GROWTH, LOG_RATIO),
    ),
    "Figure 10": (
        negative("Pre-LN: removing deep blocks costs less", "language", COST_CHANGE, NATS),
        negative("Pre-LN: deep blocks rotate the stream less", "language", ANGLE_CHANGE, ANGLE_UNIT),
    ),
    "Theory": (
        log_ratio(
            "LNS: more growth of the gradient than under Pre-LN (our reading of Theorems 3.3, 4.2)",
            "pre_ln",
            "lns",
            GAIN_RATIO,
        ),
    ),
    "Embedding scale": (LESS_VARIANCE, LESS_GROWTH, *LAYERS_OF_LNS),
}
"""Findings by figure, and about the theorems. Figure 3 states nothing that could be compared with a number."""


@dataclass(frozen=True)
class ClaimResult:
    """A claim of the paper compared with our runs."""

    key: tuple[str, ...]
    """Claims with the same key are one statistical test, whichever tables list them."""
    target: str
    column: str
    label: str
    """The row of a table, or the statement about a figure."""
    statement: str
    """The claim in words."""
    direction: str | None
    """Direction compared with the paper; None if the paper prints no figure."""
    difference: Difference
    """For a statement about a figure: positive if it holds."""
    unit: str
    about_layers: bool
    """Whether it is about the layers of a model, and not about its loss or accuracy."""


def finding_results(column: Column) -> list[ClaimResult]:
    """The findings of a column's figure that were measured."""
    results = []
    rows = {row.name: row for row in column.rows}
    for finding in FINDINGS.get(findings_key(column), ()):
        if not set(finding.rows) <= rows.keys():
            continue
        compared = [rows[name] for name in finding.rows]
        if any(run.failure for row in compared for run in row.runs):
            continue  # the seeds that are left would flatter the row that diverged
        by_seed = [{run.seed: run for run in row.runs} for row in compared]
        seeds = sorted(set.intersection(*map(set, by_seed)))
        numbers = [finding.evaluate([runs[seed] for runs in by_seed]) for seed in seeds]
        if measured := [number for number in numbers if number is not None]:
            ours, text = Difference.of(measured), finding.statement
            key = (text, *(row.run_id for row in compared))
            target, heading = column.first.target, column.heading
            is_loss = finding.quantity is final_loss
            results.append(
                ClaimResult(key, target, heading, text, text, ours.direction(1.0), ours, finding.unit, not is_loss)
            )
    return results
