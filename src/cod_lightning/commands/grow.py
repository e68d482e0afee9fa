"""`grow`: make a trained model deeper."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cod_lightning.commands.models import read_trained
from cod_lightning.commands.options import add_model, nonempty_path
from cod_lightning.errors import UserError
from cod_lightning.measure.options import parse_options

HELP = "Make a trained model deeper by copying its blocks or predicting new ones."
EPILOG = """\
how=identity    copies whose last projections are zero, so that the function stays the same (LLaMA Pro; the default)
how=stack       the first blocks, then the last ones again (SOLAR)
how=interpolate copies of blocks in their places, spread evenly
how=lesa        between the last blocks, blocks that a network predicts from their neighbours' weights (LESA)
gains=kept      weights compensate for the strategy's factors of the new layers (the default); gains=new does not

  grow runs/quickstart/lns-seed1-... blocks=36 --output runs/grown
  fit init_from=runs/grown model.num_hidden_layers=36        # continues training
  evaluate runs/grown data=files data.files=text.txt         # its loss
"""


def add_arguments(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--output", type=nonempty_path, required=True, help="new run folder")
    parser.add_argument("words", nargs="*", metavar="option=value", help="blocks=N, how=, gains=")


def run(model: str, checkpoint: str, trust_code: bool, output: Path, words: Sequence[str]) -> None:
    """Write a run folder with the deeper model, without optimizer state; all other settings are the model's."""
    from cod_lightning.commands.terminal import progress_bar
    from cod_lightning.nn.surgery import Gains, How, grow

    types: dict[str, Any] = {"blocks": int, "how": How, "gains": Gains}
    options: dict[str, Any] = {"how": "identity", **parse_options(words, types, "grow")}
    if "blocks" not in options:
        raise UserError("blocks= is missing: give the new number of blocks")
    config, decoder, tokenizer = read_trained(model, checkpoint, trust_code, output)
    from cod_lightning.train.load import write_run

    with progress_bar(f"{model}: {options['how']}") as update:
        grown = grow(decoder, config.norm, **options, progress=update)
    shape = replace(config.model, num_hidden_layers=options["blocks"])
    config = replace(config, model=shape, row=None, name=None, init_from=None, description=f"Grown from {model}.")
    write_run(config, grown, tokenizer, output)
    print(output)
