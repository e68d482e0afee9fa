"""Lightning's Trainer of a run, errors of lost ranks, and silenced messages."""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Generator, Sequence

import torch.distributed as dist
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from cod_lightning.config.schema import Config, TrainerConfig
from cod_lightning.errors import Stopped, UserError, first_line
from cod_lightning.train.callbacks import ProgressBar
from cod_lightning.train.checkpoint import AtomicCheckpointIO
from cod_lightning.train.devices import accelerator, precision
from cod_lightning.train.ranks import read_ranks
from cod_lightning.train.strategy import build_strategy


def build_trainer(config: Config, callbacks: Sequence[Callback] = (), io: AtomicCheckpointIO | None = None) -> Trainer:
    """The Trainer of a run; writes no files yet.

    Raises:
        UserError: the machine does not have what `trainer.*` asks for.
    """
    settings = config.trainer
    atexit.register(destroy_process_group)
    try:
        return Trainer(
            accelerator=accelerator(settings),
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            # LISA: frozen blocks have no gradients, which plain DDP would wait for.
            strategy=build_strategy(settings, find_unused_parameters=config.optim.lisa_layers > 0),
            precision=precision(settings),
            max_steps=settings.max_steps,
            max_epochs=-1,
            val_check_interval=config.eval.every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_checkpointing=io is not None,
            callbacks=list(callbacks),
            logger=False,
            plugins=[io or AtomicCheckpointIO(), cluster_environment()],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(
            f"trainer.accelerator={settings.accelerator!r}, trainer.devices={settings.devices}: {error}"
        ) from error


def destroy_process_group() -> None:
    """Destroy the process group at exit: a gloo thread that is alive then aborts the process (SIGABRT).

    Lightning destroys NCCL groups only.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def cluster_environment() -> ClusterEnvironment:
    """Lightning's reader of the launcher's variables, the launcher that `read_ranks` finds.

    Slurm's is without requeueing: `StopOnSignal` and the job script do it.
    """
    launcher = read_ranks().launcher
    if launcher == "slurm":
        return SLURMEnvironment(auto_requeue=False)
    return TorchElasticEnvironment() if launcher == "torchrun" else LightningEnvironment()


LOST_CONNECTION = r"(?i)gloo|connection (closed|reset|refused)|timed out|broken pipe"
"""Matches the messages of gloo and NCCL when another rank is gone."""


@contextlib.contextmanager
def translate_rank_failures(settings: TrainerConfig) -> Generator[None]:
    """Raise `Stopped` where another rank is gone or silent, or where Lightning handles SIGTERM."""
    try:
        yield
    except SIGTERMException as error:  # before the first step or after the last; uncaught it is a success
        raise Stopped("interrupted by SIGTERM") from error
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search(LOST_CONNECTION, str(error))
        if settings.world_size == 1 or not lost:
            raise
        raise Stopped(
            f"another of the {settings.world_size} ranks is gone, or did not answer for "
            f"trainer.timeout={settings.timeout:g} s ({first_line(error)})"
        ) from error


@contextlib.contextmanager
def quiet_lightning() -> Generator[None]:
    """Silence Lightning's info messages, and its warnings about choices that are intended here.

    Also silences the thread that writes for TensorBoard: the next call of its logger raises the error.
    """
    levels = {logger: logger.level for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric"))}
    for logger in levels:
        logger.setLevel(logging.WARNING)
    hook = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            hook(failure)

    threading.excepthook = report
    with warnings.catch_warnings():
        for message in (
            # The main process reads the data unless data.loader_workers is set.
            r".*does not have many workers.*",
            # Metrics are already summed over the ranks.
            r".*It is recommended to use `self\.log\(.*sync_dist=True.*",
            # One process on a machine that has Slurm is intended.
            r".*`srun` command is available on your system but is not used.*",
            # Lightning calls a function that torch has deprecated.
            r".*isinstance\(treespec, LeafSpec\).*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            threading.excepthook = hook
            for logger, level in levels.items():
                logger.setLevel(level)
