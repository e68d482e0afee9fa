"""The coefficients of a block: what a strategy returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cod_lightning.errors import UserError, short_repr

Multiplier = Annotated[float, "above 0"]


@dataclass(frozen=True)
class Rates:
    """Multipliers of the optimizer's settings for a group of parameters."""

    lr: Multiplier = 1.0
    eps: Multiplier = 1.0
    weight_decay: Multiplier = 1.0
    clip: Multiplier = 1.0
    """Multiplies the gradient in the norm that `optim.clip` bounds, and there alone."""


def scaled_rates(factor: float) -> Rates:
    """Rates under which a weight V that starts as g W, g the factor, stays exactly g W under AdamW.

    The gradient of V is 1/g times that of W, and so are Adam's m and sqrt(v). The step of V is therefore
    g lr m / (sqrt(v) + eps/g), g times that of W, and its decay 1 - (g lr) (weight_decay/g) is that of W. The sign of a
    negative factor is in m, so that its rates are those of |g|.
    """
    factor = abs(factor)
    return Rates(lr=factor, eps=1 / factor, weight_decay=1 / factor, clip=factor)


@dataclass(frozen=True)
class Schedule:
    """A factor that depends on the optimizer steps done so far: `function(step)` before step `end`, and 1 from there.

    The step is that of the run, so that a resumed run continues with the same factors. `function` returns a finite
    number for every step from 0.
    """

    function: Callable[[int], float] = field(repr=False, hash=False)
    end: int

    def __call__(self, step: int) -> float:
        return self.function(step) if step < self.end else 1.0


@dataclass(frozen=True)
class SublayerSpec:
    """The coefficients of the equation for one sub-layer, and the initialisation of its parameters.

        y = gate( sum_norm( skip * x + branch_scale * branch_norm( f( gain * pre_norm(x) ) ) ) )

    x is the residual stream and f attention or the feed-forward network. The defaults are those of Pre-LN. Values are
    checked where a strategy is built (`build_all`) and where a decoder is.

    Numbers are constants of the forward pass unless a field says that they are learned. A constant is a Python float
    and never a buffer, which `.to(bfloat16)` would round and leaving the meta device would lose.
    """

    pre_norm: bool = True
    """Whether f reads a norm of x."""
    gain: float = 1.0
    """Multiplies the output of the pre-norm (LayerNorm Scaling)."""
    input_scale: Multiplier = 1.0
    """Multiplies the input of the pre-norm."""
    pre_norm_weight: float = 1.0
    """Initial value of the pre-norm's weight."""
    groups: int = 1
    """Equal parts of the hidden dimension over which the pre-norm takes its statistics."""
    norm_alpha: Multiplier | None = None
    """Initial alpha of all norms of the sub-layer, if the block has a bounded `norm_kind`; that of the last block's
    feed-forward network is the final norm's too. None: 0.5, or 1 for BHyT."""
    branch_norm: bool = False
    """Whether the output of f is normalised."""
    branch_norm_weight: float = 1.0
    """Initial value of the branch norm's weight."""
    branch_scale: float = 1.0
    """Multiplies the branch."""
    learned_branch_scale: Literal["no", "scalar", "channel"] = "no"
    """Replaces the constant by a parameter with initial value `branch_scale`: one number, or one per channel."""
    branch_schedule: Schedule | None = None
    """Multiplies the scaled branch by a function of the step, see `set_step`."""
    skip: float = 1.0
    """Multiplies the skip."""
    learned_skip: bool = False
    """Replaces the constant by a parameter [hidden_size], initialised by profiling (Admin)."""
    skip_from: Literal["input", "pre_norm", "block"] = "input"
    """Start of the skip: the sub-layer's input x, the output of its pre-norm, or the input of the block after
    `entry_norm` and `embedding_skip`."""
    sum_norm: bool = False
    """Whether the sum of skip and branch is normalised (Post-LN)."""
    gate: Literal["no", "output", "input"] = "no"
    """GPAS: h - silu(a) * stop_gradient(h) with one learned a per block, for h = y or for the x of the skip."""
    output_init: float = 1.0
    """Multiplies the initial standard deviation of the last projection (o_proj, down_proj)."""
    xavier: float | None = None
    """Gain of a Xavier-normal initialisation of v, o and the feed-forward weights; that of q and k is 1."""
    input_init: Multiplier = 1.0
    """Multiplies the initial weights of the projections after the pre-norm (q, k, v; gate, up)."""
    rates: Rates = Rates()
    """Optimizer multipliers of every parameter of the sub-layer, norms and biases included."""
    input_rates: Rates | None = None
    """Optimizer multipliers of the weights of the projections after the pre-norm; None: `rates`."""
    norm_rates: Rates | None = None
    """Optimizer multipliers of the pre-norm; None: `rates`."""

    @property
    def has_rates(self) -> bool:
        return any(rates not in (None, Rates()) for rates in (self.rates, self.input_rates, self.norm_rates))

    def factor(self, layer: int, step: int) -> float:
        """The factor of `branch_schedule` at a step.

        Raises:
            UserError: it is not a finite number; names layer and step.
        """
        if self.branch_schedule is None:
            return 1.0
        try:
            value = self.branch_schedule(step)
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"branch_schedule of layer {layer} at step {step}: {cause}") from error
        if not is_number(value):
            raise UserError(
                f"branch_schedule of layer {layer} at step {step} is {short_repr(value)}, expected a finite number"
            )
        return value


@dataclass(frozen=True)
class BlockSpec:
    """The two sub-layers of a block, and the coefficients of the block itself."""

    attention: SublayerSpec
    ffn: SublayerSpec
    entry_norm: bool = False
    """Normalises the input of the block (Peri-LN's embeddings)."""
    norm_kind: Literal["model", "dyt", "derf", "bhyt"] = "model"
    """Kind of every norm of the block, and in the last block of the final norm: that of `model.norm`, or a bounded
    function in its place."""
    head_norm: Literal["no", "qk", "qkv"] = "no"
    """Norms of queries and keys, or of values too, over the channels of each head and before rotary embeddings."""
    embedding_skip: bool = False
    """The block reads a x + b x0, x0 the embeddings, with learned numbers a and b that start at 1 and 0."""
    value_residual: Literal["no", "mean", "learned"] = "no"
    """Mixes the values V of attention with those of the first block, V1: "mean" is (V + V1) / 2, "learned"
    s (a V + b V1) / sqrt(a^2 + b^2) with learned numbers s, a and b that start at 1, 1 and 0."""

    @property
    def sublayers(self) -> tuple[SublayerSpec, SublayerSpec]:
        return self.attention, self.ffn

    def replace(self, **changes: Any) -> BlockSpec:
        """Return a copy with `changes` to both sub-layers."""
        return replace(self, attention=replace(self.attention, **changes), ffn=replace(self.ffn, **changes))


def nondefaults(spec: SublayerSpec | BlockSpec) -> dict[str, Any]:
    """The coefficients whose values are not the defaults (Pre-LN), by name; of a `BlockSpec` only its own."""
    pre_ln = SublayerSpec() if isinstance(spec, SublayerSpec) else BlockSpec(SublayerSpec(), SublayerSpec())
    names = [field.name for field in fields(spec) if field.name not in ("attention", "ffn")]
    return {name: getattr(spec, name) for name in names if getattr(spec, name) != getattr(pre_ln, name)}


def describe_specs(specs: Sequence[BlockSpec]) -> str:
    """The coefficients that are not those of Pre-LN, as text; equal for equal strategies.

    A schedule is described by its factors at steps 0, 1, 2, 4, 8, ... to its end.
    """

    def described(value: Any) -> Any:
        if isinstance(value, Rates):
            return described(vars(value))
        if isinstance(value, dict):
            return {name: described(each) for name, each in value.items()}
        return f"{float(value):.9g}" if is_number(value) else str(value)  # machines may round 1/sqrt(l) differently

    def factors(sublayer: SublayerSpec, layer: int) -> list[Any]:
        end = 0 if sublayer.branch_schedule is None else sublayer.branch_schedule.end
        steps = [0, *(2**n for n in range(end.bit_length()))]
        return [described(sublayer.factor(layer, step)) for step in [*steps, end]]

    parts = [(layer, part) for layer, spec in enumerate(specs, 1) for part in (spec, *spec.sublayers)]
    changed = [{n: v for n, v in nondefaults(part).items() if n != "branch_schedule"} for _, part in parts]
    schedules = [factors(part, layer) for layer, part in parts if isinstance(part, SublayerSpec)]
    return str([described(each) for each in changed] + schedules)


def why_not_composed(specs: Sequence[BlockSpec]) -> str:
    """Why Jacobians of blocks do not multiply to that of several blocks; empty if they do."""
    if any(spec.embedding_skip for spec in specs):
        return "its blocks read the embeddings besides the stream, so their Jacobians do not multiply"
    if any(spec.value_residual != "no" for spec in specs):
        return "its blocks read the values of block 1 besides the stream, so their Jacobians do not multiply"
    return ""


FACTORS = ("gain", "branch_scale")
"""Coefficients of a sub-layer that multiply the output of its norm or branch, which weights can compensate for."""
INITIAL = ("pre_norm_weight", "branch_norm_weight", "norm_alpha", "input_init", "output_init", "xavier")
"""Coefficients that only set initial parameters."""
OPTIMIZER = ("rates", "input_rates", "norm_rates")
"""Coefficients that only set the optimizer."""
COEFFICIENTS = get_type_hints(SublayerSpec, include_extras=True)
"""Type hints of the coefficients of a sub-layer."""
BLOCK_COEFFICIENTS = {
    name: hint for name, hint in get_type_hints(BlockSpec).items() if name not in ("attention", "ffn")
}
"""Type hints of the coefficients of the block itself."""
PARTS = {kind: get_type_hints(kind, include_extras=True) for kind in (Rates, Schedule)}
"""Type hints of the fields of `Rates` and `Schedule`, which are coefficients with fields."""

NO_PRE_NORM = "without pre_norm, which it acts on: set pre_norm=True"
NO_BRANCH_NORM = "without branch_norm, which it acts on: set branch_norm=True"
EXCLUSIONS: tuple[tuple[tuple[str, ...], Callable[[SublayerSpec], bool], str], ...] = (
    (("gain", "input_scale", "pre_norm_weight", "groups", "norm_rates"), lambda s: not s.pre_norm, NO_PRE_NORM),
    (("skip_from",), lambda s: s.skip_from == "pre_norm" and not s.pre_norm, NO_PRE_NORM),
    (("branch_norm_weight",), lambda s: not s.branch_norm, NO_BRANCH_NORM),
    (("skip",), lambda s: s.learned_skip, "with learned_skip, which replaces it: choose one"),
    (("branch_schedule",), lambda s: s.learned_skip, "with learned_skip, whose profile ignores it: choose one"),
    (("output_init",), lambda s: s.xavier is not None, "with xavier, which replaces it: choose one"),
)
"""(names, has_no_effect, reason): coefficients that must keep their defaults in a sub-layer where `has_no_effect` is
true."""


def spec_problems(spec: BlockSpec) -> list[str]:
    """One line for each coefficient of the wrong type, out of range, or without effect."""
    problems = field_problems("block", spec, BLOCK_COEFFICIENTS)
    if not problems and spec.norm_kind != "model" and any(getattr(s, "groups", 1) != 1 for s in spec.sublayers):
        problems.append(f"norm_kind={spec.norm_kind!r} with groups, which it does not have: set groups=1")
    if not problems and spec.norm_kind == "model" and any(getattr(s, "norm_alpha", None) for s in spec.sublayers):
        problems.append("norm_alpha without a bounded norm_kind: set norm_kind, such as 'dyt'")
    for part in ("attention", "ffn"):
        sublayer = getattr(spec, part)
        if not isinstance(sublayer, SublayerSpec):
            problems.append(f"{part}={short_repr(sublayer)}, expected a SublayerSpec")
            continue
        if wrong := field_problems(part, sublayer, COEFFICIENTS):
            problems += wrong
            continue
        changed = nondefaults(sublayer)
        problems += [
            f"{part}.{name}={changed[name]!r} {reason}"
            for names, has_no_effect, reason in EXCLUSIONS
            for name in names
            if name in changed and has_no_effect(sublayer)
        ]
    return problems


def spec_warnings(specs: Sequence[BlockSpec]) -> list[str]:
    """One line for each combination of coefficients that undo each other."""
    sublayers = [sublayer for spec in specs for sublayer in spec.sublayers]
    messages: list[str] = []
    scaled = any(s.pre_norm and s.gain * s.pre_norm_weight * s.input_init != 1 for s in sublayers)
    if scaled and any(s.output_init != 1 for s in sublayers):
        messages.append(
            "LayerNorm Scaling and depth-scaled initialisation both damp the deep blocks; together they are worse than "
            "LNS alone (Table 6): choose one"
        )
    if any(s.output_init != 1 and s.branch_norm for s in sublayers):
        messages.append("norms of the branches undo the initial scale of the output projections: choose one")
    if any(spec.head_norm == "qkv" and spec.attention.gain != 1 for spec in specs):
        messages.append("norms of queries, keys and values undo the gain of attention's pre-norm: choose one")
    return messages


def field_problems(name: str, values: Any, hints: dict[str, Any]) -> list[str]:
    """One line for each field of `values` that does not have the type of its hint; `name` is that of `values`."""
    problems = []
    for key, hint in hints.items():
        value = getattr(values, key)
        if expected := mismatch(hint, value):
            problems.append(f"{name}.{key}={short_repr(value)}, expected {expected}")
        elif type(value) in PARTS:
            problems += field_problems(f"{name}.{key}", value, PARTS[type(value)])
    return problems


def check_schedules(specs: Sequence[BlockSpec], steps: int) -> None:
    """Check the factors of every schedule in the steps from 0 to `steps`.

    Raises:
        UserError: one is not a finite number; names layer and step.
    """
    for layer, spec in enumerate(specs, start=1):
        for sublayer in dict.fromkeys(spec.sublayers):
            for step in range(min(schedule_end([spec]), steps + 1)):
                sublayer.factor(layer, step)


def schedule_end(specs: Sequence[BlockSpec]) -> int:
    """The step from which all schedules are 1; 0 without a schedule."""
    schedules = [sublayer.branch_schedule for spec in specs for sublayer in spec.sublayers]
    return max((schedule.end for schedule in schedules if schedule is not None), default=0)


def mismatch(hint: Any, value: Any) -> str:
    """A description of the type `hint` if `value` does not have it, else an empty string."""
    arguments = get_args(hint)
    if type(None) in arguments:
        return "" if value is None else mismatch(arguments[0], value)
    if get_origin(hint) is Literal:
        return "" if isinstance(value, str) and value in arguments else f"one of {', '.join(arguments)}"
    holds, expected = TYPES[hint]
    return "" if holds(value) else expected


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float that float64 can hold, neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


TYPES: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: type(value) is int and value > 0, "a whole number from 1"),
    float: (is_number, "a finite number"),
    Multiplier: (lambda value: is_number(value) and value > 0, "a finite number above 0"),
    Callable[[int], float]: (callable, "a function of the step"),
    Rates: (lambda value: isinstance(value, Rates), "Rates"),
    Schedule: (lambda value: isinstance(value, Schedule), "Schedule"),
}
"""Types of coefficients by hint: whether a value has it, and its description."""
