"""Look up a strategy by its name or as `package.module:function`, check its options and build its blocks."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from cod_lightning.errors import UserError, nearest, without_breaks
from cod_lightning.nn.spec import BLOCK_COEFFICIENTS, COEFFICIENTS, BlockSpec, spec_problems

Strategy = Callable[..., BlockSpec]
STRATEGIES: dict[str, Strategy] = {}
"""Registered strategies by name; those of this package are in `strategies`."""


def register(function: Strategy) -> Strategy:
    """Register a strategy under the name of its function.

    Raises:
        UserError: the function has no name, as a partial one, or another function is registered under it.
    """
    name = getattr(function, "__name__", None)
    if name is None:
        raise UserError(f"{function!r} has no name to be registered under: define a function with def")
    other: Any = STRATEGIES.get(name, function)
    if other.__module__ not in (function.__module__, "__main__"):  # norm=script:mine imports the script again
        raise UserError(f"norm={name!r} is a strategy of {other.__module__}: give the function another name")
    STRATEGIES[name] = function
    return function


def resolve(name: str, field: str = "norm") -> Strategy:
    """The registered strategy `name`, or the function at `package.module:function`; errors name the `field`.

    Raises:
        UserError: no such strategy, module or function.
    """
    if callable(name):
        raise UserError(f"{field} is a function: give its place as text, such as {place_of(name)!r}")
    if not isinstance(name, str):
        raise UserError(f"{field}={name!r} is not the name of a strategy: {nearest(str(name), STRATEGIES)}")
    if ":" not in name:
        if name not in STRATEGIES:
            raise UserError(f"{field}={name!r} is not a strategy: {suggestion(name)}")
        return STRATEGIES[name]
    module_name, _, function_name = name.partition(":")
    try:
        strategy = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UserError(
            f"{field}={name!r}: {type(error).__name__}: {without_breaks(str(error))}; expected an importable "
            "package.module:function"
        ) from error
    if not callable(strategy):
        raise UserError(f"{field}={name!r} is not a function (layer, depth, **options) -> BlockSpec")
    return strategy


def place_of(function: Callable[..., Any]) -> str:
    """`module:name` of a function; a form to fill in for one of a script, a lambda or a partial."""
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", "")
    return f"{module}:{name}" if name.isidentifier() and module != "__main__" else "package.module:function"


def suggestion(name: str) -> str:
    """A hint for a strategy that does not exist; a dotted name may be a function."""
    module, _, function = name.rpartition(".")
    if module and all(part.isidentifier() for part in name.split(".")):
        return f"did you mean '{module}:{function}', a function of yours?"
    return nearest(name, STRATEGIES)


def default_options(strategy: Strategy) -> dict[str, Any]:
    """The options of a strategy by name, with their defaults.

    Raises:
        UserError: the function has no readable signature, like some functions written in C.
    """
    try:
        parameters = list(inspect.signature(strategy).parameters.values())[2:]
    except (TypeError, ValueError) as error:
        raise UserError(f"norm: {error}; expected a function (layer, depth, **options) -> BlockSpec") from error
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def check_options(name: str, strategy: Strategy, options: Mapping[str, Any]) -> None:
    """Check names and types of `options`, which may be those of the base strategy.

    Raises:
        UserError: an unknown option, or one that has another type than its default.
    """
    known = default_options(strategy)
    if "base" in known and (base := options.get("base", known["base"])) not in (name, None):
        known = default_options(resolve(base, "norm.base")) | known
    for option, value in options.items():
        if option not in known:
            hint = nearest(option, known) if known else "it has none"
            raise UserError(f"norm.{option} is not an option of {name!r}: {hint}")
        default = known[option]
        types = (int, float) if isinstance(default, float) else type(default)
        same = isinstance(value, types) and isinstance(default, bool) == isinstance(value, bool)
        if isinstance(default, int | float | str) and not same:
            raise UserError(f"norm.{option}={value!r} has the wrong type: expected one like {default!r}")


def build(name: str, layer: int, depth: int, options: Mapping[str, Any]) -> BlockSpec:
    """Block `layer` of `depth` under the strategy `name`.

    Raises:
        UserError: an unknown strategy, an unsupported option, an exception of the strategy, or a result that is not a
            BlockSpec with coefficients of the declared types.
    """
    strategy = resolve(name)
    check_options(name, strategy, options)
    try:
        inspect.signature(strategy).bind(layer, depth, **options)
    except TypeError as error:
        raise UserError(f"norm={name!r} cannot be called as (layer, depth, **options): {error}") from error
    try:
        spec = strategy(layer, depth, **options)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's function may raise anything
        where, reason = f"layer={layer}, depth={depth}", without_breaks(str(error))
        raise UserError(
            f"norm={name!r} raised {type(error).__name__} for {where}: {reason}{coefficient_hint(error)}"
        ) from error
    if not isinstance(spec, BlockSpec):
        raise UserError(f"norm={name!r} returned {type(spec).__name__}, expected a BlockSpec")
    if problems := spec_problems(spec):
        raise UserError("\n".join(f"norm={name!r} returned {problem}, for layer={layer}" for problem in problems))
    return spec


def coefficient_hint(error: BaseException) -> str:
    """The nearest coefficient, if `error` is about one that does not exist."""
    unknown = re.search(r"^(Block|Sublayer)Spec.* unexpected keyword argument '(\w+)'", str(error))
    if unknown is None:
        return ""
    return f"; {nearest(unknown[2], BLOCK_COEFFICIENTS if unknown[1] == 'Block' else COEFFICIENTS)}"


def norm_section(norm: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The section `norm` of a strategy that is given by its name or by its section."""
    return {"name": norm} if isinstance(norm, str) else norm


def build_all(norm: str | Mapping[str, Any], depth: int) -> list[BlockSpec]:
    """The specs of blocks 1..depth.

    Args:
        norm: the name of a strategy; or a `norm` section: `name`, and the options of the strategy as further entries.
        depth: number of blocks.

    Raises:
        UserError: as `build`, or a section without `name`.
    """
    norm = norm_section(norm)
    options = {key: value for key, value in norm.items() if key != "name"}
    if "name" not in norm:
        raise UserError(f"norm.name is missing: {nearest('', STRATEGIES)}")
    return [build(norm["name"], layer, depth, options) for layer in range(1, depth + 1)]
