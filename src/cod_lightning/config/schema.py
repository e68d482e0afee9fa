"""The settings of training; plain data, so that a configuration is checked without importing torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.errors import nearest
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.config import RUNTIME, DecoderConfig

FIGURES = {"val_loss": ".4f", "ppl": ".2f", "ppl_paper_protocol": ".2f", "accuracy": ".2f"}
"""Figures of a validation and how they are printed; a task has some of them."""
COUNTS = ("val_tokens", "val_images")
"""What a validation was made on."""

TOKENIZER = "tokenizer"
"""Folder of the tokenizer inside a run folder."""


def run_of(source: Path) -> Path:
    """The run folder that `init_from` names by itself or by a file in its `checkpoints/`."""
    return source.parent.parent if source.suffix == ".ckpt" else source


def one_of(name: str, value: str, known: tuple[str, ...]) -> list[str]:
    return [] if value in known else [f"{name}={value!r} does not exist: {nearest(value, known)}"]


@dataclass
class OptimConfig:
    """Optimizer, schedule and how the loss of a step is weighted."""

    name: str = "adam"
    """`adam` (the paper's) or `adamw`."""
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    """On matrices only; `adam` adds it to the gradient, `adamw` decouples it."""
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip (the paper's)."""
    warmup_ratio: float = 0.1
    """Linear warm-up over this share of the steps."""
    warmup_steps: int | None = None
    """Instead of `warmup_ratio`."""
    min_lr_ratio: float = 0.1
    """The schedule ends at this share of `lr`."""
    schedule: str = "cosine"
    """`cosine`; `cosine_released`, one update behind it: the released code's first update has rate 0; or `linear`."""
    weighting: str = "tokens"
    """`tokens`: every target of a step counts the same; `micro_batches`: the mean of micro-batch means (paper)."""
    lisa_layers: int = 0
    """LISA (Pan et al., 2024): train only so many blocks at a time, besides embeddings, head and final norm; 0: all."""
    lisa_interval: int = 3
    """Steps between draws of these blocks."""

    def warmup(self, max_steps: int) -> int:
        """Warm-up in steps."""
        return round(self.warmup_ratio * max_steps) if self.warmup_steps is None else self.warmup_steps

    def problems(self, max_steps: int) -> list[str]:
        found = one_of("optim.name", self.name, ("adam", "adamw"))
        found += one_of("optim.schedule", self.schedule, ("cosine", "cosine_released", "linear"))
        found += one_of("optim.weighting", self.weighting, ("tokens", "micro_batches"))
        if not self.lr > 0:
            found.append(f"optim.lr={self.lr} must be positive")
        if len(self.betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas):
            found.append(f"optim.betas={list(self.betas)} must be two numbers in [0, 1)")
        for name in ("weight_decay", "clip"):
            if getattr(self, name) < 0:
                found.append(f"optim.{name}={getattr(self, name)} must not be negative")
        if not self.eps > 0:
            found.append(f"optim.eps={self.eps} must be positive")
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"optim.{name}={getattr(self, name)} must lie between 0 and 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            found.append(f"optim.warmup_steps={self.warmup_steps} must not be negative")
        elif max_steps > 0 and self.warmup(max_steps) >= max_steps:
            name = "warmup_ratio" if self.warmup_steps is None else "warmup_steps"
            found.append(
                f"optim.{name}={getattr(self, name)} warms up for {self.warmup(max_steps)} steps, "
                f"but trainer.max_steps={max_steps}: it must end before the run does"
            )
        if self.lisa_layers < 0:
            found.append(f"optim.lisa_layers={self.lisa_layers} must not be negative")
        if self.lisa_interval < 1:
            found.append(f"optim.lisa_interval={self.lisa_interval} must be at least 1")
        return found


@dataclass
class EvalConfig:
    """Validation during and after training."""

    every: int = 1000
    """Steps between validations; one always ends the run."""
    paper_batch: int = 64
    """Rows per batch in the released evaluation that `ppl_paper_protocol` emulates."""
    paper_ranks: int = 1
    """Its number of GPUs."""

    def problems(self) -> list[str]:
        names = ("every", "paper_batch", "paper_ranks")
        return [f"eval.{n}={getattr(self, n)} must be at least 1" for n in names if getattr(self, n) < 1]


@dataclass
class TrainerConfig:
    """How long a run is and what it runs on."""

    max_steps: int = 1000
    precision: str = "auto"
    """`32-true`, `bf16-mixed`, `bf16-true`; `auto` is `auto_cuda` on a CUDA device with bfloat16, else `32-true`."""
    auto_cuda: str = "bf16-mixed"
    """What `precision=auto` means on CUDA; protocol=paper sets `bf16-true`."""
    accelerator: str = field(default="auto", metadata=RUNTIME)
    """`cpu`, `gpu` (CUDA), or `auto`: CUDA where there is one, else the CPU."""
    devices: int = field(default=1, metadata=RUNTIME)
    """Ranks per node."""
    num_nodes: int = field(default=1, metadata=RUNTIME)
    strategy: str = field(default="auto", metadata=RUNTIME)
    """`auto` (one rank); `ddp`, each rank has all of the model; `fsdp`, each has a part of every parameter (FSDP2)."""
    hybrid: bool = field(default=False, metadata=RUNTIME)
    """Under `fsdp`: shard within a node, and replicate over the nodes."""
    offload: bool = field(default=False, metadata=RUNTIME)
    """Under `fsdp`: parameters and moments rest in the host's memory."""
    checkpointing: str = field(default="none", metadata=RUNTIME)
    """Activations made again in the backward pass: `none`; `selective`, all but what matrix products and attention
    return; `full`, all of a block but its input."""
    compile: bool | None = field(default=None, metadata=RUNTIME)
    """Compile the blocks, each as one graph; None: on CUDA."""
    timeout: float = field(default=1800.0, metadata=RUNTIME)
    """Seconds that a rank waits for another before it gives up."""
    threads: int = field(default=0, metadata=RUNTIME)
    """CPU threads of one rank; 0: torch's default."""
    log_every: int = field(default=10, metadata=RUNTIME)
    """Steps between logged values."""
    stats_every: int = field(default=100, metadata=RUNTIME)
    """Steps between layer statistics; 0: none."""
    measures: dict[str, int] = field(default_factory=lambda: {"jacobian": 1000}, metadata=RUNTIME)
    """Steps between other measures of a decoder's layers, by name (`measure.registry.MEASURES`); 0: none."""
    probe_rows: int = field(default=8, metadata=RUNTIME)
    """Validation rows that layer statistics and measures are taken on."""
    checkpoint_every: int = field(default=1000, metadata=RUNTIME)
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = field(default=2, metadata=RUNTIME)
    """Checkpoints kept, besides the one with the best validation loss."""
    progress: bool = field(default=True, metadata=RUNTIME)

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    def problems(self) -> list[str]:
        precisions = ("32-true", "bf16-mixed", "bf16-true")
        found = one_of("trainer.precision", self.precision, ("auto", *precisions))
        found += one_of("trainer.auto_cuda", self.auto_cuda, precisions)
        found += one_of("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        found += one_of("trainer.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        found += one_of("trainer.checkpointing", self.checkpointing, ("none", "selective", "full"))
        if self.strategy != "fsdp":
            found += [
                f"trainer.{n}=true is for trainer.strategy=fsdp" for n in ("hybrid", "offload") if getattr(self, n)
            ]
        if not self.timeout > 0:
            found.append(f"trainer.timeout={self.timeout} must be positive")
        at_least_one = ("max_steps", "devices", "num_nodes", "log_every", "probe_rows", "checkpoint_every", "keep_last")
        found += [f"trainer.{n}={getattr(self, n)} must be at least 1" for n in at_least_one if getattr(self, n) < 1]
        found += [
            f"trainer.{n}={getattr(self, n)} must not be negative"
            for n in ("threads", "stats_every")
            if getattr(self, n) < 0
        ]
        for name, every in self.measures.items():
            found += one_of("trainer.measures", name, tuple(MEASURES))
            if every < 0:
                found.append(f"trainer.measures.{name}={every} must not be negative")
        return found


@dataclass
class Config:
    """Everything a run is made of; each section is owned by the room that acts on it."""

    experiment: str = field(default="none", metadata=RUNTIME)
    description: str = field(default="", metadata=RUNTIME)
    scale: str = field(default="paper", metadata=RUNTIME)
    """`paper`: as published; `mini` and `toy` keep what is compared and shrink the rest."""
    row: str | None = field(default=None, metadata=RUNTIME)
    """Which of the experiment's rows this is; None: the settings decide (see `row_of`)."""
    task: str = "language"
    """`language`, or `vision`: a Vision Transformer on `images` (Table 5) in the place of a decoder on `data`."""
    protocol: str = "strict"
    """`paper`, or `strict`: which of the two procedures the settings follow."""
    init_from: str | None = None
    """Where the weights come from, at step 0: a run folder (its last checkpoint; same `model` and `norm`) or a .ckpt
    file. Its run's tokenizer stands for `data.tokenizer=bpe`; None: weights are drawn."""
    seed: int = 1
    """Of the initialisation and of the order of the data."""
    output: str = field(default="runs", metadata=RUNTIME)
    """Root of all run folders."""
    name: str | None = field(default=None, metadata=RUNTIME)
    """Of the run folder below `output`; None: derived from the configuration."""
    resume: bool = field(default=True, metadata=RUNTIME)
    """False: put an earlier run of the same configuration aside and start anew."""
    logger: str = field(default="tensorboard", metadata=RUNTIME)
    """`tensorboard` or `none`; `record.json` holds every figure in any case."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    norm: dict[str, Any] = field(default_factory=dict)
    """`name` of the strategy, and its options."""
    data: DataConfig = field(default_factory=DataConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    paper: dict[str, Any] = field(default_factory=dict, metadata=RUNTIME)
    """What the experiment reproduces: its rows, their published figures, the source of each setting."""
    scales: dict[str, Any] = field(default_factory=dict, metadata=RUNTIME)
    """By scale, what the experiment sets there beyond what the scale does."""

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that stand for everything a run computes.

        Two experiments that ask for the same computation give the same id, and so does a configuration saved before a
        field was added: only what differs from the defaults counts.
        """
        kept, plain_defaults = flatten(identity(self)), flatten(identity(Config()))
        changed = {name: value for name, value in kept.items() if value != plain_defaults.get(name)}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """Strategy, seed and id: what a run is called."""
        return f"{re.sub(r'[^a-zA-Z0-9]+', '_', self.norm['name'])}-seed{self.seed}-{self.id}"

    @property
    def folder(self) -> Path:
        """Where the run lives: a pure function of the configuration."""
        return Path(self.output, self.name or f"{self.experiment}/{self.label}")


def identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same: every field that is not marked as a matter of carrying the run out."""
    kept = identity_fields(config)
    if config.task == "vision":  # which reads nothing else of `data`
        kept["data"] = {"batch_size": config.data.batch_size}
    if config.data.sha256 is not None:
        kept["data"] = {**kept["data"], "files": None, "val_files": None}
    if config.optim.weighting == "micro_batches":
        # A mean of means depends on what is in each.
        kept["data"]["micro_batch_size"] = config.data.micro_batch_size
    return kept


def identity_fields(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in fields(section) if f.metadata.get("identity", True)}
    return {name: identity_fields(value) if is_dataclass(value) else value for name, value in values.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def init_from_run(config: Config, source: Path) -> Config:
    """A configuration that starts from the weights at `source`, and reads text with the tokenizer that lies there."""
    data = config.data
    if data.tokenizer == "bpe":
        # Tokens of one trained anew would have nothing to do with the rows of the embedding.
        data = replace(data, tokenizer=str(run_of(source) / TOKENIZER))
    return replace(config, init_from=str(source), data=data)
