"""The rank of this process, read from the environment variables that launchers set (torchrun, Slurm, Lightning)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cod_lightning.errors import UserError

if TYPE_CHECKING:
    from cod_lightning.config.schema import TrainerConfig


class LauncherVariables(NamedTuple):
    """The environment variables of a launcher."""

    rank: str
    local_rank: str
    node: str
    world_size: str
    ranks_per_node: str
    nodes: str


LAUNCHERS = {
    "torchrun": LauncherVariables(
        "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"
    ),
    "slurm": LauncherVariables(
        "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES"
    ),
    "lightning": LauncherVariables(
        "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"
    ),
}
"""By launcher. `lightning` starts the ranks of a node itself, unless LOCAL_RANK says that this is one of them."""

INTERACTIVE_JOBS = ("bash", "interactive")
"""Names of the Slurm jobs in which Lightning ignores Slurm: `srun --pty bash`, `salloc`."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among the ranks, as the environment says."""

    launcher: str
    """A key of `LAUNCHERS`."""
    values: Mapping[str, int]
    """The variables that are set, by name."""

    @property
    def variables(self) -> LauncherVariables:
        return LAUNCHERS[self.launcher]

    def get(self, name: str) -> int:
        """The value of a variable, 0 if it is unset."""
        return self.values.get(name, 0)

    @property
    def node(self) -> int:
        """The number of this node; Lightning reads torchrun's variable if there is none of its own."""
        return self.values.get(self.variables.node, self.get("GROUP_RANK"))

    def rank(self, devices: int) -> int:
        """The rank of this process, computed as Lightning does; a node has `devices` ranks."""
        if self.launcher == "lightning":
            return self.node * devices + self.get("LOCAL_RANK")
        return self.get(self.variables.rank)


def read_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Read the variables of all launchers; the launcher is the one that Lightning would choose.

    Raises:
        UserError: a variable is not an integer.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    elif "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS:
        launcher = "slurm"
    else:
        launcher = "lightning"
    known = {name for launcher in LAUNCHERS.values() for name in launcher}
    values = {name: environ[name] for name in sorted(known & environ.keys())}
    if errors := [
        f"{name}={value!r} in the environment is not an integer: unset it"
        for name, value in values.items()
        if not (value.isascii() and value.isdecimal())
    ]:
        raise UserError("\n".join(errors))
    return Ranks(launcher, {name: int(value) for name, value in values.items()})


def is_rank_zero() -> bool:
    """Whether this process writes files and prints for all ranks.

    Raises:
        UserError: a launcher variable is not an integer.
    """
    return read_ranks().rank(devices=1) == 0


def is_local_rank_zero() -> bool:
    """Whether this process reports to the launcher of its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def check_ranks(trainer: TrainerConfig) -> Ranks:
    """Compare the ranks that a launcher started with those that the configuration asks for.

    Raises:
        UserError: they differ, or variables contradict each other; lists every problem.
    """
    if problems := rank_problems(trainer, os.environ):
        raise UserError("\n".join(problems))
    return read_ranks()


def rank_problems(trainer: TrainerConfig, environ: Mapping[str, str]) -> list[str]:
    """Contradictions between the environment and `trainer.devices`, `num_nodes`, or within the environment.

    Raises:
        UserError: a variable is not an integer.
    """
    ranks = read_ranks(environ)
    names, values = ranks.variables, ranks.values
    devices, nodes = f"trainer.devices={trainer.devices}", f"trainer.num_nodes={trainer.num_nodes}"
    if different := [
        f"{name}={values[name]} in the environment, but {asked}: set both to the ranks that the launcher starts, or "
        f"unset {name} if no launcher started this process"
        for name, value, asked in (
            (names.world_size, trainer.world_size, f"{devices} x {nodes} = {trainer.world_size}"),
            (names.ranks_per_node, trainer.devices, devices),
            (names.nodes, trainer.num_nodes, nodes),
        )
        if values.get(name, value) != value
    ]:
        return different
    problems = [
        f"{name} is not set, but {ranks.launcher} sets it: start all ranks with {ranks.launcher}"
        for name in (names.rank, names.local_rank, names.node, names.world_size)
        if name not in values and ranks.launcher != "lightning"
    ]
    problems += [
        f"{name}={values[name]} in the environment is out of range: {what} are 0 to {count - 1}; unset it, or start "
        "all ranks with torchrun or Slurm"
        for name, what, count in (
            (names.rank, "ranks", trainer.world_size),
            (names.local_rank, "ranks of a node", trainer.devices),
            (names.node, "nodes", trainer.num_nodes),
        )
        if values.get(name, 0) >= count
    ]
    if problems or ranks.launcher == "torchrun":
        return problems
    if ranks.launcher == "slurm":
        return slurm_problems(trainer, ranks, environ)
    return lightning_problems(trainer, ranks, environ)


def slurm_problems(trainer: TrainerConfig, ranks: Ranks, environ: Mapping[str, str]) -> list[str]:
    """Contradictions in the environment of a Slurm task."""
    if trainer.world_size > 1 and not {"SLURM_STEP_ID", "SLURM_STEPID"} & environ.keys():
        return [
            f"SLURM_NTASKS={trainer.world_size} in the environment, but SLURM_STEP_ID is not set, so srun did not "
            "start this process: start it with srun, or unset SLURM_NTASKS so that fit starts the ranks itself"
        ]
    if trainer.world_size > 1 and "SLURM_NTASKS_PER_NODE" not in ranks.values:
        return [f"SLURM_NTASKS_PER_NODE is not set: pass --ntasks-per-node={trainer.devices} to sbatch or srun"]
    slurm, generic = ranks.variables, LAUNCHERS["torchrun"]
    return [
        f"{other}={ranks.get(other)} in the environment contradicts {name}={ranks.get(name)}: unset {other}"
        for name, other in (
            (slurm.rank, generic.rank),
            (slurm.local_rank, generic.local_rank),
            (slurm.world_size, generic.world_size),
        )
        if other in ranks.values and ranks.get(other) != ranks.get(name)
    ]


def lightning_problems(trainer: TrainerConfig, ranks: Ranks, environ: Mapping[str, str]) -> list[str]:
    """Contradictions in the environment of a process that no launcher started, or Lightning's."""
    values = ranks.values
    if ranks.get("SLURM_PROCID"):
        reason = (
            f"Lightning ignores Slurm in a job named {environ['SLURM_JOB_NAME']}: choose another --job-name"
            if "SLURM_NTASKS" in environ
            else "SLURM_NTASKS is not set: unset SLURM_PROCID, or start all ranks with srun"
        )
        return [f"SLURM_PROCID={values['SLURM_PROCID']} in the environment, but {reason}"]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
    if not {"NODE_RANK", "GROUP_RANK"} & values.keys():
        missing.append("NODE_RANK")
    if trainer.num_nodes > 1 and missing:
        return [
            f"trainer.num_nodes={trainer.num_nodes}, but no environment variable numbers this node or finds the first "
            f"({' and '.join(missing)} not set): start all nodes with torchrun or Slurm, or set MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK on each; for one process pass trainer=auto"
        ]
    if trainer.world_size > 1 and "LOCAL_RANK" in values and "WORLD_SIZE" not in values:
        return [
            f"LOCAL_RANK={values['LOCAL_RANK']} in the environment, but WORLD_SIZE is not set, so no launcher started "
            "this process: unset LOCAL_RANK, or start all ranks with torchrun or Slurm"
        ]
    rank = ranks.rank(trainer.devices)
    if values.get("RANK", rank) != rank:
        return [
            f"RANK={values['RANK']} in the environment, but NODE_RANK={ranks.node} and "
            f"LOCAL_RANK={ranks.get('LOCAL_RANK')} make it rank {rank}: unset RANK, or start all ranks with torchrun"
        ]
    return []
