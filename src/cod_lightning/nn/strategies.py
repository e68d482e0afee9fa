"""Normalisation strategies: each is a row of data for one equation.

    y = gate( sum_norm( skip * x + branch_scale * branch_norm( f( gain * pre_norm(x) ) ) ) )

computes both sub-layers of a block, where f is attention or the feed-forward network, and x their input unless
`skip_from` says otherwise. A strategy is a function
`(layer, depth, **options) -> BlockSpec`; `layer` counts blocks from 1, `depth` is the number of blocks L. To add one:

    from cod_lightning.nn.strategies import block

    def my_strategy(layer, depth, power=0.25):
        return block(gain=layer**-power)

and select it with `norm=my_package.my_module:my_strategy norm.power=0.5`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cod_lightning.errors import UserError
from cod_lightning.nn.spec import (
    BLOCK_COEFFICIENTS,
    BlockSpec,
    Rates,
    Schedule,
    SublayerSpec,
    nondefaults,
    scaled_rates,
)
from cod_lightning.nn.strategy_lookup import STRATEGIES as STRATEGIES
from cod_lightning.nn.strategy_lookup import build, register
from cod_lightning.nn.strategy_lookup import build_all as build_all
from cod_lightning.nn.strategy_lookup import suggestion as suggestion
from cod_lightning.settings import require_choice

ROUNDING = 1e-9
"""Tolerance for a number of blocks: 15/22 of 22 is 14.999999999999998 in floating point."""


def block(**both: Any) -> BlockSpec:
    """A block with the same coefficients for both sub-layers; those that are not given are Pre-LN's.

    Args:
        both: fields of `SublayerSpec`. Their values are checked where the strategy is built.

    Raises:
        TypeError: there is no such coefficient.
    """
    return BlockSpec(SublayerSpec(**both), SublayerSpec(**both))


# Norm placement ------------------------------------------------------------------------------------------------------


@register
def pre_ln(layer: int, depth: int) -> BlockSpec:
    """x + f(LN(x)); eq. 2-3 of the paper."""
    return block()


@register
def post_ln(layer: int, depth: int) -> BlockSpec:
    """LN(x + f(x))."""
    return block(pre_norm=False, sum_norm=True)


@register
def sandwich_ln(layer: int, depth: int) -> BlockSpec:
    """x + LN(f(LN(x)))."""
    return block(branch_norm=True)


@register
def peri_ln(layer: int, depth: int, embedding_norm: bool = True) -> BlockSpec:
    """x + LN(f(LN(x))), by default with the embeddings normalised as well."""
    return replace(sandwich_ln(layer, depth), entry_norm=embedding_norm and layer == 1)


@register
def mix_ln(layer: int, depth: int, fraction: float = 0.25) -> BlockSpec:
    """Post-LN in the first `fraction` of the blocks, Pre-LN in the others."""
    if not 0 <= fraction <= 1:
        raise UserError(f"norm.fraction={fraction} must lie between 0 and 1")
    return (post_ln if layer <= fraction * depth + ROUNDING else pre_ln)(layer, depth)


@register
def group_ln(layer: int, depth: int, groups: int = 8) -> BlockSpec:
    """Pre-LN with statistics per group of channels; the paper does not state the number of groups."""
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


@register
def olmo2(layer: int, depth: int) -> BlockSpec:
    """x + LN(f(x)), the reordered norm of OLMo 2, without its norms of queries and keys (`qk_norm` adds them)."""
    return block(pre_norm=False, branch_norm=True)


@register
def depth_scaled_sandwich(layer: int, depth: int) -> BlockSpec:
    """x + LN(f(LN(x))), weights of the outer LN learned from 1/sqrt(L) (Trinity; Pangu Ultra has c/sqrt(L))."""
    return block(branch_norm=True, branch_norm_weight=depth**-0.5)


@register
def keel(layer: int, depth: int) -> BlockSpec:
    """LN(2L x + f(LN(x))), Pre-LN in block 1: alpha is the number of sub-layers in the paper; some code has 1/sqrt(2L),
    or the number of blocks.
    """
    return block() if layer == 1 else block(sum_norm=True, skip=2.0 * depth)


@register
def deep_loop(layer: int, depth: int) -> BlockSpec:
    """DeepNorm with alpha = (2N)^(1/2) and beta = (8N)^(-1/2), for N visits of blocks in a looped model; here N = L."""
    return deep_norm(layer, depth).replace(skip=(2 * depth) ** 0.5, xavier=(8 * depth) ** -0.5)


@register
def hybrid_norm(layer: int, depth: int, star: bool = False) -> BlockSpec:
    """y = x + attention(x) with q, k and v normalised in each head, then LN(y) + ffn(LN(y)) (HybridNorm); `star`: the
    first block has the sums of Pre-LN and its norm before attention as well (HybridNorm*).
    """
    if star and layer == 1:
        return replace(block(), head_norm="qkv")
    return BlockSpec(SublayerSpec(pre_norm=False), SublayerSpec(skip_from="pre_norm"), head_norm="qkv")


@register
def span_norm(layer: int, depth: int) -> BlockSpec:
    """y = LN(x + attention(x)), then LN(x + ffn(y)): both skips start at the input x of the block (SpanNorm). Attention
    of block 1 reads LN(x).
    """
    attention = SublayerSpec(pre_norm=layer == 1, sum_norm=True)
    return BlockSpec(attention, SublayerSpec(pre_norm=False, sum_norm=True, skip_from="block"))


# LayerNorm Scaling ---------------------------------------------------------------------------------------------------

LNS_POSITIONS = {
    "after_ln": ("gain",),
    "before_ln": ("input_scale",),
    "after_branch": ("branch_scale",),
    "after_residual": ("skip", "branch_scale"),
    "only_attention": ("gain",),
    "only_ffn": ("gain",),
}
"""Coefficients that are 1/sqrt(l) by position: `after_ln` is the paper's choice, the others are those of Table 8."""


@register
def lns(layer: int, depth: int, position: str = "after_ln", base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + f(LN(x) / sqrt(l)): LayerNorm Scaling, section 4 of the paper."""
    require_choice("norm.position", position, LNS_POSITIONS)
    spec = build(base, layer, depth, options)
    scaled = extend_base("lns", spec, **dict.fromkeys(LNS_POSITIONS[position], layer**-0.5))
    attention, ffn = position != "only_ffn", position != "only_attention"
    return replace(scaled, attention=(scaled if attention else spec).attention, ffn=(scaled if ffn else spec).ffn)


@register
def lns_learnable(layer: int, depth: int) -> BlockSpec:
    """1/sqrt(l) as the initial weight of the norms instead of a fixed factor, as GPAS and ProRes implement LNS."""
    return block(pre_norm_weight=layer**-0.5)


# The learning rates of a block ---------------------------------------------------------------------------------------


@register
def lns_as_rates(layer: int, depth: int) -> BlockSpec:
    """LNS without a factor: q, k, v, gate and up start at g W, g = 1/sqrt(l), with lr g, eps/g and weight_decay/g."""
    g = layer**-0.5
    return block(input_init=g, input_rates=scaled_rates(g))


@register
def lns_as_norm_weights(layer: int, depth: int) -> BlockSpec:
    """LNS without a factor: the norms' weights start at g = 1/sqrt(l), with lr g, eps/g and weight_decay/g."""
    g = layer**-0.5
    return block(pre_norm_weight=g, norm_rates=scaled_rates(g))


@register
def lns_init_only(layer: int, depth: int) -> BlockSpec:
    """The smaller initial weights of `lns_as_rates` with the usual rates."""
    return block(input_init=layer**-0.5)


@register
def lns_rate_only(layer: int, depth: int) -> BlockSpec:
    """The rates of `lns_as_rates` with the usual initial weights."""
    return block(input_rates=scaled_rates(layer**-0.5))


@register
def complete_p(layer: int, depth: int, base_depth: int = 2) -> BlockSpec:
    """x + f(LN(x)) / m, m = L / `base_depth`; the block's eps is eps/m."""
    m = depth_ratio(depth, base_depth)
    return block(branch_scale=1 / m, rates=Rates(eps=1 / m))


@register
def depth_mup(layer: int, depth: int, base_depth: int = 2) -> BlockSpec:
    """x + f(LN(x)) / sqrt(m), m = L / `base_depth`; the block's rates are lr/sqrt(m) and eps/sqrt(m)."""
    m = depth_ratio(depth, base_depth)
    return block(branch_scale=m**-0.5, rates=Rates(lr=m**-0.5, eps=m**-0.5))


def depth_ratio(depth: int, base_depth: int) -> float:
    if base_depth < 1:
        raise UserError(f"norm.base_depth={base_depth} must be at least 1")
    return depth / base_depth


# Scaled branches -----------------------------------------------------------------------------------------------------


@register
def minicpm(layer: int, depth: int, scale_depth: float = 1.4) -> BlockSpec:
    """x + 1.4 f(LN(x)) / sqrt(L)."""
    return block(branch_scale=scale_depth * depth**-0.5)


@register
def granite(layer: int, depth: int, residual_multiplier: float = 0.22) -> BlockSpec:
    """x + 0.22 f(LN(x)) at every depth, as in the released models."""
    return block(branch_scale=residual_multiplier)


@register
def esm_c(layer: int, depth: int) -> BlockSpec:
    """x + f(LN(x)) / sqrt(L / 36), as in the code of ESM-C and ESM3; ESM-C's paper multiplies by mistake."""
    return block(branch_scale=(depth / 36) ** -0.5)


@register
def norm_preserving(layer: int, depth: int, beta: float = math.log(2)) -> BlockSpec:
    """sqrt(1 - b/L) x + sqrt(b/L) f(LN(x)), b = softplus(0) = ln 2 fixed; its authors learn b from there."""
    if not 0 <= beta <= depth:
        raise UserError(f"norm.beta={beta} must lie between 0 and the number of blocks, {depth}")
    return block(skip=(1 - beta / depth) ** 0.5, branch_scale=(beta / depth) ** 0.5)


@register
def rezero(layer: int, depth: int) -> BlockSpec:
    """x + a f(x), a learned from 0; one a for each sub-layer, where the released code shares it in a block."""
    return block(pre_norm=False, branch_scale=0.0, learned_branch_scale="scalar")


@register
def nf_residual(layer: int, depth: int, alpha: float = 0.2) -> BlockSpec:
    """x + alpha f(x / b), b^2 = 1 + alpha^2 k after k branches (NF-ResNet); 1/b is exact as weights and rates."""

    def sublayer(branches: int) -> SublayerSpec:
        g = (1 + alpha**2 * branches) ** -0.5
        return SublayerSpec(pre_norm=False, branch_scale=alpha, input_init=g, input_rates=scaled_rates(g))

    return BlockSpec(sublayer(2 * layer - 2), sublayer(2 * layer - 1))


# Strategies that change a base strategy; further options are those of the base ----------------------------------------

CONFLICTS = {
    "gain": ("pre_norm_weight", "input_init", "input_rates", "norm_rates"),  # LNS in other forms, which would act twice
    "skip": ("learned_skip",),
    "output_init": ("xavier",),
    "branch_schedule": ("learned_skip",),
}
"""Other coefficients of a base strategy that exclude one: they do the same, or it would have no effect."""


def extend_base(name: str, spec: BlockSpec, **new: Any) -> BlockSpec:
    """`spec`, the block of a base strategy, with `new` coefficients of the block or of both sub-layers.

    Raises:
        UserError: the base strategy sets one of these coefficients, or of their `CONFLICTS`; the message names it.
    """
    excluded = {*new, *(other for coefficient in new for other in CONFLICTS.get(coefficient, ()))}
    for part in (spec, *spec.sublayers):
        if conflicts := [coefficient for coefficient in nondefaults(part) if coefficient in excluded]:
            raise UserError(f"norm={name!r} does not support this norm.base, which sets {', '.join(conflicts)} itself")
    of_block = {coefficient: value for coefficient, value in new.items() if coefficient in BLOCK_COEFFICIENTS}
    both = {coefficient: value for coefficient, value in new.items() if coefficient not in of_block}
    return replace(spec.replace(**both), **of_block)


@register
def layer_scale(layer: int, depth: int, init: float = 1e-4, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + diag(w) f(LN(x)), w learned with a small `init`; the paper does not state it, CaiT's default is 1e-4."""
    spec = build(base, layer, depth, options)
    return extend_base("layer_scale", spec, branch_scale=init, learned_branch_scale="channel")


@register
def skip_init(layer: int, depth: int, init: float | None = None, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + a f(LN(x)), a learned from 1/sqrt(L) (text of the paper) or `init` (0.001 in the released code)."""
    init = depth**-0.5 if init is None else init
    spec = build(base, layer, depth, options)
    return extend_base("skip_init", spec, branch_scale=init, learned_branch_scale="scalar")


@register
def ds_init(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """Depth-Scaled Initialisation: divides the initial output projections by sqrt(2l)."""
    return extend_base("ds_init", build(base, layer, depth, options), output_init=(2 * layer) ** -0.5)


@register
def scaled_init(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """Scaled Initialisation (GPT-2, Megatron): divides the initial output projections by sqrt(2L)."""
    return extend_base("scaled_init", build(base, layer, depth, options), output_init=(2 * depth) ** -0.5)


@register
def qk_norm(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + f(LN(x)), queries and keys normalised in each head before rotary embeddings, as in Qwen3 and Gemma 3."""
    return extend_base("qk_norm", build(base, layer, depth, options), head_norm="qk")


@register
def x0_mix(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """Each block reads a x + b x0, x0 the embeddings, a and b learned from 1 and 0, as in nanochat."""
    return extend_base("x0_mix", build(base, layer, depth, options), embedding_skip=True)


@register
def value_residual(layer: int, depth: int, form: str = "learned", base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + f(LN(x)), values s (a V + b V1) / sqrt(a^2 + b^2), V1 those of block 1; s, a, b learned from 1, 1, 0 (IMU-1).
    `form=mean`: (V + V1) / 2 (ResFormer).
    """
    require_choice("norm.form", form, ("learned", "mean"))
    return extend_base("value_residual", build(base, layer, depth, options), value_residual=form)


@register
def dyt(
    layer: int,
    depth: int,
    alpha: float | None = None,
    attention_alpha: float | None = None,
    base: str = "pre_ln",
    **options: Any,
) -> BlockSpec:
    """x + f(w tanh(a x) + b) in place of every norm, a learned from `alpha`, 0.5 by default, in attention from
    `attention_alpha` if given (DyT), without its scale of the embeddings.
    """
    spec = extend_base("dyt", build(base, layer, depth, options), norm_kind="dyt", norm_alpha=alpha)
    if attention_alpha is None:
        return spec
    return replace(spec, attention=replace(spec.attention, norm_alpha=attention_alpha))


@register
def derf(layer: int, depth: int, alpha: float | None = None, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + f(w erf(a x + s) + b) in place of every norm, a and s learned from `alpha`, 0.5 by default, and 0 (Derf)."""
    return extend_base("derf", build(base, layer, depth, options), norm_kind="derf", norm_alpha=alpha)


@register
def bhyt(layer: int, depth: int, alpha: float | None = None, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """x + f(w tanh(a x / (10 rms(x)))) in place of every norm, a learned from `alpha`, 1 by default: the form that the
    code of BHyT calls BHyT*. BHyT itself estimates rms(x) before the FFN.
    """
    return extend_base("bhyt", build(base, layer, depth, options), norm_kind="bhyt", norm_alpha=alpha)


@register
def gpas(layer: int, depth: int, base: str = "pre_ln", **options: Any) -> BlockSpec:
    """h - silu(a) stop_gradient(h), for the sums of pre-norm blocks and the skip's input of post-norm blocks."""
    spec = build(base, layer, depth, options)
    return extend_base("gpas", spec, gate="input" if spec.attention.sum_norm else "output")


@dataclass(frozen=True)
class Warmup:
    """A factor that rises from `first` at step `start` to 1 at step `end`, by a power of the time between them."""

    start: int
    end: int
    first: float = 0.0
    power: float = 1.0

    def __call__(self, step: int) -> float:
        passed = min(max((step - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.first + (1 - self.first) * passed**self.power


PRO_RES_SCHEDULES: dict[str, Callable[[int, int, int], Warmup]] = {
    "linear": lambda layer, depth, t: Warmup(0, layer * t),
    "sqrt": lambda layer, depth, t: Warmup(0, layer * t, power=0.5),
    "square": lambda layer, depth, t: Warmup(0, layer * t, power=2.0),
    "equal": lambda layer, depth, t: Warmup(0, depth * t),
    "reverse": lambda layer, depth, t: Warmup(0, (depth + 1 - layer) * t),
    "stagewise_0": lambda layer, depth, t: Warmup((layer - 1) * t, layer * t),
    "stagewise_L": lambda layer, depth, t: Warmup((layer - 1) * t, layer * t, first=1 / depth),
    "stagewise_sqrt_L": lambda layer, depth, t: Warmup((layer - 1) * t, layer * t, first=depth**-0.5),
    "stagewise_sqrt_l": lambda layer, depth, t: Warmup((layer - 1) * t, layer * t, first=layer**-0.5),
}
"""The schedules of ProRes, with the names of its released code."""


@register
def pro_res(
    layer: int, depth: int, schedule: str = "linear", warmup: int = 1000, base: str = "pre_ln", **options: Any
) -> BlockSpec:
    """x + a f(LN(x)), a = min(t / (T l), 1) after t optimizer steps, T = `warmup`; on Post-LN bases LN(x + a f(x)).

    Progressive Residual Warmup (arXiv 2603.05369); `schedule` names others of its paper.
    """
    require_choice("norm.schedule", schedule, PRO_RES_SCHEDULES)
    if warmup < 1:
        raise UserError(f"norm.warmup={warmup} must be at least 1")
    factor = PRO_RES_SCHEDULES[schedule](layer, depth, warmup)
    spec = build(base, layer, depth, options)
    return extend_base("pro_res", spec, branch_schedule=Schedule(factor, factor.end))
