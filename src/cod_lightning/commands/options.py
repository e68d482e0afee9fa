"""Arguments and options that several commands share."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from cod_lightning.errors import UserError


def add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=nonempty_path, help="run folder")
    add_checkpoint(parser)


def nonempty_path(word: str) -> Path:
    """The path that a word names; an empty word, such as an unset variable, would be the current folder."""
    if not word:
        raise ArgumentTypeError("'' is empty: name a path")
    return Path(word)


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model folder, .gguf file, glassllm, smollm2 or hub name")
    add_checkpoint(parser)
    add_trust_code(parser)


def add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="default: last")


def add_trust_code(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import the strategy norm=package.module:function that a saved run names",
    )


def add_jobs(parser: ArgumentParser) -> None:
    parser.add_argument("-j", "--jobs", type=int, default=1, help="number of parallel runs (default: 1)")


def add_results(parser: ArgumentParser) -> None:
    parser.add_argument("--results", type=nonempty_path, help="folder of the records (default: experiments/results)")


def require_positive(option: str, value: int | None) -> None:
    """Check the value of a numeric option.

    Raises:
        UserError: the value is smaller than 1.
    """
    if value is not None and value < 1:
        raise UserError(f"--{option}={value} must be at least 1")


def require_text(option: str, text: str) -> None:
    """Check that the text of an option is valid UTF-8; Python keeps other bytes of a command line as surrogates.

    Raises:
        UserError: it is not; names the first other byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise UserError(
            f"{option} is not UTF-8: byte {byte:#x} in place {error.start + 1}: convert it, as with "
            "iconv -f latin1 -t utf-8"
        ) from error
