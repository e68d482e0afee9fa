"""Validation of a whole configuration: all of its errors at once, each with its field and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cod_lightning.config.schema import Config, flatten
from cod_lightning.data.config import data_errors, image_errors
from cod_lightning.errors import UserError, short_repr
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn import strategies
from cod_lightning.nn.config import MAX_LAYERS, DecoderConfig
from cod_lightning.nn.spec import schedule_end
from cod_lightning.settings import choice_errors, setting_errors


def config_errors(config: Config, trains: bool = True) -> list[str]:
    """All errors of a configuration; those of the sections come before those between them.

    Args:
        config: to check.
        trains: false for a command that only runs the model, without steps and their batches.
    """
    if errors := value_errors(config):
        return errors
    return [
        *config.model.problems(rotary=config.task == "language"),
        *data_errors(config.data),
        *image_errors(config.images),
        *setting_errors(config.trainer, "trainer."),
        *setting_errors(config.eval, "eval."),
        *setting_errors(config.optim, "optim."),
        *setting_errors(config),
        *folder_errors(config),
        *optim_errors(config),
        *(batch_errors(config) if trains else ()),
        *trainer_errors(config),
        *(token_errors(config) if config.task == "language" else vision_errors(config)),
        *strategy_errors(config),
    ]


def value_errors(config: Config) -> list[str]:
    """Values that no field can have: infinite numbers, integers over 64 bits, strings that are not valid UTF-8."""
    return [
        f"{name}={short_repr(value)} {reason}"
        for name, value in flatten(asdict(config)).items()
        for part in (value if isinstance(value, list) else [value])
        if (reason := invalid_value(part)) is not None
    ]


def invalid_value(value: Any) -> str | None:
    """Why no field can have this value, None if it is valid."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large: an integer has 64 bits"
    if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
        return "must be valid UTF-8 without NUL"
    return None


def size_errors(config: Config) -> list[str]:
    """An error if the size of the vocabulary, or the number of classes, is in files that are not read."""
    if config.task == "vision":
        folder = f"images.folder={config.images.folder!r}"
        reason = f"images.classes is null, and {folder} is not read here: set images.classes"
        return [] if config.images.known_classes else [reason]
    if config.vocab_size is not None:
        return []
    tokenizer = f"data.tokenizer={config.data.tokenizer!r}"
    return [f"model.vocab_size is null, and the tokenizer {tokenizer} is not loaded here: set model.vocab_size"]


def folder_errors(config: Config) -> Iterator[str]:
    """Errors in the fields that name folders and the source of the weights."""
    for field, value in (("experiment", config.experiment), ("name", config.name)):
        if value is not None and (not Path(value).parts or Path(value).is_absolute() or ".." in Path(value).parts):
            yield f"{field}={value!r} must be a folder below output"
    if not config.output:
        yield "output is empty: name a folder"
    if config.init_from == "":
        yield "init_from is empty: name a run folder or a .ckpt file, or pass init_from=null"


def optim_errors(config: Config) -> Iterator[str]:
    """Errors between the settings of the optimizer and the length and depth of the run."""
    optim, steps = config.optim, config.trainer.max_steps
    if len(optim.betas) != 2:
        yield f"optim.betas={list(optim.betas)} must be two numbers in [0, 1)"
    if steps > 0 and optim.warmup(steps) >= steps:
        name = "warmup_ratio" if optim.warmup_steps is None else "warmup_steps"
        yield (
            f"optim.{name}={getattr(optim, name)} warms up for {optim.warmup(steps)} steps, but "
            f"trainer.max_steps={steps}: end the warm-up before the run"
        )
    if optim.lisa_layers > max(config.model.num_hidden_layers, 1):
        yield (
            f"optim.lisa_layers={optim.lisa_layers} is more than "
            f"model.num_hidden_layers={config.model.num_hidden_layers}"
        )
    if optim.lisa_layers and config.trainer.strategy == "fsdp":
        yield "optim.lisa_layers does not support FSDP: use trainer=ddp"


def batch_errors(config: Config) -> Iterator[str]:
    """Errors between batch size and ranks."""
    data, trainer = config.data, config.trainer
    samples_per_micro_step = data.micro_batch_size * trainer.world_size
    if min(data.batch_size, samples_per_micro_step) > 0 and data.batch_size % samples_per_micro_step:
        yield (
            f"data.batch_size={data.batch_size} is not divisible by data.micro_batch_size={data.micro_batch_size} "
            f"x {trainer.world_size} rank(s) = {samples_per_micro_step}"
        )


def trainer_errors(config: Config) -> Iterator[str]:
    """Errors between ranks, strategy and measures."""
    trainer = config.trainer
    if trainer.world_size > 1 and trainer.strategy == "auto":
        yield (
            f"trainer.strategy='auto' supports one rank, but {trainer.world_size} are configured: "
            "use trainer=ddp or trainer=fsdp"
        )
    for name in ("hybrid", "offload"):
        if getattr(trainer, name) and trainer.strategy != "fsdp":
            yield f"trainer.{name}=true requires trainer.strategy=fsdp"
    depth, images = config.model.num_hidden_layers, config.task == "vision"
    for name, every in trainer.measures.items():
        yield from choice_errors("trainer.measures", name, tuple(MEASURES))
        if every and name in MEASURES and (reason := MEASURES[name].why_never(depth, images)):
            yield f"trainer.measures.{name}={every} does not apply to the model: {reason}; set it to 0"


def vision_errors(config: Config) -> Iterator[str]:
    """Settings that task=vision does not have."""
    if config.init_from is not None:
        yield "init_from does not support task=vision: remove init_from"
    for name in ("rope_theta", "tie_word_embeddings"):
        if (value := getattr(config.model, name)) != (default := getattr(DecoderConfig, name)):
            now, then = str(value).lower(), str(default).lower()
            yield f"model.{name}={now} does not support task=vision: set model.{name}={then}"


def token_errors(config: Config) -> Iterator[str]:
    """Errors between the decoder, its vocabulary and the length of the sequences."""
    model, data = config.model, config.data
    new_tokenizer = data.tokenizer == "bpe" and data.folder is None
    if new_tokenizer and model.vocab_size is not None and model.vocab_size < data.vocab_size:
        yield f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's: data.vocab_size={data.vocab_size}"
    if model.max_position_embeddings is not None and data.seq_len > model.max_position_embeddings:
        yield (
            f"data.seq_len={data.seq_len} is longer than the context of the imported model, "
            f"model.max_position_embeddings={model.max_position_embeddings}: use shorter sequences"
        )


def strategy_errors(config: Config) -> Iterator[str]:
    """Errors between the norm strategy, the model and the optimizer."""
    model = config.model
    try:
        depth = model.num_hidden_layers if 1 <= model.num_hidden_layers <= MAX_LAYERS else 1
        specs = strategies.build_all(config.norm, depth)
    except UserError as error:
        yield str(error)
        return
    sublayers = [sublayer for spec in specs for sublayer in spec.sublayers]
    if groups := {sublayer.groups for sublayer in sublayers if model.hidden_size % sublayer.groups}:
        yield f"norm.groups={groups.pop()} does not divide model.hidden_size={model.hidden_size}"
    if config.optim.name == "adam" and config.optim.weight_decay and any(sublayer.has_rates for sublayer in sublayers):
        yield (
            f"optim.weight_decay={config.optim.weight_decay} of optim.name='adam' is part of the gradient, where the "
            f"rates of norm={config.norm['name']} do not reach it: set optim.name=adamw"
        )
    if config.init_from is not None and schedule_end(specs):
        yield (
            f"init_from does not support norm={config.norm['name']}, whose branch_schedule would begin again: choose "
            "a strategy without one"
        )
    weights = {weight for s in sublayers for weight in (s.pre_norm_weight, s.branch_norm_weight)}
    if not model.norm_affine and (weights != {1} or any(s.norm_rates is not None for s in sublayers)):
        yield f"norm={config.norm['name']} needs norms with a weight: set model.norm_affine=true"
