"""Read JSON into dataclasses; an error names the field.

@dataclass(frozen=True)
class Chunk:
    name: str
    rows: int

@dataclass(frozen=True)
class Split:
    chunks: tuple[Chunk, ...]
    loss: float | None = None  # a field with a default may be missing

read_json(path, Split, "prepare the set again")  # UserError: "train.json: chunks[0].rows: expected an integer, ..."
from_json(Split, json.loads(text))  # the same check on a parsed value; ValueError without the file name
read_json(path, dict[str, Any], "run again")  # only the outermost type is checked
"""

from __future__ import annotations

import json
import math
import types
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from cod_lightning.errors import DAMAGED, UserError, first_line, no_permission
from cod_lightning.files import read_regular

T = TypeVar("T")


def read_json(path: Path, kind: type[T], remedy: str, *, ignore_unknown: bool = False) -> T:
    """Read the JSON file at `path` as a value of type `kind`; see `from_json`.

    Args:
        path: a UTF-8 file.
        kind: a dataclass, or another type that `from_json` supports.
        remedy: tells the user what to do with a bad file; the last part of the message.
        ignore_unknown: leave out the fields that `kind` does not have.

    Raises:
        UserError: the file is missing, is not JSON, or has a missing, unknown or wrongly typed field.
    """
    try:
        return from_json(kind, json.loads(read_regular(path)), ignore_unknown=ignore_unknown)
    except PermissionError as error:
        raise no_permission(error, path) from error
    except json.JSONDecodeError as error:
        problem = f"not JSON at line {error.lineno} column {error.colno}" if error.doc.strip() else "empty"
        raise UserError(f"{path}: {problem}; {remedy}") from error
    except DAMAGED as error:
        raise UserError(f"{path}: {first_line(error)}; {remedy}") from error


def from_json(kind: type[T], value: Any, *, ignore_unknown: bool = False) -> T:
    """Convert a value of `json.loads` to type `kind`.

    Supports dataclasses, unions, `Literal`, `list[X]`, `tuple[X, ...]`, `dict[str, X]`, the types of JSON and `Any`.
    A `float` accepts an integer, and null as NaN, which JSON cannot express.

    Raises:
        ValueError: names the first field that is missing, unknown or wrongly typed.
    """
    return cast(T, _convert(kind, value, "", ignore_unknown))


def _convert(kind: Any, value: Any, field: str, ignore_unknown: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in arguments:
            return None
        first, *others = (option for option in arguments if option is not types.NoneType)
        for option in others:
            with suppress(ValueError):
                return _convert(option, value, field, ignore_unknown)
        return _convert(first, value, field, ignore_unknown)
    if is_dataclass(kind) and isinstance(value, dict):
        return _convert_dataclass(kind, value, field, ignore_unknown)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_convert(arguments[0], item, f"{field}[{n}]", ignore_unknown) for n, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, _join(field, key), ignore_unknown) for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        with suppress(OverflowError):
            return float(value)
    if value in arguments if origin is Literal else type(value) is kind:
        return value
    raise ValueError(f"{field + ': ' if field else ''}expected {_describe(kind)}, got {repr(value)[:80]}")


def _describe(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false", list: "a list"}
    return names.get(origin or kind, "a list" if origin is tuple else "an object")


def _convert_dataclass(kind: Any, value: dict[str, Any], field: str, ignore_unknown: bool) -> Any:
    hints, required = _schema(kind)
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{_join(field, missing[0])} is missing")
    if not ignore_unknown and (unknown := sorted(value.keys() - hints.keys())):
        raise ValueError(f"{_join(field, unknown[0])} is unknown")
    known = {name: item for name, item in value.items() if name in hints}
    return kind(**{n: _convert(hints[n], item, _join(field, n), ignore_unknown) for n, item in known.items()})


@cache
def _schema(kind: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the types of the fields of a dataclass, and the fields without a default."""
    required = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    return get_type_hints(kind), required


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name
