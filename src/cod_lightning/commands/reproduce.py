"""`reproduce`: run every row of some experiments, and compare the results with the paper."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.options import add_jobs, add_results, require_positive
from cod_lightning.commands.overrides import TEXT_CHOICES, pop_options, unread_fields
from cod_lightning.commands.processes import CommandPool
from cod_lightning.errors import UserError, shorten
from cod_lightning.files import check_writable
from cod_lightning.settings import require_choice

if TYPE_CHECKING:
    from rich.console import Group

    from cod_lightning.paper.claims import Experiment
    from cod_lightning.paper.experiments import Task

HELP = "Run every row of some experiments, or resume them, and show the results beside the paper's."
EPILOG = """\
Examples:
  reproduce table1_350m                                 # every row at the paper's size
  reproduce table1 table6 scale=toy seeds=3 -j 2 --results mine     # a small version, on two cores
  reproduce figure7 scale=toy seeds=3 --results mine                # the same runs, measured
  reproduce table8 row=lns,before_ln scale=toy --results mine       # selected rows
"""
OPTIONS = {"scale": str, "seeds": int, "row": str}
MAX_SEEDS = 1000
MEASURED_ROWS = 64
"""Held-out rows for the measures of an experiment."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="experiment|key=value", help="such as table1 scale=toy seeds=3")
    add_jobs(parser)
    add_results(parser)


def run(words: Sequence[str], jobs: int, results: Path | None) -> int:
    from cod_lightning.commands.terminal import show
    from cod_lightning.paper.experiments import experiment_rows, find_experiments, remaining_tasks, with_results
    from cod_lightning.paper.results import RESULTS, load_runs

    require_positive("jobs", jobs)
    options, words = pop_options(words, OPTIONS, "reproduce")
    seeds = options.get("seeds", 1)
    if not 1 <= seeds <= MAX_SEEDS:
        raise UserError(f"seeds={shorten(str(seeds))} must lie between 1 and {MAX_SEEDS:,}")
    names = find_experiments([word for word in words if "=" not in word])
    if not names:
        raise UserError("no experiment is named: name one, such as table1")
    overrides = [word for word in words if "=" in word]
    every_row = experiment_rows(names, options.get("scale", "paper"), overrides)
    known = {row.name for row in every_row}
    chosen = options["row"].split(",") if "row" in options else known
    for name in chosen:
        require_choice("row", name, known)
    rows = [row for row in every_row if row.name in chosen]
    read = {word for row in rows for each in (row, row.source) if each is not None for word in each.overrides}
    if unread := [word for word in overrides if word not in read]:
        raise UserError("\n".join(f"{word} has no effect on the chosen rows: remove it" for word in unread))
    import_torchmetrics()
    results = results or RESULTS
    runs = load_runs(results)
    tasks = remaining_tasks(rows, range(1, seeds + 1), runs)
    if tasks:
        check_writable(results, "--results=")
        check_corpus(tasks, with_results(every_row, runs))
    requested = {row.run_id(seed) for row in rows for seed in range(1, seeds + 1)}
    total = len(requested | {task.run_id for task in tasks})  # and those that they start from
    print(f"{len(tasks)} of {total} runs remaining", file=sys.stderr, flush=True)
    with CommandPool(jobs) as pool:
        # A run that starts from another one comes after all that do not.
        waves = [[t for t in tasks if t.row.source is None], [t for t in tasks if t.row.source is not None]]
        statuses = [status for wave in waves for status in pool.map(lambda t: run_task(t, pool, results), wave)]
    show(reproduction_tables(with_results(rows, load_runs(results)), overrides))
    return max(statuses, default=0)


def check_corpus(tasks: Sequence[Task], experiments: Sequence[Experiment]) -> None:
    """Prepare the text of runs and compare it with that of the records beside which they will stand.

    `data=docs` is the documentation of the installed packages, so that another machine has another text.

    Raises:
        UserError: it is another one; names a record.
    """
    from cod_lightning.data.prepare import prepare
    from cod_lightning.data.stream import open_set
    from cod_lightning.paper.results import record_path

    recorded = {e.target: run for e in experiments for row in e.rows for run in row.runs if not run.failure}
    for task in tasks:
        row, config = task.row, task.config
        run = recorded.get(config.paper.get("target", row.experiment))
        theirs = None if run is None else run.record.get("data_fingerprint")
        if run is None or theirs is None or config.task != "language" or row.source or row.pretrained_model:
            continue
        if theirs != open_set(config.data.folder or str(prepare(config.data)))[0].fingerprint:
            raise UserError(
                f"{task.label} would read another text than {record_path(run.folder)} (data {theirs[:16]}...), and a "
                "table has one: keep your own records elsewhere, as in --results=FOLDER"
            )


def run_task(task: Task, pool: CommandPool, results: Path) -> int:
    """Train, score and measure a run, or measure a pretrained model, and save the results; returns the exit status."""
    from cod_lightning.paper.results import MEASURES_FOLDER, save_result
    from cod_lightning.train.record import RECORD

    row, status = task.row, 0
    if (source := row.source_folder(task.seed)) and not (source / RECORD).is_file():
        print(f"{task.label} is left out: it starts from {source}, which is not trained", file=sys.stderr)
        return 1
    model = row.pretrained_model or str(task.folder)
    if row.pretrained_model is None:
        status = pool.run_command(["fit", *row.cli_args(task.seed)], task.label)
        if status == 0 and row.tasks is not None:
            status = pool.run_command(["evaluate", model, f"tasks={row.tasks}"], task.label)
        save_result(task.folder, results)
    if status == 0 and task.measures:
        command = ["measure", "all", model, f"only={','.join(sorted(task.measures))}", f"rows={MEASURED_ROWS}"]
        if row.pretrained_model is not None:
            unread = unread_fields(row.overrides, "measure of a pretrained model", TEXT_CHOICES)
            text = [word for word, fields in unread.items() if not fields]
            command += [*text, f"output={task.folder / MEASURES_FOLDER}"]
        status = pool.run_command(command, task.label)
        if status == 0:
            save_result(task.folder, results, task.measures)
    return status


def reproduction_tables(experiments: Sequence[Experiment], overrides: Sequence[str] = ()) -> Group:
    """Our results beside the paper's, tables for each scale and column of an experiment, with a summary.

    Args:
        experiments: with their runs.
        overrides: what the runs change of the experiments; the titles name it.
    """
    from rich.console import Group
    from rich.text import Text

    from cod_lightning.commands.terminal import rich_table
    from cod_lightning.paper.claims import by_target, group_columns
    from cod_lightning.paper.tables import comparison_table, figure_tables, summary_lines

    changes = f" with {' '.join(overrides)}" if overrides else ""
    parts: list[Any] = []
    for target, scales in by_target(experiments).items():
        for scale, group in scales.items():
            for column in group_columns(group):
                title = f"{target}, scale={scale}: {column.heading}{changes}"
                tables = (comparison_table(column, complete=True), *figure_tables(column))
                parts += [rich_table(title, table) for table in tables if table.rows]
                parts.append(Text("\n".join(summary_lines(column)) + "\n"))
    return Group(*parts)
