"""`launch`: a job script for a cluster."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cod_lightning.commands.options import add_overrides, require_at_least
from cod_lightning.errors import TRY_AGAIN, UserError

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

HELP = "Print, write or submit a job script that trains a run and requeues it until it finishes."
EPILOG = """\
Examples:
  launch slurm experiments=table1_350m trainer=ddp trainer.devices=4                        # one node, printed
  launch slurm experiments=table1_1b trainer=fsdp trainer.devices=8 trainer.num_nodes=4 --time 12:00:00 --submit
The run folder must be on a file system that all nodes share. Prepare the data first: see prepare.
"""
SIGNALS = ("TERM", "HUP", "USR1", "USR2")
SLURM = """\
#!/bin/bash
{directives}

# Slurm may signal this script too; catch the signals so that it waits for the ranks, which save a checkpoint.
trap : TERM HUP USR1 USR2
srun {command}
status=$?
# Status {try_again}: interrupted by a signal or a lost node; the requeued job resumes from the last checkpoint.
if [ "$status" -eq {try_again} ]; then
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
        parser.add_argument(f"--{name}", help="passed to sbatch")
    parser.add_argument("--output", type=Path, help="new file for the script (default: print it)")
    parser.add_argument("--submit", action="store_true", help="pass the script to sbatch")
    add_overrides(parser)


def run(
    scheduler: str,
    overrides: Sequence[str],
    signal: str,
    grace: int,
    output: Path | None,
    submit: bool,
    **options: str | None,
) -> int:
    from cod_lightning.config.compose import compose

    require_at_least("grace", grace, 1)
    for name, value in options.items():
        if value is not None and not re.fullmatch(r"\S+", value):
            raise UserError(f"--{name.replace('_', '-')}={value!r} must be one word, as sbatch takes it")
    script = slurm_script(compose(overrides), overrides, signal=signal, grace=grace, **options)
    if output is not None:
        if output.exists():
            raise UserError(f"--output={output} exists: choose a new file")
        output.write_text(script)
        print(output)
    if submit:
        try:
            return subprocess.run(["sbatch"], input=script, text=True).returncode
        except FileNotFoundError:
            raise UserError(
                "--submit requires sbatch, which is not installed: use --output, and submit the script on the cluster"
            ) from None
    if output is None:
        print(script, end="")
    return 0


def slurm_script(
    config: Config, overrides: Sequence[str], *, signal: str = "TERM", grace: int = 300, **options: str | int | None
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
    return SLURM.format(directives="\n".join([*directives, "#SBATCH --requeue"]), command=command, try_again=TRY_AGAIN)
