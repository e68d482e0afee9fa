"""`evaluate`: validate a checkpoint, or score it on tasks of lm-evaluation-harness."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.models import load_run_config
from cod_lightning.commands.options import add_run, add_trust_code, nonempty_path, require_positive
from cod_lightning.commands.overrides import add_overrides, pop_options
from cod_lightning.errors import UserError
from cod_lightning.files import check_writable
from cod_lightning.settings import require_choice
from cod_lightning.train.ranks import check_ranks

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

HELP = (
    "Validate a checkpoint on the data of its run or on other data; or, with tasks=a,b,c, score it on tasks of "
    "lm-evaluation-harness (tasks=paper: those of Table 2). protocol=paper also prints the perplexity of the released "
    "evaluation."
)
OPTIONS = {"tasks": str, "protocol": str}


def add_arguments(parser: ArgumentParser) -> None:
    add_run(parser)
    add_trust_code(parser)
    parser.add_argument("--task-folder", type=nonempty_path, help="with tasks=: folder with your tasks as YAML")
    parser.add_argument("--limit", type=int, help="with tasks=: largest number of examples of a task")
    add_overrides(parser)


def run(
    run: Path, checkpoint: str, trust_code: bool, overrides: Sequence[str], task_folder: Path | None, limit: int | None
) -> None:
    options, overrides = pop_options(overrides, OPTIONS, "evaluate")
    if "tasks" in options:
        if "protocol" in options:
            raise UserError("protocol= has no effect with tasks=: remove one of them")
        config = load_run_config(run, overrides, trust_code, "evaluate tasks=")
        score_run(config, run, checkpoint, options["tasks"], task_folder, limit)
        return
    if task_folder is not None or limit is not None:
        raise UserError("--task-folder and --limit require tasks=")
    from cod_lightning.config.schema import COUNTS, PROTOCOLS, is_shown

    if "protocol" in options:
        require_choice("protocol", options["protocol"], PROTOCOLS)
    config = load_run_config(run, overrides, trust_code, "evaluate", options.get("protocol"))
    import_torchmetrics()
    from cod_lightning.train.load import checkpoint_of
    from cod_lightning.train.run import validate_checkpoint

    rank = check_ranks(config.trainer).rank(config.trainer.devices)
    if rank:
        sys.stderr.write(f"rank {rank} of {config.trainer.world_size}: rank 0 prints the results\n")
    metrics = validate_checkpoint(config, checkpoint_of(run, checkpoint))
    if rank == 0:
        for name, value in metrics.items():
            if is_shown(name, config.protocol):
                print(f"{name} {value:.0f}" if name in COUNTS else f"{name} {value:.6g}")


def score_run(
    config: Config, run: Path, checkpoint: str, tasks: str, task_folder: Path | None, limit: int | None
) -> None:
    """Score a run on tasks; without `limit` the scores are saved in the run folder."""
    from cod_lightning.evaluate import PAPER_TASKS
    from cod_lightning.evaluate.lm_eval import save_scores, score_tasks, task_manager
    from cod_lightning.train.load import checkpoint_of, load_decoder

    require_positive("limit", limit)
    if config.task != "language":
        raise UserError(f"{run} is a run of task={config.task}, and tasks= are of language: remove tasks=")
    if limit is None:
        check_writable(run, "the run folder ")
    names = PAPER_TASKS if tasks == "paper" else tuple(filter(None, tasks.split(",")))
    manager = task_manager(names, task_folder)
    import_torchmetrics()
    from cod_lightning.train.devices import accelerator

    decoder, tokenizer = load_decoder(config, run, checkpoint_of(run, checkpoint))
    scores = score_tasks(
        decoder,
        tokenizer,
        names,
        manager,
        max_length=config.data.seq_len,
        batch_size=config.data.micro_batch_size,
        device=accelerator(config.trainer),
        limit=limit,
    )
    for task, metrics in scores.items():
        for name, value in metrics.items():
            print(f"{task} {name} {value:.6g}")
    if limit is None:
        save_scores(run, scores, checkpoint, step=decoder.step, max_length=config.data.seq_len)
