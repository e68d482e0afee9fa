"""The check of a whole configuration: all of its errors at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cod_lightning.config.schema import Config, flatten, one_of
from cod_lightning.data.config import image_problems
from cod_lightning.data.config import problems as data_problems
from cod_lightning.errors import UserError
from cod_lightning.nn import strategies
from cod_lightning.nn.config import MOST_LAYERS


def problems(config: Config) -> list[str]:
    """Everything that keeps this run from working, each naming its field and what would be right."""
    data, trainer = config.data, config.trainer
    if strange := [
        f"{name}={value!r} {reason}"
        for name, value in flatten(asdict(config)).items()
        for part in (value if isinstance(value, list) else [value])
        if (reason := invalid_value(part)) is not None
    ]:
        return strange
    if wrong := paper_block_errors(config):
        return wrong
    found = [*config.model.problems(), *data_problems(data), *image_problems(config.images)]
    found += [*trainer.problems(), *config.eval.problems()]
    found += config.optim.problems(trainer.max_steps)
    found += one_of("logger", config.logger, ("tensorboard", "none"))
    found += one_of("protocol", config.protocol, ("paper", "strict"))
    found += one_of("task", config.task, ("language", "vision"))
    if config.seed < 0:
        found.append(f"seed={config.seed} must not be negative")
    if config.task == "vision" and config.init_from is not None:
        found.append("init_from starts a decoder: leave it out, or task=vision")
    rows = data.micro_batch_size * trainer.world_size
    if min(data.batch_size, rows) > 0 and data.batch_size % rows:
        found.append(
            f"data.batch_size={data.batch_size} is not divisible by data.micro_batch_size={data.micro_batch_size} "
            f"x {trainer.world_size} rank(s) = {rows}"
        )
    if trainer.world_size > 1 and trainer.strategy == "auto":
        found.append(
            f"trainer.strategy='auto' is one rank, but {trainer.world_size} are asked for: trainer=ddp or fsdp"
        )
    if trainer.strategy == "fsdp" and config.optim.lisa_layers:
        found.append("optim.lisa_layers rests blocks by the step, which sharded ones cannot: trainer=ddp can")
    trained = data.tokenizer == "bpe" and data.folder is None
    if trained and config.model.vocab_size is not None and config.model.vocab_size < data.vocab_size:
        found.append(
            f"model.vocab_size={config.model.vocab_size} is smaller than the tokenizer's: "
            f"data.vocab_size={data.vocab_size}"
        )
    depth = min(max(config.model.num_hidden_layers, 1), MOST_LAYERS)
    if config.optim.lisa_layers > depth:
        found.append(
            f"optim.lisa_layers={config.optim.lisa_layers} is more than "
            f"model.num_hidden_layers={config.model.num_hidden_layers}"
        )
    for field_name in ("experiment", "name"):
        value = getattr(config, field_name)
        if value is not None and (not Path(value).parts or Path(value).is_absolute() or ".." in Path(value).parts):
            found.append(f"{field_name}={value!r} must be a folder below output")
    try:
        specs = strategies.build_all(config.norm, depth)
    except UserError as error:
        return [*found, str(error)]
    width = config.model.hidden_size
    if wrong := {s.groups for spec in specs for s in spec.sublayers if width % s.groups}:
        found.append(f"norm.groups={wrong.pop()} does not divide model.hidden_size={width}")
    if not config.model.norm_affine and any(s.pre_norm_weight != 1 for spec in specs for s in spec.sublayers):
        found.append(f"norm={config.norm['name']} needs norms with a weight: model.norm_affine=true")
    return found


def paper_block_errors(config: Config) -> list[str]:
    """Errors in `paper` and `scales`, which the schema leaves open."""
    rows = config.paper.get("rows", {})
    if not isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows.values()):
        return [f"paper.rows={rows!r} must hold a mapping for each row, as in paper.rows={{lns: {{label: LNS}}}}"]
    return [
        f"{name}={value!r} must be a mapping of overrides, as in {name}={{optim.lr: 0.001}}"
        for name, value in [
            *((f"paper.rows.{row}.set", settings.get("set")) for row, settings in rows.items()),
            *((f"scales.{scale}", settings) for scale, settings in config.scales.items()),
        ]
        if value is not None and not isinstance(value, Mapping)
    ]


def invalid_value(value: Any) -> str | None:
    """Why no field can have this value, None if some can."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large: whole numbers have 64 bits"
    if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
        return "must be text that UTF-8 can spell, without NUL"
    return None
