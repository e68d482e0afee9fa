"""The run folder, and the configuration saved there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cod_lightning.config.compose import (
    DOCUMENT_OVERRIDES,
    INTERPOLATION,
    TEXT_OVERRIDES,
    apply_overrides,
    as_config,
    checked,
    has_interpolation,
    omegaconf_message,
    parse,
)
from cod_lightning.config.groups import FastLoader, groups
from cod_lightning.config.no_effect import without_effect
from cod_lightning.config.schema import (
    CHECKPOINTS,
    TOKENIZER,
    Config,
    flatten,
    identity,
    identity_fields,
    run_folder_of,
)
from cod_lightning.config.validate import config_errors
from cod_lightning.data.config import DataConfig, is_hub_name
from cod_lightning.errors import DAMAGED, UserError, no_permission, one_line
from cod_lightning.files import read_regular, write_atomic
from cod_lightning.nn.packaged_models import is_packaged

CONFIG = "config.yaml"
"""The composed configuration, in every run folder."""
REMEDY = "restore it from a copy; record.json of a finished run holds the same values, under config"
"""The remedy in an error about a damaged `config.yaml`."""
REQUIRED_SECTIONS = {"model", "norm", "data", "optim", "eval", "trainer", "paper", "scales"}
"""Sections that every version writes; `scales` is the last one."""
DEFAULTS = OmegaConf.structured(Config)
"""Built once, because it takes a third of the time to read a record."""


def to_yaml(config: Config) -> str:
    """A configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def save_config(config: Config, folder: Path) -> None:
    """Write a configuration into a run folder; create the folder if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, to_yaml(config))


@contextmanager
def translate_config_errors(path: Path) -> Generator[None]:
    """Turn the errors of a damaged configuration into a `UserError` that names its file."""
    try:
        yield
    except PermissionError as error:
        raise no_permission(error, path) from error
    except (*DAMAGED, TypeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = one_line(error) if isinstance(error, yaml.YAMLError) else omegaconf_message(error)
        remedy = f"; {REMEDY}" if path.name == CONFIG else ""
        raise UserError(f"{path}: not a saved configuration: {reason}{remedy}") from error


def config_from_dict(values: Any, path: Path) -> Config:
    """The configuration that `asdict` returned, read from the file at `path`; missing fields get their defaults.

    Raises:
        UserError: `values` is not a configuration.
    """
    with translate_config_errors(path):
        return as_config(with_defaults(values))


def with_defaults(values: Any) -> DictConfig:
    """The defaults of every field, replaced by `values`.

    Raises:
        ValueError: `values` is not a mapping, or holds an interpolation.
    """
    if not isinstance(values, Mapping):
        raise ValueError("not a mapping of sections")
    if has_interpolation(values):
        raise ValueError(INTERPOLATION)
    return DictConfig(OmegaConf.merge(DEFAULTS, values))


def read_config(folder: Path) -> tuple[DictConfig, Config]:
    """The configuration of a run folder, before validation; imports no code that it names.

    Raises:
        UserError: not a run folder, or a damaged file.
    """
    path = folder / CONFIG
    if not path.is_file():
        check_not_pretrained(folder, str(folder))
        raise UserError(f"{folder}: not a run folder: it has no {CONFIG}{runs_inside(folder)}")
    with translate_config_errors(path):
        text = read_regular(path)
        if not text.strip():
            raise ValueError("it is empty")
        events = [event for event in yaml.parse(text, Loader=FastLoader) if isinstance(event, yaml.NodeEvent)]
        if not events or not isinstance(events[0], yaml.MappingStartEvent):
            raise ValueError("not a mapping of sections")
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ValueError("YAML aliases (*) are not supported: write the value")  # few of them expand to any size
        values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        node = with_defaults(values)
        if missing := sorted(REQUIRED_SECTIONS.difference(values)):
            raise ValueError(f"truncated, it lacks {', '.join(missing)}")
        return node, as_config(node)


def runs_inside(folder: Path) -> str:
    """The end of an error about a folder that is not a run: names a run inside it; empty if there is none."""
    runs = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{CONFIG}"))
    return f"; it holds runs: name one, such as {runs[0]}" if runs else ""


def check_not_pretrained(path: Path, name: str) -> None:
    """Say how to make a run folder of a pretrained model.

    Raises:
        UserError: `path`, called `name` in the error, is one.
    """
    if path.suffix == ".gguf" or (path / "config.json").is_file() or is_packaged(name):
        raise UserError(
            f"{name}: a pretrained model, not a run folder: make one of it with `python -m cod_lightning import "
            f"{path} --output RUN` and use RUN"
        )


def load_config(folder: Path, overrides: Sequence[str] = (), trust_code: bool = False) -> Config:
    """The configuration of a run folder, changed by `overrides`.

    A tokenizer that was read from a folder is the run's own copy, as is that of documents which `overrides` choose
    unless they name one. A name that may be one of the hub stays, unless the working directory has such a folder.

    Args:
        folder: folder of the run.
        overrides: fields, and choices of the groups `data` and `trainer`.
        trust_code: import the strategy that the configuration names as package.module:function.

    Raises:
        UserError: not a run folder, a damaged file, invalid overrides, or code that is not trusted.
    """
    path = folder / CONFIG
    node, saved = read_config(folder)
    name, source, own_tokenizer = saved.data.tokenizer, saved.init_from, str((folder / TOKENIZER).absolute())
    is_of_source = source is not None and Path(name) == run_folder_of(Path(source)) / TOKENIZER
    is_folder = is_of_source or not is_hub_name(name) or Path(name).is_dir()
    if name != "bpe" and is_folder and not Path(name).is_file():
        node.data.tokenizer = own_tokenizer  # the folder may be gone, or hold another by now
    parsed = parse(overrides)
    chosen = {override.key_or_group for override in parsed}
    forget_text(node, chosen)
    check_trusted(saved, folder, trust_code)
    with translate_config_errors(path):
        saved_errors = config_errors(saved, trains=False)
    fixed = [o for o in parsed if o.key_or_group in groups() and o.key_or_group not in ("data", "trainer")]
    errors = [f"{o.input_line}: a trained run accepts data=, trainer= and section.field=value" for o in fixed]
    # Groups come first, as in `compose`: a group resets the fields before it.
    accepted = sorted((o for o in parsed if o not in fixed), key=lambda o: o.key_or_group not in groups())
    errors += apply_overrides(node, accepted)
    if saved.task == "language" and chosen & DOCUMENT_OVERRIDES and "data.tokenizer" not in chosen:
        node.data.tokenizer = own_tokenizer
    errors += [error for _, error in without_effect(node, parsed)]
    errors += decoder_changes(folder, saved, node)
    try:
        return checked(node, errors, trains=False)
    except UserError as error:
        lines = str(error).splitlines()
        raise UserError("\n".join(f"{path}: {e}" if e in saved_errors else e for e in lines)) from error


def forget_text(node: DictConfig, chosen: Set[str]) -> None:
    """Reset what describes the text of the run if `chosen` fields name another, which would be read with it."""
    stale = {"val_files", "folder", "sha256"} if chosen & TEXT_OVERRIDES else set()
    if chosen & {"data", "data.source"}:
        stale.add("files")
    if chosen & {"data", "data.source", "data.files"}:
        stale |= {"text_field", "encoding"}
    for name in stale:
        node.data[name] = getattr(DataConfig, name, None)


def check_trusted(saved: Config, folder: Path, trust_code: bool) -> None:
    """Check that a saved configuration names no code, or that its code is trusted and not in the run folder.

    Raises:
        UserError: it is not.
    """
    for name in sorted(value for value in saved.norm.values() if isinstance(value, str) and ":" in value):
        if not trust_code:
            raise UserError(
                f"{folder / CONFIG}: norm={name!r} would import code: pass --trust-code if you trust it and its module "
                "is installed"
            )
        paths = map(os.path.realpath, module_paths(name.partition(":")[0]))
        if any(Path(path).is_relative_to(os.path.realpath(folder)) for path in paths):
            raise UserError(
                f"norm={name!r} is in the run folder {folder}, from which no code is imported: move the module to a "
                "folder of your own"
            )


def module_paths(module: str) -> list[str]:
    """The files and folders from which an import would run code; imports nothing."""
    paths: list[str] = []
    search: Sequence[str] | None = None
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:number]), search)
        if spec is None:
            break
        search = list(spec.submodule_search_locations or ())
        paths += [path for path in (spec.origin, *search) if path is not None]
    return paths


def decoder_changes(folder: Path, saved: Config, node: DictConfig) -> list[str]:
    """Errors for changes of `model` and `norm`, to which the weights of a run belong."""
    try:
        config = as_config(node)
    except OmegaConfBaseException:
        return []  # `checked` reports it
    return [
        f"cannot change {section} of the trained run {folder} ({changes}): remove the override"
        for section, before, after in (
            ("model", identity_fields(saved.model), identity_fields(config.model)),
            ("norm", saved.norm, config.norm),
        )
        if (changes := describe_differences(before, after))
    ]


def check_folder(config: Config) -> Path:
    """The run's folder, which may not exist yet.

    Raises:
        UserError: it holds a run of another configuration, or files that a run would replace.
    """
    folder = config.folder
    if (folder / CONFIG).exists():
        _, saved = read_config(folder)
        if differing := describe_differences(identity(saved), identity(config)):
            raise UserError(f"{folder} holds a run of another configuration ({differing}): choose another name=")
    elif config.resume and not any((folder / CHECKPOINTS).glob("step-*.ckpt")):
        for name in (CHECKPOINTS, TOKENIZER):
            if any((folder / name).glob("*")):
                raise UserError(f"{folder} has {name}/, but it is no run: choose another name=, or move {name}/ aside")
    return folder


def describe_differences(saved: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Every field that differs, with both values; empty if none does."""
    before, after = flatten(saved), flatten(new)
    return "; ".join(
        f"{name}={before.get(name)!r} there, {after.get(name)!r} here"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    )


def check_init_from(config: Config) -> None:
    """Compare the decoder with that of the run folder `init_from`; the shapes of the weights do not show all settings.

    Raises:
        UserError: the decoders differ, or `init_from` is a model that no run trained.
    """
    if config.init_from is None:
        return
    if not (Path(config.init_from) / CONFIG).is_file():
        check_not_pretrained(Path(config.init_from), f"init_from={config.init_from}")
        if inside := runs_inside(Path(config.init_from)):
            raise UserError(f"init_from={config.init_from}: not a run folder{inside}")
        return
    source = read_config(Path(config.init_from))[1]
    if source.task != "language":
        raise UserError(f"init_from={config.init_from}: a run of task={source.task}: name a run of language")

    def decoder(run: Config) -> dict[str, Any]:
        # The initialisation does not matter, and the vocabulary is compared with the weights themselves.
        ignored = ("vocab_size", "init", "init_cutoff", "init_std", "embedding_std")
        model = {name: value for name, value in identity_fields(run.model).items() if name not in ignored}
        return flatten({"model": model, "norm": run.norm})

    theirs, ours = decoder(source), decoder(config)
    words = [
        f"{'norm' if name == 'norm.name' else name}={'null' if value is None else value}"
        for name, value in theirs.items()
        if ours.get(name) != value
    ]
    if theirs != ours:
        raise UserError(
            f"init_from={config.init_from} has another decoder: add {' '.join(words) or 'its norm='}, or name its "
            ".ckpt file to load the weights without this check"
        )


def create_run_folder(config: Config) -> Path:
    """Make the run's folder and save the configuration there; with `resume=false`, rename an earlier run first.

    Raises:
        UserError: as `check_folder`.
    """
    folder = check_folder(config)
    if not config.resume and any((folder / name).exists() for name in (CONFIG, CHECKPOINTS, TOKENIZER)):
        number = next(n for n in itertools.count(1) if not Path(f"{folder}.previous-{n}").exists())
        folder.rename(f"{folder}.previous-{number}")
    save_config(config, folder)
    return folder
