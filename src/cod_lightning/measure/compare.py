"""Runs side by side on one page: what `measure` found of each, as one figure, and as HTML to open in a browser."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from cod_lightning.measure.result import figure, layer_lines

Found = Mapping[str, Mapping[str, Any]]
"""A run's results by the name they are saved under, as their JSON files hold them."""

NEEDED = ("variance", "jacobian", "angular", "removal", "linear_replacement", "influence")
"""The results that a page shows."""


def panels(found: Found) -> dict[str, tuple[Sequence[float], bool]]:
    """What is drawn of a run, over the layers, and whether on a logarithmic axis."""
    removed, jacobian = found["removal"], found["jacobian"]
    return {
        "variance of the residual stream": (found["variance"]["residual"]["variance"], True),
        "distance of the Jacobian from I, $||J-I||_F/\\sqrt{d}$": (jacobian["distance"], True),
        "largest singular value of the Jacobian": (jacobian["largest_singular_value"], True),
        "angular distance to the next layer": (found["angular"]["distances"][0], True),
        "loss added by removing the block": ([loss - removed["loss"] for loss in removed["losses"]], False),
        "block influence": (found["influence"]["influence"], True),
    }


def comparison_figure(runs: Mapping[str, Found]) -> Figure:
    """One panel for each quantity, one line in it for each run."""
    drawn = {label: panels(found) for label, found in runs.items()}
    titles = next(iter(drawn.values()))
    made, axes = figure("", columns=3, rows=2)
    for place, (title, (_, log)) in zip(axes, titles.items(), strict=True):
        layer_lines(place, {label: values[title][0] for label, values in drawn.items()}, title, log)
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return made


def headline(found: Found) -> dict[str, str]:
    """A run in one row of figures."""
    variance = found["variance"]["residual"]["variance"]
    removed = found["removal"]
    costs = [loss - removed["loss"] for loss in removed["losses"]]
    deep = costs[len(costs) // 2 :]
    return {
        "loss": f"{removed['loss']:.4f}",
        "variance, first block": f"{variance[0]:.3g}",
        "variance, last block": f"{variance[-1]:.3g}",
        "last over first": f"{variance[-1] / variance[0]:.3g}",
        "loss added by removing a block of the deeper half, mean": f"{sum(deep) / len(deep):.4f}",
        "usefulness (share of layers that are not linear)": f"{found['linear_replacement']['usefulness']:.2f}",
    }


def comparison_page(runs: Mapping[str, Found]) -> tuple[bytes, str]:
    """The page as PNG, and as HTML that holds the PNG and a table and needs no other file."""
    image = io.BytesIO()
    comparison_figure(runs).savefig(image, dpi=120, format="png")
    rows = {label: headline(found) for label, found in runs.items()}
    names = list(next(iter(rows.values())))
    head = "".join(f"<th>{html.escape(label)}</th>" for label in rows)
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{row[name]}</td>" for row in rows.values()) + "</tr>"
        for name in names
    )
    style = (
        "body{font:15px system-ui,sans-serif;max-width:1250px;margin:2em auto;padding:0 1em}img{width:100%}"
        "table{border-collapse:collapse}td,th{padding:.3em 1em;border-bottom:1px solid #ccc;text-align:right}"
        "td:first-child{text-align:left}"
    )
    title = " beside ".join(map(html.escape, rows))
    data = base64.b64encode(image.getvalue()).decode()
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1><table><tr><th></th>{head}</tr>{body}</table>"
        f'<img alt="Layer by layer: {title}" src="data:image/png;base64,{data}"></html>\n'
    )
    return image.getvalue(), page
