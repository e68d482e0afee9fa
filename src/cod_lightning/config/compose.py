"""Composition of a configuration from the files of configs/ and experiments/ and from `key=value` overrides.

Hydra reads the overrides and merges the files that they choose. The values follow in one order: those of the experiment
at its scale, those of its row, those of the command line. `OmegaConf.update` sets them, as Hydra does, but after an
error continues with the next, so that a command shows all errors at once.
"""

from __future__ import annotations

import glob
import itertools
import math
import os
import pickle
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from cod_lightning.config.groups import SECTIONS, choices, config_folder, groups, read_yaml
from cod_lightning.config.no_effect import PREPARED_FIELDS, fields_of, may_be_without_effect, without_effect
from cod_lightning.config.paper_block import paper_block_errors, scale_errors
from cod_lightning.config.schema import Config, flatten, init_from_run
from cod_lightning.config.validate import config_errors
from cod_lightning.errors import UserError, first_line, nearest, one_line, root_cause
from cod_lightning.nn import strategies

CONTENT_OVERRIDES = {"model", "data", "data.source", "task"}
"""Overrides after which a run is no longer the default experiment."""
TEXT_OVERRIDES = {"data", "data.source", "data.files", "data.val_files", "data.folder"}
"""Overrides that choose the text."""
DOCUMENT_OVERRIDES = TEXT_OVERRIDES | PREPARED_FIELDS
"""Overrides that may choose other documents, on which another `bpe` would be trained."""
PATH_FIELDS = {
    *("data.files", "data.val_files", "data.root", "data.folder", "data.tokenizer", "images.folder"),
    *("init_from", "output"),
}
OMEGACONF_HINTS = {
    "is not Optional": "it needs a value, not null",
    "is not a ListConfig": "it needs a list, such as [0.9,0.95]",
}
"""Clearer words for errors of OmegaConf, by a part of them."""
INTERPOLATION = "interpolation (${...}) is not supported: write the value"
"""A run must not depend on the environment, and a folder from elsewhere must not read it."""
MAX_RUNS = 10_000
"""Runs of one sweep; a mistyped range is an error instead of running out of memory."""


# Overrides -----------------------------------------------------------------------------------------------------------


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse `key=value` words by Hydra's grammar.

    Raises:
        UserError: names every word that is not an override, or holds an interpolation such as ${oc.env:HOME}.
    """
    parser, parsed, errors = OverridesParser.create(), [], []
    for word in overrides:
        try:
            override = parser.parse_override(quote(word))
            if override.key_or_group in text_fields() and isinstance(override.value(), bool | int | float):
                override = parser.parse_override(quoted(word))  # name=2024_05_12 is no number
            parsed.append(override)
        except HydraException as error:
            errors.append(syntax_error(word, error))
        except ValueError as error:  # Python reads integers of at most 4,300 digits
            errors.append(f"{word.partition('=')[0]}: {first_line(error).partition(';')[0]}")
    errors += [f"{o.input_line}: {INTERPOLATION}" for o in parsed if has_interpolation(o.value())]
    if errors:
        raise UserError("\n".join(errors))
    return parsed


def syntax_error(word: str, error: HydraException) -> str:
    """The error of a word that Hydra's grammar does not accept, with the quotes that it may need."""
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word}: expected key=value, such as norm=pre_ln or trainer.max_steps=100"
    path = os.path.expanduser(value) if value.startswith("~/") else value
    quoted = shlex.quote(f"{key}={QuotedString(path, Quote.double).with_quotes()}")
    return f"{word}: {first_line(error)}; if the value is text, quote it: {quoted}"


def has_interpolation(value: Any) -> bool:
    """Whether OmegaConf would replace a part of a value."""
    if isinstance(value, Mapping):
        return any(has_interpolation(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(has_interpolation, value))
    return "${" in str(value)


def quote(word: str) -> str:
    """Quote existing paths and norm=package.module:function, in which Hydra's grammar gives characters a meaning."""
    key, _, value = word.partition("=")
    custom_norm = key == "norm" and ":" in value and not set(value) & set(",'\"{}[]()")
    return quoted(word) if custom_norm or is_existing_path(key.lstrip("+"), value) else word


def quoted(word: str) -> str:
    key, _, value = word.partition("=")
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}"


@cache
def text_fields() -> frozenset[str]:
    """The fields of a configuration that hold text."""
    sections = {"": Config, **{f"{name}.": hint for name, hint in get_type_hints(Config).items() if is_dataclass(hint)}}
    hints = {prefix + name: hint for prefix, kind in sections.items() for name, hint in get_type_hints(kind).items()}
    return frozenset(name for name, hint in hints.items() if hint in (str, str | None))


def is_existing_path(field: str, value: str) -> bool:
    """Whether the value of a field is the path of a file or folder, or a glob that matches one."""
    if field not in PATH_FIELDS or value == "null":
        return False
    is_list = value.startswith("[")
    try:
        return os.path.lexists(value) or (not is_list and any(glob.iglob(value, recursive=True)))
    except ValueError:  # NUL, or half a surrogate pair
        return False


def is_custom_norm(override: Override) -> bool:
    """Whether an override is norm=package.module:function."""
    return override.key_or_group == "norm" and ":" in str(override.value())


def sweep(overrides: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the comma-separated values in `overrides`, the last one varying fastest, as in Hydra.

    A run leaves out an override without effect in it, if it has one in another run (`leave_out`).

    Raises:
        UserError: a sweep without a list of values, such as interval(0, 1); one of no runs, or of too many.
    """
    expanded = [sweep_values(override) for override in parse(overrides)]
    if (count := math.prod(map(len, expanded))) > MAX_RUNS:
        raise UserError(f"a sweep has at most {MAX_RUNS:,} runs, and this has at least {count:,}: give fewer values")
    return leave_out(list(map(list, itertools.product(*expanded))))


def leave_out(runs: Sequence[list[str]]) -> Iterator[list[str]]:
    """The overrides of each run without those that have an effect in other runs only; runs equal by that are one."""
    words = list(dict.fromkeys(itertools.chain.from_iterable(runs)))
    fields = {word: set(fields_of(o.key_or_group, o.value())) for word, o in zip(words, parse(words), strict=True)}
    if not any(map(may_be_without_effect, set().union(*fields.values()))):
        yield from runs
        return
    unread = [{name for name, _ in without_effect(*compose_node(run)[:2])} for run in runs]
    in_every_run, seen = set.intersection(*unread), []
    for run, names in zip(runs, unread, strict=True):
        left = [word for word in run if not fields[word] <= names - in_every_run]
        if left == run or left not in seen:
            yield left
        seen.append(left)


def sweep_values(override: Override) -> list[str]:
    """The override with each value of its sweep, `MAX_RUNS` + 1 at most; the override itself without a sweep.

    Raises:
        UserError: it has no values, or is not a list of values.
    """
    word = override.input_line or ""
    if not override.is_sweep_override():
        return [word]
    try:
        values = list(itertools.islice(override.sweep_string_iterator(), MAX_RUNS + 1))
    except (HydraException, ValueError) as error:  # ValueError: range() with step 0
        raise UserError(
            f"{word}: {omegaconf_message(error)}; a sweep takes a,b,c, range(1,4) or choice(a,b)"
        ) from error
    if not values:
        raise UserError(f"{word} has no values; range(1,4) is 1,2,3")
    # Hydra escapes the colon of package.module:function.
    return [f"{override.get_key_element()}={value}".replace("\\:", ":") for value in values]


# Composition ---------------------------------------------------------------------------------------------------------


def compose(overrides: Sequence[str] = (), trains: bool = True) -> Config:
    """Compose the configuration of a command line; `trains` as for `config_errors`.

    Raises:
        UserError: all unknown fields, unknown choices, wrong types and invalid combinations.
    """
    node, parsed, errors = compose_node(overrides)
    errors += [error for _, error in without_effect(node, parsed)]
    return named_by_content(checked(node, errors, trains), {o.key_or_group: str(o.value()) for o in parsed})


def compose_node(overrides: Sequence[str]) -> tuple[DictConfig, list[Override], list[str]]:
    """The unchecked configuration of a command line, its overrides, and the errors of applying them."""
    parsed = parse(overrides)
    chosen = [o for o in parsed if o.key_or_group in groups() and not (is_custom_norm(o) or unsupported(o))]
    scales = [str(o.value()) for o in chosen if o.key_or_group == "scale"]
    files = tuple(o.input_line or "" for o in chosen if o.key_or_group != "scale")
    scale = scales[-1] if scales else None
    node = pickle.loads(merge_files(config_folder(), files, scale))
    # Overrides of `scales` and `paper` change the experiment's file, so they come before its scale and its row.
    fields = sorted((o for o in parsed if o not in chosen), key=lambda o: not is_custom_norm(o))
    apply_overrides(node, (o for o in fields if o.key_or_group.partition(".")[0] == "scales"))
    errors = apply_overrides(node, as_overrides(node.scales.get(node.scale)))
    apply_overrides(node, (o for o in fields if o.key_or_group.partition(".")[0] == "paper"))
    file_errors = experiment_errors(node)
    if scale is not None:
        errors += replaced_choices(pickle.loads(merge_files(config_folder(), files)), node, parsed)
    rows = [str(o.value()) for o in parsed if o.key_or_group == "row" and not unsupported(o) and o.value() is not None]
    if rows and not file_errors:
        row_errors = apply_overrides(node, row_overrides(node, rows[-1]))
        errors += [f"{node.experiment}: paper.rows.{rows[-1]}.set: {error}" for error in row_errors]
        if any(o.key_or_group == "norm" for o in parsed):
            errors.append("row= and norm= both choose the strategy: remove one")
    if {"norm", "norm.name"} <= {o.key_or_group for o in parsed}:
        errors.append("norm= and norm.name= both choose the strategy: remove norm.name=")
    return node, parsed, [*errors, *apply_overrides(node, fields), *file_errors]


def named_by_content(config: Config, chosen: Mapping[str, str]) -> Config:
    """The configuration, named by model and data, such as `tiny-files`, if these are chosen and no experiment is."""
    if chosen.keys() & {"experiments", "experiment"} or not chosen.keys() & CONTENT_OVERRIDES:
        return config
    model = chosen.get("model", config.experiment)
    source = config.images.source if config.task == "vision" else config.data.source
    return replace(config, experiment=f"{model}-{source}", description=f"{model} on {source}")


@lru_cache(maxsize=256)  # a report merges every experiment at every scale
def merge_files(folder: Path, words: tuple[str, ...], scale: str | None = None) -> bytes:
    """The files of configs/ that group overrides choose, merged by Hydra: a pickled `DictConfig`.

    Unpickling is six times as fast as copying. The file of a scale is the last in Hydra's order too. It is merged
    here, so that one reading of the other files, which takes most of the time, serves all scales.

    Raises:
        UserError: the files or choices do not fit together.
    """
    if scale is not None:
        node = pickle.loads(merge_files(folder, words))
        node.merge_with(read_yaml(f"scale/{scale}"))
        return pickle.dumps(node)
    if "schema.yaml" not in ConfigStore.instance().repo:
        ConfigStore.instance().store("schema", Config)
    with initialize_config_dir(str(folder.resolve()), version_base="1.3", job_name="cod_lightning"):
        try:
            node = hydra_compose("config", list(words))
        except (HydraException, OmegaConfBaseException) as error:
            message = omegaconf_message(error)  # "In FILE: ERROR raised while composing config:" goes on
            raise UserError(one_line(error) if message.endswith(":") else message) from error
        except yaml.YAMLError as error:
            raise UserError(one_line(error)) from error
    OmegaConf.set_struct(node, None)  # Hydra closes dictionaries too, which take any key here
    return pickle.dumps(node)


def replaced_choices(before: DictConfig, after: DictConfig, parsed: Sequence[Override]) -> list[str]:
    """Errors for choices such as model=llama_1b of which a scale replaces fields that the command line does not set.

    Args:
        before: the files that are chosen, without the scale.
        after: with it.
        parsed: the command line.
    """
    given = {override.key_or_group: str(override.value()) for override in parsed}
    errors, select = [], OmegaConf.select
    for group in given.keys() & (set(groups()) - {"scale", "experiments"}):
        content = read_yaml(f"{group}/{given[group]}") if given[group] in choices(group) else {}
        chosen = flatten({group: content} if group in SECTIONS else content)
        open_fields = {name: value for name, value in chosen.items() if name == group or name not in given}
        replaced = [name for name, value in open_fields.items() if select(before, name) == value != select(after, name)]
        if replaced:
            errors.append(
                f"scale={given['scale']} replaces {', '.join(replaced)} of {group}={given[group]}: remove one of the "
                "two, or set these fields"
            )
    return sorted(errors)


def experiment_errors(node: DictConfig) -> list[str]:
    """Errors in `paper` and `scales`, which the schema leaves open, after the name of the experiment.

    Raises:
        UserError: an interpolation in them that cannot be resolved.
    """
    try:
        paper: Any = OmegaConf.to_container(node.paper, resolve=True)
        scales = OmegaConf.to_container(node.scales, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{node.experiment}: {omegaconf_message(error)}") from error
    errors = [*paper_block_errors(paper), *scale_errors(scales)]
    if not errors and (unread := [name for name in paper.get("rows", ()) if not is_row_name(name)]):
        errors = [f"paper.rows: {name!r} cannot be read back from row={name}: rename it" for name in unread]
    return [f"{node.experiment}: {error}" for error in errors]


@cache
def is_row_name(name: str) -> bool:
    """Whether row=NAME chooses a row of this name, unlike null and a,b, which is a sweep."""
    try:
        return str(parse([f"row={name}"])[0].value()) == name
    except UserError:
        return False


def row_overrides(node: DictConfig, name: str) -> list[Override]:
    """The overrides that a row of the experiment sets.

    Raises:
        UserError: the experiment has no such row.
    """
    rows = node.paper.get("rows") or {}
    if name not in rows:
        hint = nearest(name, rows) if rows else f"{node.experiment} has none"
        raise UserError(f"row={name!r} does not exist: {hint}")
    return as_overrides(rows[name].get("set"))


def as_overrides(values: Any) -> list[Override]:
    """{"norm": "lns", "optim.lr": 0.1} of a YAML file as the overrides norm=lns optim.lr=0.1."""
    if not isinstance(values, Mapping):
        return []  # None, or an error that `experiment_errors` reports
    return parse([f"{key}={'null' if value is None else value}" for key, value in values.items()])


def unsupported(override: Override) -> str | None:
    """Why an override cannot be applied, None if it can."""
    key, word = override.key_or_group, override.input_line
    if override.is_delete():
        return f"{word}: a field cannot be deleted: set {key}= to a value"
    if override.is_sweep_override():
        return f"{word}: several values are a sweep, which needs fit -m"
    if override.package is not None:
        return f"{word}: package overrides (@) are not supported: use {key}="
    if key in groups() and override.is_add():
        return f"{word}: the group has a choice already: use {key}= without +"
    name = str(override.value())
    if key in groups() and not is_custom_norm(override) and name not in choices(key):
        hint = strategies.suggestion(name) if key == "norm" else nearest(name, choices(key))
        return f"{key}={name!r} does not exist: {hint}"
    return None


def apply_overrides(node: DictConfig, overrides: Iterable[Override]) -> list[str]:
    """Apply the overrides in order: set a field, or load the section that is chosen. Returns the error messages.

    Args:
        node: a `Config`, changed in place.
        overrides: `section.field=value`, or a choice of `SECTIONS`.
    """
    errors = []
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if reason := unsupported(override):
            errors.append(reason)
            continue
        if key in groups() and key not in SECTIONS:
            errors.append(f"{override.input_line}: choose {key}= on the command line")
            continue
        if is_custom_norm(override):
            value = {"name": value}
        elif key in groups():
            value = read_yaml(f"{key}/{value}")
        try:
            # A strategy does not keep the options of another.
            OmegaConf.update(node, key, value, merge=key != "norm")
        except (ConfigAttributeError, ConfigKeyError) as error:
            known = map(str, error.parent_node or ())
            errors.append(f"{error.full_key} is not a field: {nearest(str(error.key), known)}")
        except (OmegaConfBaseException, OverflowError) as error:  # OverflowError: an integer beyond any float
            errors.append(f"{override.input_line}: {omegaconf_message(error)}")
    return errors


def checked(node: DictConfig, errors: Sequence[str], trains: bool = True) -> Config:
    """A composed configuration as an object; `trains` as for `config_errors`.

    Raises:
        UserError: `errors`, and those of the configuration.
    """
    try:
        config = as_config(node)
    except OmegaConfBaseException as error:
        raise UserError("\n".join([*errors, omegaconf_message(error)])) from error
    if errors := [*errors, *config_errors(config, trains)]:
        raise UserError("\n".join(errors))
    return config


def as_config(node: DictConfig) -> Config:
    """The configuration as an object, with the tokenizer of `init_from`."""
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return init_from_run(config, Path(config.init_from)) if config.init_from else config


def row_of(config: Config) -> str | None:
    """The row of the experiment that a configuration computes: `row`, or else the first one with the same id."""
    if config.row is not None:
        return config.row
    for name in config.paper.get("rows", {}):
        node = OmegaConf.structured(config)
        if not apply_overrides(node, row_overrides(node, name)) and as_config(node).id == config.id:
            return name
    return None


def omegaconf_message(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain, after the field that OmegaConf's error is about."""
    field = getattr(error, "full_key", None)
    reason = first_line(root_cause(error))
    for part, clearer in OMEGACONF_HINTS.items():
        reason = clearer if part in reason else reason
    return f"{field}: {reason}" if field else reason
