"""`generate`: sample text from a trained run."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from cod_lightning.commands.models import read_run
from cod_lightning.commands.options import add_run, add_trust_code, require_text
from cod_lightning.errors import UserError

HELP = "Continue a text with a trained run."


def add_arguments(parser: ArgumentParser) -> None:
    add_run(parser)
    add_trust_code(parser)
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=100, help="default: 100")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="sample from the k most likely tokens (default: all)")
    parser.add_argument(
        "--dola",
        choices=("low", "high"),
        help="contrast the last layer with one of the lower or upper half (DoLa, arXiv 2309.03883)",
    )
    parser.add_argument("--seed", type=int, help="of the sampling (default: 0)")


def run(run: Path, prompt: str, checkpoint: str, trust_code: bool, **options: Any) -> None:
    """Print the prompt and what the model adds; the options are those of `generate`."""
    require_text("prompt", prompt)
    from cod_lightning.evaluate.generate import check_options, generate

    check_options(prefix="--", **options)
    config, decoder, tokenizer = read_run(run, checkpoint, trust_code)

    ids = tokenizer.encode([prompt])[0][:-1]
    if not ids:
        raise UserError("prompt='' is empty: give at least one character to continue")
    ids += generate(decoder, ids, eos_id=tokenizer.eos_id, **options)
    if len(ids) > config.max_length:
        sys.stderr.write(
            f"warning: the text has {len(ids)} tokens, and the model supports {config.max_length}: later ones may be "
            "worse\n"
        )
    print(tokenizer.backend.decode(ids))
