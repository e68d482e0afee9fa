"""Optimizer groups with the rates of a strategy, for the models of this package and for others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from numbers import Real
from typing import Any, Literal

from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.nn.apply import (
    SCALED,
    SUPPORTED,
    InitialWeights,
    applied_inside,
    change_weights,
    changes_initial_weights,
    checked_sublayer_specs,
    config_of,
    own_config,
    require_parameter,
    require_untrained,
    strategy_of,
)
from cod_lightning.nn.decoder import Block, Decoder
from cod_lightning.nn.layouts import LLAMA, VIT, Layout, Site, find_sites, pre_norm_sites, require_inputs
from cod_lightning.nn.output_scale import is_scaled
from cod_lightning.nn.spec import Rates, SublayerSpec, nondefaults, scaled_rates
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.settings import require_choice

Form = Literal["matrices", "norm_weights"]


def param_groups(
    model: nn.Module,
    norm: str,
    *,
    lr: float,
    initial_weights: InitialWeights,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    form: Form = "matrices",
    layout: Layout | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups for AdamW under which a stock Pre-LN model trains exactly as under a strategy such as LNS.

    A gain g of a norm becomes weights that start at g times their value and train with lr g, eps/g and weight_decay/g.
    The model computes no factor, so every checkpoint of it is one of the stock model. This is exact for AdamW, and for
    matrices under Muon, in exact arithmetic and without clipping of the gradient's norm. It does not hold for SGD,
    which would need lr g^2, nor for Adam with weight decay in the gradient.

    Weight decay applies to parameters with at least two dimensions, as in `fit`.

    Args:
        model: as for `apply`, without a strategy.
        norm: a strategy that sets gains, rates or initial weights only.
        lr: learning rate. A scheduler must multiply the rate of every group, as LambdaLR does; OneCycleLR needs
            `max_lr=[group["lr"] for group in groups]`, CosineAnnealingLR `eta_min=0`.
        initial_weights: "scale" multiplies the initial weights now, in place, once; "scaled" expects that this is
            done, as in a checkpoint of such a training. Training equals that of the strategy only with both: scaled
            initial weights and these groups.
        eps: of AdamW.
        weight_decay: of AdamW, whose own default the groups override.
        form: which weights stand for the gains: "matrices" (q, k, v, gate, up) or "norm_weights".
        layout: as for `apply`; "matrices" need `layout.inputs`.
        options: of the strategy.

    Returns:
        Groups to pass to `torch.optim.AdamW`; those with rates of their own have a `name`.

    Raises:
        UserError: as `apply`; a strategy with other factors than gains; a `form`, `initial_weights`, `lr`, `eps` or
            `weight_decay` out of range; "scale" for a model that is trained or scaled, or whose norms have no weights
            to show it; layers with different rates that share a weight. The model is unchanged.
    """
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        # YAML reads 1e-3 as text.
        if isinstance(value, bool) or not isinstance(value, Real | Tensor) or not 0 <= float(value) < math.inf:
            raise UserError(f"{name}={value!r} must be a finite number of at least 0")
    require_choice("form", form, Form)
    require_choice("initial_weights", initial_weights, InitialWeights)
    if (applied := strategy_of(model)) is not None or any(is_scaled(module) for module in model.modules()):
        applied = applied or applied_inside(model)
        raise UserError(f"the model has a strategy already: {applied}; use apply or param_groups, not both")
    sites = pre_norm_sites(model, layout)
    own = [part for site in sites if isinstance(site.block, Block) for part in site.block.spec.sublayers]
    if any(name in SUPPORTED for spec in own for name in nondefaults(spec)):
        raise UserError(
            "the decoder was built with a strategy: build it with norm=pre_ln, or train it with its own strategy"
        )
    specs = [without_gain(s, form, norm) for s in checked_sublayer_specs({"name": norm, **options}, len(sites) // 2)]
    if any(spec.input_rates or spec.input_init != 1 for spec in specs):
        require_inputs(sites, "; or pass form='norm_weights'")
    rates = rates_of(sites, specs)
    if initial_weights == "scale":
        problem, remedy = "initial_weights='scale' is for a model that is not trained", "pass initial_weights='scaled'"
        if hasattr(config_of(model), SCALED):
            raise UserError(
                f"{problem}: param_groups was called before: {remedy}; for a new model with the configuration of a "
                f"scaled one, delete config.{SCALED}"
            )
        where = "of each norm" if form == "norm_weights" else "after each norm"
        by_hand = f"for a new model first multiply the weights {where} by its gain"
        require_untrained(sites, problem, f"{remedy}; {by_hand}")
        change_weights(model, sites, specs, norm, "change")
        if changes_initial_weights(specs):
            setattr(own_config(model), SCALED, True)
    return adamw_groups(model.named_parameters(), rates, lr=lr, eps=eps, weight_decay=weight_decay)


def without_gain(spec: SublayerSpec, form: Form, norm: str) -> SublayerSpec:
    """The exact equivalent of a sub-layer that has initial weights and rates instead of a gain.

    Raises:
        UserError: the sub-layer scales its branch, has both a gain and rates, or a gain of 0.
    """
    if spec.branch_scale != 1:
        raise UserError(f"norm={norm!r} sets branch_scale={spec.branch_scale!r}, which no optimizer group replaces")
    if spec.gain == 1:
        return spec
    if spec.has_rates:
        raise UserError(f"norm={norm!r} sets gain={spec.gain!r} and rates: param_groups supports one of them")
    if spec.gain == 0:
        raise UserError(f"norm={norm!r} sets gain={spec.gain!r}, which no optimizer group replaces: use apply")
    rates = scaled_rates(spec.gain)
    if form == "matrices":
        return replace(spec, gain=1.0, input_init=spec.input_init * spec.gain, input_rates=rates)
    return replace(spec, gain=1.0, pre_norm_weight=spec.pre_norm_weight * spec.gain, norm_rates=rates)


def model_rates(model: nn.Module) -> dict[nn.Parameter, Rates]:
    """The rates of the parameters of a `Decoder` or `VisionTransformer`; empty for any other module."""
    if not isinstance(model, Decoder | VisionTransformer):
        return {}
    specs = [sublayer for block in model.blocks for sublayer in block.spec.sublayers]
    layout = replace(LLAMA if isinstance(model, Decoder) else VIT, branches=("attention_residual", "ffn_residual"))
    return rates_of(find_sites(model, layout), specs)


def rates_of(sites: list[Site], specs: list[SublayerSpec]) -> dict[nn.Parameter, Rates]:
    """The rates of every parameter of the sub-layers.

    Raises:
        UserError: a layer has rates but no weight of its own, or two sub-layers with different rates share one.
    """
    rates: dict[nn.Parameter, Rates] = {}
    for site, spec in zip(sites, specs, strict=True):
        own: dict[nn.Parameter, Rates] = {}
        place = f"layer {site.layer}, {site.part}"
        for module in (site.norm, site.sublayer, site.branch):
            own |= dict.fromkeys(module.parameters(), spec.rates)
        if spec.norm_rates is not None:
            require_parameter(site.norm, f"{place}: no rates for its norm")
            # A gain multiplies weight and bias of a bounded norm, not what is inside its function.
            scaled = [p for name, p in site.norm.named_parameters() if name not in ("alpha", "shift")]
            own |= dict.fromkeys(scaled, spec.norm_rates)
        if spec.input_rates is not None:
            for linear in site.inputs:
                require_parameter(linear, f"{place}: no rates for a weight")
                own[linear.weight] = spec.input_rates
        if any(rates.get(parameter, own[parameter]) != own[parameter] for parameter in own):
            raise UserError(f"{place}: it shares a weight with a layer of other rates: give each a weight of its own")
        rates |= own
    return rates


def adamw_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    rates: dict[nn.Parameter, Rates],
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    exempt: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters with equal settings, the `rates` times the others; the plain ones first.

    Parameters with fewer than two dimensions, or whose names have an `exempt` ending, have no weight decay.
    """
    plain = Rates()
    members: dict[tuple[Rates, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and not name.endswith(exempt)
            members.setdefault((rates.get(parameter, plain), decayed), []).append(parameter)
    groups = []
    for own, decayed in sorted(members, key=lambda key: (key[0] != plain, not key[1])):
        group: dict[str, Any] = {
            "params": members[own, decayed],
            "lr": lr * own.lr,
            "eps": eps * own.eps,
            "weight_decay": weight_decay * own.weight_decay if decayed else 0.0,
        }
        if own != plain:
            decay = f"weight_decay x {own.weight_decay:.6g}" if decayed else "no weight_decay"
            group |= {"name": f"lr x {own.lr:.6g}, eps x {own.eps:.6g}, {decay}", "clip": own.clip}
        groups.append(group)
    return groups
