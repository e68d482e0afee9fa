"""The `key=value` words of a command line: options of a command and overrides of the configuration."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from cod_lightning.errors import UserError
from cod_lightning.measure.options import parse_options

OVERRIDES = """\
Overrides are Hydra's: group=choice (experiments, model, norm, data, optim, protocol, trainer, scale) or
section.field=value. Examples:
  fit experiments=table1_350m norm=mix_ln
  fit norm=pre_ln seed=2 trainer.max_steps=100 output=/scratch/runs
  fit -m norm=pre_ln,lns seed=1,2
  fit 'logger=[csv,wandb]'
  fit data=files 'data.files=texts/*.json.gz' norm=my_package.my_module:my_strategy
"""

READS = {
    "evaluate": (
        *("data", "images", "model", "norm", "eval.paper_batch", "eval.paper_ranks"),
        *("trainer.precision", "trainer.auto_cuda", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
        *("trainer.strategy", "trainer.hybrid", "trainer.offload", "trainer.checkpointing", "trainer.compile"),
        *("trainer.timeout", "trainer.threads"),
    ),
    "evaluate tasks=": (
        "data.seq_len",
        "data.batch_size",
        "data.micro_batch_size",
        "model",
        "norm",
        "trainer.accelerator",
    ),
    "predict": ("model", "norm", "seed", "task", "data.vocab_size", "data.tokenizer", "row"),
    "measure": ("data", "images", "model", "norm", "trainer.accelerator", "trainer.threads"),
    "measure of a pretrained model": ("data", "row", "paper", "trainer.accelerator", "trainer.threads"),
}
"""The sections and fields that a command reads with a model, so that an override of another one is refused.

`model` and `norm` have fields that are not in the weights, such as `model.norm_backend`; `load_config` refuses others.
"""

TEXT_CHOICES = ("data", "trainer", "experiments", "scale", "protocol")
"""The groups of which a command with a pretrained model takes a choice: they may set the text or the device."""


def add_overrides(parser: ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")


def is_model(word: str) -> bool:
    """Whether a word names a model and is not key=value; paths of models may hold =, as in sweeps/lr=0.1."""
    key, equals, _ = word.partition("=")
    return not equals or os.sep in key or os.path.exists(word)


def check_no_repeats(words: Sequence[str]) -> None:
    """Check that no key of the words of a command is given twice, also as +key; paths may hold = themselves.

    Raises:
        UserError: one is; names it and both values.
    """
    values: dict[str, str] = {}
    for word in words:
        if is_model(word):
            continue
        key, _, value = word.lstrip("+").partition("=")
        if key in values:
            raise UserError(f"{key}={values[key]} and {key}={value} are both given: keep one")
        values[key] = value


def pop_options(words: Sequence[str], types: Mapping[str, Any], command: str) -> tuple[dict[str, Any], list[str]]:
    """Split `key=value` words into the options of a command and the overrides of the configuration.

    Args:
        words: `key=value` arguments.
        types: type of each option.
        command: name of the command, for errors.

    Raises:
        UserError: lists every value of the wrong type.
    """
    own = [word for word in words if word.partition("=")[0] in types]
    return parse_options(own, types, command), [word for word in words if word not in own]


def compose_norm(words: Sequence[str], command: str) -> dict[str, Any]:
    """The section `norm` of `norm=NAME norm.OPTION=VALUE`.

    Raises:
        UserError: other words, no name, or no such strategy or option.
    """
    from cod_lightning.config.compose import compose

    if unknown := [word for word in words if not word.startswith(("norm=", "norm.")) or "=" not in word]:
        raise UserError(f"{unknown[0]!r}: {command} reads norm=NAME and norm.OPTION=VALUE only")
    if not any(word.startswith("norm=") for word in words):
        raise UserError("norm= is missing: name a strategy, as in norm=lns")
    return compose(words).norm


def ignored_overrides(overrides: Sequence[str], command: str, choices: Sequence[str]) -> list[str]:
    """The overrides that set no field that a command reads with a model.

    Args:
        overrides: of the command line.
        command: a key of `READS`.
        choices: the groups of which it takes a choice.
    """
    from cod_lightning.config.compose import parse

    known = READS[command]
    return [
        str(override.input_line)
        for override in parse(overrides)
        if (key := override.key_or_group) not in choices and key not in known and key.partition(".")[0] not in known
    ]


def check_no_ignored_overrides(overrides: Sequence[str], command: str, choices: Sequence[str]) -> None:
    """Check that there are no `ignored_overrides`.

    Raises:
        UserError: names every override that has no effect.
    """
    if words := ignored_overrides(overrides, command, choices):
        hint = f"{command} reads only {', '.join(READS[command])}"
        raise UserError("\n".join(f"{word} has no effect, remove it: {hint}" for word in words))
