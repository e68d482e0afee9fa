"""Models side by side on one page: a figure with a line per model, and a table, as PNG, PDF and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from cod_lightning import plots
from cod_lightning.measure.panels import Lines, draw_panels
from cod_lightning.page import Table, html_page

Results = Mapping[str, Any]
"""A model's results by the name of their measure."""

COMPARED = ("variance", "jacobian", "angular", "removal", "linear_replacement", "influence")
"""The measures on the page."""


def delta_losses(results: Results) -> list[float]:
    """Increase of the loss, in nats, when each block is removed."""
    removal = results["removal"]
    return [loss - removal.loss for loss in removal.losses]


def panels(models: Mapping[str, Results]) -> list[Lines]:
    """One panel for each quantity, with one line for each model by its name."""
    values = {
        "variance of the residual stream": lambda results: results["variance"].residual.variance,
        "distance of the Jacobian from I, $||J-I||_F/\\sqrt{d}$": lambda results: results["jacobian"].distance,
        "largest singular value of the Jacobian": lambda results: results["jacobian"].largest_singular_value,
        "angular distance to the next layer": lambda results: results["angular"].distances[0],
        "increase of the loss without the block (nats)": delta_losses,
        "block influence": lambda results: results["influence"].influence,
    }
    return [
        Lines(label, {name: layers(results) for name, results in models.items()}, log=layers is not delta_losses)
        for label, layers in values.items()
    ]


def summary(results: Results) -> dict[str, str]:
    """The table's entries for one model."""
    variance, costs = results["variance"].residual.variance, delta_losses(results)
    deeper = costs[len(costs) // 2 :]
    return {
        "loss": f"{results['removal'].loss:.4f}",
        "variance, first block": f"{variance[0]:.3g}",
        "variance, last block": f"{variance[-1]:.3g}",
        "last over first": f"{variance[-1] / variance[0]:.3g}",
        "mean increase of the loss when a block of the deeper half is removed": f"{sum(deeper) / len(deeper):.4f}",
        "usefulness (share of layers that are not linear)": f"{results['linear_replacement'].usefulness:.2f}",
    }


def comparison_page(models: Mapping[str, Results]) -> tuple[Figure, str]:
    """The figure, and an HTML page that holds it and the table and needs no other file."""
    figure = draw_panels(panels(models), shared_legend=True)
    columns = [summary(results) for results in models.values()]
    head = ["", *plots.run_labels(models).values()]
    rows = [["model", *(f"`{name}`" for name in models)]]
    rows += [[row, *(column[row] for column in columns)] for row in columns[0]]
    title = " beside ".join(head[1:])
    page = f"# {title}\n\n{Table(head, rows)}\n\n![Layer by layer](compare.png)\n"
    return figure, html_page(title, page, {"compare.png": plots.image(figure)})
