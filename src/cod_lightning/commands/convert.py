"""`convert`: give a trained model another norm strategy without changing its function."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cod_lightning.commands.import_ import read_pretrained
from cod_lightning.commands.models import is_run, read_run, require_paths
from cod_lightning.commands.options import add_model, nonempty_path
from cod_lightning.commands.overrides import compose_norm
from cod_lightning.files import check_new_folder

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config
    from cod_lightning.data.tokenizers import DocumentTokenizer
    from cod_lightning.nn.decoder import Decoder

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


def read_trained(
    model: str, checkpoint: str, trust_code: bool, output: Path
) -> tuple[Config, Decoder, DocumentTokenizer]:
    """A run, or a pretrained model that `import` reads, for a run that will be in the new folder `output`.

    Raises:
        UserError: there is no such model, an option of runs is given for a pretrained one, or `output` is not a new
            folder.
    """
    require_paths([model], checkpoint, trust_code)
    check_new_folder(output, "--output=")
    return read_run(Path(model), checkpoint, trust_code) if is_run(model) else read_pretrained(model, output)
