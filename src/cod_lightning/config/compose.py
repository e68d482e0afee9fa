"""Composition by Hydra from the files of configs/ and experiments/ and from the command line."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cod_lightning.config.schema import Config, init_from_run
from cod_lightning.config.validate import problems
from cod_lightning.errors import UserError, nearest


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
    found += problems(config)
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
    if found := found or problems(changed):
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
    return config if config.init_from is None else init_from_run(config, Path(config.init_from))


def changes_text(overrides: Sequence[str]) -> bool:
    """Whether overrides ask for other text than a run was trained on."""
    text = {"data", "data.source", "data.files", "data.val_files", "data.folder"}
    return any(override.key_or_group in text for override in parse(overrides))
