"""The page of the depth report: HTML that needs no other file, and its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from cod_lightning import plots
from cod_lightning.errors import plural
from cod_lightning.measure.depth_report import (
    CHEAP,
    SECTIONS,
    Curve,
    Results,
    depth,
    differences,
    format_number,
    headline,
    headline_sentence,
)
from cod_lightning.measure.panels import HeatMap, Lines, Panel, draw_panels
from cod_lightning.page import Table, html_page


def panels(models: Mapping[str, Results], measure: str) -> list[Lines]:
    """The curves of a measure, one line for each model by its name; over relative depth if models differ in depth."""
    return [panel(curve, models, measure) for curve in SECTIONS[measure].curves]


def panel(curve: Curve, models: Mapping[str, Results], measure: str) -> Lines:
    depths = {name: depth(results) for name, results in models.items()}
    relative = len(set(depths.values())) > 1
    lines, x, errors = {}, {}, {}
    for name, results in models.items():
        values = curve.values(results[measure])
        layers = results[measure].get("layers") or range(1, len(values) + 1)
        lines[name] = values
        x[name] = [layer / depths[name] if relative else layer for layer in layers]
        if curve.errors is not None and (found := curve.errors(results[measure])) is not None:
            errors[name] = [math.nan if error is None else error for error in found]
    log = curve.log
    if log is None:
        log = all(value is None or value > 0 for values in lines.values() for value in values)
    return Lines(curve.ylabel, lines, log, x=x, xlabel=curve.relative if relative else curve.xlabel, errors=errors)


def maps(models: Mapping[str, Results]) -> list[Panel]:
    """The angular distances between all layers, a map for each model with the same colours."""
    labels = plots.run_labels(models)
    matrices = {name: results["angular"]["distances"] for name, results in models.items()}
    known = [value for matrix in matrices.values() for row in matrix for value in row if value is not None]
    limits = (min(known), max(known)) if known else None
    names = ("layer", "layers further on, n", "angular distance")
    return [HeatMap(matrix, *names, title=labels[name], limits=limits) for name, matrix in matrices.items()]


def summary(results: Results, uniform: float) -> dict[str, str]:
    """The table's entries for one model; `uniform` is the loss of a uniform guess."""
    residual, numbers = results["variance"]["residual"], headline(results)
    variance, middle = residual["variance"], residual["variance_median"]
    deeper = [cost for cost in differences(results["removal"])[numbers["blocks"] // 2 :] if cost is not None]
    entries = {
        "blocks": str(numbers["blocks"]),
        "loss": "not finite" if numbers["loss"] is None else f"{numbers['loss']:.4f}",
        "loss of a uniform guess": f"{uniform:.4f}",
        f"blocks that cost less than {CHEAP:.0%} of the loss": str(len(numbers["cheap_blocks"])),
    }
    entries |= {f"of these, {third}": str(amount) for third, amount in numbers["cheap_by_third"].items()}
    for limit, run in numbers.get("longest_runs", {}).items():
        entries[f"longest run found for {limit}% perplexity"] = str(run["blocks"])
    entries |= {
        "variance, first block": format_number(variance[0]),
        "variance, last block": format_number(variance[-1]),
        "last over first": format_number(
            variance[-1] / variance[0] if variance[0] and variance[-1] is not None else None
        ),
        "median variance of a token, last block": format_number(middle[-1]),
        "mean increase of the loss when a block of the deeper half is removed": f"{fmean(deeper):.4f}"
        if deeper
        else "",
    }
    if replacement := results.get("linear_replacement"):
        entries["usefulness (share of layers that are not linear)"] = f"{replacement['usefulness']:.2f}"
    return entries


def report_page(
    models: Mapping[str, Results],
    texts: Mapping[str, Mapping[str, Any]],
    uniform: Mapping[str, float],
    name: str = "report",
) -> tuple[str, dict[str, bytes]]:
    """The HTML page, which needs no other file, and its figures as PNG and PDF by file name.

    Args:
        models: results by measure, for every model the same measures.
        texts: for every model `source`, `sha256`, `sequences` and `tokens` of the text.
        uniform: for every model the loss of a uniform guess over its vocabulary, in nats.
        name: of the figure with all curves, which is not on the page.
    """
    measures = [measure for measure in SECTIONS if all(measure in results for results in models.values())]
    labels = plots.run_labels(models)
    figures = {name: draw_panels([panel for each in measures for panel in panels(models, each)], shared_legend=True)}
    title = (
        " beside ".join(labels.values())
        if len(models) > 1
        else f"How much of its depth {labels[next(iter(models))]} uses"
    )
    lines = [f"# {title}", ""]
    lines += [
        f"- **{labels[each]}**: {headline_sentence(headline(results), results['removal'], uniform[each])}"
        for each, results in models.items()
    ]
    columns = [summary(results, uniform[each]) for each, results in models.items()]
    rows = [["model", *(f"`{each}`" for each in models)]]
    rows += [[row, *(column[row] for column in columns)] for row in columns[0]]
    lines += ["", str(Table(["", *labels.values()], rows)), ""]
    for measure in measures:
        section = SECTIONS[measure]
        figures[f"{name}-{measure}"] = draw_panels(panels(models, measure), shared_legend=len(models) > 1)
        pictures = [f"{name}-{measure}"]
        if measure == "angular":
            figures[f"{name}-angular-map"] = draw_panels(maps(models))
            pictures.append(f"{name}-angular-map")
        lines += [f"## {section.title}", ""]
        lines += [f"- **{labels[each]}**: {section.sentence(results[measure])}" for each, results in models.items()]
        lines += ["", *(f"![{section.title}]({picture}.png)\n" for picture in pictures)]
    lines += ["## Text", ""]
    lines += [
        f"- **{labels[each]}**: `{text['source']}`, {plural(text['sequences'], 'sequence')}, "
        f"{plural(text['tokens'], 'token')}, SHA-256 of the tokens `{text['sha256']}`."
        for each, text in texts.items()
    ]
    files = {
        f"{each}.{suffix}": plots.figure_bytes(figure, suffix)
        for each, figure in figures.items()
        for suffix in plots.FORMATS
    }
    return html_page(title, "\n".join(lines) + "\n", files), files
