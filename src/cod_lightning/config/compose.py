"""A run's configuration: composed by Hydra from configs/ and experiments/, checked as a whole, then plain data."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cod_lightning.config.schema import TOKENIZER, EvalConfig, OptimConfig, TrainerConfig, one_of, run_of
from cod_lightning.data.config import DataConfig, ImageConfig, image_problems
from cod_lightning.data.config import problems as data_problems
from cod_lightning.errors import DAMAGED, UserError, nearest
from cod_lightning.nn import strategies
from cod_lightning.nn.config import MOST_LAYERS, RUNTIME, DecoderConfig

CONFIG = "config.yaml"
"""The composed configuration, in every run folder."""


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

    def problems(self) -> list[str]:
        """Everything that keeps this run from working, each naming its field and what would be right."""
        data, trainer = self.data, self.trainer
        if strange := [
            f"{name}={value!r} {reason}"
            for name, value in flatten(plain(self)).items()
            for part in (value if isinstance(value, list) else [value])
            if (reason := strangeness(part)) is not None
        ]:
            return strange
        if wrong := self.misshapen():
            return wrong
        found = [*self.model.problems(), *data_problems(data), *image_problems(self.images)]
        found += [*trainer.problems(), *self.eval.problems()]
        found += self.optim.problems(trainer.max_steps)
        found += one_of("logger", self.logger, ("tensorboard", "none"))
        found += one_of("protocol", self.protocol, ("paper", "strict"))
        found += one_of("task", self.task, ("language", "vision"))
        if self.seed < 0:
            found.append(f"seed={self.seed} must not be negative")
        if self.task == "vision" and self.init_from is not None:
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
        if trainer.strategy == "fsdp" and self.optim.lisa_layers:
            found.append("optim.lisa_layers rests blocks by the step, which sharded ones cannot: trainer=ddp can")
        trained = data.tokenizer == "bpe" and data.folder is None
        if trained and self.model.vocab_size is not None and self.model.vocab_size < data.vocab_size:
            found.append(
                f"model.vocab_size={self.model.vocab_size} is smaller than the tokenizer's: "
                f"data.vocab_size={data.vocab_size}"
            )
        depth = min(max(self.model.num_hidden_layers, 1), MOST_LAYERS)
        if self.optim.lisa_layers > depth:
            found.append(
                f"optim.lisa_layers={self.optim.lisa_layers} is more than "
                f"model.num_hidden_layers={self.model.num_hidden_layers}"
            )
        for field_name in ("experiment", "name"):
            value = getattr(self, field_name)
            if value is not None and (not Path(value).parts or Path(value).is_absolute() or ".." in Path(value).parts):
                found.append(f"{field_name}={value!r} must be a folder below output")
        try:
            specs = strategies.build_all(self.norm, depth)
        except UserError as error:
            return [*found, str(error)]
        width = self.model.hidden_size
        if wrong := {s.groups for spec in specs for s in spec.sublayers if width % s.groups}:
            found.append(f"norm.groups={wrong.pop()} does not divide model.hidden_size={width}")
        if not self.model.norm_affine and any(s.pre_norm_weight != 1 for spec in specs for s in spec.sublayers):
            found.append(f"norm={self.norm['name']} needs norms with a weight: model.norm_affine=true")
        return found

    def misshapen(self) -> list[str]:
        """What of `paper` and `scales`, which hold anything, is not as it is read."""
        rows = self.paper.get("rows", {})
        if not isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows.values()):
            return [f"paper.rows={rows!r} must hold a mapping for each row, as in paper.rows={{lns: {{label: LNS}}}}"]
        return [
            f"{name}={value!r} must be a mapping of overrides, as in {name}={{optim.lr: 0.001}}"
            for name, value in [
                *((f"paper.rows.{row}.set", settings.get("set")) for row, settings in rows.items()),
                *((f"scales.{scale}", settings) for scale, settings in self.scales.items()),
            ]
            if value is not None and not isinstance(value, Mapping)
        ]


def strangeness(value: Any) -> str | None:
    """Why no field can have this value, None if some can."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large: whole numbers have 64 bits"
    if isinstance(value, str) and ("\0" in value or value.encode(errors="replace").decode() != value):
        return "must be text that UTF-8 can spell, without NUL"
    return None


# Composition ---------------------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """configs/: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def choices(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml") if path.stem != "custom")


def groups() -> list[str]:
    return sorted(path.name for path in config_folder().iterdir() if path.is_dir())


def fields_and_groups() -> set[str]:
    """What an override can begin with."""
    return {*groups(), *(f.name for f in fields(Config))}


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's reading of the words of a command line.

    Raises:
        UserError: a word is not `key=value`, or its value is to be taken from elsewhere, as ${oc.env:HOME} is.
    """
    try:
        words = OverridesParser.create().parse_overrides([custom_norm(word) for word in overrides])
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{reason}; expected key=value, such as norm=pre_ln or trainer.max_steps=100") from error
    if found := [f"{word.input_line}: {INTERPOLATED}" for word in words if interpolated(word.value())]:
        raise UserError("\n".join(found))
    return words


INTERPOLATED = "${...} is not filled in here: write the value itself"
"""A run is what its words say, on every machine; and a folder of someone else's reads nothing of the environment."""


def interpolated(value: Any) -> bool:
    """Whether OmegaConf would put something in the place of a string inside."""
    if isinstance(value, Mapping):
        return any(interpolated(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(interpolated, value))
    return "${" in str(value)


def custom_norm(word: str) -> str:
    """`norm=package.module:function` names no file of the group norm/; quoted, it stays one value."""
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key == "norm" and ":" in value and not set(value) & set(",'\"{}[]()") else word


def sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the comma-separated values among `overrides`, the last one varying fastest, as in Hydra.

    Raises:
        UserError: a sweep that cannot be spelled out, such as interval(0, 1).
    """
    try:
        expanded = [
            # Hydra escapes the colon of package.module:function.
            [f"{override.get_key_element()}={value}".replace("\\:", ":") for value in override.sweep_string_iterator()]
            if override.is_sweep_override()
            else [override.input_line or ""]
            for override in parse(overrides)
        ]
    except HydraException as error:
        raise UserError(f"{first_line(error)}; a sweep takes a,b,c, range(1,4) or choice(a,b)") from error
    return (list(words) for words in itertools.product(*expanded))


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration that `overrides` ask for.

    After the groups come what the experiment sets at its scale, what its row sets, then the values of the command line.

    Raises:
        UserError: names every unknown field, choice, wrong type and impossible combination at once.
    """
    words, found = translate(parse(overrides))
    chosen = [override for override in words if override.key_or_group in groups()]
    ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3", job_name="cod_lightning"):
        try:
            node = hydra_compose("config", [override.input_line or "" for override in chosen])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError("\n".join([*found, first_line(error)])) from error
    picked = {override.key_or_group: override.value() for override in words}
    found += amend(node, settings(node.scales.get(node.scale) or {}))
    if (row := picked.get("row")) is not None:
        row, known = str(row), node.paper.get("rows") or {}
        if row not in known:
            hint = nearest(row, known) if known else f"{node.experiment} has none"
            raise UserError("\n".join([*found, f"row={row!r} is not a row: {hint}"]))
        if "norm" in picked:
            found.append("row= and norm= both choose the strategy: leave one out")
        found += amend(node, settings(known[row].get("set") or {}))
    found += amend(node, [override for override in words if override not in chosen])
    try:
        config = as_config(node)
    except OmegaConfBaseException as error:
        raise UserError("\n".join([*found, first_line(error)])) from error
    found += config.problems()
    if found:
        raise UserError("\n".join(found))
    return config


def settings(values: Mapping[str, Any]) -> list[Override]:
    """{"norm": "lns", "optim.lr": 0.1} of a YAML file as the command line would say it."""
    return parse([f"{key}={'null' if value is None else value}" for key, value in values.items()])


def amend(node: DictConfig, overrides: Iterable[Override]) -> list[str]:
    """Set values, and sections to choices of their group, in a composed configuration; returns what cannot be set.

    Args:
        node: of a `Config`, changed in place.
        overrides: set one after the other.
    """
    found = []
    for override in overrides:
        key, word = override.key_or_group, override.input_line or ""
        if key not in groups():
            if problem := value_problem(node, word):
                found.append(problem)
            else:
                OmegaConf.update(node, key, override.value(), force_add=True)
        elif key not in SECTIONS:
            found.append(f"{word}: {key} is no section, and is chosen on the command line alone")
        elif (value := str(override.value())) not in choices(key):
            found.append(f"{key}={value!r} does not exist: {nearest(value, choices(key))}")
        elif key == "norm":  # options of one strategy mean nothing to another
            node.norm = OmegaConf.load(config_folder() / key / f"{value}.yaml")
        else:
            node[key] = OmegaConf.merge(node[key], OmegaConf.load(config_folder() / key / f"{value}.yaml"))
    return found


SECTIONS = ("model", "norm", "data", "optim", "trainer")
"""Groups whose files hold one section of the configuration."""


def with_row(config: Config, name: str, overrides: Sequence[str] = ()) -> Config:
    """A composed configuration turned into a row of its experiment, as `compose` gives it for `row=`, but at once.

    Raises:
        UserError: no such row, or settings that cannot be.
    """
    node = OmegaConf.structured(config)
    found = amend(node, settings({"row": name} | config.paper["rows"][name].get("set", {})))
    found += amend(node, [o for o in parse(overrides) if o.key_or_group not in groups()])
    changed = as_config(node)
    if found := found or changed.problems():
        raise UserError("\n".join(found))
    return changed


def row_of(config: Config) -> str | None:
    """The row of its experiment that a configuration is: the one named by `row`, or else the one it agrees with."""
    if config.row is not None:
        return config.row
    return next((name for name in config.paper.get("rows", {}) if with_row(config, name).id == config.id), None)


def translate(overrides: Iterable[Override]) -> tuple[list[Override], list[str]]:
    """The overrides, a strategy of one's own spelled out, and what among them means nothing here."""
    words: list[Override] = []
    found: list[str] = []
    for override in overrides:
        key, word = override.key_or_group, override.input_line or ""
        if override.is_delete():
            found.append(f"{word}: nothing can be left out of a run; set {key}= to what it shall be")
        elif override.is_sweep_override():
            found.append(f"{word}: several values are a sweep, which needs -m")
        elif override.package is not None:
            found.append(f"{word}: what is chosen has its place already: {key}=")
        elif key in groups() and override.is_add():
            found.append(f"{word}: {key} has a choice already: leave out the +")
        elif key in groups():
            value = str(override.value())
            if key == "norm" and ":" in value:
                words += parse(["norm=custom", f"norm.name='{value}'"])
            elif value in choices(key):
                words.append(override)
            else:
                found.append(f"{key}={value!r} does not exist: {nearest(value, choices(key))}")
        else:
            words.append(override)
    return words, found


def value_problem(base: DictConfig, word: str) -> str | None:
    """Why a value cannot be set, None if it can."""
    (override,) = OverridesParser.create().parse_overrides([word])
    node: Any = base
    parts = override.key_or_group.split(".")
    try:
        for depth, part in enumerate(parts):
            if OmegaConf.get_type(node) is dict:
                break  # a dictionary takes any key; what the keys mean is for the section's own check
            known = [str(key) for key in node] if isinstance(node, DictConfig) else []
            if part not in known:
                where = ".".join(parts[: depth + 1])
                return f"{where} is not a field: {nearest(part, known) if known else 'it has no fields'}"
            node = node[part]
        OmegaConf.update(base.copy(), override.key_or_group, override.value(), force_add=True)
    except OmegaConfBaseException as error:
        return f"{word}: {first_line(error)}"
    return None


def first_line(error: BaseException) -> str:
    """The reason at the bottom of a chain of Hydra's errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def as_config(node: DictConfig) -> Config:
    """The configuration as an object, with the tokenizer that comes with `init_from`."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config if config.init_from is None else started(config, Path(config.init_from))


def started(config: Config, source: Path) -> Config:
    """A configuration that starts from the weights at `source`, and reads text with the tokenizer that lies there."""
    data = config.data
    if data.tokenizer == "bpe":
        # Tokens of one trained anew would have nothing to do with the rows of the embedding.
        data = replace(data, tokenizer=str(run_of(source) / TOKENIZER))
    return replace(config, init_from=str(source), data=data)


# Saving, identity ----------------------------------------------------------------------------------------------------


def plain(config: Config) -> dict[str, Any]:
    """The configuration as plain data."""
    return asdict(config)


def identity(config: Config) -> dict[str, Any]:
    """What makes two runs the same: every field that is not marked as a matter of carrying the run out."""
    kept = marked(config)
    if config.task == "vision":  # which reads nothing else of `data`
        kept["data"] = {"batch_size": config.data.batch_size}
    if config.data.sha256 is not None:
        kept["data"] = {**kept["data"], "files": None, "val_files": None}
    if config.optim.weighting == "micro_batches":
        # A mean of means depends on what is in each.
        kept["data"]["micro_batch_size"] = config.data.micro_batch_size
    return kept


def marked(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in fields(section) if f.metadata.get("identity", True)}
    return {name: marked(value) if is_dataclass(value) else value for name, value in values.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def save(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(to_yaml(config))
    partial.replace(folder / CONFIG)


def from_plain(values: Mapping[str, Any], path: Path) -> Config:
    """The configuration that `plain` gave, read from a file at `path`; fields it does not have keep their defaults.

    Raises:
        UserError: it is none.
    """
    try:
        return as_config(merged(values))
    except (*DAMAGED, TypeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a saved configuration: {first_line(error)}") from error


def merged(values: Any) -> DictConfig:
    """The defaults with `values`, of a file, in their place.

    Raises:
        ValueError: they are no mapping, or are to be taken from elsewhere.
    """
    if not isinstance(values, Mapping):
        raise ValueError("it holds no sections")
    if interpolated(values):
        raise ValueError(INTERPOLATED)
    return DictConfig(OmegaConf.merge(OmegaConf.structured(Config), values))


def load(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration saved in a run folder, amended by `overrides`; of the groups, `data` and `trainer` can change.

    Raises:
        UserError: no run folder, a damaged file, or overrides that mean nothing there.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder: it has no {CONFIG}")
    try:
        saved = merged(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
        at_fault = as_config(saved).problems()
    except (*DAMAGED, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a saved configuration: {first_line(error)}") from error
    wanted, saved_as = parse(overrides), saved.copy()
    foreign = [
        override
        for override in wanted
        if override.is_sweep_override()
        or override.is_delete()
        or override.package is not None
        or (override.key_or_group in groups() and override.key_or_group not in ("data", "trainer"))
    ]
    found = [f"{o.input_line}: a finished run takes data=, trainer= and section.field=value" for o in foreign]
    found += amend(saved, [override for override in wanted if override not in foreign])
    try:
        config = as_config(saved)
    except OmegaConfBaseException as error:
        raise UserError("\n".join([*found, first_line(error)])) from error
    found += [f"{path}: {problem}" if problem in at_fault else problem for problem in config.problems()]
    before = as_config(saved_as)
    for section, now in (("model", config.model), ("norm", config.norm)):
        if differing := differences(deciding(getattr(before, section)), deciding(now)):
            found.append(f"{section}: the weights of {folder} were trained otherwise ({differing}): leave it as it is")
    if found:
        raise UserError("\n".join(found))
    return config


def deciding(section: Any) -> Mapping[str, Any]:
    """What of a section decides what is computed."""
    return marked(section) if is_dataclass(section) else section


def changes_text(overrides: Sequence[str]) -> bool:
    """Whether overrides ask for other text than a run was trained on."""
    text = {"data", "data.source", "data.files", "data.val_files", "data.folder"}
    return any(override.key_or_group in text for override in parse(overrides))


def check_folder(config: Config) -> Path:
    """The run's folder, which may not exist yet.

    Raises:
        UserError: it holds a run of another configuration.
    """
    folder = config.folder
    differing = differences(identity(load(folder)), identity(config)) if (folder / CONFIG).exists() else ""
    if differing:
        raise UserError(f"{folder} holds a run of another configuration ({differing}): choose another name=")
    return folder


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Every field that differs, with both values; empty where none does."""
    before, now = flatten(there), flatten(here)
    return "; ".join(
        f"{name}={before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    )


def check_source(config: Config) -> None:
    """Compare the decoder with that of the run folder `init_from`, of which weights alone do not tell all.

    Raises:
        UserError: they compute something else.
    """
    if config.init_from is None or not (Path(config.init_from) / CONFIG).is_file():
        return

    def computed(run: Config) -> dict[str, Any]:
        # How weights are drawn does not matter, and the vocabulary is compared with the weights themselves.
        model = {k: v for k, v in marked(run.model).items() if k not in ("vocab_size", "init_std", "embedding_std")}
        return {"model": model, "norm": run.norm}

    if differing := differences(computed(load(Path(config.init_from))), computed(config)):
        raise UserError(
            f"init_from={config.init_from} has another decoder ({differing}): choose its model= and norm=, or name its "
            ".ckpt file to take the weights all the same"
        )


def claim(config: Config) -> Path:
    """Make the run's folder and save the configuration there; with `resume=false`, put an earlier run aside first.

    Raises:
        UserError: as `check_folder`.
    """
    folder = check_folder(config)
    if not config.resume and (folder / CONFIG).exists():
        number = next(n for n in itertools.count(1) if not Path(f"{folder}.previous-{n}").exists())
        folder.rename(f"{folder}.previous-{number}")
    save(config, folder)
    return folder
