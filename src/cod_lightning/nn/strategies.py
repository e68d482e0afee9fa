"""Normalisation strategies: every one is a row of data for one equation.

    y = gate( sum_norm( skip * x + branch_scale * branch_norm( f( gain * pre_norm(x) ) ) ) )

holds for both sub-layers of a block, f being attention or the feed-forward network. A strategy is a function
`(layer, depth, **options) -> BlockSpec`; `layer` counts blocks from 1, `depth` is their number L. To add one:

    from cod_lightning.nn.strategies import block

    def my_strategy(layer, depth, power=0.25):
        return block(gain=layer**-power)

and choose it with `norm=my_package.my_module:my_strategy norm.power=0.5`.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

from cod_lightning.errors import UserError, nearest


@dataclass(frozen=True)
class SublayerSpec:
    """The coefficients of the equation for one sub-layer, and how its parameters start.

    All numbers are constants of the forward pass unless a field says that they are learned; a constant is a Python
    float, never a buffer: it has no dtype to be rounded to and nothing to lose when a model leaves the meta device.
    """

    pre_norm: bool = True
    gain: float = 1.0
    """Multiplies the output of the pre-norm (LayerNorm Scaling)."""
    input_scale: float = 1.0
    """Multiplies the input of the pre-norm."""
    pre_norm_weight: float = 1.0
    """Initial value of the pre-norm's weight."""
    groups: int = 1
    """The pre-norm takes its statistics over `groups` equal parts of the hidden dimension."""
    branch_norm: bool = False
    branch_scale: float = 1.0
    learned_branch_scale: Literal["no", "scalar", "channel"] = "no"
    """A parameter that starts at `branch_scale` instead of the constant: one number, or one per channel."""
    skip: float = 1.0
    learned_skip: bool = False
    """A parameter [hidden_size] instead of the constant, set by profiling at initialisation (Admin)."""
    sum_norm: bool = False
    gate: Literal["no", "output", "input"] = "no"
    """GPAS: h - silu(a) * stop_gradient(h) with one learned a per block, on the output y or on the x of the skip."""
    output_init: float = 1.0
    """Multiplies the initial standard deviation of the sub-layer's last projection (o_proj, down_proj)."""
    xavier: float | None = None
    """Xavier-normal initialisation with this gain on v, o and the feed-forward weights, and gain 1 on q and k."""


@dataclass(frozen=True)
class BlockSpec:
    """The two sub-layers of a block; `entry_norm` normalises the block's input before them (Peri-LN's embeddings)."""

    attention: SublayerSpec
    ffn: SublayerSpec
    entry_norm: bool = False

    @property
    def sublayers(self) -> tuple[SublayerSpec, SublayerSpec]:
        return self.attention, self.ffn

    def replace(self, **changes: Any) -> BlockSpec:
        """The same block with `changes` made to both sub-layers."""
        return replace(self, attention=replace(self.attention, **changes), ffn=replace(self.ffn, **changes))


Strategy = Callable[..., BlockSpec]
STRATEGIES: dict[str, Strategy] = {}


def register(function: Strategy) -> Strategy:
    """Make a strategy known under its function's name."""
    STRATEGIES[getattr(function, "__name__", "")] = function
    return function


def block(**both: Any) -> BlockSpec:
    """A block whose sub-layers share the same coefficients."""
    return BlockSpec(SublayerSpec(**both), SublayerSpec(**both))


def choice(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"norm.{option}={value!r} does not exist: {nearest(str(value), known)}")


def number(option: str, value: Any) -> float:
    if not is_number(value):
        raise UserError(f"norm.{option}={value!r} must be a number")
    return value


# Where the norm stands -----------------------------------------------------------------------------------------------


@register
def pre_ln(layer: int, depth: int) -> BlockSpec:
    """X + f(LN(x)); eq. 2-3 of the paper."""
    return block()


@register
def post_ln(layer: int, depth: int) -> BlockSpec:
    """LN(x + f(x))."""
    return block(pre_norm=False, sum_norm=True)


@register
def sandwich_ln(layer: int, depth: int) -> BlockSpec:
    """X + LN(f(LN(x)))."""
    return block(branch_norm=True)


@register
def peri_ln(layer: int, depth: int, embedding_norm: bool = True) -> BlockSpec:
    """X + LN(f(LN(x))), by default with the embeddings normalised as well."""
    return replace(sandwich_ln(layer, depth), entry_norm=embedding_norm and layer == 1)


@register
def mix_ln(layer: int, depth: int, fraction: float = 0.25) -> BlockSpec:
    """Post-LN in the first `fraction` of the blocks, Pre-LN in the others."""
    if not 0 <= fraction <= 1:
        raise UserError(f"norm.fraction={fraction} must lie between 0 and 1")
    return (post_ln if layer <= fraction * depth else pre_ln)(layer, depth)


@register
def group_ln(layer: int, depth: int, groups: int = 8) -> BlockSpec:
    """Pre-LN whose norms take their statistics per group of channels. The paper gives no number of groups."""
    if groups < 1:
        raise UserError(f"norm.groups={groups} must be at least 1")
    return block(groups=groups)


@register
def deep_norm(layer: int, depth: int) -> BlockSpec:
    """LN(alpha x + f(x)), alpha = (2L)^(1/4); Xavier gain beta = (8L)^(-1/4) on v, o and the feed-forward weights."""
    return block(pre_norm=False, sum_norm=True, skip=(2 * depth) ** 0.25, xavier=(8 * depth) ** -0.25)


@register
def deep_norm_released(layer: int, depth: int) -> BlockSpec:
    """DeepNorm with the constants of the released code: alpha = 64^(1/4) at every depth, and beta inverted."""
    return deep_norm(layer, depth).replace(skip=64**0.25, xavier=(8 * depth) ** 0.25)


@register
def admin(layer: int, depth: int) -> BlockSpec:
    """LN(w * x + f(x)), w learned, set by profiling at initialisation: w_i^2 = 1 + sum of Var[f_j] over j < i."""
    return block(pre_norm=False, sum_norm=True, learned_skip=True)


# LayerNorm Scaling ---------------------------------------------------------------------------------------------------

LNS_POSITIONS = ("after_ln", "before_ln", "after_branch", "after_residual", "only_attention", "only_ffn")


@register
def lns(layer: int, depth: int, position: str = "after_ln") -> BlockSpec:
    """X + f(LN(x) / sqrt(l)): LayerNorm Scaling, section 4 of the paper; the other positions are those of Table 8."""
    choice("position", position, LNS_POSITIONS)
    scale, plain = layer**-0.5, SublayerSpec()
    scaled = replace(plain, gain=scale)
    return {
        "after_ln": BlockSpec(scaled, scaled),
        "before_ln": block(input_scale=scale),
        "after_branch": block(branch_scale=scale),
        "after_residual": block(skip=scale, branch_scale=scale),
        "only_attention": BlockSpec(scaled, plain),
        "only_ffn": BlockSpec(plain, scaled),
    }[position]


@register
def lns_learnable(layer: int, depth: int) -> BlockSpec:
    """1/sqrt(l) as the initial weight of the norms instead of a fixed factor, as GPAS and ProRes implement LNS."""
    return block(pre_norm_weight=layer**-0.5)


# What can be put on top of another strategy: `base` names it, further options are the base's --------------------------


def on_top(name: str, spec: BlockSpec, **changes: Any) -> BlockSpec:
    """The block with `changes`, refused where the base strategy has set the same coefficients itself.

    Raises:
        UserError: names the coefficient.
    """
    untouched = SublayerSpec()
    for sublayer in spec.sublayers:
        taken = [field for field in changes if getattr(sublayer, field) != getattr(untouched, field)]
        if "output_init" in changes and sublayer.xavier is not None:
            taken.append("xavier")
        if taken:
            raise UserError(f"norm={name!r} cannot be put on this norm.base, which sets {', '.join(taken)} itself")
    return spec.replace(**changes)


@register
def layer_scale(layer: int, depth: int, init: float = 1e-4, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """X + diag(w) f(LN(x)), w learned and starting small; the paper does not give its value, CaiT's default is 1e-4."""
    spec = build(base, layer, depth, options)
    return on_top("layer_scale", spec, branch_scale=number("init", init), learned_branch_scale="channel")


@register
def skip_init(layer: int, depth: int, init: float | None = None, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """X + a f(LN(x)), a learned, starting at 1/sqrt(L) (text of the paper) or `init` (0.001 in the released code)."""
    init = depth**-0.5 if init is None else number("init", init)
    spec = build(base, layer, depth, options)
    return on_top("skip_init", spec, branch_scale=init, learned_branch_scale="scalar")


@register
def ds_init(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """Depth-Scaled Initialisation: output projections start smaller by 1/sqrt(2l)."""
    return on_top("ds_init", build(base, layer, depth, options), output_init=(2 * layer) ** -0.5)


@register
def scaled_init(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """Scaled Initialisation (GPT-2, Megatron): output projections start smaller by 1/sqrt(2L)."""
    return on_top("scaled_init", build(base, layer, depth, options), output_init=(2 * depth) ** -0.5)


@register
def gpas(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """H - silu(a) stop_gradient(h) on the sums of pre-norm blocks, and on the skip's input of post-norm blocks."""
    spec = build(base, layer, depth, options)
    return on_top("gpas", spec, gate="input" if spec.attention.sum_norm else "output")


# Looking up and building ---------------------------------------------------------------------------------------------


def resolve(name: str) -> Strategy:
    """The strategy called `name`, or the function at `package.module:function`.

    Raises:
        UserError: no such strategy, module or function.
    """
    if not isinstance(name, str):
        raise UserError(f"norm={name!r} is not the name of a strategy: {nearest(str(name), STRATEGIES)}")
    if ":" not in name:
        if name not in STRATEGIES:
            raise UserError(f"norm={name!r} is not a strategy: {nearest(name, STRATEGIES)}")
        return STRATEGIES[name]
    module_name, _, function_name = name.partition(":")
    try:
        strategy = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise UserError(
            f"norm={name!r}: {type(error).__name__}: {error}; expected an importable package.module:function"
        ) from error
    if not callable(strategy):
        raise UserError(f"norm={name!r} is not a function (layer, depth, **options) -> BlockSpec")
    return strategy


def options_of(strategy: Strategy) -> dict[str, Any]:
    """The named options of a strategy with their defaults.

    Raises:
        UserError: it does not say what it takes, as some functions written in C.
    """
    try:
        parameters = list(inspect.signature(strategy).parameters.values())[2:]
    except (TypeError, ValueError) as error:
        raise UserError(f"norm: {error}; expected a function (layer, depth, **options) -> BlockSpec") from error
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def build(name: str, layer: int, depth: int, options: Mapping[str, Any]) -> BlockSpec:
    """Block `layer` of `depth` under the strategy `name`.

    Raises:
        UserError: an unknown strategy, an option that it does not have or does not take, one that raises, or a result
            that is no BlockSpec or has coefficients of other types.
    """
    strategy = resolve(name)
    known = options_of(strategy)
    if "base" in known and options.get("base", known["base"]) not in (name, None):
        known = options_of(resolve(options.get("base", known["base"]))) | known
    for option, value in options.items():
        if option not in known:
            raise UserError(
                f"norm.{option} is not an option of {name!r}: {nearest(option, known) if known else 'it has none'}"
            )
        default = known[option]
        if isinstance(default, bool) != isinstance(value, bool) or (
            isinstance(default, int | float | str)
            and not isinstance(value, (int, float) if isinstance(default, float) else type(default))
        ):
            raise UserError(f"norm.{option}={value!r} has the wrong type: expected one like {default!r}")
    try:
        spec = strategy(layer, depth, **options)
    except TypeError as error:
        raise UserError(f"norm={name!r} cannot be called as (layer, depth, **options): {error}") from error
    except UserError:
        raise
    except Exception as error:  # whatever one's own function raises
        where = f"layer={layer}, depth={depth}"
        raise UserError(f"norm={name!r} raised {type(error).__name__} for {where}: {error}") from error
    if not isinstance(spec, BlockSpec):
        raise UserError(f"norm={name!r} returned {type(spec).__name__}, expected a BlockSpec")
    if found := spec_problems(spec):
        raise UserError("\n".join(f"norm={name!r} returned {problem} for layer={layer}" for problem in found))
    return spec


def spec_problems(spec: BlockSpec) -> list[str]:
    """What of a block is not of the type that the coefficient has, nothing where all is well."""
    found = []
    for part in ("attention", "ffn"):
        sublayer = getattr(spec, part)
        if not isinstance(sublayer, SublayerSpec):
            found.append(f"{part}={sublayer!r}, expected a SublayerSpec,")
            continue
        for field, (kind, right) in COEFFICIENTS.items():
            if not right(value := getattr(sublayer, field)):
                found.append(f"{part}.{field}={value!r}, expected {kind},")
    return found


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def coefficient(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    """What a coefficient of a type can be, in words and as a test."""
    if hint is bool:
        return "true or false", lambda value: isinstance(value, bool)
    if hint is int:
        return "a whole number from 1", lambda value: type(value) is int and value > 0
    if words := [word for word in get_args(hint) if isinstance(word, str)]:
        return f"one of {', '.join(words)}", lambda value: value in words
    optional = type(None) in get_args(hint)
    return "a finite number", lambda value: is_number(value) or (optional and value is None)


COEFFICIENTS = {name: coefficient(hint) for name, hint in get_type_hints(SublayerSpec).items()}
"""By field of a SublayerSpec."""


def build_all(norm: Mapping[str, Any], depth: int) -> list[BlockSpec]:
    """The blocks 1..depth of a `norm` section: its `name`, and options as further entries."""
    options = {key: value for key, value in norm.items() if key != "name"}
    if "name" not in norm:
        raise UserError(f"norm.name is missing: {nearest('', STRATEGIES)}")
    return [build(norm["name"], layer, depth, options) for layer in range(1, depth + 1)]


def warnings(specs: list[BlockSpec]) -> list[str]:
    """Combinations that run but defeat themselves."""
    sublayers = [sublayer for spec in specs for sublayer in spec.sublayers]
    if any(s.gain != 1 for s in sublayers) and any(s.output_init != 1 for s in sublayers):
        return [
            "LayerNorm Scaling together with depth-scaled initialisation: both damp the deep branches, and the "
            "paper finds the combination worse than LNS alone (Table 6); choose one"
        ]
    return []
