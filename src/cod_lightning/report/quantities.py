"""What the paper's figures show, as numbers of our runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from cod_lightning.report import figures
from cod_lightning.report.claims import Column, Run, Sample
from cod_lightning.report.document import Table

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
