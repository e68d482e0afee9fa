"""The rank of this process, read from the environment variables that launchers set (torchrun, Slurm, Lightning)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cod_lightning.errors import UserError

if TYPE_CHECKING:
    from cod_lightning.config.schema import TrainerConfig

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")
"""Environment variables that hold a rank; all of them are 0 or unset on the first rank."""


def is_first_rank() -> bool:
    """Whether this process writes files and prints for all ranks.

    Raises:
        UserError: a launcher variable is not an integer.
    """
    return not any(variable(name) for name in RANK_VARIABLES)


def is_first_on_node() -> bool:
    """Whether this process reports to the launcher of its node.

    Raises:
        UserError: LOCAL_RANK is not an integer.
    """
    return variable("LOCAL_RANK") == 0


def check_ranks(trainer: TrainerConfig) -> None:
    """Compare the ranks that a launcher started with those that the configuration asks for.

    Raises:
        UserError: they differ, or several nodes are configured and no variable numbers this one.
    """
    world_size, rank = trainer.world_size, variable("RANK")
    started = variable("WORLD_SIZE", default=world_size)
    if started != world_size:
        raise UserError(
            f"WORLD_SIZE={started} in the environment, but trainer.devices={trainer.devices} x "
            f"trainer.num_nodes={trainer.num_nodes} = {world_size}: set them to the ranks that the launcher starts"
        )
    if rank >= world_size:
        raise UserError(f"RANK={rank} in the environment is out of range: ranks are 0 to {world_size - 1}")
    if trainer.num_nodes > 1 and not any(name in os.environ for name in RANK_VARIABLES):
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}, but no environment variable numbers this node: start all nodes "
            "with torchrun or Slurm, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )


def variable(name: str, default: int = 0) -> int:
    """The value of a launcher variable, `default` if it is unset.

    Raises:
        UserError: it is not an integer.
    """
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name}={value!r} in the environment is not an integer: unset it")
    return int(value)
