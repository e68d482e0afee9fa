"""What the paper's figures show, as numbers of our runs, and whether these show the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from cod_lightning.paper import figures
from cod_lightning.paper.claims import Column, Difference, Run, Sample, direction
from cod_lightning.paper.document import Table

Quantity = Callable[[Run], float | None]


def deeper(values: Sequence[float | None]) -> float:
    """Mean over the deeper half of the layers."""
    known = [value for value in values if value is not None]
    return fmean(known[len(known) // 2 :])


def of_measure(name: str, found: Callable[[Mapping[str, Any]], float]) -> Quantity:
    return lambda run: found(run.measures[name]) if name in run.measures else None


def of_layers(found: Callable[[list[int], np.ndarray], float]) -> Quantity:
    """Of the steps and the variances [steps, layers] that a run recorded."""

    def quantity(run: Run) -> float | None:
        layers = run.history.get("layers")
        return found(layers["step"], np.array(layers["variance"])) if layers else None

    return quantity


def diagonal(matrix: Sequence[Sequence[float]]) -> float:
    """Norm of the diagonal over the norm of all."""
    array = np.array(matrix)
    return float(np.linalg.norm(np.diag(array)) / np.linalg.norm(array))


def at_fraction(fraction: float) -> Callable[[list[int], np.ndarray], float]:
    return lambda steps, variance: float(variance[figures.nearest_step(steps, fraction)][-1])


REMOVED: dict[str, Quantity] = {
    "angular distance to the next layer, deeper half": of_measure(
        "angular", lambda found: deeper(found["distances"][0])
    ),
    "rise of the loss without a block, deeper half": of_measure(
        "removal", lambda found: deeper([loss - found["loss"] for loss in found["losses"]])
    ),
}
GROWN: dict[str, Quantity] = {
    "variance behind the last layer, at the end": of_layers(lambda _, variance: float(variance[-1][-1])),
    "its highest": of_layers(lambda _, variance: float(variance[:, -1].max())),
    "last over first layer, at the end": of_layers(lambda _, variance: float(variance[-1][-1] / variance[-1][0])),
}
QUANTITIES: dict[str, dict[str, Quantity]] = {
    **dict.fromkeys(("Figure 2", "Figure 3", "Figure 7", "Figure 10"), REMOVED),
    **dict.fromkeys(("Figure 4", "Figure 8"), GROWN),
    "Figure 5": {
        "distance of the Jacobian from I, second layer": of_measure("jacobian", lambda found: found["distance"][1]),
        "last layer": of_measure("jacobian", lambda found: found["distance"][-1]),
        "share of the diagonal in the mean Jacobian, last layer": of_measure(
            "jacobian_map", lambda found: diagonal(found["matrices"][-1])
        ),
    },
    "Figure 6": {"validation loss at the end": lambda run: run.record.get("val_loss")},
}
THEORY: dict[str, Quantity] = {
    "p of a variance ~ l^p": of_measure("theory", lambda found: found["growth"]["power"]),
    "its R^2": of_measure("theory", lambda found: found["growth"]["power_r2"]),
    "c of the lemma, fitted": of_measure("theory", lambda found: found["c"]),
    "gain to the last layer": of_measure("theory", lambda found: found["gains"][-1]),
}


@dataclass(frozen=True)
class Finding:
    """What the paper says of a figure, as a number of runs of one seed that is above zero where it holds."""

    statement: str
    rows: tuple[str, ...]
    """Names of those that it is about."""
    number: Callable[..., float | None]
    """Of a run of each; None where that was not measured."""


def smaller(statement: str, less: str, more: str, quantity: Quantity) -> Finding:
    """That a row has less of a positive quantity than another: the logarithm of their ratio."""

    def number(one: Run, other: Run) -> float | None:
        a, b = quantity(one), quantity(other)
        return None if a is None or b is None else math.log(b / a)

    return Finding(statement, (less, more), number)


def minus(quantity: Quantity) -> Quantity:
    return lambda run: None if (value := quantity(run)) is None else -value


def difference(one: Quantity, other: Quantity) -> Callable[[Run, Run], float | None]:
    """Of a quantity of one run and one of another."""

    def number(first: Run, second: Run) -> float | None:
        a, b = one(first), other(second)
        return None if a is None or b is None else a - b

    return number


def halves(values: Sequence[float | None]) -> float:
    """Median over the deeper half of the layers less that over the other half; a mean would be that of one layer."""
    known = [value for value in values if value is not None]
    return median(known[len(known) // 2 :]) - median(known[: len(known) // 2])


TURNED = of_measure("angular", lambda found: halves(found["distances"][0]))
COST = of_measure("removal", lambda found: halves([loss - found["loss"] for loss in found["losses"]]))
LAST = GROWN["variance behind the last layer, at the end"]
DEEP_TURN = REMOVED["angular distance to the next layer, deeper half"]


def costliest(costs: Sequence[float]) -> float:
    """Share that the block which costs most to leave out has of what all cost: less where all matter evenly."""
    return max(costs) / sum(map(abs, costs))


COSTLIEST = of_measure("removal", lambda found: costliest([loss - found["loss"] for loss in found["losses"]]))
NEARER = of_measure("jacobian", lambda found: math.log(found["distance"][1] / found["distance"][-1]))
"""The first block, which reads the embeddings, is far from I in any model: the second is compared with the last."""


def deeper_variance(steps: list[int], variance: np.ndarray) -> float:
    """Behind the last layer over behind the first, at the end, as a logarithm."""
    return math.log(variance[-1][-1] / variance[-1][0])


def later_variance(steps: list[int], variance: np.ndarray) -> float:
    """Behind the last layer at 30 % of the run over that at 5 %, as a logarithm: the moments that are drawn."""
    return math.log(at_fraction(0.3)(steps, variance) / at_fraction(0.05)(steps, variance))


def idle(row: str, label: str) -> tuple[Finding, Finding]:
    """That the deep blocks of a row do less than the others."""
    return (
        Finding(f"{label}: deep blocks cost less to leave out", (row,), minus(COST)),
        Finding(f"{label}: deep blocks turn the stream less", (row,), minus(TURNED)),
    )


def busy(row: str, label: str) -> tuple[Finding, Finding]:
    """That they do more."""
    return (
        Finding(f"{label}: deep blocks cost more to leave out", (row,), COST),
        Finding(f"{label}: deep blocks turn the stream more", (row,), TURNED),
    )


BOTH = ("lns", "pre_ln")
FINDINGS: dict[str, tuple[Finding, ...]] = {
    "Figure 2": (*idle("pre_ln", "Pre-LN"), *busy("post_ln", "Post-LN")),
    "Figure 4": (
        smaller("LNS: less variance at the end than Pre-LN", "lns", "pre_ln", LAST),
        smaller("LNS: less variance at the end than Scaled Initialization", "lns", "scaled_init", LAST),
    ),
    "Figure 5": (Finding("Pre-LN: Jacobians come nearer to I with depth", ("pre_ln",), NEARER),),
    "Figure 6": (smaller("LNS: lower loss at the end", "lns", "pre_ln", lambda run: run.record.get("val_loss")),),
    "Figure 7": (
        smaller("LNS: the costliest block has less of the cost of all than under Pre-LN", *BOTH, COSTLIEST),
        Finding("LNS: deep blocks turn the stream more than under Pre-LN", BOTH, difference(DEEP_TURN, DEEP_TURN)),
    ),
    "Figure 8": (smaller("LNS: less variance at the end", "after_branch", "pre_ln", LAST),),
    "Figure 9": (
        Finding("Pre-LN: the variance grows with depth", ("pre_ln",), of_layers(deeper_variance)),
        Finding("Pre-LN: the variance grows with training", ("pre_ln",), of_layers(later_variance)),
    ),
    "Figure 10": idle("language", "Pre-LN"),
}
"""By figure. What Figure 3 shows is not put into words that could be compared, nor do the theory's bounds say such."""


@dataclass(frozen=True)
class Verdict:
    """A finding of the paper and ours."""

    statement: str
    difference: Difference | None
    """Above zero where it holds; None where it was not measured."""
    direction: str | None
    """As `claims.direction` names it."""


def verdicts(target: str, column: Column) -> list[Verdict]:
    """Of the findings of a figure about rows that the column has and that were run."""
    found = []
    rows = {row.name: {run.seed: run for run in row.runs} for row in column.rows if row.runs}
    for finding in FINDINGS.get(target, ()):
        if not set(finding.rows) <= rows.keys():
            continue
        runs = [rows[name] for name in finding.rows]
        seeds = sorted(set.intersection(*(set(one) for one in runs)))
        numbers = [number for seed in seeds if (number := finding.number(*(one[seed] for one in runs))) is not None]
        ours = Difference.of(numbers) if numbers else None
        found.append(Verdict(finding.statement, ours, direction(ours, 1.0)))
    return found


def shown(target: str, column: Column) -> Table | None:
    """The verdicts of a figure; None where there are none."""
    rows = []
    for verdict in verdicts(target, column):
        ours = verdict.difference
        if ours is not None:
            margin = "" if ours.margin is None else f" ± {ours.margin:.2g}"
            text = f"{ours.mean:+.3g}{margin}"
            rows.append(
                [verdict.statement, f"**{text}**" if ours.beyond_noise else text, str(ours.n), verdict.direction or ""]
            )
    head = ["the paper's finding", "ours, above 0 where it holds (95 %)", "n", "direction"]
    return Table(head, rows, words=(0, 3)) if rows else None


def quantities(target: str, column: Column) -> Table | None:
    """Numbers of a figure, mean ± sd over seeds; None where nothing is drawn or measured."""
    wanted = QUANTITIES.get(target, {} if target.startswith(("Table", "Figure")) else THEORY)
    if fractions := column.experiments[0].paper.get("fractions"):
        wanted = {
            f"variance behind the last layer at {part:.0%} of the run": of_layers(at_fraction(part))
            for part in fractions
        }
    rows = []
    for row in column.rows:
        found = [[value for run in row.runs if (value := quantity(run)) is not None] for quantity in wanted.values()]
        cells = [significant(Sample.of(values)) if values else "not measured" for values in found]
        rows.append([row.label, *cells, str(max(map(len, found), default=0))])
    return Table(["row", *wanted, "n"], rows) if any(row[-1] != "0" for row in rows) else None


def significant(sample: Sample) -> str:
    return f"{sample.mean:.3g}" + ("" if sample.sd is None else f" ± {sample.sd:.2g}")
