"""The results folder: records and measures of finished runs, one JSON line each, by scale and run label."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from cod_lightning.config.saved import config_from_dict
from cod_lightning.errors import UserError, first_line
from cod_lightning.evaluate import PAPER_TASKS, SCORES_FILE
from cod_lightning.files import read_regular, write_atomic
from cod_lightning.measure.registry import MEASURES
from cod_lightning.paper.claims import Run
from cod_lightning.train.record import FAILURE, RECORD, read_record_file
from cod_lightning.typed_json import read_json

MEASURES_FOLDER = "measure"
"""Folder of a run that holds its measures."""
DIGITS = {"jacobian_map": 4}
"""Significant digits kept of a measure, if not all: matrices take most of the space, and the report draws
their colours. Losses keep all digits, because the report subtracts them."""
RESULTS = Path("experiments/results")
"""Default results folder, from the top of a checkout: {scale}/{run label}/record.json and the measures."""
NOTES = "notes.md"
"""File of a results folder with list items about its runs, for the report."""


def load_notes(results: Path) -> str:
    """The notes of a results folder; empty if it has none.

    Raises:
        UserError: they are not text.
        OSError: they cannot be read.
    """
    path = results / NOTES
    try:
        return read_regular(path) if path.exists() else ""
    except ValueError as error:
        raise UserError(f"{path}: {first_line(error)}; write it as UTF-8 text, or remove it") from error


def load_runs(results: Path) -> dict[str, Run]:
    """All runs in the results folder by id, also diverged ones; measured pretrained models by "scale/name".

    Raises:
        UserError: a file is damaged.
    """
    runs = {}
    for folder in sorted(results.glob("*/*")):
        measures = load_measures(folder)
        path = record_path(folder)
        if path.is_file():
            record = read_record_file(path)
            scores = load_task_scores(folder / SCORES_FILE)
            # A run that resume=false moved aside, to NAME.previous-1, follows its successor.
            run = Run(record["seed"], record | scores, measures, folder)
            runs.setdefault(config_from_dict(record["config"], path).id, run)
        elif measures:
            runs[f"{folder.parent.name}/{folder.name}"] = Run(0, {}, measures, folder)
    return runs


def record_path(folder: Path) -> Path:
    """The file that says how a run ended: its record, or why it diverged."""
    return folder / (RECORD if (folder / RECORD).exists() else FAILURE)


def save_result(folder: Path, results: Path, measures: Collection[str] = ()) -> None:
    """Copy a run's record and measures into the results folder; a run without either writes nothing.

    Args:
        folder: run folder, or folder of a pretrained model; its parent is named after the scale.
        results: the results folder.
        measures: names of measures to copy, of those that apply to the model.
    """
    target = results / folder.parent.name / folder.name
    record = record_path(folder)
    if not record.is_file() and not measures:
        return
    target.mkdir(parents=True, exist_ok=True)
    for path in (record, folder / SCORES_FILE):
        if path.is_file():
            copy_json(path, target)
    for name in measures:
        if (path := folder / MEASURES_FOLDER / f"{name}.json").is_file():
            copy_json(path, target, DIGITS.get(name))


def copy_json(path: Path, folder: Path, digits: int | None = None) -> None:
    """Write a JSON file into a folder as one line, rounded to significant digits if given."""
    parse = None if digits is None else lambda number: float(f"{float(number):.{digits}g}")
    content = json.loads(path.read_text("utf-8"), parse_float=parse)
    write_atomic(folder / path.name, json.dumps(content, separators=(",", ":")) + "\n")


def load_measures(folder: Path) -> dict[str, Any]:
    """All measures in a result's folder, by name.

    Raises:
        UserError: a file does not hold the result of the measure it is named after.
    """
    measures = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem in MEASURES:
            kind: Any = MEASURES[path.stem].result_type
            measures[path.stem] = asdict(read_json(path, kind, "remove it and measure again", ignore_unknown=True))
    return measures


def load_task_scores(path: Path) -> dict[str, float]:
    """Accuracies in per cent by task, and their mean as `average` once all tasks of Table 2 are there.

    Scores of other steps or lengths have no mean.

    Raises:
        UserError: the file does not hold scores by task.
    """
    if not path.is_file():
        return {}
    tasks = read_json(path, dict[str, dict[str, float]], "remove it")
    accuracies = {task: 100.0 * scores["acc"] for task, scores in tasks.items() if "acc" in scores}
    settings = {(tasks[task].get("step"), tasks[task].get("max_length")) for task in PAPER_TASKS if task in accuracies}
    is_complete = all(task in accuracies for task in PAPER_TASKS) and len(settings) == 1
    return accuracies | ({"average": fmean(accuracies[task] for task in PAPER_TASKS)} if is_complete else {})
