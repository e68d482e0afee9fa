"""Job scripts for a cluster, made from a run's configuration."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from cod_lightning.config.schema import Config
from cod_lightning.errors import TRY_AGAIN

SLURM = """\
#!/bin/bash
{directives}

# A SIGTERM that comes to this script as well must not end it before the ranks have saved.
trap : TERM
srun {command}
status=$?
# {try_again}: stopped by a signal, or a node was lost; the same command goes on from the last checkpoint.
if [ "$status" -eq {try_again} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def slurm(config: Config, overrides: Sequence[str], *, grace: int = 300, **options: str | int | None) -> str:
    """A script for `sbatch`: one task for each rank, SIGTERM `grace` seconds before the end, and queued again after it.

    Args:
        config: of the run, which says how many nodes and ranks.
        overrides: that it is composed of.
        grace: seconds that a rank has to finish its step and save.
        options: of sbatch, with underscores; those that are None are left out.
    """
    trainer = config.trainer
    values: dict[str, str | int | None] = {
        "job_name": config.label,
        "output": f"{config.label}-%j.log",
        "open_mode": "append",
        "nodes": trainer.num_nodes,
        "ntasks_per_node": trainer.devices,
        "gpus_per_node": None if trainer.accelerator == "cpu" else trainer.devices,
        "signal": f"TERM@{grace}",
        **options,
    }
    directives = [f"#SBATCH --{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    command = shlex.join([sys.executable, "-m", "cod_lightning", "fit", *overrides])
    return SLURM.format(directives="\n".join([*directives, "#SBATCH --requeue"]), command=command, try_again=TRY_AGAIN)
