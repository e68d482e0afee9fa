"""Options of measures as words of a command line: their names and types are those of the functions' own keywords."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from cod_lightning.errors import UserError, nearest

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


def one_of(known: Any, **options: Any) -> None:
    """Refuse values that are not among those of a `Literal`.

    Raises:
        UserError: names the option and the values that it knows.
    """
    for name, value in options.items():
        if value not in get_args(known):
            raise UserError(f"{name}={value!r}: {nearest(str(value), get_args(known))}")


def options_of(measure: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only options of a function that a word can give, with their types."""
    types = get_type_hints(measure)
    return {
        name: types[name]
        for name, parameter in signature(measure).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and readable(types[name])
    }


def read_options(words: Iterable[str], known: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Words such as `probes=32`, `exact=true` or `sizes=[1,2,4]` as values of their types.

    Args:
        words: `option=value` each.
        known: from `options_of`.
        command: whose options they are, for errors.

    Raises:
        UserError: names every word that is no option, or whose value is not of its type.
    """
    options, found = {}, []
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            other = nearest(name, known) if known else "it has none"
            found.append(f"{name} is not an option of {command}: {other}")
            continue
        try:
            options[name] = read(known[name], text)
        except ValueError as error:
            found.append(f"{word}: {error}")
    if found:
        raise UserError("\n".join(found))
    return options


def readable(kind: Any) -> bool:
    """Whether `read` has values of this type: numbers, words, true and false, sequences of them, or None."""
    kind = unless_none(kind)
    return readable(get_args(kind)[0]) if get_origin(kind) is Sequence else kind in EXPECTED or is_choice(kind)


def read(kind: Any, text: str) -> Any:
    """The value of a type that a text spells.

    Raises:
        ValueError: it spells none; says what would.
    """
    plain = unless_none(kind)
    if plain is not kind and text.lower() in ("none", "null"):
        return None
    if get_origin(plain) is Sequence:
        parts = text.removeprefix("[").removesuffix("]").split(",")
        return [read(get_args(plain)[0], part.strip()) for part in parts]
    if is_choice(plain):
        if text not in get_args(plain):
            raise ValueError(nearest(text, get_args(plain)))
        return text
    try:
        return {"true": True, "false": False}[text.lower()] if plain is bool else plain(text)
    except (KeyError, ValueError):
        raise ValueError(f"expected {EXPECTED[plain]}") from None


def is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


def unless_none(kind: Any) -> Any:
    """The X of X | None; any other type as it is."""
    others = [part for part in get_args(kind) if part is not NoneType]
    return others[0] if get_origin(kind) in (Union, UnionType) and len(others) == 1 else kind
