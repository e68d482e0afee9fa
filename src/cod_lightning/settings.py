"""Fields of configuration dataclasses with bounds and choices, and the check that reads them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any, get_args

from cod_lightning.errors import UserError, nearest

MAX_TOKENS = 2**22
"""Larger than any published vocabulary (1.0M)."""
BOUNDS = {
    "at_least": (operator.ge, "must be at least"),
    "above": (operator.gt, "must be greater than"),
    "at_most": (operator.le, "must be at most"),
    "below": (operator.lt, "must be less than"),
}


def setting(default: Any, **limits: Any) -> Any:
    """A dataclass field with a default value and the metadata of `limits`."""
    return field(default=default, metadata=metadata(**limits))


def metadata(*, runtime: bool = False, choices: Sequence[str] | None = None, **bounds: float) -> dict[str, Any]:
    """The metadata of a dataclass field.

    Args:
        runtime: the field does not change the result of a run, and is not part of its id.
        choices: the values of a string, or of the entries of a list.
        bounds: keys of `BOUNDS`; they hold for a number, for the entries of a list and for the values of a dictionary.
    """
    assert bounds.keys() <= BOUNDS.keys(), bounds
    return {"runtime": runtime, "choices": choices, "bounds": bounds}


def setting_errors(section: Any, prefix: str = "") -> list[str]:
    """One error for each value of a dataclass outside its bounds or choices; None is always allowed.

    Args:
        section: instance of a dataclass.
        prefix: its place in the configuration, such as "optim.".
    """
    errors = []
    for item in fields(section):
        name, value = f"{prefix}{item.name}", getattr(section, item.name)
        known = item.metadata.get("choices")
        if known is not None:
            for entry in value if isinstance(value, list) else [value]:
                errors += choice_errors(name, entry, known) if entry is not None else []
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        for key, entry in entries:
            entry_name = f"{name}.{key}" if key else name
            errors += bound_errors(entry_name, entry, item.metadata.get("bounds", {}))
    return errors


def choice_errors(name: str, value: str, known: Sequence[str]) -> list[str]:
    """The error of a value that is not a choice, as a list of one or none."""
    return [] if value in known else [f"{name}={value!r} does not exist: {nearest(str(value), known)}"]


def require_choice(name: str, value: str, known: Any) -> None:
    """Check that a value is one of `known`, a `Literal` type or some strings.

    Raises:
        UserError: as `choice_errors`.
    """
    for error in choice_errors(name, value, get_args(known) or tuple(known)):
        raise UserError(error)


def bound_errors(name: str, value: Any, bounds: Mapping[str, float]) -> list[str]:
    """One error for each bound that a number, or an entry of a list, does not keep."""
    numbers = value if isinstance(value, list) else [value]
    return [
        f"{name}={value} {BOUNDS[kind][1]} {bound}"
        for kind, bound in bounds.items()
        if not all(
            number is None or (isinstance(number, int | float) and BOUNDS[kind][0](number, bound)) for number in numbers
        )
    ]
