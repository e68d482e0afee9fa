"""`convert`: give a trained model another norm strategy without changing its function."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from cod_lightning.commands.import_ import read_foreign
from cod_lightning.commands.options import add_checkpoint, add_trust_code, compose_norm, require_path

HELP = "Give a trained model another norm strategy by changing weights so that it computes the same."
EPILOG = """\
  convert runs/quickstart/pre_ln-seed1-... norm=lns --output runs/as_lns
  convert path/to/llama norm=lns --output runs/llama_as_lns
  fit init_from=runs/as_lns norm=lns                   # goes on training
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, or folder, .gguf file, word or hub name of a model to import")
    add_checkpoint(parser)
    add_trust_code(parser)
    parser.add_argument("--output", type=Path, required=True, help="new run folder")
    parser.add_argument("overrides", nargs="*", metavar="norm=...", help="the new strategy and its options")


def run(model: str, checkpoint: str, trust_code: bool, output: Path, overrides: Sequence[str]) -> int:
    """Write a run folder with the changed weights, without optimizer state; all other settings are the model's."""
    norm = compose_norm(overrides, "convert")
    require_path(model)
    from dataclasses import replace

    from cod_lightning._torchmetrics import import_torchmetrics

    import_torchmetrics()
    from cod_lightning.config.saved import CONFIG, load
    from cod_lightning.files import check_new_folder
    from cod_lightning.nn.convert import convert
    from cod_lightning.train.load import load_run, write_run

    check_new_folder(output)
    if (Path(model) / CONFIG).is_file():
        config = load(Path(model), trust_code=trust_code)
        decoder, tokenizer = load_run(model, checkpoint, trust_code)
    else:
        config, decoder, tokenizer = read_foreign(model, output)
    config = replace(config, norm=norm, description=f"Converted from {model}.")
    write_run(config, convert(decoder, norm), tokenizer, output)
    print(output)
    return 0
