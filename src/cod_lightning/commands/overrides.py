"""The `key=value` words of a command line: options of a command and overrides of the configuration."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cod_lightning.errors import UserError
from cod_lightning.measure.options import parse_options

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config

OVERRIDES = """\
Overrides are Hydra's: group=choice (experiments, model, norm, data, optim, protocol, trainer, scale) or
section.field=value. Examples:
  fit experiments=table1_350m norm=mix_ln
  fit norm=pre_ln seed=2 trainer.max_steps=100 output=/scratch/runs
  fit -m norm=pre_ln,lns seed=1,2
  fit 'logger=[csv,wandb]'
  fit data=files 'data.files=texts/*.json.gz' norm=my_package.my_module:my_strategy
"""


def in_section(section: str, names: str) -> tuple[str, ...]:
    """Fields of a section by their whole names."""
    return tuple(f"{section}.{name}" for name in names.split())


CORPUS = in_section("data", "source files val_files text_field encoding val_every seq_len micro_batch_size")
TEXT = (
    *CORPUS,
    *in_section("data", "sha256 max_documents tokenizer layout val_tokens folder root workers"),
)
IMAGES = in_section("images", "source folder classes size patch_size")
READS = {
    "evaluate": (
        *(*TEXT, "data.loader_workers", *IMAGES, "model", "norm", "eval.paper_batch", "eval.paper_ranks"),
        *in_section("trainer", "precision auto_cuda accelerator devices num_nodes strategy hybrid offload compile"),
        *("trainer.timeout", "trainer.threads"),
    ),
    "evaluate tasks=": ("data.seq_len", "data.micro_batch_size", "model", "norm", "trainer.accelerator"),
    "predict": ("model", "norm", "seed", "task", "data.vocab_size", "data.tokenizer", "row"),
    "measure": (*TEXT, *IMAGES, "model", "norm", "trainer.accelerator", "trainer.threads"),
    "measure of a pretrained model": (*CORPUS, "trainer.accelerator", "trainer.threads"),
}
"""The sections and fields that a command reads with a model, so that an override of another one is refused.

`model` and `norm` have fields that are not in the weights, such as `model.norm_backend`; `load_config` refuses others.
"""


def names_text(config: Config, overrides: Sequence[str]) -> bool:
    """Whether the command line names another text, of which `data.max_documents` limits what is prepared."""
    from cod_lightning.config.compose import TEXT_OVERRIDES, parse

    return any(override.key_or_group in TEXT_OVERRIDES for override in parse(overrides))


Condition: TypeAlias = "tuple[str, Callable[[Config, Sequence[str]], bool]]"
"""When a field is read, in words, and as a function of the configuration and the overrides."""
OTHER_TEXT: Condition = ("a new text, named by data= or data.files=", names_text)
WITH_PROTOCOL: Condition = (
    "protocol=paper",
    lambda config, overrides: config.protocol == "paper",
)
WITHOUT_VOCABULARY: Condition = ("model.vocab_size=null", lambda config, overrides: config.model.vocab_size is None)
WHEN: dict[str, dict[str, Condition]] = {
    "evaluate": {
        "data.max_documents": OTHER_TEXT,
        "eval.paper_batch": WITH_PROTOCOL,
        "eval.paper_ranks": WITH_PROTOCOL,
    },
    "predict": {
        "data": WITHOUT_VOCABULARY,
        "data.tokenizer": WITHOUT_VOCABULARY,
        "data.vocab_size": (
            "model.vocab_size=null and data.tokenizer=bpe",
            lambda config, overrides: config.model.vocab_size is None and config.data.tokenizer == "bpe",
        ),
    },
    "measure": {"data.max_documents": OTHER_TEXT},
}
"""Fields of `READS` that a command reads in some cases only; those of the machine are accepted in all."""

TEXT_CHOICES = ("data", "trainer", "experiments", "scale")
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


def unread_fields(overrides: Sequence[str], command: str, choices: Sequence[str]) -> dict[str, list[str]]:
    """For each override the fields that it sets and a command does not read with a model.

    A choice of a group sets many fields: it is unread if the command reads none of those that it changes.

    Args:
        overrides: of the command line.
        command: a key of `READS`.
        choices: the groups of which it takes a choice.
    """
    from cod_lightning.config.compose import parse
    from cod_lightning.config.no_effect import fields_of
    from cod_lightning.config.schema import Config

    known, default = READS[command], Config()
    sections = {field.partition(".")[0] for field in known}

    def is_unread(field: str) -> bool:
        section, _, name = field.partition(".")
        values = getattr(default, section) if section in sections else None
        misspelled = is_dataclass(values) and name.partition(".")[0] not in {field.name for field in fields(values)}
        return field not in known and section not in known and not misspelled  # `compose` names the nearest field

    unread: dict[str, list[str]] = {}
    for word, override in zip(overrides, parse(overrides), strict=True):
        key = override.key_or_group
        if key in choices:
            changed = changed_fields(key, str(override.value()))
            unread[word] = changed if changed and all(map(is_unread, changed)) else []
        else:
            unread[word] = [field for field in fields_of(key, override.value()) if is_unread(field)]
    return unread


def changed_fields(group: str, choice: str) -> list[str]:
    """The fields of a section that a choice of its group sets to other values than the default."""
    from cod_lightning.config.groups import choices, read_yaml
    from cod_lightning.config.schema import Config

    if group not in ("data", "trainer") or choice not in choices(group):
        return []
    default = getattr(Config(), group)
    values = read_yaml(f"{group}/{choice}").items()
    return [f"{group}.{name}" for name, value in values if value != getattr(default, name)]


def check_no_ignored_overrides(overrides: Sequence[str], command: str, choices: Sequence[str]) -> None:
    """Check that a command reads all overrides; arguments as `unread_fields`.

    Raises:
        UserError: names every override that has no effect.
    """
    errors = []
    for word, unread in unread_fields(overrides, command, choices).items():
        if not unread:
            continue
        section = unread[0].partition(".")[0]
        known = [field for field in READS[command] if field.startswith(f"{section}.")]
        known = known or list(dict.fromkeys(field.partition(".")[0] for field in READS[command]))
        errors.append(f"{word} has no effect, remove it: {command} reads only {', '.join(known)}")
    if errors:
        raise UserError("\n".join(errors))


def check_conditions(overrides: Sequence[str], command: str, config: Config) -> None:
    """Check that a command reads the overrides in the case that they are given for.

    Args:
        overrides: of the command line.
        command: a key of `READS`.
        config: what they and the model give.

    Raises:
        UserError: names every override that has no effect, and when it has one.
    """
    from cod_lightning.config.compose import parse
    from cod_lightning.config.no_effect import fields_of

    errors = []
    for override in parse(overrides):
        for field in fields_of(override.key_or_group, override.value()):
            when, holds = WHEN.get(command, {}).get(field, ("", None))
            if holds is not None and not holds(config, overrides):
                errors.append(
                    f"{override.input_line} has no effect, remove it: {command} reads {field} only for {when}"
                )
    if errors:
        raise UserError("\n".join(errors))
