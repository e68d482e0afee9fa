"""`consolidate`: write a sharded checkpoint as one file."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.options import add_run, nonempty_path
from cod_lightning.errors import UserError
from cod_lightning.files import check_new_file

HELP = "Write a sharded checkpoint of a run as one file."


def add_arguments(parser: ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--output", type=nonempty_path, help="new .ckpt file (default: whole-STEP.ckpt in checkpoints/)"
    )


def run(run: Path, checkpoint: str, output: Path | None) -> None:
    import_torchmetrics()
    from cod_lightning.train.checkpoint import AtomicCheckpointIO, read_checkpoint
    from cod_lightning.train.load import checkpoint_of

    path = checkpoint_of(run, checkpoint)
    if output is not None:
        if output.suffix != ".ckpt":
            raise UserError(f"--output={output} must end in .ckpt, by which other commands know a checkpoint")
        check_new_file(output, "--output=")
    content = read_checkpoint(path)
    target = output or path.with_name(f"whole-{content.get('global_step', 0):08d}.ckpt")
    check_new_file(target, "--output=")
    io = AtomicCheckpointIO()
    io.save_checkpoint(content, target)
    if io.failure:
        raise UserError(io.failure)
    print(target)
