"""The rank of this process in the environments of torchrun, Slurm and Lightning."""

from dataclasses import asdict

import pytest

from cod_lightning.config.compose import compose
from cod_lightning.config.schema import TrainerConfig
from cod_lightning.errors import UserError
from cod_lightning.train.ranks import rank_problems, read_ranks


def torchrun(rank, local_rank, world_size, **changes):
    """The environment of a rank on one node."""
    ours = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    others = {"GROUP_RANK": 0, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    return {"TORCHELASTIC_RUN_ID": "none"} | ours | others | changes


def sbatch(**changes):
    """The environment of a batch script with one task."""
    task = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}
    return {"SLURM_JOB_ID": 1234, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": 1, "SLURM_NNODES": 1} | task | changes


def srun(rank, tasks, nodes=1, **changes):
    """The environment of a task of srun."""
    each = tasks // nodes
    task = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
    step = {"SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": each, "SLURM_NNODES": nodes, "SLURM_STEP_ID": 0}
    return sbatch(**task, **step) | changes


def node(number, **changes):
    """The environment of a node whose ranks `fit` starts."""
    return {"NODE_RANK": number, "MASTER_ADDR": "node0", "MASTER_PORT": 29500} | changes


def started_by_lightning(local_rank, world_size, number=0):
    """The environment of a rank that Lightning started."""
    return node(number, LOCAL_RANK=local_rank, WORLD_SIZE=world_size)


ONE, TWO, FOUR = (1, 1), (2, 1), (2, 2)
"""`trainer.devices` and `trainer.num_nodes`."""


def as_text(environment):
    return {name: str(value) for name, value in environment.items()}


@pytest.mark.parametrize(
    ("environment", "asked", "launcher", "rank"),
    [
        ({}, ONE, "lightning", 0),
        ({}, TWO, "lightning", 0),
        ({"LOCAL_RANK": 0, "RANK": 0, "WORLD_SIZE": 1}, ONE, "lightning", 0),
        (started_by_lightning(1, 2), TWO, "lightning", 1),
        (node(1), FOUR, "lightning", 2),
        (started_by_lightning(1, 4, number=1), FOUR, "lightning", 3),
        (torchrun(1, 1, 2), TWO, "torchrun", 1),
        (torchrun(3, 1, 4, LOCAL_WORLD_SIZE=2, GROUP_RANK=1, GROUP_WORLD_SIZE=2), FOUR, "torchrun", 3),
        (srun(1, 2), TWO, "slurm", 1),
        (srun(3, 4, nodes=2), FOUR, "slurm", 3),
        (srun(1, 2, RANK=1, LOCAL_RANK=1, WORLD_SIZE=2), TWO, "slurm", 1),
        (srun(0, 1) | torchrun(1, 1, 2), TWO, "torchrun", 1),
        (sbatch(), ONE, "slurm", 0),
        ({"SLURM_JOB_ID": 7, "SLURM_PROCID": 0}, TWO, "lightning", 0),
        (srun(0, 1, SLURM_JOB_NAME="bash"), TWO, "lightning", 0),
        (srun(0, 1, SLURM_JOB_NAME="interactive"), TWO, "lightning", 0),
        (srun(0, 1, SLURM_JOB_NAME="bash") | started_by_lightning(1, 2), TWO, "lightning", 1),
    ],
)
def test_the_rank_is_that_of_the_launcher(environment, asked, launcher, rank):
    environment = as_text(environment)
    assert rank_problems(TrainerConfig(devices=asked[0], num_nodes=asked[1]), environment) == []
    ranks = read_ranks(environment)
    assert (ranks.launcher, ranks.rank(asked[0])) == (launcher, rank)


@pytest.mark.parametrize(
    ("environment", "asked", "named"),
    [
        (sbatch(), TWO, "SLURM_NTASKS=1"),
        (sbatch(SLURM_NTASKS=2), TWO, "SLURM_STEP_ID is not set"),
        (srun(0, 2), ONE, "SLURM_NTASKS=2"),
        (srun(1, 2), ONE, "SLURM_NTASKS=2"),
        (srun(0, 4, nodes=2), (4, 1), "SLURM_NTASKS_PER_NODE=2"),
        (srun(0, 2, SLURM_NNODES=2), TWO, "SLURM_NNODES=2"),
        (srun(1, 2, LOCAL_RANK=0), TWO, "LOCAL_RANK=0"),
        (srun(0, 2, WORLD_SIZE=4), TWO, "WORLD_SIZE=4"),
        ({"SLURM_NTASKS": 1, "SLURM_JOB_NAME": "train"}, ONE, "SLURM_PROCID is not set"),
        (srun(1, 2, SLURM_JOB_NAME="bash"), ONE, "job named bash"),
        ({"SLURM_PROCID": 1}, ONE, "SLURM_PROCID=1"),
        ({"LOCAL_RANK": 1}, ONE, "LOCAL_RANK=1"),
        ({"LOCAL_RANK": 1}, TWO, "WORLD_SIZE is not set"),
        ({"LOCAL_RANK": 0}, TWO, "WORLD_SIZE is not set"),
        ({"RANK": 5}, ONE, "RANK=5"),
        ({"RANK": 1}, TWO, "RANK=1"),
        ({"NODE_RANK": 1}, ONE, "NODE_RANK=1"),
        ({"WORLD_SIZE": 4}, ONE, "WORLD_SIZE=4"),
        ({"NODE_RANK": 1}, FOUR, "MASTER_ADDR and MASTER_PORT not set"),
        (node(2), FOUR, "NODE_RANK=2"),
        (torchrun(0, 0, 2), ONE, "WORLD_SIZE=2"),
        (torchrun(0, 0, 4), (2, 1), "WORLD_SIZE=4"),
        (torchrun(0, 0, 4), FOUR, "LOCAL_WORLD_SIZE=4"),
        ({"TORCHELASTIC_RUN_ID": "none"}, ONE, "RANK is not set"),
    ],
)
def test_a_contradiction_is_named(environment, asked, named):
    (problem, *_) = rank_problems(TrainerConfig(devices=asked[0], num_nodes=asked[1]), as_text(environment))
    assert named in problem
    assert ":" in problem  # what to do


@pytest.mark.parametrize("value", ["x", "", "-1", "1.0", "\u00b2"])
@pytest.mark.parametrize("name", ["RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_NTASKS", "WORLD_SIZE"])
def test_a_variable_that_is_not_an_integer_is_named(name, value):
    with pytest.raises(UserError, match=rf"^{name}='.*' in the environment is not an integer"):
        read_ranks({name: value})


def test_a_rank_other_than_0_says_so_once(toy, train, monkeypatch, capsys, tmp_path):
    for name, value in started_by_lightning(1, 2).items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "finished").mkdir()
    words = ("trainer=ddp", "trainer.devices=2", "data.micro_batch_size=4", "name=finished")
    record = {"config": asdict(compose([*toy, *words]))}
    monkeypatch.setattr("cod_lightning.train.record.read_record", lambda folder: record)
    train(*words)
    assert capsys.readouterr().err == "rank 1 of 2: rank 0 prints and keeps the results\n"
