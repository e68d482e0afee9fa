"""Accuracy on tasks of lm-evaluation-harness, which runs the exported model from a temporary folder."""

from __future__ import annotations

import difflib
import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cod_lightning.data.tokenizers import DocumentTokenizer
from cod_lightning.errors import DAMAGED, UserError
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import export, obstacles, quiet

PAPER_TASKS = ("mmlu", "boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande")
"""The columns of Table 2, in its order, by their names in the harness."""
SCORES = "tasks.json"
"""Where a run keeps what it scored on whole tasks."""


def task_manager(tasks: Sequence[str], folder: Path | None = None) -> Any:
    """The harness's list of tasks, in which all of `tasks` are found.

    Args:
        tasks: names of tasks or groups.
        folder: holds the YAML of further tasks.

    Raises:
        UserError: lm-evaluation-harness is not installed, no tasks are asked for, or it does not have one of them.
    """
    try:
        importlib.import_module("lm_eval.models.huggingface")  # needs more than the harness itself does
        tasks_of = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UserError(f"tasks= needs lm-evaluation-harness ({error}): pip install 'cod_lightning[eval]'") from error
    if folder is not None and not folder.is_dir():
        raise UserError(f"--task-folder={folder}: no such folder")
    manager = tasks_of.TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    found = [
        f"tasks: {task!r} is not a task; near it: {', '.join(difflib.get_close_matches(task, known, n=5)) or 'none'}"
        for task in tasks
        if task not in known
    ]
    if found or not tasks:
        raise UserError("\n".join(found) or "tasks= is empty: name some, as in arc_easy,piqa, or paper")
    return manager


def score(
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
    """The figures of every task, such as {"arc_easy": {"acc": 0.31, "acc_stderr": 0.01, "acc_norm": ...}}.

    Args:
        decoder: on any device; computes in float32.
        tokenizer: its tokenizer.
        tasks: names that `manager` knows.
        manager: from `task_manager`.
        max_length: tokens of a question with its answer, of which longer ones lose their beginning.
        batch_size: rows per forward pass.
        device: `cpu` or `cuda`, where it is run.
        limit: examples of each task at the most; None: all.

    Raises:
        UserError: the decoder cannot be exported, or a task's data cannot be had.
    """
    if found := obstacles(decoder):
        raise UserError("\n".join(["tasks= runs on the exported model, and this one cannot be exported", *found]))
    harness = importlib.import_module("lm_eval")
    model_class = importlib.import_module("lm_eval.models.huggingface").HFLM
    with tempfile.TemporaryDirectory() as folder, quiet():
        export(decoder, Path(folder), tokenizer, max_length=max_length)
        model = model_class(pretrained=folder, dtype="float32", device=device, batch_size=batch_size)
        try:
            results = harness.simple_evaluate(
                model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
            )
        except OSError as error:
            raise UserError(f"tasks={','.join(tasks)}: the data of a task cannot be had: {error}") from error
    return {task: plain(results["results"][task]) for task in tasks}


def keep_scores(folder: Path, scores: dict[str, dict[str, float]]) -> None:
    """Write scores into `tasks.json` of a run folder, beside those of other tasks there; whole or not at all."""
    path, partial = folder / SCORES, folder / f".{SCORES}.partial"
    try:
        before = dict(json.loads(path.read_text())) if path.is_file() else {}
    except (*DAMAGED, TypeError) as error:
        raise UserError(f"{path}: not readable scores ({error}); remove it, and evaluate again") from error
    partial.write_text(json.dumps(before | scores, indent=1) + "\n")
    partial.replace(path)


def plain(figures: dict[str, Any]) -> dict[str, float]:
    """The harness's numbers, under names without the filter that gave them where that is none."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and "," in name
    }
