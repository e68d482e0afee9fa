"""Put a norm strategy onto any Pre-LN model, and fold it into the weights of a stock checkpoint."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cod_lightning.errors import UserError, first_line
from cod_lightning.nn.decoder import Block
from cod_lightning.nn.layouts import Layout, Site, pre_norm_sites, require_inputs
from cod_lightning.nn.output_scale import forget_compiled, is_scaled, remove_scale, scale_output
from cod_lightning.nn.spec import FACTORS, OPTIMIZER, nondefaults
from cod_lightning.nn.strategies import SublayerSpec, build_all
from cod_lightning.settings import require_choice

Model = TypeVar("Model", bound=nn.Module)
Trained = Literal["refuse", "preserve", "change"]
InitialWeights = Literal["scale", "scaled"]

WEIGHTS = ("pre_norm_weight", "input_init", "output_init")
"""Coefficients that `apply` multiplies into the initial weights."""
SUPPORTED = (*FACTORS, *WEIGHTS, *OPTIMIZER)
"""Coefficients of `apply` and `param_groups`. All others must have the values of Pre-LN."""
CONFIG_KEY = "cod_lightning"
"""Name under which the strategy stands in the model's configuration, or on a model without one."""
SCALED = "cod_initial_weights_scaled"
"""Attribute of the configuration of a model whose initial weights `param_groups` has scaled."""


def apply(
    model: Model,
    norm: str,
    *,
    layout: Layout | None = None,
    trained: Trained = "refuse",
    initial_weights: InitialWeights | None = None,
    **options: Any,
) -> Model:
    """Put a norm strategy onto a Pre-LN model, in place, before it is trained.

    A checkpoint keeps the weights but not the factors: call `apply` before `load_state_dict`. One of `transformers`
    keeps the name of the strategy in its configuration as well: call `apply` again after `from_pretrained`. Code that
    `torch.compile` made before is forgotten, as it has no factors.

    Args:
        model: a causal language model of `transformers` with the norms of Llama (also Mixtral, DeepSeek-V3, Phi-3),
            Gemma 2 or GPT-2, or with `layout` any module; on any device, the meta device included. Pass the model that
            is saved, not one inside it: its configuration keeps the name.
        norm: name of a strategy, such as "lns", or `package.module:function`.
        layout: where the model keeps its blocks and norms; None: by the names of its modules.
        trained: what to do with a model that is trained already. "refuse" it; "preserve" its function, by dividing the
            weights after scaled norms, so that it continues training under the strategy; or "change" its function, also
            right for weights that were trained under the strategy.
        initial_weights: for a strategy of initial weights, such as `scaled_init`, and needed where the configuration
            names it, which a checkpoint has and a new model lacks: "scale" multiplies them now, "scaled" leaves them.
        options: of the strategy, such as `position="only_ffn"`.

    Returns:
        The model.

    Raises:
        UserError: an unknown strategy or layout, a `Decoder`, a coefficient that an existing model cannot have, a
            strategy that is applied already, here or by `param_groups`, a trained model and `trained="refuse"`, no
            decision on initial weights, or weights that cannot be changed here: quantised, sharded, offloaded or on the
            meta device. The model is unchanged.
    """
    require_choice("trained", trained, Trained)
    if initial_weights is not None:
        require_choice("initial_weights", initial_weights, InitialWeights)
    sites = pre_norm_sites(model, layout)
    if any(isinstance(site.block, Block) for site in sites):
        raise UserError("a Decoder gets its strategy when it is built: pass build_all(...) to build_decoder")
    section = {"name": norm, **options}
    specs = checked_sublayer_specs(section, len(sites) // 2)
    if any(spec.has_rates for spec in specs):
        raise UserError(
            f"norm={norm!r} sets rates of the optimizer, which apply cannot: train the stock model with "
            f"param_groups(model, {norm!r}, ...), where it scales no branches, and with fit otherwise"
        )
    written = strategy_of(model)
    if any(is_scaled(module) for module in model.modules()):
        raise UserError(f"norm={norm!r}: the model has a strategy already: {written or applied_inside(model)}")
    if trained == "refuse" and hasattr(config_of(model), SCALED):
        raise UserError(
            f"norm={norm!r}: param_groups scaled the initial weights: use apply or param_groups, not both; for a new "
            f"model with the configuration of a scaled one, delete config.{SCALED}; for a trained one pass "
            "trained='preserve'"
        )
    if written not in (None, section):
        raise UserError(f"norm={section} differs from {written}, the strategy in the configuration of the model")
    if written is not None and initial_weights is None and changes_initial_weights(specs):
        raise UserError(
            f"norm={norm!r}: the configuration names this strategy, but not whether the initial weights are multiplied "
            "already: pass initial_weights='scaled' after from_pretrained, or 'scale' for a new model"
        )
    if written is not None and trained == "preserve":
        raise UserError(
            f"norm={norm!r}: the configuration names this strategy, so the weights are taken as trained under it: "
            f"delete config.{CONFIG_KEY} to preserve the function of others, or leave out trained='preserve'"
        )
    if written is None and initial_weights is not None and not changes_initial_weights(specs):
        raise UserError(f"norm={norm!r} sets no initial weights: leave out initial_weights={initial_weights!r}")
    if initial_weights == "scaled" and trained == "preserve":
        raise UserError(
            "initial_weights='scaled' is for weights that were trained under the strategy, trained='preserve' for "
            "others: pass one of them"
        )
    factors = [
        (site, module, factor)
        for site, spec in zip(sites, specs, strict=True)
        for module, factor in ((site.norm, spec.gain), (site.branch, spec.branch_scale))
        if factor != 1
    ]
    for site, module, _ in factors:
        place = f"norm={norm!r}: layer {site.layer}, {site.part}"
        require_no_adapter(module, place)
        if type(module).forward is nn.Module.forward:  # as nn.ModuleDict has
            raise UserError(
                f"{place}: an nn.{type(module).__name__} is never called, and cannot be multiplied: name the module "
                "inside it that is added to the stream in layout.branches"
            )
    if initial_weights == "scale" or (initial_weights is None and written is None):
        change_weights(model, sites, specs, norm, trained)
    for _, module, factor in factors:
        scale_output(module, factor)
    setattr(own_config(model), CONFIG_KEY, section)
    forget_compiled()
    return model


@torch.no_grad()
def fold(model: Model, *, layout: Layout | None = None) -> Model:
    """Multiply the factors of an applied strategy into the weights, in place, for a checkpoint of the stock model.

    The factor of a norm goes into its weight and bias. That of a branch goes into the module of `layout.branches`, such
    as Gemma 2's norm after a sub-layer, else into the sub-layer's last linear layer. The logits change by the rounding
    of one product per weight.

    Args:
        model: as returned by `apply`.
        layout: as given to `apply`.

    Returns:
        The model, without factors, and without the strategy in its configuration.

    Raises:
        UserError: no strategy is applied, a `Decoder`, or a factor has no weight here to go into. The model is
            unchanged.
    """
    targets: list[tuple[Any, Any, float]] = []
    sites, section = pre_norm_sites(model, layout), strategy_of(model)
    if any(isinstance(site.block, Block) for site in sites):
        raise UserError("a Decoder has its strategy in its blocks: the command export writes it folded")
    for site in sites:
        for module in (site.norm, site.branch):
            context = f"layer {site.layer}: the factor of its {site.part} has no weight to go into"
            require_no_adapter(module, context)
            if is_scaled(module):
                target = site.output if module is site.sublayer else module
                require_weight(target, context)
                offset = weight_offset(target) if target.weight.ndim == 1 else 0.0  # of a norm, not of a linear layer
                targets.append((module, target, offset))
    require_own_weights(model, sites, [target for _, target, _ in targets])
    if section is None:
        remedy = f"pass its {inside}" if (inside := applied_inside(model)) else "call apply first"
        raise UserError(f"{type(model).__name__} has no strategy to fold: {remedy}")
    specs = checked_sublayer_specs(section, len(sites) // 2)
    if not targets and any(name in FACTORS for spec in specs for name in nondefaults(spec)):
        raise UserError(f"the factors of {section} are lost, as after from_pretrained: call apply again, then fold")
    for module, target, offset in targets:
        target.weight.copy_((target.weight.double() + offset) * module.cod_output_scale - offset)
        if getattr(target, "bias", None) is not None:
            target.bias.copy_(target.bias.double() * module.cod_output_scale)
        remove_scale(module)
    delattr(own_config(model), CONFIG_KEY)
    forget_compiled()
    return model


def strategy_of(model: nn.Module) -> dict[str, Any] | None:
    """The strategy in the configuration of a model, such as `{"name": "lns"}`, or None."""
    return getattr(config_of(model), CONFIG_KEY, None)


def applied_inside(model: nn.Module) -> str:
    """The first module inside that `apply` was called on, with its strategy; empty if there is none."""
    strategies = {path: strategy_of(module) for path, module in model.named_modules() if path}
    return next((f"module {path!r}, which has {section}" for path, section in strategies.items() if section), "")


def config_of(model: Any) -> Any:
    """The configuration that a model of `transformers` is saved with; any other model itself."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_json_file") else model


def own_config(model: nn.Module) -> Any:
    """`config_of` a model, copied before it is changed: models that were made from one object share it."""
    shared = config_of(model)
    if shared is model:
        return model
    own = copy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return own


def require_no_adapter(module: Any, context: str) -> None:
    """Check that PEFT does not wrap a module: the adapter adds weights, and merging it loses the wrapper's factor.

    Raises:
        UserError: `context`, with the reason.
    """
    if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
        raise UserError(f"{context}: {type(module).__name__} has an adapter: merge it first (merge_and_unload)")


def require_parameter(module: Any, context: str) -> None:
    """Check that the weight of a layer is a parameter of its own that the layer computes with.

    Raises:
        UserError: `context`, with the reason.
    """
    if module is None:
        raise UserError(f"{context}: layout.outputs is missing, the last linear layers (mixtures of experts have none)")
    require_no_adapter(module, context)
    if getattr(module, "weight", None) is None:
        own = ", ".join(name for name, parameter in module._parameters.items() if parameter is not None)
        raise UserError(
            f"{context}: {type(module).__name__} has no parameter 'weight', but {own or 'none of its own'}: a layer "
            "that is multiplied needs one of this name; dequantise a quantised model"
        )
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise UserError(
            f"{context}: {type(module).__name__} has no parameter 'weight' of floating-point numbers: dequantise the "
            "model, or remove pruning (prune.remove) or parametrizations (remove_parametrizations) first"
        )


def require_weight(module: Any, context: str) -> None:
    """Check that the weight of a layer can be multiplied: as `require_parameter`, and its values are here.

    Raises:
        UserError: `context`, with the reason.
    """
    require_parameter(module, context)
    if module.weight.is_meta:
        raise UserError(f"{context}: it is on the meta device, or offloaded: initialise or load the weights first")
    if isinstance(module.weight, DTensor):
        raise UserError(f"{context}: it is sharded: do so before fully_shard, or in a model with the full state dict")
    if type(module.weight.data) is not Tensor:
        raise UserError(f"{context}: it is a {type(module.weight.data).__name__}: dequantise the model first")


def require_own_weights(model: nn.Module, sites: list[Site], changed: Sequence[Any]) -> None:
    """Check that no other module has the parameters of the modules that are changed: their factors would multiply.

    Raises:
        UserError: names the first sub-layer that shares one.
    """
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    chosen = set(changed)
    for site in sites:
        for module in [module for module in (site.norm, *site.inputs, site.output) if module in chosen]:
            others = [other for other in sites if module in (other.norm, *other.inputs, other.output)]
            if len(others) > 1 or any(holders[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
                raise UserError(
                    f"layer {site.layer}, {site.part}: another module shares the weight of its "
                    f"{type(module).__name__}, so that the factors would multiply: give each a weight of its own"
                )


def changes_initial_weights(specs: list[SublayerSpec]) -> bool:
    return any(name in WEIGHTS for spec in specs for name in nondefaults(spec))


def checked_sublayer_specs(
    norm: dict[str, Any],
    depth: int,
    supported: Sequence[str] = SUPPORTED,
    reason: str = "which an existing Pre-LN model cannot have",
) -> list[SublayerSpec]:
    """The sub-layers of all blocks of a strategy, whose coefficients are all supported.

    Raises:
        UserError: names every coefficient that is not; the message ends in `reason`.
    """
    specs = build_all(norm, depth)
    problems: dict[str, Any] = {}
    for part in [part for spec in specs for part in (*spec.sublayers, spec)]:
        problems = {name: value for name, value in nondefaults(part).items() if name not in supported} | problems
    if problems:
        listed = ", ".join(f"{name}={value!r}" for name, value in problems.items())
        raise UserError(f"norm={norm['name']!r} sets {listed}, {reason}")
    return [sublayer for spec in specs for sublayer in spec.sublayers]


@torch.no_grad()
def change_weights(model: nn.Module, sites: list[Site], specs: list[SublayerSpec], norm: str, trained: Trained) -> None:
    """Set the initial weights of a strategy, or keep the function of a trained model.

    Raises:
        UserError: see `apply`; nothing is changed.
    """
    initial = changes_initial_weights(specs)
    if trained == "refuse":
        same = "initial_weights='scaled'" if initial else "trained='change'"
        remedy = (
            f"for weights trained under this strategy call apply before load_state_dict, or pass {same}; for others "
            "pass trained='preserve' to keep the function, or trained='change'"
        )
        require_untrained(sites, f"norm={norm!r} changes what a trained model computes", remedy)
    if trained == "preserve" and (initial or any(spec.branch_scale != 1 for spec in specs)):
        raise UserError(f"norm={norm!r} scales branches or initial weights: trained='preserve' keeps only norms' gains")
    if trained == "preserve":
        scaled = [site for site, spec in zip(sites, specs, strict=True) if spec.gain != 1]
        require_inputs(scaled, ", for trained='preserve'")
    if any(spec.input_init != 1 for spec in specs):
        require_inputs(sites)
    if any(spec.output_init != 1 for spec in specs) and any(site.output is None for site in sites):
        raise UserError("layout.outputs is missing: the last linear layers of the sub-layers")
    changed: list[tuple[Any, float, float]] = []
    for site, spec in zip(sites, specs, strict=True):
        input_factor = spec.input_init
        if trained == "preserve":
            input_factor = 1 / spec.gain if spec.gain else math.inf  # infinity is refused below
        factors = [(site.norm, spec.pre_norm_weight), (site.output, spec.output_init)]
        factors += [(linear, input_factor) for linear in site.inputs]
        for module, factor in factors:
            if factor == 1:
                continue
            require_weight(module, f"norm={norm!r} cannot change a weight of layer {site.layer}")
            if trained == "preserve" and not (module.weight * factor).isfinite().all():
                raise UserError(
                    f"norm={norm!r}: weights divided by gain={spec.gain:.3g} of layer {site.layer} are not finite"
                )
            changed.append((module, factor, weight_offset(module) if module is site.norm else 0.0))
    require_own_weights(model, sites, [module for module, _, _ in changed])
    for module, factor, offset in changed:
        module.weight.add_(offset).mul_(factor).sub_(offset)


def is_trained(norm: Any) -> bool | None:
    """Whether the weight of a norm differs from its initial value: one, or zero where the norm adds one.

    None: it has no weight, or an offloaded one. A weight on the meta device, whose initialisation is still to come, is
    not trained.

    Raises:
        UserError: the weight is sharded.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(weight, DTensor):
        raise UserError("the model is sharded, which hides whether it is trained: do so before fully_shard")
    if not isinstance(weight, Tensor) or (weight.is_meta and hasattr(norm, "_hf_hook")):
        return None
    return not weight.is_meta and bool((weight != 1 - weight_offset(norm)).any())


def require_untrained(sites: list[Site], problem: str, remedy: str) -> None:
    """Check that a model is not trained.

    Raises:
        UserError: its norms are not at their initial weights, or none has one that would show it.
    """
    states = {is_trained(site.norm) for site in sites}
    if True in states:
        raise UserError(f"{problem}: its norms are not at their initial weights: {remedy}")
    if states == {None}:
        norm = type(sites[0].norm).__name__
        raise UserError(
            f"{problem}: its norms ({norm}) have no parameter 'weight' in memory, which would show whether it is "
            f"trained: {remedy}"
        )


def without_hooks(norm: Any) -> Any:
    """A norm without hooks of the user and of `scale_output`; it shares the parameters."""
    other = copy(norm)
    other._forward_hooks, other._forward_pre_hooks = OrderedDict(), OrderedDict()
    return other


@torch.no_grad()
def weight_offset(norm: Any) -> float:
    """The offset that a norm adds to its weight: 0, or 1 in models like Gemma; measured with weight 0.

    Raises:
        UserError: the norm cannot be run on one tensor.
    """
    probe = deepcopy(without_hooks(norm)).float()
    for parameter in probe.parameters():
        parameter.zero_()
    x = torch.ones_like(probe.weight)
    x[::2] = -1  # mean 0, variance 1
    try:
        return float(probe(x[None, None])[0, 0, 1].round())
    except Exception as error:  # a norm of the user raises many kinds
        raise UserError(
            f"{type(norm).__name__} cannot be run on one tensor [batch, length, hidden]: {first_line(error)}"
        ) from error
