"""The files of configs/ and their defaults, read without Hydra, so that --help is fast."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cod_lightning.config.schema import Config, flatten
from cod_lightning.errors import UserError, one_line

SECTIONS = ("model", "norm", "data", "optim", "trainer")
"""Groups whose files hold one section of the configuration."""
FIELDS_OF_FILES = ("experiment", "description", "row", "paper", "scales")
"""Fields that the files of an experiment set."""
WIDTH = 120


class FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """Reads 1e-3 and 1.5e3 as numbers, as Hydra does. Deeply nested brackets take the loader in Python minutes."""


FastLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def config_folder() -> Path:
    """configs/: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def choices(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@cache
def groups() -> list[str]:
    """The config groups: the folders of configs/."""
    return sorted(path.name for path in config_folder().iterdir() if path.is_dir())


def fields_and_groups() -> set[str]:
    """The first part of every valid override."""
    return {*groups(), *(field.name for field in fields(Config))}


def read_yaml(name: str) -> dict[str, Any]:
    """A file of configs/ as a dictionary.

    Raises:
        UserError: it is not YAML, or not a mapping.
    """
    path = config_folder() / f"{name}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), FastLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a mapping of fields")
    return values


def default_choices() -> dict[str, str]:
    """The choice of every group in a run without overrides, in the order in which the files follow each other."""
    chosen: dict[str, str] = {}
    for entry in read_yaml("config")["defaults"]:
        chosen |= entry if isinstance(entry, dict) else {}
    for entry in read_yaml(f"experiments/{chosen['experiments']}").get("defaults", []):
        chosen |= {key.removeprefix("override /"): name for key, name in entry.items()}
    return chosen


def default_values() -> dict[str, Any]:
    """Every field of a run without overrides, such as {"optim.lr": 0.0015}."""
    values = flatten(asdict(Config()))
    for group, name in default_choices().items():
        content = read_yaml(f"{group}/{name}")
        content.pop("defaults", None)
        values |= flatten({group: content} if group in SECTIONS else content)
    return values


def choices_of_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The choices of every field that has some, by the field's name."""
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from choices_of_fields(value, f"{prefix}{item.name}.")
        elif item.metadata.get("choices"):
            yield f"{prefix}{item.name}", ", ".join(item.metadata["choices"])
        elif isinstance(value, bool):
            yield f"{prefix}{item.name}", "true, false"


def describe_settings() -> str:
    """The groups and fields of the configuration, each with its default and its choices, for --help."""
    chosen = default_choices()
    lines = ["groups with their defaults and choices; fit --cfg prints what they set:"]
    for group, name in chosen.items():
        text = f"  {f'{group}={name}':<40} {', '.join(choices(group))}"
        lines.append(textwrap.fill(text, WIDTH, subsequent_indent=" " * 43))
    lines += ["", "fields with their values in a run without overrides, and choices:"]
    known = dict(choices_of_fields(Config()))
    for name, value in default_values().items():
        if name not in (*chosen, *FIELDS_OF_FILES, "norm.name"):
            word = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"  {f'{name}={word}':<40} {known.get(name, '')}".rstrip())
    return "\n".join(lines) + "\n"
