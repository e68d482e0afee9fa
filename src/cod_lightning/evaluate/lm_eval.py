"""Downstream tasks of lm-evaluation-harness, run on the exported model in a temporary folder."""

from __future__ import annotations

import difflib
import glob
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from cod_lightning.data.tokenizers import DocumentTokenizer
from cod_lightning.errors import UserError, first_line, root_cause
from cod_lightning.evaluate import SCORES_FILE
from cod_lightning.files import locked, write_atomic
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import export, quiet_transformers, unsupported_features
from cod_lightning.typed_json import read_json


def task_manager(tasks: Sequence[str], folder: Path | None = None) -> Any:
    """Return the harness's `TaskManager`, after checking that it knows all `tasks`.

    Args:
        tasks: names of tasks or groups.
        folder: holds the YAML of additional tasks.

    Raises:
        UserError: lm-evaluation-harness is not installed, `tasks` is empty, or a task is unknown or has no score.
    """
    try:
        importlib.import_module("lm_eval.models.huggingface")  # imports optional dependencies that lm_eval does not
        lm_eval_tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UserError(f"tasks= needs lm-evaluation-harness ({error}): pip install 'cod_lightning[eval]'") from error
    if not tasks:
        raise UserError("tasks= is empty: give task names, as in arc_easy,piqa, or paper")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder={folder}: no such folder")
    manager = lm_eval_tasks.TaskManager(include_path=None if folder is None else str(folder.absolute()))
    known = set(manager.all_tasks)
    errors = []
    for task in tasks:
        if task not in known:
            similar = ", ".join(difflib.get_close_matches(task, known, n=5))
            errors.append(f"tasks: unknown task {task!r}" + (f"; similar: {similar}" if similar else ""))
        elif reason := why_no_score(manager, task):
            errors.append(f"tasks: {reason}: name its tasks")
    if errors:
        # The harness skips files that it cannot read.
        raise UserError("\n".join(errors + ([] if folder is None else yaml_errors(folder))))
    return manager


def why_no_score(manager: Any, task: str) -> str:
    """Why a name has no score: it is a tag, or a group without an aggregate; empty if it has one."""
    if task in manager.all_tags:
        return f"{task!r} is a tag, which has no score"
    if task in manager.all_groups and (path := yaml_path(manager, task)) is not None:
        fields = task_fields(path)
        if not fields.get("aggregate_metric_list") and "include" not in fields:
            return f"{task!r} is a group without an aggregate score"
    return ""


def yaml_errors(folder: Path) -> list[str]:
    """An error for each file in a folder of tasks that is not valid YAML."""
    errors = []
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.load(path.read_text("utf-8"), TaskLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            errors.append(f"{path}: not YAML: {first_line(error)}")
    return errors


def score_tasks(
    decoder: Decoder,
    tokenizer: DocumentTokenizer,
    tasks: Sequence[str],
    manager: Any,
    *,
    max_length: int,
    batch_size: int = 1,
    device: str = "cpu",
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return the metrics of every task, such as {"arc_easy": {"acc": 0.31, "acc_stderr": 0.01, "acc_norm": ...}}.

    Args:
        decoder: on any device; it is evaluated in float32.
        tokenizer: its tokenizer.
        tasks: names that `manager` knows.
        manager: from `task_manager`.
        max_length: maximum tokens of a question with its answer; longer ones are truncated from the left.
        batch_size: sequences per forward pass.
        device: `cpu` or `cuda`, for the evaluation.
        limit: maximum examples of each task; None: all.

    Raises:
        UserError: the decoder cannot be exported, or as `run_tasks`.
    """
    if unsupported := unsupported_features(decoder):
        raise UserError("\n".join(["tasks= evaluates the exported model, and this model has no export:", *unsupported]))
    harness = importlib.import_module("lm_eval")
    model_class = importlib.import_module("lm_eval.models.huggingface").HFLM
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        export(decoder, Path(folder), tokenizer, max_length=max_length)
        model = model_class(pretrained=folder, dtype="float32", device=device, batch_size=batch_size)
        evaluate = partial(harness.simple_evaluate, model, task_manager=manager, limit=limit, log_samples=False)
        results = run_tasks(evaluate, tasks, {task: user_yaml(manager, task) for task in tasks})
    return {task: numeric_metrics(results[task]) for task in tasks}


def run_tasks(evaluate: Callable[..., Any], tasks: Sequence[str], files: Mapping[str, Path | None]) -> dict[str, Any]:
    """Return the results by task; tasks of `--task-folder` run first, one by one, so that an error names its task.

    Args:
        evaluate: the harness's `simple_evaluate`, which takes `tasks`.
        tasks: their names.
        files: the YAML of each task of `--task-folder`, None for those of the harness.

    Raises:
        UserError: a task of --task-folder fails, or the data of a task is not available.
    """
    results: dict[str, Any] = {}
    for task in tasks:
        if (path := files[task]) is None:
            continue
        try:
            with in_data_folder(path):
                results |= evaluate(tasks=[task])["results"]
        except Exception as error:  # the harness raises many types for a task that it cannot read
            reason = root_cause(error)
            foreign = "".join(f"; {name!r} is not a metric of the harness" for name in foreign_metrics(path))
            raise UserError(
                f"tasks={task}: {path}: {type(reason).__name__}: {first_line(reason)}{foreign}; check its output_type, "
                "splits, metrics, fields and data files"
            ) from error
    if rest := [task for task in tasks if files[task] is None]:
        try:
            results |= evaluate(tasks=rest)["results"]
        except OSError as error:
            raise UserError(f"tasks={','.join(rest)}: cannot load the data of a task: {error}") from error
    return results


def user_yaml(manager: Any, task: str) -> Path | None:
    """The YAML of a task of `--task-folder`; None for a task of the harness."""
    path = yaml_path(manager, task)
    built_in = Path(importlib.import_module("lm_eval.tasks").__path__[0])
    return None if path is None or path.resolve().is_relative_to(built_in.resolve()) else path


def yaml_path(manager: Any, task: str) -> Path | None:
    """The YAML of a task or group, if it has one."""
    entry = manager.task_index[task]
    path = entry.get("yaml_path") if isinstance(entry, dict) else entry.yaml_path
    return Path(path).absolute() if isinstance(path, str | Path) and Path(path).is_file() else None


@contextmanager
def in_data_folder(path: Path) -> Generator[None, None, None]:
    """Enter the folder of a task's YAML, where its relative data files are, unless they are in the working folder."""
    named = (task_fields(path).get("dataset_kwargs") or {}).get("data_files")
    relative = [name for name in strings_in(named) if "://" not in name and not Path(name).is_absolute()]
    here = Path.cwd()
    beside = any(glob.glob(str(path.parent / name)) for name in relative)
    if relative and (beside or not all(map(glob.glob, relative))):
        os.chdir(path.parent)
    try:
        yield
    finally:
        os.chdir(here)


def foreign_metrics(path: Path) -> list[str]:
    """The metrics in the YAML of a task that the harness itself does not have."""
    metrics = task_fields(path).get("metric_list") or []
    names = [metric.get("metric") for metric in metrics if isinstance(metric, dict)]
    if not names:
        return []
    importlib.import_module("lm_eval.api.metrics")  # fills the registry
    known = importlib.import_module("lm_eval.api.registry").METRIC_REGISTRY
    return [name for name in names if isinstance(name, str) and name not in known]


def task_fields(path: Path) -> dict[str, Any]:
    """The content of the YAML of a task, without its functions."""
    content = yaml.load(path.read_text("utf-8"), TaskLoader)
    return content if isinstance(content, dict) else {}


class TaskLoader(yaml.SafeLoader):
    """Reads the YAML of a task without its functions (`!function`)."""


TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def strings_in(value: Any) -> list[str]:
    """The strings in nested lists and mappings."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings_in(part)]


def save_scores(folder: Path, scores: dict[str, dict[str, float]], checkpoint: str = "last", **setting: int) -> None:
    """Merge scores into `tasks.json` of a run folder, atomically; into `tasks_best.json` those of the best checkpoint.

    Args:
        folder: of the run.
        scores: by task and metric.
        checkpoint: "last" or "best".
        setting: numbers that are saved with each task, such as the `step` of the checkpoint.

    Raises:
        UserError: the existing file cannot be read.
    """
    path = folder / (SCORES_FILE if checkpoint == "last" else f"tasks_{checkpoint}.json")
    with locked(path.with_name(f".{path.name}.lock")):  # another process may add the scores of other tasks
        previous = read_json(path, dict[str, Any], "remove the file and evaluate again") if path.is_file() else {}
        marked = {task: metrics | setting for task, metrics in scores.items()}
        write_atomic(path, json.dumps(previous | marked, indent=1) + "\n")


def numeric_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of a task's results; `acc,none`, a metric without a filter, becomes `acc`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, int | float) and "," in name
    }
