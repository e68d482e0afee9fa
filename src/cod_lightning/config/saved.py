"""The run folder and the configuration saved there."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cod_lightning.config.compose import INTERPOLATED, amend, as_config, first_line, groups, interpolated, parse
from cod_lightning.config.schema import Config, flatten, identity, identity_fields
from cod_lightning.config.validate import problems
from cod_lightning.errors import DAMAGED, UserError

CONFIG = "config.yaml"
"""The composed configuration, in every run folder."""


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def save(config: Config, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(to_yaml(config))
    partial.replace(folder / CONFIG)


def from_dict(values: Mapping[str, Any], path: Path) -> Config:
    """The configuration that `asdict` gave, read from a file at `path`; fields it does not have keep their defaults.

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
        at_fault = problems(as_config(saved))
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
    found += [f"{path}: {problem}" if problem in at_fault else problem for problem in problems(config)]
    before = as_config(saved_as)
    for section, now in (("model", config.model), ("norm", config.norm)):
        if differing := differences(deciding(getattr(before, section)), deciding(now)):
            found.append(f"{section}: the weights of {folder} were trained otherwise ({differing}): leave it as it is")
    if found:
        raise UserError("\n".join(found))
    return config


def deciding(section: Any) -> Mapping[str, Any]:
    """What of a section decides what is computed."""
    return identity_fields(section) if is_dataclass(section) else section


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


def check_init_from(config: Config) -> None:
    """Compare the decoder with that of the run folder `init_from`, of which weights alone do not tell all.

    Raises:
        UserError: they compute something else.
    """
    if config.init_from is None or not (Path(config.init_from) / CONFIG).is_file():
        return

    def computed(run: Config) -> dict[str, Any]:
        # How weights are drawn does not matter, and the vocabulary is compared with the weights themselves.
        model = {
            k: v for k, v in identity_fields(run.model).items() if k not in ("vocab_size", "init_std", "embedding_std")
        }
        return {"model": model, "norm": run.norm}

    if differing := differences(computed(load(Path(config.init_from))), computed(config)):
        raise UserError(
            f"init_from={config.init_from} has another decoder ({differing}): choose its model= and norm=, or name its "
            ".ckpt file to take the weights all the same"
        )


def create_run_folder(config: Config) -> Path:
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
