"""The settings of a run: plain data, checked without importing torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from cod_lightning.data.config import MAX_PROCESSES, DataConfig, ImageConfig
from cod_lightning.nn.config import DecoderConfig, num_vit_parameters
from cod_lightning.nn.spec import describe_specs
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.nn.strategy_lookup import default_options
from cod_lightning.settings import metadata, setting

METRIC_FORMATS = {"val_loss": ".4f", "ppl": ".2f", "ppl_paper_protocol": ".2f", "accuracy": ".2f"}
"""Validation metrics and their print formats; the task decides which exist."""
COUNTS = ("val_tokens", "val_images")
"""Counts of the tokens or images that a validation evaluates."""


def is_shown(name: str, protocol: str) -> bool:
    """Whether commands and loggers show a metric: the released evaluation's only with `protocol=paper`."""
    return name != "ppl_paper_protocol" or protocol == "paper"


def printed_metrics(names: Iterable[str], protocol: str) -> list[str]:
    """The metrics among `names` that are shown."""
    return [name for name in METRIC_FORMATS if name in names and is_shown(name, protocol)]


TOKENIZER = "tokenizer"
"""Folder of the tokenizer inside a run folder."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints inside a run folder."""


def run_folder_of(source: Path) -> Path:
    """The run folder that `init_from` names by itself or by a file in its `checkpoints/`."""
    return source.parent.parent if source.suffix == ".ckpt" else source


@dataclass
class OptimConfig:
    """Optimizer, schedule and weighting of the loss."""

    name: str = setting("adam", choices=("adam", "adamw"))
    """`adam` (the paper's) or `adamw`."""
    lr: float = setting(1e-3, above=0)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata=metadata(at_least=0, below=1))
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.0, at_least=0)
    """Applied to matrices only; `adam` adds it to the gradient, `adamw` decouples it."""
    decay_embeddings: bool = True
    """False: no weight decay of the token embeddings, nor of a head tied to them (OLMo)."""
    clip: float = setting(0.0, at_least=0)
    """Largest norm of the gradient; 0 does not clip (the paper's)."""
    warmup_ratio: float = setting(0.1, at_least=0, at_most=1)
    """Linear warm-up over this share of the steps."""
    warmup_steps: int | None = setting(None, at_least=0)
    """Warm-up steps, instead of `warmup_ratio`."""
    warmup_start_ratio: float = setting(0.0, at_least=0, at_most=1)
    """The warm-up starts at this share of `lr` (OLMo: 0.1)."""
    min_lr_ratio: float = setting(0.1, at_least=0, at_most=1)
    """The schedule ends at this share of `lr`."""
    schedule: str = setting("cosine", choices=("cosine", "cosine_released", "linear"))
    """`cosine`; `cosine_released`, one update later: the released code's first update has rate 0; or `linear`."""
    weighting: str = setting("tokens", choices=("tokens", "micro_batches"))
    """`tokens`: every target of a step counts the same; `micro_batches`: the mean of micro-batch means (paper)."""
    lisa_layers: int = setting(0, at_least=0)
    """LISA (Pan et al., 2024): train this many blocks at a time, with embeddings, head and final norm; 0: all."""
    lisa_interval: int = setting(3, at_least=1)
    """Steps between draws of these blocks."""

    def warmup(self, max_steps: int) -> int:
        """Warm-up in steps."""
        return round(self.warmup_ratio * max_steps) if self.warmup_steps is None else self.warmup_steps


@dataclass
class EvalConfig:
    """Validation during and after training."""

    every: int = setting(1000, at_least=1)
    """Steps between validations; one always ends the run."""
    paper_batch: int = setting(64, at_least=1)
    """Sequences per batch in the released evaluation, which `ppl_paper_protocol` emulates."""
    paper_ranks: int = setting(1, at_least=1, at_most=2**16)
    """GPUs in the released evaluation."""


PROBE_ROWS = 8
"""The default of `trainer.probe_rows`."""
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
CHECKPOINTING = ("none", "selective", "full")
PROTOCOLS = ("paper", "strict")


@dataclass
class TrainerConfig:
    """Length of a run, and the hardware that it uses."""

    max_steps: int = setting(1000, at_least=1)
    precision: str = setting("auto", choices=("auto", *PRECISIONS))
    """`32-true`, `bf16-mixed`, `bf16-true`; `auto` is `auto_cuda` on a CUDA device with bfloat16, else `32-true`."""
    auto_cuda: str = setting("bf16-mixed", choices=PRECISIONS)
    """Meaning of `precision=auto` on CUDA; protocol=paper sets `bf16-true`."""
    accelerator: str = setting("auto", runtime=True, choices=("auto", "cpu", "gpu"))
    """`cpu`, `gpu` (CUDA), or `auto`: CUDA if there is a device, else the CPU."""
    devices: int = setting(1, runtime=True, at_least=1, at_most=MAX_PROCESSES)
    """Ranks per node."""
    num_nodes: int = setting(1, runtime=True, at_least=1, at_most=2**16)
    strategy: str = setting("auto", runtime=True, choices=("auto", "ddp", "fsdp"))
    """`auto` (one rank); `ddp`: each rank has the whole model; `fsdp`: each has a shard of every parameter (FSDP2)."""
    hybrid: bool = setting(False, runtime=True)
    """With `fsdp`: shard within a node, and replicate across nodes."""
    offload: bool = setting(False, runtime=True)
    """With `fsdp`: keep parameters and optimizer state in CPU memory."""
    checkpointing: str = setting("none", runtime=True, choices=CHECKPOINTING)
    """Activations recomputed in the backward pass: `none`; `selective`: all but the outputs of matrix products and
    attention; `full`: all of a block but its input."""
    compile: bool | None = setting(None, runtime=True)
    """Compile the blocks, each as one graph; None: on CUDA."""
    timeout: float = setting(1800.0, runtime=True, above=0, at_most=1e9)
    """Seconds that a rank waits for another before it fails."""
    threads: int = setting(0, runtime=True, at_least=0, at_most=MAX_PROCESSES)
    """CPU threads of one rank; 0: torch's default."""
    log_every: int = setting(10, runtime=True, at_least=1)
    """Steps between logged values."""
    stats_every: int = setting(100, runtime=True, at_least=0)
    """Steps between layer statistics; 0: none."""
    measures: dict[str, int] = field(
        default_factory=lambda: {"jacobian": 1000}, metadata=metadata(runtime=True, at_least=0)
    )
    """Steps between other measures of the layers, by name; 0: none."""
    probe_rows: int | None = setting(None, runtime=True, at_least=1, at_most=2**24)
    """Validation sequences or images used for layer statistics and measures; None: 8, or all if there are fewer."""
    checkpoint_every: int = setting(1000, runtime=True, at_least=1)
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = setting(2, runtime=True, at_least=1)
    """Checkpoints kept, besides the one with the best validation loss."""
    progress: bool = setting(True, runtime=True)

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


@dataclass
class Config:
    """All settings of a run; a section is defined in the package that uses it."""

    experiment: str = setting("none", runtime=True)
    description: str = setting("", runtime=True)
    scale: str = setting("paper", runtime=True)
    """`paper`: as published; `mini`, `small` and `toy` keep the comparison and shrink the rest."""
    row: str | None = setting(None, runtime=True)
    """Row of the experiment; None: determined from the settings (`row_of`)."""
    task: str = setting("language", choices=("language", "vision"))
    """`language`: a decoder on `data`; `vision`: a Vision Transformer on `images` (Table 5)."""
    protocol: str = setting("strict", choices=PROTOCOLS)
    """Training and evaluation procedure of the settings: `paper` or `strict`."""
    init_from: str | None = None
    """Initial weights: a run folder (its last checkpoint; same `model` and `norm`) or a .ckpt file. The tokenizer of
    that run replaces `data.tokenizer=bpe`. None: random weights."""
    seed: int = setting(1, at_least=0)
    """Seed of the initialisation and of the order of the data."""
    output: str = setting("runs", runtime=True)
    """Root of all run folders."""
    name: str | None = setting(None, runtime=True)
    """Run folder below `output`; None: derived from the configuration."""
    resume: bool = setting(True, runtime=True)
    """False: move an earlier run of the same configuration aside and start from step 0."""
    logger: Any = field(
        default="tensorboard",
        metadata=metadata(runtime=True, choices=("none", "tensorboard", "csv", "wandb", "mlflow")),
    )
    """One or a list of `tensorboard`, `csv`, `wandb` and `mlflow`, or `none`; `record.json` has every number anyway."""
    model: DecoderConfig = field(default_factory=DecoderConfig)
    norm: dict[str, Any] = field(default_factory=dict)
    """`name` of the strategy, and its options."""
    data: DataConfig = field(default_factory=DataConfig)
    images: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    paper: dict[str, Any] = field(default_factory=dict, metadata=metadata(runtime=True))
    """Reproduced table or figure: its rows, their published figures, the source of each setting."""
    scales: dict[str, Any] = field(default_factory=dict, metadata=metadata(runtime=True))
    """Settings of the experiment at each scale, in addition to those of the scale itself."""

    @property
    def loggers(self) -> list[str]:
        """The names in `logger`, without `none`."""
        names = self.logger if isinstance(self.logger, list) else [self.logger]
        return [name for name in dict.fromkeys(names) if name not in ("none", None)]

    @property
    def vocab_size(self) -> int | None:
        """Size of a decoder's vocabulary: the model's, or that of the tokenizer to train; None: not in the settings."""
        return self.model.vocab_size or (self.data.vocab_size if self.data.tokenizer == "bpe" else None)

    def num_parameters(self, vocab_size: int | None = None) -> int:
        """Parameters of the model under Pre-LN; a strategy with learned scales or more norms has more.

        Args:
            vocab_size: used if `model.vocab_size` is null; None: that of the tokenizer to train. A size that is not
                in the settings counts as one, as `images.classes=null` does.
        """
        if self.task == "language":
            return self.model.num_parameters(vocab_size or self.vocab_size or 1)
        images = self.images
        return num_vit_parameters(self.model, images.size, images.patch_size, images.known_classes or 1)

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence, or patches of an image."""
        return self.data.seq_len if self.task == "language" else self.images.patches

    @property
    def training_tokens(self) -> int:
        """Tokens, or patches, of the whole run."""
        return self.trainer.max_steps * self.data.batch_size * self.sequence_length

    @property
    def max_length(self) -> int:
        """Longest supported sequence: that of the imported model, or the one of the run."""
        return self.model.max_position_embeddings or self.data.seq_len

    @property
    def id(self) -> str:
        """Eight hexadecimal digits, a hash of the settings that change the result of a run.

        Settings at their default do not count, so that a new field leaves the ids of saved configurations unchanged.
        """
        values, defaults = flatten(identity(self)), flatten(identity(Config()))
        changed = {name: value for name, value in values.items() if value != defaults.get(name)}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def label(self) -> str:
        """Name of the run: strategy, seed and id."""
        return f"{re.sub(r'[^a-zA-Z0-9]+', '_', self.norm['name'])}-seed{self.seed}-{self.id}"

    @property
    def folder(self) -> Path:
        """The run folder, a pure function of the configuration."""
        return Path(self.output, self.name or f"{self.experiment}/{self.label}")


def identity(config: Config) -> dict[str, Any]:
    """The settings that change the result of a run, as nested dictionaries."""
    values = identity_fields(config)
    # The options of a strategy have no declared types: 1 and 1.0 are the same.
    norm = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in config.norm.items()}
    defaults = base_defaults(config.norm)
    values["norm"] = {name: v for name, v in norm.items() if name not in defaults or v != defaults[name]}
    if config.init_from is not None:  # a run below `output` is the same run wherever `output` is
        source = run_folder_of(Path(config.init_from))
        values["init_from"] = under_default_output(config, config.init_from)
        if Path(config.data.tokenizer).is_relative_to(source):
            values["data"]["tokenizer"] = under_default_output(config, config.data.tokenizer)
    if config.task == "vision":  # it reads no other field of `data`
        values["data"] = {"batch_size": config.data.batch_size}
    if config.data.sha256 is not None:  # the hash of the text stands for the names of its files
        values["data"] = {**values["data"], "files": None, "val_files": None}
    if config.optim.weighting == "micro_batches":  # a mean of means depends on the size of each
        values["data"]["micro_batch_size"] = config.data.micro_batch_size
    return values


def base_defaults(norm: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the base of a registered strategy, with their defaults; the files of configs/ do not set them."""
    strategy = STRATEGIES.get(str(norm.get("name")))  # a saved name may be anything
    own = {} if strategy is None else default_options(strategy)
    base = STRATEGIES.get(str(norm.get("base", own["base"]))) if "base" in own else None
    options = {} if base is None else default_options(base)
    return {name: default for name, default in options.items() if name not in own}


def resumable_settings(config: Config) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint, by name.

    Without the vocabulary, which the data may determine; the shapes of the weights show it. With a hash of what
    package.module:function returns, which may change while its name stays.
    """
    settings = {name: value for name, value in flatten(identity(config)).items() if name != "model.vocab_size"}
    if any(":" in str(value) for value in config.norm.values()):
        coefficients = describe_specs(build_all(config.norm, config.model.num_hidden_layers))
        settings["norm.coefficients"] = hashlib.sha256(coefficients.encode()).hexdigest()[:8]
    return settings


def under_default_output(config: Config, path: str) -> str:
    """A path below `output`, as it would be below the default output; any other path unchanged."""
    if not Path(path).is_relative_to(config.output):
        return path
    return str(Path(Config.output) / Path(path).relative_to(config.output))


def identity_fields(section: Any) -> dict[str, Any]:
    """The fields of a dataclass and of those inside it, without runtime settings."""
    values = {f.name: getattr(section, f.name) for f in fields(section) if not f.metadata.get("runtime")}
    return {name: identity_fields(value) if is_dataclass(value) else value for name, value in values.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def init_from_run(config: Config, source: Path) -> Config:
    """A copy of a configuration that starts from the weights at `source`, with the tokenizer of that run."""
    data = config.data
    if data.tokenizer == "bpe":  # token ids of a new tokenizer would not match the embedding
        data = replace(data, tokenizer=str(run_folder_of(source) / TOKENIZER))
    return replace(config, init_from=str(source), data=data)
