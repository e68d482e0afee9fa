"""`export`: write a run as a Hugging Face model."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from cod_lightning.commands.models import read_run
from cod_lightning.commands.options import add_run, add_trust_code, nonempty_path, require_positive
from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

HELP = "Write a run as a Hugging Face model, which stock transformers loads."


def add_arguments(parser: ArgumentParser) -> None:
    add_run(parser)
    add_trust_code(parser)
    parser.add_argument("--to", choices=("hf",), default="hf", help="format: Hugging Face (default)")
    parser.add_argument("--output", type=nonempty_path, help="new folder (default: hf, inside the run folder)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--max-length", type=int, help="max_position_embeddings (default: that of an imported model, else data.seq_len)"
    )


def run(
    run: Path, to: str, output: Path | None, checkpoint: str, trust_code: bool, dtype: str, max_length: int | None
) -> None:
    from cod_lightning.config.saved import load_config

    check_max_length(max_length, load_config(run, trust_code=trust_code))  # before the weights are read
    folder = output or run / to
    check_new_folder(folder, "--output=")
    config, decoder, tokenizer = read_run(run, checkpoint, trust_code)
    import torch

    from cod_lightning.nn.huggingface import export

    export(decoder, folder, tokenizer, getattr(torch, dtype), max_length or config.max_length)
    print(folder)


def check_max_length(length: int | None, config: Config) -> None:
    """Check the longest sequence that the exported model will announce; warn about one longer than in training.

    Rotary embeddings compute any position, so a trained run may announce more than it was trained on.

    Raises:
        UserError: the length is not positive, longer than the context of an imported model, or than any sequence.
    """
    from cod_lightning.data.config import MAX_SEQ_LEN

    require_positive("max-length", length)
    context = config.model.max_position_embeddings
    if length is None:
        return
    if context is not None and length > context:
        raise UserError(
            f"--max-length={length} is longer than the context of the imported model, "
            f"model.max_position_embeddings={context}: shorten it"
        )
    if length > MAX_SEQ_LEN:
        raise UserError(f"--max-length={length} must be at most {MAX_SEQ_LEN}, the longest data.seq_len")
    if context is None and length > config.data.seq_len:
        sys.stderr.write(
            f"warning: --max-length={length} is longer than data.seq_len={config.data.seq_len}, on which the run was "
            "trained: later positions may be worse\n"
        )
