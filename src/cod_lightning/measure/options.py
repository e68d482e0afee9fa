"""Options of measures: names, types and bounds are those of the functions' keyword-only parameters.

A bound stands in the hint, as `Annotated[int, {"at_least": 2}]`, with the keys of `cod_lightning.settings.BOUNDS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cod_lightning.errors import UserError, nearest, shorten
from cod_lightning.settings import bound_errors, choice_errors

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
Positive = Annotated[int, {"at_least": 1}]
TO_DEPTH = {"to_depth": True}
"""The bound of numbers of blocks, or of layers, from 1 to the depth of the model; each may be given once."""
UpToDepth = Annotated[Sequence[int] | None, TO_DEPTH]


def require_options(function: Callable[..., Any], options: Mapping[str, Any], depth: int) -> None:
    """Check that options are choices, or finite and inside the bounds, of a function's hints; None is always allowed.

    Args:
        function: has the options.
        options: values by name.
        depth: of the model.

    Raises:
        UserError: names each that is not.
    """
    hints, errors = annotated_types(function), []
    for name, value in options.items():
        if value is None:
            continue
        kind, bounds = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name], {})
        kind, several = without_none(kind), isinstance(value, Sequence) and not isinstance(value, str)
        values = list(value) if several else [value]
        if several and not values:
            errors.append(f"{name}=[]: give at least one")
        elif get_origin(kind) is Literal:
            errors += choice_errors(name, value, get_args(kind))
        elif bounds == TO_DEPTH:
            if not set(values) <= set(range(1, depth + 1)) or len(set(values)) < len(values):
                expected = f"1 to {depth}, the number of blocks" + (", each once" if several else "")
                errors.append(f"{name}={values if several else value}: expected {expected}")
        elif isinstance(value, float) and not math.isfinite(value):
            errors.append(f"{name}={value} must be a finite number")
        else:
            errors += bound_errors(name, values if several else value, bounds)
    if errors:
        raise UserError("\n".join(errors))


@cache
def annotated_types(function: Callable[..., Any]) -> dict[str, Any]:
    """The hints of a function with their bounds."""
    return get_type_hints(function, include_extras=True)


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and types of the keyword-only parameters that can be given as text."""
    types = get_type_hints(function)
    return {
        name: types[name]
        for name, parameter in signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and can_parse(types[name])
    }


def parse_options(words: Iterable[str], known: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Parse words such as `probes=32`, `lns=true` or `sizes=[1,2,4]`.

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
