"""Overrides that change nothing beside other settings: an error, because they would only give the run another name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from cod_lightning.data.config import FILE_SOURCES, INSTRUCTION_SOURCES

PREPARED_FIELDS = {
    f"data.{name}" for name in ("files", "val_files", "text_field", "encoding", "val_every", "max_documents")
}
"""Fields that a prepared set, `data.folder`, no longer depends on."""


class Rule(NamedTuple):
    """Fields that have no effect under a condition."""

    fields: str
    """A regular expression of their names."""
    condition: Callable[[DictConfig], bool]
    """Whether they have none in a composed configuration."""
    reason: str
    """Follows `field=value`; {} is the field, and other braces hold a field of the configuration."""


RULES = (
    Rule(
        "|".join(map(re.escape, sorted(PREPARED_FIELDS))),
        lambda node: node.data.folder is not None,
        "does not change data.folder={data.folder}, a prepared set: add data.folder=null, or remove {}",
    ),
    Rule(
        r"images(\..*)?",
        lambda node: node.task == "language",
        "has no effect without task=vision: add it, or remove {}",
    ),
    Rule(
        r"data(\.(?!batch_size|micro_batch_size|loader_workers).*)?",
        lambda node: node.task == "vision",
        "has no effect with task=vision, whose data is images.*: remove {}",
    ),
    Rule(
        r"model\.(embedding_std|vocab_size|max_position_embeddings)|eval\.paper_(batch|ranks)",
        lambda node: node.task == "vision",
        "has no effect with task=vision: remove {}",
    ),
    Rule(
        r"images\.(folder|classes)",
        lambda node: node.images.source == "drawn",
        "has no effect with images.source=drawn: add images.source=folder, or remove {}",
    ),
    Rule(
        r"data\.encoding",
        lambda node: node.data.source not in FILE_SOURCES,
        "has no effect with data.source={data.source}: remove {}",
    ),
    Rule(
        r"data\.vocab_size",
        lambda node: node.data.tokenizer != "bpe" and node.init_from is None,
        "has no effect with data.tokenizer={data.tokenizer}: remove {}",
    ),
    Rule(
        r"model\.(init|init_cutoff|init_std|embedding_std)",
        lambda node: node.init_from is not None,
        "has no effect with init_from={init_from}, which gives all weights: remove {}",
    ),
    Rule(
        r"data\.text_field",
        lambda node: node.data.source != "files",
        "has no effect with data.source={data.source}: remove {}",
    ),
    Rule(
        r"data\.val_every",
        lambda node: node.data.source == "c4" or bool(node.data.val_files),
        "has no effect, because data.val_files or c4 have validation text of their own: remove {}",
    ),
    Rule(
        r"data\.layout",
        lambda node: node.data.source in INSTRUCTION_SOURCES,
        "has no effect with data.source={data.source}, which has one example per sequence: remove {}",
    ),
    Rule(
        r"model\.(init_std|embedding_std)",
        lambda node: node.model.init == "fan_in",
        "has no effect with model.init=fan_in: add model.init=normal, or remove {}",
    ),
    Rule(
        r"optim\.warmup_ratio",
        lambda node: node.optim.warmup_steps is not None,
        "has no effect with optim.warmup_steps={optim.warmup_steps}: add optim.warmup_steps=null, or remove {}",
    ),
    Rule(
        r"optim\.warmup_start_ratio",
        lambda node: (node.optim.warmup_ratio if node.optim.warmup_steps is None else node.optim.warmup_steps) == 0,
        "has no effect without warm-up: set optim.warmup_steps, or remove {}",
    ),
    Rule(
        r"optim\.decay_embeddings",
        lambda node: node.optim.weight_decay == 0,
        "has no effect without weight decay: set optim.weight_decay, or remove {}",
    ),
    Rule(
        r"optim\.lisa_interval",
        lambda node: node.optim.lisa_layers == 0,
        "has no effect without LISA: set optim.lisa_layers, or remove {}",
    ),
    Rule(
        r"trainer\.auto_cuda",
        lambda node: node.trainer.precision != "auto",
        "has no effect with trainer.precision={trainer.precision}: add trainer.precision=auto, or remove {}",
    ),
)


def fields_of(key: str, value: Any) -> dict[str, Any]:
    """The fields that `key=value` sets: several if the value is a mapping, as in images={size: 16}."""
    parts = value.items() if isinstance(value, Mapping) else ()
    return {field: v for name, part in parts for field, v in fields_of(f"{key}.{name}", part).items()} or {key: value}


def may_be_without_effect(name: str) -> bool:
    """Whether a field has no effect beside some other settings."""
    return any(re.fullmatch(rule.fields, name) for rule in RULES)


def without_effect(node: DictConfig, overrides: Iterable[Override]) -> Iterator[tuple[str, str]]:
    """The fields that overrides set without effect on the configuration composed with them, and the error of each."""
    sections = {str(name): section for name, section in node.items()}
    given: dict[str, Any] = {}  # the last of two values counts
    for override in overrides:
        given |= fields_of(override.key_or_group, override.value())
    for name, value in given.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        applying = (rule for rule in RULES if re.fullmatch(rule.fields, name) and rule.condition(node))
        if value is not None and (rule := next(applying, None)):
            yield name, f"{name}={shown} {rule.reason.format(name, **sections)}"
