"""Prove by running a model that every block applies the factors of a norm strategy, whoever implemented it.

The factors are measured at the modules' boundaries: how much larger the input of a sub-layer is than the plain norm of
the stream, and how much of a sub-layer's output reaches the stream. Two released implementations lost them: one has a
branch that is never reached, the other a buffer that is wiped, without an error, when a model leaves the meta device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from inspect import ismethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cod_lightning.errors import UserError, first_line
from cod_lightning.nn.apply import checked_sublayer_specs, strategy_of, weight_offset, without_hooks
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.layouts import (
    Layout,
    Site,
    branch_multiplier,
    hidden_input,
    hidden_output,
    logits_output,
    pre_norm_sites,
)
from cod_lightning.nn.spec import FACTORS, SublayerSpec
from cod_lightning.nn.weights import is_sharded
from cod_lightning.rng import isolate_rng

TOLERANCE = 5e-5
"""Relative error of a factor measured in float32; rounding to bfloat16 changes 1/sqrt(2), 1/sqrt(3), ... by more."""
GARBAGE = 1.7
"""Stands for uninitialised memory where a buffer is not set again."""
EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
"""Attributes in which norms keep their eps."""
USUAL_EPS = (torch.finfo(torch.float32).eps, 1e-5, 1e-6, 1e-8, 1e-12)
"""Values of eps that a norm may have: those of `nn.RMSNorm`, `F.layer_norm`, Llama and others."""
FIT_TOLERANCE = 1e-3
"""Largest relative error of a least-squares fit that counts as a factor."""


@dataclass(frozen=True)
class Factor:
    """A factor of one sub-layer, expected and measured."""

    layer: int
    """Counts from 1."""
    part: str
    """"attention" or "ffn"."""
    name: str
    """"gain" of the norm or "branch_scale"."""
    expected: float
    measured: float

    @property
    def holds(self) -> bool:
        return abs(self.measured - self.expected) <= TOLERANCE * abs(self.expected)


def verify(
    model: nn.Module,
    norm: str | None = None,
    *,
    layout: Layout | None = None,
    inputs: Tensor | None = None,
    reset: Callable[[nn.Module], object] | None = None,
    **options: Any,
) -> list[Factor]:
    """Check that every block applies the factors of a strategy.

    It holds in the model, in training mode (without dropout), after a round trip through bfloat16, after initialisation
    on the meta device with loading of the weights, and compiled. Each check runs on a copy in float32; the model does
    not change.

    Args:
        model: a Pre-LN model, as for `apply`; its forward takes `inputs` alone.
        norm: name of the strategy; None: the one in the model's configuration.
        layout: where the model keeps its blocks, norms and sub-layers; None: by the names of its modules.
        inputs: tokens [batch, length], or another tensor that the model's forward takes, such as images; None: 16
            tokens of the vocabulary of a `transformers` model.
        reset: sets the buffers of a model that has left the meta device, as its trainer does; None: calls
            `reset_buffers()` of every module that has it.
        options: of the strategy.

    Returns:
        Every factor, as measured on the unchanged model.

    Raises:
        UserError: a factor is missing or wrong; names the first block and when. Or the strategy is not known, not named
            anywhere, or has coefficients other than gains and branch scales. Or the model cannot be run, as on the
            meta device, or is sharded.
    """
    if options and not norm:
        name, value = next(iter(options.items()))
        raise UserError(f"{name}={value!r} is an option of a strategy: pass norm= too, or leave it out")
    section = {"name": norm, **options} if norm else strategy_of(model)
    if section is None:
        raise UserError(f"{type(model).__name__}: its configuration names no strategy; say which, such as norm='lns'")
    unsupported = "which verify cannot check: it measures gain and branch_scale"
    # `pre_norm_sites` refuses a Decoder of post_ln or skip_init by its modules; its coefficients say more.
    depth = len(model.blocks) if isinstance(model, Decoder) else len(pre_norm_sites(model, layout)) // 2
    specs = checked_sublayer_specs(section, depth, FACTORS, unsupported)
    require_values(model)
    tokens = example_tokens(model) if inputs is None else inputs
    if not isinstance(tokens, Tensor):
        raise UserError(f"inputs is a {type(tokens).__name__}: expected a tensor, such as tokens [batch, length]")
    tokens = tokens.float() if tokens.is_floating_point() else tokens  # as the copies of the model
    try:
        with isolate_rng():
            return check_copies(model, section["name"], specs, layout, tokens, reset or reset_buffers)
    except UserError:
        raise
    except Exception as error:  # models of the user raise many kinds
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{type(model).__name__} cannot be verified on inputs {list(tokens.shape)}: {reason}"
        ) from error


def check_copies(
    model: nn.Module,
    norm: str,
    specs: list[SublayerSpec],
    layout: Layout | None,
    tokens: Tensor,
    reset: Callable[[nn.Module], object],
) -> list[Factor]:
    """The factors of a model, which hold in every copy; arguments and errors are those of `verify`."""
    try:
        original = deepcopy(model).float().eval()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of torch, for a tensor in an attribute that has a graph of autograd
        raise UserError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}): delete what its forward keeps"
        ) from error
    for site in pre_norm_sites(original, layout):
        if site.output is not None and not site.output.weight.any():
            nn.init.eye_(site.output.weight)  # a branch that starts at zero has no factor
    factors = measure_factors(original, specs, layout, tokens)
    require_factors(factors, norm, "")
    with WithoutDropout():
        require_factors(measure_factors(deepcopy(original).train(), specs, layout, tokens), norm, " in training mode")
    rounded = measure_factors(deepcopy(original).bfloat16().float(), specs, layout, tokens)
    require_factors(rounded, norm, " after .to(bfloat16)")
    fresh = measure_factors(leave_meta_device(original, reset), specs, layout, tokens)
    require_factors(fresh, norm, " after meta initialisation")
    check_compiled(original, tokens, norm)
    return factors


def require_values(model: nn.Module) -> None:
    """Check that a model can be copied and run here.

    Raises:
        UserError: it is sharded, quantised, or on the meta device.
    """
    name = type(model).__name__
    if is_sharded(model):
        raise UserError(f"{name} is sharded: call verify before fully_shard")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{name} is on the meta device, or offloaded: initialise or load the weights first")
    # torch.ao's quantised layers have a method weight().
    if any(ismethod(getattr(module, "weight", None)) for module in model.modules()):
        raise UserError(f"{name} is quantised: dequantise the model first")


class WithoutDropout(TorchFunctionMode):
    """Inside the `with`, every function of dropout returns its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "dropout" in getattr(func, "__name__", ""):
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def measure_factors(model: nn.Module, specs: list[SublayerSpec], layout: Layout | None, tokens: Tensor) -> list[Factor]:
    """Run a model and measure the factors of every sub-layer."""
    sites = pre_norm_sites(model, layout)
    seen: dict[tuple[int, str], Tensor] = {}
    with torch.compiler.set_stance("force_eager"), ExitStack() as handles:
        for site in sites:
            for handle in register_recorders(site, seen):
                handles.enter_context(handle)
        model(tokens)
    require_called(sites, seen)
    for site, spec in zip(sites[1::2], specs[1::2], strict=True):
        if (site.layer, "middle") not in seen:  # a fused kernel ran instead of the norm's forward
            seen[site.layer, "middle"] = seen[site.layer, "output"] - spec.branch_scale * seen[site.layer, "ffn output"]
    factors = []
    for index, (site, spec) in enumerate(zip(sites, specs, strict=True)):
        ends = ("block", "middle") if site.part == "attention" else ("middle", "output")
        x, y = (seen[site.layer, end] for end in ends)  # the residual stream before and after the sub-layer
        h = seen[site.layer, f"{site.part} input"]
        gain = fit_factor(h, plain_norm_outputs(site.norm, x))
        if math.isnan(gain):  # a norm of another kind counts without hooks, such as that of `apply`
            gain = fit_factor(h, output_alone(site.norm, x))
        factors.append(Factor(site.layer, site.part, "gain", spec.gain, gain))
        outputs = [branch_multiplier(site.block) * seen[site.layer, f"{part} output"] for part in ("attention", "ffn")]
        if torch.equal(seen[site.layer, "block"], seen[site.layer, "middle"]):  # parallel: both read the block's input
            branch = fit_factors(seen[site.layer, "output"] - x, outputs)[index % 2]
        else:
            branch = fit_factor(y - x, [outputs[index % 2]])
        factors.append(Factor(site.layer, site.part, "branch_scale", spec.branch_scale, branch))
    return factors


def require_called(sites: list[Site], seen: Container[tuple[int, str]]) -> None:
    """Raise a UserError that names the first module of a layout that was not called."""
    for site in sites:
        for name, field in (
            ("block", "blocks"),
            (f"{site.part} input", "sublayers"),
            (f"{site.part} output", "branches"),
        ):
            if (site.layer, name) not in seen:
                raise UserError(
                    f"layer {site.layer}, {site.part}: its module of layout.{field} is not called in the forward: name "
                    "one that is"
                )


def register_recorders(site: Site, seen: dict[tuple[int, str], Tensor]) -> list[Any]:
    """Hooks that keep the inputs and outputs of a sub-layer and of its block, by layer and name, in `seen`."""

    def keep_input(module: nn.Module, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[site.layer, name] = flat(hidden_input(args, kwargs))

        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def keep_output(module: nn.Module, name: str, prepend: bool = False) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen[site.layer, name] = flat(hidden_output(output)).clone()  # the block may add the stream in place

        return module.register_forward_hook(hook, prepend=prepend)

    # `prepend`: before the hook of `apply`, which multiplies by branch_scale.
    ends = (
        keep_input(site.sublayer, f"{site.part} input"),
        keep_output(site.branch, f"{site.part} output", prepend=True),
    )
    if site.part == "attention":
        return [*ends, keep_input(site.block, "block"), keep_output(site.block, "output")]
    return [*ends, keep_input(site.norm, "middle")]


def flat(x: Tensor) -> Tensor:
    """Hidden states as [1, tokens, hidden]: some blocks, as OPT's, merge batch and length before a sub-layer."""
    return x.reshape(1, -1, x.shape[-1])


def plain_norm_outputs(norm: Any, x: Tensor) -> list[Tensor]:
    """Outputs that a norm without a gain can have on x: those of RMSNorm and LayerNorm.

    A norm that does not name its eps has one of the usual values. One that does not run on x alone is taken to add
    nothing to its weight.
    """
    named = next((getattr(norm, name) for name in EPS_NAMES if hasattr(norm, name)), None)
    epsilons = USUAL_EPS if named is None else (named,)
    centred = x - x.mean(-1, keepdim=True)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    factor = 1.0 if weight is None else weight
    if weight is not None:
        with suppress(UserError):
            factor = weight + weight_offset(norm)
    return [
        h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * factor + (0 if bias is None else bias)
        for h in (x, centred)
        for eps in epsilons
    ]


def output_alone(norm: Any, x: Tensor) -> list[Tensor]:
    """The output of a norm without hooks; empty if it does not run on x alone."""
    try:
        return [without_hooks(norm)(x)]
    except Exception:  # a norm of the user raises many kinds
        return []


def fit_factors(y: Tensor, outputs: list[Tensor]) -> list[float]:
    """The factors by which y is the sum of the outputs; NaN if there are none."""
    terms, total = torch.stack([output.double().flatten() for output in outputs], 1), y.double().flatten()
    factors = torch.linalg.lstsq(terms, total[:, None]).solution[:, 0]
    holds = (terms @ factors - total).norm() < FIT_TOLERANCE * total.norm()
    return factors.tolist() if holds else [math.nan] * len(outputs)


def fit_factor(y: Tensor, candidates: list[Tensor]) -> float:
    """The factor s of the candidate c for which y is s * c; NaN if there is none."""
    best, factor = FIT_TOLERANCE, float("nan")
    for candidate in candidates:
        y64, c64 = y.double().flatten(), candidate.double().flatten()
        s = (y64 @ c64) / (c64 @ c64)
        error = float((y64 - s * c64).norm() / y64.norm())
        if error < best:
            best, factor = error, float(s)
    return factor


def require_factors(factors: list[Factor], norm: str, when: str) -> None:
    """Raise a UserError that names the first factor that does not hold."""
    for factor in factors:
        if not factor.holds:
            unknown = math.isnan(factor.measured)
            measured = "no constant factor" if unknown else f"{factor.measured:.6g}"
            adds = "; if its sub-layer adds the stream itself, name the linear layer before the sum in layout.branches"
            hint = adds if unknown and factor.name == "branch_scale" else ""
            raise UserError(
                f"norm={norm!r} does not hold{when}: layer {factor.layer}, {factor.part}: "
                f"{factor.name} is {measured}, expected {factor.expected:.6g}{hint}"
            )


def check_compiled(model: nn.Module, tokens: Tensor, norm: str) -> None:
    """Raise a UserError if the compiled model computes other logits."""
    import torch._dynamo  # takes a second

    settings: Any = torch._dynamo.config
    # By default the ninth model of a class in a process runs without compilation.
    with torch.no_grad(), settings.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        compiled_model = torch.compile(deepcopy(model), backend="eager")
        eager, compiled = logits_output(model(tokens)), logits_output(compiled_model(tokens))
    if not torch.allclose(eager, compiled, rtol=1e-3, atol=1e-3 * float(eager.abs().max())):
        raise UserError(f"norm={norm!r} does not hold after compilation: the logits differ")


@torch.no_grad()
def leave_meta_device(model: nn.Module, reset: Callable[[nn.Module], object]) -> nn.Module:
    """A copy that was on the meta device: its buffers are empty until `reset`, its parameters are loaded."""
    fresh, device = deepcopy(model).to("meta"), next(model.parameters()).device
    fresh = fresh.to_empty(device=device)
    for buffer in fresh.buffers():
        buffer.fill_(GARBAGE)
    reset(fresh)
    state = model.state_dict(keep_vars=True).items()  # wrappers name parameters otherwise in it
    fresh.load_state_dict({name: x for name, x in state if isinstance(x, nn.Parameter)}, strict=False)
    return fresh


def reset_buffers(model: nn.Module) -> None:
    """Call `reset_buffers()` of every module that has it."""
    for module in model.modules():
        if callable(reset := getattr(module, "reset_buffers", None)):
            reset()


def example_tokens(model: Any) -> Tensor:
    """16 different tokens [1, 16] of the vocabulary of a model of `transformers`, or of our decoder."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not isinstance(vocabulary := getattr(config, "vocab_size", None), int):
        raise UserError(
            f"{type(model).__name__} has no config.vocab_size: pass inputs=, such as tokens [batch, length]"
        )
    return (torch.arange(1, 17) * 7919 % vocabulary)[None].to(next(model.parameters()).device)
