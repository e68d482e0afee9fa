"""Downstream tasks of lm-evaluation-harness, run on the exported model in a temporary folder."""

from __future__ import annotations

import difflib
import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cod_lightning.data.tokenizers import DocumentTokenizer
from cod_lightning.errors import UserError
from cod_lightning.files import write_atomic
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import export, quiet_transformers, unsupported_features
from cod_lightning.typed_json import read_json

PAPER_TASKS = ("mmlu", "boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande")
"""The columns of Table 2, in its order, by their names in the harness."""
SCORES_FILE = "tasks.json"
"""File in a run folder with the scores of whole tasks."""


def task_manager(tasks: Sequence[str], folder: Path | None = None) -> Any:
    """Return the harness's `TaskManager`, after checking that it knows all `tasks`.

    Args:
        tasks: names of tasks or groups.
        folder: holds the YAML of additional tasks.

    Raises:
        UserError: lm-evaluation-harness is not installed, `tasks` is empty, or a task is unknown.
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
    manager = lm_eval_tasks.TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    errors = []
    for task in tasks:
        if task not in known:
            similar = ", ".join(difflib.get_close_matches(task, known, n=5))
            errors.append(f"tasks: unknown task {task!r}" + (f"; similar: {similar}" if similar else ""))
    if errors:
        raise UserError("\n".join(errors))
    return manager


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
        UserError: the decoder cannot be exported, or the data of a task is not available.
    """
    if unsupported := unsupported_features(decoder):
        raise UserError("\n".join(["tasks= evaluates the exported model, and this model has no export:", *unsupported]))
    harness = importlib.import_module("lm_eval")
    model_class = importlib.import_module("lm_eval.models.huggingface").HFLM
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        export(decoder, Path(folder), tokenizer, max_length=max_length)
        model = model_class(pretrained=folder, dtype="float32", device=device, batch_size=batch_size)
        try:
            results = harness.simple_evaluate(
                model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )
        except OSError as error:
            raise UserError(f"tasks={','.join(tasks)}: cannot load the data of a task: {error}") from error
    return {task: numeric_metrics(results["results"][task]) for task in tasks}


def save_scores(folder: Path, scores: dict[str, dict[str, float]]) -> None:
    """Merge scores into `tasks.json` of a run folder, atomically.

    Raises:
        UserError: the existing file cannot be read.
    """
    path = folder / SCORES_FILE
    previous = read_json(path, dict[str, Any], "remove the file and evaluate again") if path.is_file() else {}
    write_atomic(path, json.dumps(previous | scores, indent=1) + "\n")


def numeric_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of a task's results; `acc,none`, a metric without a filter, becomes `acc`."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in results.items()
        if isinstance(value, int | float) and "," in name
    }
