"""`fit`: train a run, or all runs of a sweep."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.options import add_jobs, require_positive
from cod_lightning.commands.overrides import OVERRIDES, add_overrides
from cod_lightning.commands.processes import CommandPool, sweep_labels
from cod_lightning.errors import Diverged, UserError, os_message
from cod_lightning.files import check_writable, locked
from cod_lightning.train.ranks import check_ranks, is_rank_zero

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

HELP = "Train a run, or resume it; its data is prepared first."
EPILOG = OVERRIDES


def details() -> str:
    """The fields of the configuration, for the end of the help."""
    from cod_lightning.config.groups import describe_settings

    return describe_settings()


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("-m", "--multirun", action="store_true", help="sweep over comma-separated values")
    add_jobs(parser)
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    add_overrides(parser)


def run(overrides: Sequence[str], multirun: bool, jobs: int, cfg: bool) -> int:
    from cod_lightning.config.compose import compose, row_of, sweep
    from cod_lightning.config.saved import to_yaml

    require_positive("jobs", jobs)
    if not multirun and jobs > 1:
        raise UserError(f"--jobs={jobs} requires a sweep: add -m")
    if cfg:
        runs = sweep(overrides) if multirun else [overrides]
        print("---\n".join(to_yaml(compose(words)) for words in runs), end="")
        return 0
    if multirun:
        return run_sweep(overrides, jobs)
    config = compose(overrides)
    config.row = row_of(config)
    record, folder = train_run(config)
    if is_rank_zero():
        from cod_lightning.commands.terminal import run_summary, show

        show(run_summary(record | {"config": asdict(config)}, folder))
    return 0


def train_run(config: Config) -> tuple[dict[str, Any], Path]:
    """Train a run unless it is finished; nothing but prepared data is written before everything is checked.

    Returns:
        Its record and its folder.

    Raises:
        UserError: the folder holds another run or is in use, a logger is not installed, the memory is too small, or
            as `train.run.fit`.
        Diverged: the loss is not finite; `failed.json` in the folder says so.
    """
    from cod_lightning.config.saved import check_folder, check_init_from, config_from_dict, create_run_folder
    from cod_lightning.config.schema import CHECKPOINTS, TOKENIZER
    from cod_lightning.nn.spec import spec_warnings
    from cod_lightning.nn.strategies import build_all

    rank = check_ranks(config.trainer).rank(config.trainer.devices)
    folder, rank_zero = check_folder(config), rank == 0
    if not rank_zero:
        sys.stderr.write(f"rank {rank} of {config.trainer.world_size}: rank 0 prints and keeps the results\n")
    else:
        print(f"{config.experiment}: {config.description}\nrun folder: {folder}", file=sys.stderr)
        for warning in spec_warnings(build_all(config.norm, config.model.num_hidden_layers)):
            print(f"warning: {warning}", file=sys.stderr)
    import_torchmetrics()
    from cod_lightning.train.loggers import check_loggers
    from cod_lightning.train.record import FAILURE, RECORD, read_record, write_failure
    from cod_lightning.train.run import fit

    if config.resume and (record := read_record(folder)) is not None:
        if config_from_dict(record["config"], folder / RECORD).id != config.id:
            raise UserError(f"{folder / RECORD} is of a run with other settings: remove it, or choose another name=")
        if rank_zero:
            print("this run is finished: pass resume=false to retrain", file=sys.stderr)
        return record, folder
    check_init_from(config)
    check_loggers(config.loggers)
    if rank_zero:
        for path in (folder, folder / CHECKPOINTS, folder / TOKENIZER):
            check_writable(path, f"output={config.output}: the run folder ")
        check_writable(lock_of(folder), f"output={config.output}: the lock of the run folder ", new=True)
    is_new = not folder.exists()
    try:
        with ExitStack() as locks:

            def begin() -> None:
                if is_new:  # a run that is refused makes no folder for its lock
                    locks.enter_context(lock_folder(folder))
                    if folder.exists():
                        raise UserError(f"{folder} was written by another process meanwhile: run the command again")
                create_run_folder(config)
                (folder / FAILURE).unlink(missing_ok=True)  # of an earlier attempt

            if rank_zero and not is_new:
                locks.enter_context(lock_folder(folder))
            return fit(config, folder, begin if rank_zero else lambda: None), folder
    except Diverged as error:
        if rank_zero:
            write_failure(folder, asdict(config), str(error))
        raise
    except OSError as error:
        raise UserError(os_message(error, folder)) from error
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into an exit
            raise KeyboardInterrupt from stop
        raise


def lock_of(folder: Path) -> Path:
    """The lock file of a run folder, beside it."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Hold the lock of a run folder, which does not depend on the path by which it is reached.

    Raises:
        UserError: another process holds it.
    """
    lock = lock_of(folder)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            raise UserError(
                f"{folder} is being trained by another process: wait for it, or choose another name="
            ) from None
        yield


def run_sweep(overrides: Sequence[str], jobs: int) -> int:
    """Train each run of a sweep in a process, then print a table that compares them; returns the exit status."""
    from cod_lightning.config.compose import compose, sweep

    runs = list(sweep(overrides))
    configs = [compose(words) for words in runs]
    if len({config.folder for config in configs}) < len(configs):
        if any(config.name for config in configs):
            raise UserError("name= gives several runs of the sweep one folder: remove it")
        raise UserError("two runs of the sweep would be the same run: vary a setting that changes the result")
    labels = sweep_labels(runs)
    with CommandPool(jobs) as pool:
        statuses = list(pool.map(lambda words, label: pool.run_command(["fit", *words], label), runs, labels))

    from cod_lightning.commands.sweeps import sweep_table
    from cod_lightning.commands.terminal import show
    from cod_lightning.train.record import read_record

    records = [
        read_record(config.folder) if status == 0 else None for config, status in zip(configs, statuses, strict=True)
    ]
    show(sweep_table(list(zip(labels, records, strict=True))))
    return max(statuses)
