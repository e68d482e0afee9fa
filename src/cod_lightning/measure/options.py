"""Options of measures: names, types and bounds are those of the functions' keyword-only parameters.

Bounds of a number, or of the numbers of a sequence, stand in the hint by their names in `settings.BOUNDS`, as in
`Annotated[int, ("at_least", 2)]`. They are pairs and not dictionaries, which an optional hint cannot hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cod_lightning.errors import UserError, nearest, shorten
from cod_lightning.settings import bound_errors, choice_errors

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
PYTHON_TYPES = {int: Integral, float: Real, bool: bool, str: str}
"""Python's type for each type of an option; True is no number here."""


Positive = Annotated[int, ("at_least", 1)]
UpToDepth = Annotated[Sequence[int] | None, ("to_depth", True)]
"""Numbers of blocks, or of layers, from 1 to the depth of the model; each may be given once."""


def to_python(value: Any) -> Any:
    """The value of an option with numbers of Python, which JSON can hold, for those of NumPy and torch.

    Anything that can be iterated over but text becomes a list.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(value, Iterable) and not isinstance(value, str)
    return [to_python(each) for each in value] if several else value


def require_options(function: Callable[..., Any], options: Mapping[str, Any], depth: int) -> None:
    """Check that options have the types of a function's hints, and are choices, or finite and inside the bounds.

    Raises:
        UserError: names each that is not.
    """
    errors = []
    for name, given in options.items():
        kind, bounds, optional = bounded_type(function, name)
        value = to_python(given)
        several = isinstance(value, list)
        values = value if several else [value]
        if value is None:
            errors += [] if optional else [f"{name}=None: give a value, or leave it out"]
        elif several and not values:
            errors.append(f"{name}=[]: give at least one")
        elif (expected := expected_type(kind, value)) is not None:
            errors.append(f"{name}={value!r}: expected {expected}")
        elif get_origin(kind) is Literal:
            errors += choice_errors(name, value, get_args(kind))
        elif bounds.get("to_depth"):
            if not all(each in range(1, depth + 1) for each in values) or len(set(values)) < len(values):
                expected = f"1 to {depth}, the number of blocks" + (", each once" if several else "")
                errors.append(f"{name}={values if several else value}: expected {expected}")
        elif isinstance(value, float) and not math.isfinite(value):
            errors.append(f"{name}={value} must be a finite number")
        else:
            errors += bound_errors(name, values if several else value, bounds)
    if errors:
        raise UserError("\n".join(errors))


def expected_type(kind: Any, value: Any) -> str | None:
    """The expected type in words, None if the value has it."""
    of_several, several = get_origin(kind) is Sequence, isinstance(value, list)
    plain = get_args(kind)[0] if of_several else kind
    if plain not in EXPECTED:
        return None
    values = value if several and of_several else [value]
    right = all(
        isinstance(each, PYTHON_TYPES[plain]) and (plain is bool or not isinstance(each, bool)) for each in values
    )
    if right and several == of_several:
        return None
    return f"a list, each {EXPECTED[plain]}" if of_several else EXPECTED[plain]


@cache
def bounded_type(function: Callable[..., Any], name: str) -> tuple[Any, dict[str, Any], bool]:
    """The type of a parameter without None, its bounds, and whether it may be None."""
    hint = get_type_hints(function, include_extras=True)[name]
    bounds = dict(each for kind in (hint, *get_args(hint)) for each in getattr(kind, "__metadata__", ()))
    kind = get_type_hints(function)[name]
    return without_none(kind), bounds, without_none(kind) is not kind


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
