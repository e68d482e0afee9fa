"""`convert`: give a trained model another norm strategy without changing its function."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cod_lightning.commands.models import read_trained
from cod_lightning.commands.options import add_model, nonempty_path
from cod_lightning.commands.overrides import compose_norm

HELP = "Give a trained model another norm strategy by changing weights so that it computes the same."
EPILOG = """\
  convert runs/quickstart/pre_ln-seed1-... norm=lns --output runs/as_lns
  convert path/to/llama norm=lns --output runs/llama_as_lns
  fit init_from=runs/as_lns norm=lns                   # continues training
"""


def add_arguments(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--output", type=nonempty_path, required=True, help="new run folder")
    parser.add_argument("overrides", nargs="*", metavar="norm=...", help="the new strategy and its options")


def run(model: str, checkpoint: str, trust_code: bool, output: Path, overrides: Sequence[str]) -> None:
    """Write a run folder with the changed weights, without optimizer state; all other settings are the model's."""
    norm = compose_norm(overrides, "convert")
    config, decoder, tokenizer = read_trained(model, checkpoint, trust_code, output)
    from cod_lightning.nn.surgery import convert
    from cod_lightning.train.load import write_run

    config = replace(config, norm=norm, row=None, name=None, init_from=None, description=f"Converted from {model}.")
    write_run(config, convert(decoder, norm), tokenizer, output)
    print(output)
