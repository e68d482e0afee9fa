"""Options of measures on the command line: names and types are those of the functions' keyword-only parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cod_lightning.errors import UserError, nearest, shorten
from cod_lightning.settings import bound_errors

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def require_positive(**options: int) -> None:
    """Check that options are at least 1.

    Raises:
        UserError: names the first that is not.
    """
    for name, value in options.items():
        if value < 1:
            raise UserError(f"{name}={value}: expected at least 1")


def require_limits(limits: Mapping[str, Mapping[str, float]], **options: float | None) -> None:
    """Check that options are finite and inside `limits`, the bounds of each by name; None is always allowed.

    Raises:
        UserError: names each that is not.
    """
    errors = []
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            errors.append(f"{name}={value} must be a finite number")
        else:
            errors += bound_errors(name, value, limits[name])
    if errors:
        raise UserError("\n".join(errors))


def select_layers(model: Any, layers: Sequence[int] | None) -> list[int]:
    """The layers that an option selects; None selects all.

    Raises:
        UserError: a layer does not exist or is given twice, or there is none.
    """
    if layers is None:
        return list(range(1, model.depth + 1))
    if unknown := [layer for layer in layers if not 1 <= layer <= model.depth]:
        raise UserError(f"layers={list(layers)}: {model.name} has layers 1 to {model.depth}, not {unknown[0]}")
    if not layers or len(set(layers)) < len(layers):
        raise UserError(f"layers={list(layers)}: give at least one layer, and each layer once")
    return list(layers)


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and types of the keyword-only parameters that can be given as text."""
    types = get_type_hints(function)
    return {
        name: types[name]
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and can_parse(types[name])
    }


def parse_options(words: Iterable[str], known: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Parse words such as `probes=32`, `exact=true` or `sizes=[1,2,4]`.

    Args:
        words: `option=value` each.
        known: names and types, from `options_of`.
        command: the command that has the options, for errors.

    Raises:
        UserError: names every word whose option is unknown or whose value has the wrong type.
    """
    options, problems = {}, []
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            hint = nearest(name, known) if known else "it has no options"
            problems.append(f"{name} is not an option of {command}: {hint}")
            continue
        try:
            options[name] = parse(known[name], text)
        except ValueError as error:
            problems.append(f"{shorten(word)}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return options


def can_parse(kind: Any) -> bool:
    """Whether `parse` supports a type: numbers, strings, booleans, `Literal`, sequences of them, and None."""
    kind = without_none(kind)
    if get_origin(kind) is Sequence:
        return can_parse(get_args(kind)[0])
    return kind in EXPECTED or get_origin(kind) is Literal


def parse(kind: Any, text: str) -> Any:
    """Convert text to a type.

    Raises:
        ValueError: says what was expected.
    """
    plain = without_none(kind)
    if plain is not kind and text.lower() in ("none", "null"):
        return None
    if get_origin(plain) is Sequence:
        items = text.removeprefix("[").removesuffix("]").split(",")
        return [parse(get_args(plain)[0], item.strip()) for item in items]
    if get_origin(plain) is Literal:
        if text not in get_args(plain):
            raise ValueError(nearest(text, get_args(plain)))
        return text
    try:
        value = {"true": True, "false": False}[text.lower()] if plain is bool else plain(text)
    except (KeyError, ValueError):
        raise ValueError(f"expected {EXPECTED[plain]}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    if plain is int and abs(value) >= 2**63:
        raise ValueError("too large: an integer has 64 bits")
    return value


def without_none(kind: Any) -> Any:
    """X for X | None; other types unchanged."""
    others = [part for part in get_args(kind) if part is not NoneType]
    return others[0] if get_origin(kind) in (Union, UnionType) and len(others) == 1 else kind
