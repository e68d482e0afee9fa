"""Depth reports on pretrained models, and what they say about the paper's findings on such models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cod_lightning.errors import UserError
from cod_lightning.measure.depth_report import SECTIONS, format_number, has_learned, headline, headline_sentence
from cod_lightning.measure.result import finite_or_none
from cod_lightning.paper.findings import half_medians, loss_increases
from cod_lightning.paper.results import load_measures
from cod_lightning.plots import RUN
from cod_lightning.typed_json import read_json

REPORTS = "reports"
"""Folder in the results folder with outputs of `measure report`: NAME/report.json and NAME/MODEL/MEASURE.json."""


@dataclass(frozen=True)
class Headline:
    """The fields of a model in report.json that are read."""

    uniform_loss: float


@dataclass(frozen=True)
class DepthReport:
    """The field of report.json that is read."""

    models: dict[str, Headline]


@dataclass(frozen=True)
class PretrainedModel:
    """A model on the page of a depth report."""

    name: str
    page: str
    """Path of the page."""
    results: Mapping[str, Any]
    """Fields of its results by measure."""
    uniform_loss: float
    """Loss of a uniform guess of the next token, in nats."""


@dataclass(frozen=True)
class Contrast:
    """A finding of the paper about Pre-LN models: a number is smaller in the deeper half of the blocks."""

    finding: str
    measure: str
    numbers: Callable[[Any], tuple[float, float]]
    """The number of the shallower half of the blocks, and of the deeper half."""
    unit: str
    errors: Callable[[Any], tuple[float, float]] | None = None
    """Standard errors of the numbers; of a median at most that of a median block."""


CONTRASTS = {
    "Figure 2": (
        Contrast(
            "removing deep blocks costs less",
            "removal",
            lambda result: half_medians(loss_increases(result)),
            "median increase of the loss in nats",
        ),
        Contrast(
            "deep blocks rotate the stream less",
            "angular",
            lambda result: half_medians(result["distances"][0]),
            "median angular distance to the next layer",
        ),
    ),
    "Figure 5": (
        Contrast(
            "Jacobians approach I with depth",
            "jacobian",
            lambda result: half_medians(result["distance"][1:]),
            "median distance of the Jacobian from I",
            lambda result: half_medians(result["errors"]["distance"][1:]),
        ),
    ),
}
"""Findings by figure; see `findings.FINDINGS`."""
DETAILS: dict[str, Callable[[PretrainedModel], str]] = {
    "Figure 2": lambda model: headline_sentence(headline(model.results), model.results["removal"], model.uniform_loss),
    "Figure 5": lambda model: SECTIONS["jacobian"].sentence(model.results["jacobian"]),
}
"""Sentences of the report's page."""
MEASURED = ("variance", "removal", "angular", "jacobian")
"""Measures that the sentences need."""


def load_pretrained_models(results: Path) -> list[PretrainedModel]:
    """The models of all depth reports in the results folder; runs are left out.

    Raises:
        UserError: a file is damaged.
    """
    models = []
    for path in sorted((results / REPORTS).glob("*/report.json")):
        for name, numbers in read_json(path, DepthReport, "remove it", ignore_unknown=True).models.items():
            if RUN.fullmatch(name):
                continue
            measured = finite_or_none(load_measures(path.parent / name))
            if missing := [each for each in MEASURED if each not in measured]:
                raise UserError(f"{path.parent / name}: {missing[0]}.json is missing; copy the whole report")
            models.append(PretrainedModel(name, path.with_suffix(".html").as_posix(), measured, numbers.uniform_loss))
    return models


def pretrained_model_lines(target: str, models: Sequence[PretrainedModel]) -> list[str]:
    """One paragraph for each model on the paper's findings about a figure."""
    lines = []
    for model in models if target in CONTRASTS else ():
        loss = model.results["removal"]["loss"]
        losses = f"loss {format_number(loss)} nats, {format_number(model.uniform_loss)} for a uniform guess"
        head = f"**{model.name}** ({losses}; `{model.page}`)."
        if not has_learned(loss, model.uniform_loss):
            lines.append(f"{head} It has not learned this text, and says nothing about the finding.")
            continue
        sentences = [contrast_sentence(each, model.results) for each in CONTRASTS[target]]
        lines.append(f"{head} {' '.join(sentences)} {DETAILS[target](model)}")
    return lines


def contrast_sentence(contrast: Contrast, results: Mapping[str, Any]) -> str:
    result = results[contrast.measure]
    shallow, deep = contrast.numbers(result)
    of_shallow, of_deep = contrast.errors(result) if contrast.errors is not None else (None, None)
    direction = "As in the paper" if deep < shallow else "Opposite to the paper"
    if not math.isfinite(deep - shallow):
        direction = "No comparison"
    if abs(deep - shallow) < 2 * math.hypot(of_shallow or 0, of_deep or 0):
        direction = "Within two standard errors"
    return (
        f"{direction} ({contrast.finding}): {contrast.unit} {format_number(shallow, of_shallow)} in the shallower "
        f"half, {format_number(deep, of_deep)} in the deeper half."
    )
