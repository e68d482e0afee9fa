"""`launch`: a job script for a cluster."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning.commands.options import nonempty_path, require_positive
from cod_lightning.commands.overrides import add_overrides
from cod_lightning.errors import TRY_AGAIN, UserError
from cod_lightning.files import check_new_file, write_atomic

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

HELP = "Print, write or submit a job script that trains a run and requeues it until it finishes."
EPILOG = """\
Examples:
  launch slurm experiments=table1_350m trainer=ddp trainer.devices=4                        # one node, printed
  launch slurm experiments=table1_1b trainer=fsdp trainer.devices=8 trainer.num_nodes=4 --time 12:00:00 --submit
The run folder must be on a file system that all nodes share. Prepare the data first: see prepare.
"""
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
"""A time limit as sbatch takes it: minutes, minutes:seconds, hours:minutes:seconds, each also after days-."""
NO_LIMIT = ("infinite", "unlimited")
"""Time limits that are not in `TIME`."""
SIGNALS = ("TERM", "HUP", "USR1", "USR2")
MAX_RESTARTS = 10
"""Requeues of a job before a killed rank ends it."""
SLURM = """\
#!/bin/bash
{directives}

# Slurm may signal this script too; catch the signals so that it waits for the ranks, which save a checkpoint.
trap : {signals}
{srun} {command}
status=$?
# A requeued job resumes from the last checkpoint. Status {try_again}: interrupted by a signal, or a rank is gone. 134:
# ended by NCCL, which met a lost rank. 137: a rank was killed, maybe for lack of memory, so the requeues are limited.
requeue=no
case "$status" in
{try_again}) requeue=yes ;;
134 | 137) if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {most_restarts} ]; then requeue=yes; fi ;;
esac
if [ "$requeue" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("scheduler", choices=("slurm",))
    parser.add_argument("--time", default="24:00:00", help="time limit of the job (default: 24:00:00)")
    parser.add_argument(
        "--signal", choices=SIGNALS, default="TERM", help="signal before the time limit (default: TERM)"
    )
    parser.add_argument(
        "--grace", type=int, default=300, help="seconds between the signal and the time limit (default: 300)"
    )
    for name in ("partition", "account", "qos", "constraint", "cpus-per-task", "mem"):
        parser.add_argument(f"--{name}", type=int if name == "cpus-per-task" else str, help="passed to sbatch")
    parser.add_argument("--output", type=nonempty_path, help="new file for the script (default: print it)")
    parser.add_argument("--submit", action="store_true", help="pass the script to sbatch")
    add_overrides(parser)


def run(
    scheduler: str,
    overrides: Sequence[str],
    signal: str,
    grace: int,
    output: Path | None,
    submit: bool,
    **options: Any,
) -> int:
    from cod_lightning.config.compose import compose

    check_options(grace, **options)
    if output is not None:
        check_new_file(output, "--output=")
    config = compose(overrides)
    if not config.resume:
        raise UserError(
            "resume=false would start again at every requeue: omit it; to retrain, move the run folder aside"
        )
    if submit and shutil.which("sbatch") is None:
        raise UserError(
            "--submit requires sbatch, which is not installed: use --output, and submit the script on the cluster"
        )
    script = slurm_script(config, overrides, signal=signal, grace=grace, **options)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(output, script)
        print(output)
    if submit:
        return subprocess.run(["sbatch"], input=script, text=True).returncode
    if output is None:
        print(script, end="")
    return 0


def check_options(
    grace: int, time: str, cpus_per_task: int | None = None, mem: str | None = None, **words: str | None
) -> None:
    """Check the options of sbatch.

    Raises:
        UserError: one is not a word, a number is too small, or the signal is sent before the job starts.
    """
    require_positive("grace", grace)
    require_positive("cpus-per-task", cpus_per_task)
    for name, value in {"time": time, "mem": mem, **words}.items():
        if value is not None and not re.fullmatch(r"\S+", value):
            raise UserError(f"--{name}={value!r} must be one word, as sbatch takes it")
    if mem is not None and not re.fullmatch(r"\d+([KMGT]B?)?", mem, re.ASCII | re.IGNORECASE):
        raise UserError(f"--mem={mem} must be a number of megabytes, or one with a unit, such as 64G")
    limit = seconds_of(time)
    if limit <= 0:
        raise UserError(f"--time={time} must be longer than 0, such as 24:00:00")
    if grace >= limit:
        raise UserError(f"--grace={grace} must be less than the {limit:.0f} seconds of --time={time}")


def seconds_of(time: str) -> float:
    """The seconds of a time limit as sbatch takes it.

    Raises:
        UserError: it is not one.
    """
    if time.lower() in NO_LIMIT:
        return math.inf
    match = TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time={time} must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 24 * 3600 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def slurm_script(
    config: Config, overrides: Sequence[str], *, signal: str, grace: int, **options: str | int | None
) -> str:
    """A script for `sbatch`: one task per rank, a signal before the time limit, and a requeue after an interruption.

    Args:
        config: configuration of the run, with the numbers of nodes and ranks.
        overrides: overrides of the run, passed to `fit`.
        signal: one of `SIGNALS`; all make the ranks save a checkpoint and stop.
        grace: seconds between the signal and the time limit, for a rank to finish its step and save.
        options: options of sbatch, with underscores; None omits an option.
    """
    trainer = config.trainer
    values: dict[str, str | int | None] = {
        "job_name": config.label,
        "output": f"{config.label}-%j.log",
        "open_mode": "append",
        "nodes": trainer.num_nodes,
        "ntasks_per_node": trainer.devices,
        "gpus_per_node": None if trainer.accelerator == "cpu" else trainer.devices,
        "signal": f"{signal}@{grace}",
        **options,
    }
    directives = [f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    command = shlex.join([sys.executable, "-m", "cod_lightning", "fit", *overrides])
    cpus = options.get("cpus_per_task")
    return SLURM.format(
        directives="\n".join([*directives, "#SBATCH --requeue"]),
        srun="srun" if cpus is None else f"srun --cpus-per-task={cpus}",  # srun does not inherit that of sbatch
        signals=" ".join(SIGNALS),
        command=command,
        try_again=TRY_AGAIN,
        most_restarts=MAX_RESTARTS,
    )
