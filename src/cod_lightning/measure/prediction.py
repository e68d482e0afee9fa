"""The residual stream of a strategy before training: in closed form from its coefficients, and measured.

The closed form propagates three kernels [tokens, tokens] through the blocks, averages over the random weights:

    q   x_t . x_s / d, of the stream; its diagonal is the variance
    p   the same of a perturbation that starts with independent entries of variance 1 at the first block's input
    g   the same of the gradient of the loss, backwards from the head

For a sub-layer with the kernel N of its norm's output, n n^T * q with n_t = gain * weight / sqrt(q_tt + eps),

    q <- norms( skip^2 q + branch_scale^2 f(N) )    attention   f(N) = c_v c_o E[A N A^T]
                                                    FFN         f(N) = c_down c_up E[silu silu^T] * N

and c is the number of inputs of a projection times the variance of its weights; after a norm of queries, keys or
values, c N is normalised as well. A bounded function h in place of a norm gives N = gain^2 E[h(x_t) h(x_s)]. p and g
follow the derivatives.

It assumes that

- branches are independent of the stream they are added to, which new random weights make exact on average, and that
  the width is large: one draw of the weights differs from the average by about 1/sqrt(width);
- a norm's input is Gaussian, or has a fixed norm after a norm of the sum;
- attention nearly averages the values of all earlier tokens: the variance of its logits is well below the logarithm
  of the number of tokens, and logits differ independently from token to token;
- the logits of the head are small, and tokens are uniformly random, as are the targets. The head is not tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.kernels.reference import BOUNDED, KAPPA
from cod_lightning.measure.activation_stats import token_variance
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.jacobian_products import differentiable, jvp_and_vjp, rademacher
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.result import Result, table_rows
from cod_lightning.memory import require_memory
from cod_lightning.nn.config import MAX_LAYERS, DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import OUTPUT_PROJECTIONS, build_decoder, outer_stds, projection_std
from cod_lightning.nn.norms import ALPHA, with_norm_kind
from cod_lightning.nn.strategies import SublayerSpec, build_all
from cod_lightning.nn.strategy_lookup import norm_section

Array = np.ndarray
SEQUENCES, TOKENS = 8, 64
"""The random batch."""
FP16_MAX, DEVIATIONS = 65504, 6
"""fp16 overflows where this many standard deviations of the stream exceed its largest number."""
QUANTITIES = {
    "variance": "variance of the block's output",
    "gradient_norm": "gradient of the loss at the block's output",
    "gain": r"gain $\|\partial y_l/\partial x_1\|_F/\sqrt{nd}$",
}


@dataclass(frozen=True)
class Prediction(Result):
    """Each quantity by layer, in closed form and as measured at initialisation."""

    variance: list[float]
    """Variance of the block's output, mean over tokens."""
    variance_measured: list[float]
    gradient_norm: list[float]
    """L2 norm of the gradient of the mean loss with respect to the block's output."""
    gradient_norm_measured: list[float]
    gain: list[float]
    """||d y_l / d x_1||_F / sqrt(n d), from the first block's input to the output of block l, n tokens."""
    gain_measured: list[float]
    overflow_layer: int | None
    """First layer whose closed-form stream overflows fp16 at `DEVIATIONS` standard deviations; None: none does."""
    doubled: dict[str, float]
    """Factors of the largest variance, gradient and gain in closed form when the depth doubles."""

    def panels(self) -> list[Panel]:
        layers = range(1, len(self.variance) + 1)
        return [
            Lines(
                label,
                {"closed form": getattr(self, name)},
                log=True,
                points={"measured": (layers, getattr(self, f"{name}_measured"))},
            )
            for name, label in QUANTITIES.items()
        ]

    def rows(self) -> list[dict[str, Any]]:
        return table_rows({name.replace("_measured", ", measured"): values for name, values in self.series().items()})

    def summary(self) -> str:
        """The layer that overflows, and the growth with the depth, in words."""
        place = "no layer" if self.overflow_layer is None else f"layer {self.overflow_layer}"
        growth = ", ".join(f"{name.replace('_', ' ')} by {factor:.3g}" for name, factor in self.doubled.items())
        overflow = f"fp16 overflow at {DEVIATIONS} standard deviations: {place}"
        return f"{overflow}\ntwice the depth multiplies the largest {growth}"


def predict(config: DecoderConfig, norm: str | Mapping[str, Any], seed: int = 1) -> Prediction:
    """Compare the closed form with one forward and backward pass, and one Jacobian product, of an untrained decoder.

    Args:
        config: the configuration, with `vocab_size` set; the decoder is built on the CPU.
        norm: the strategy, as in `build_all`.
        seed: of weights and tokens.

    Raises:
        UserError: an unknown strategy, one that raises, one without a closed form, one whose stream, gradient or gain
            is zero or infinite, more than `MAX_LAYERS` / 2 blocks, or more than the free memory.
    """
    depth = config.num_hidden_layers
    if 2 * depth > MAX_LAYERS:
        raise UserError(f"model.num_hidden_layers={depth} is doubled: expected at most {MAX_LAYERS // 2}")
    require_memory(config.num_parameters(), "model")
    specs, twice = build_all(norm, depth), build_all(norm, 2 * depth)
    if any(spec.value_residual == "mean" for spec in specs):
        raise UserError("norm: value_residual='mean' has no closed form: predict norm.form=learned, or the base")
    decoder = build_decoder(config, specs, seed)
    with torch.device("meta"):
        deeper = Decoder(replace(config, num_hidden_layers=2 * depth), twice)
    expected, doubled = checked_closed_form(decoder), checked_closed_form(deeper)
    overflow = [v for v in expected["variance"] if DEVIATIONS * math.sqrt(v) > FP16_MAX]
    return Prediction(
        model=str(norm_section(norm)["name"]),
        **expected,
        **{f"{name}_measured": values for name, values in measure_at_init(decoder, seed).items()},
        overflow_layer=expected["variance"].index(overflow[0]) + 1 if overflow else None,
        doubled={name: max(doubled[name]) / max(values) for name, values in expected.items()},
    )


def measure_at_init(decoder: Decoder, seed: int) -> dict[str, list[float]]:
    """The quantities on random tokens: one pass forward and backward, and the product with one random vector."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(decoder.lm_head.out_features, (SEQUENCES, TOKENS), generator=generator)
    streams: list[Tensor] = []
    loss: Any = decoder(tokens, next_tokens(tokens), lambda name, _, x: name == "residual" and streams.append(x))
    gradients = torch.autograd.grad(loss.total / loss.counts.sum(), streams)
    gain = []
    with differentiable(decoder):
        inputs, functions = ModelAdapter(decoder).block_functions(tokens)
        v = rademacher(inputs[0].shape, generator, inputs[0].device)
        for function, x in zip(functions, inputs, strict=True):
            v = jvp_and_vjp(function, x)[0](v)
            gain.append(float(v.square().mean().sqrt()))
    return {
        "variance": [float(token_variance(x).mean()) for x in streams],
        "gradient_norm": [float(gradient.norm()) for gradient in gradients],
        "gain": gain,
    }


def checked_closed_form(decoder: Decoder) -> dict[str, list[float]]:
    """`closed_form` of a decoder, whose numbers are all positive and finite.

    Raises:
        UserError: a number is zero or not finite.
    """
    with np.errstate(all="ignore"), suppress(OverflowError):
        quantities = closed_form(decoder)
        if all(0 < value < math.inf for values in quantities.values() for value in values):
            return quantities
    depth = decoder.config.num_hidden_layers
    raise UserError(
        f"norm: the stream of {depth} blocks, its gradient or its gain is zero or infinite: change the skip"
    )


def closed_form(decoder: Decoder) -> dict[str, list[float]]:
    """The quantities from the coefficients and the configuration of a decoder, whose weights are not read."""
    config, hidden = decoder.config, decoder.config.hidden_size
    stds, vocabulary = outer_stds(decoder), decoder.lm_head.out_features
    embedding = stds["model.embed_tokens.weight"] ** 2 * truncated_variance(config)
    head = stds.get("lm_head.weight", stds["model.embed_tokens.weight"]) ** 2 * truncated_variance(config)
    q = embedding * (np.eye(TOKENS) * (1 - 1 / vocabulary) + 1 / vocabulary)  # equal tokens have equal embeddings
    steps = propagate(decoder, q, None)
    if any(sublayer.learned_skip for block in decoder.blocks for sublayer in block.spec.sublayers):
        steps = propagate(decoder, q, np.cumsum([1, *(step.branch for step in steps[:-1])]))  # Admin's profile
    outputs = steps[1::2]
    p, gain = np.eye(TOKENS), []
    for attention_step, ffn_step in zip(steps[::2], outputs, strict=True):
        p = ffn_step.forward(attention_step.forward(p, p), p)
        gain.append(float(p.diagonal().mean()) ** 0.5)
    # |softmax - onehot|^2 over the vocabulary for every token but the last of a sequence, which has no target.
    softmax = min(math.exp(min(hidden * head, 99)), vocabulary) / vocabulary
    error = head * (1 - 2 / vocabulary + softmax) / (SEQUENCES * (TOKENS - 1)) ** 2
    of_last = decoder.blocks[-1].spec
    _, last = norm_factors(outputs[-1].q, with_norm_kind(config, of_last), alpha=of_last.ffn.norm_alpha)
    g, gradient_norm = last * np.diag([error] * (TOKENS - 1) + [0.0]), []
    for attention_step, ffn_step in zip(reversed(steps[::2]), reversed(outputs), strict=True):
        gradient_norm.append(math.sqrt(SEQUENCES * hidden * g.trace()))
        g, of_block = ffn_step.backward(g)
        through, own = attention_step.backward(g)
        g = through + own + of_block
    variance = [float(step.q.diagonal().mean()) for step in outputs]
    return {"variance": variance, "gradient_norm": gradient_norm[::-1], "gain": gain}


class Step(NamedTuple):
    """A sub-layer at the kernels of its input."""

    q: Array
    """Kernel of the output."""
    branch: float
    """Variance of the scaled branch."""
    forward: Callable[[Array, Array], Array]
    """Maps p at the sub-layer's input, and at the block's input, to p after the sub-layer."""
    backward: Callable[[Array], tuple[Array, Array]]
    """Maps g after the sub-layer to g at its input, and to what the skip adds to g at the block's input."""


def propagate(decoder: Decoder, q: Array, skips: Array | None) -> list[Step]:
    """All sub-layers in order, for the kernel q of the embeddings; `skips` are the squares of learned skips."""
    steps: list[Step] = []
    for layer, block in enumerate(decoder.blocks, start=1):
        config = with_norm_kind(decoder.config, block.spec)
        if block.spec.entry_norm:
            q = q * norm_factors(q, config, alpha=block.spec.attention.norm_alpha)[0]
        of_block = q
        for spec, module in ((block.spec.attention, block.self_attn), (block.spec.ffn, block.mlp)):
            spec = replace(spec, branch_scale=spec.branch_scale * spec.factor(layer, decoder.step))
            skip = float(skips[len(steps)]) if skips is not None and spec.learned_skip else spec.skip**2
            c = fan_variances(spec, module, config)
            steps.append(step_of(spec, c, config, q, of_block, skip, block.spec.head_norm))
            q = steps[-1].q
    return steps


def step_of(
    spec: SublayerSpec,
    c: Mapping[str, float],
    config: DecoderConfig,
    q: Array,
    of_block: Array,
    skip: Array | float,
    head_norm: str,
) -> Step:
    """The sub-layer of a spec at the kernels q of its input and `of_block` of its block's; c as in `fan_variances`."""
    factors = partial(norm_factors, config=config, alpha=spec.norm_alpha)
    before, slope = 1.0, 1.0
    if spec.pre_norm:
        weight, size = spec.gain * spec.pre_norm_weight, config.hidden_size // spec.groups
        before, slope = factors(q, weight=weight, size=size, input_scale=spec.input_scale)
    if "q_proj" in c:
        head_factors = partial(factors, size=config.head_dim)
        value, mix = attention(before * q, c, {name: head_factors for name in "qkv" if name in head_norm})
    else:
        value, mix = feed_forward(before * q, c)
    after, after_slope = factors(value, weight=spec.branch_norm_weight) if spec.branch_norm else (1.0, 1.0)
    branch = spec.branch_scale**2 * after * value
    start = {"input": q, "pre_norm": before * q, "block": of_block}[spec.skip_from]
    total = skip * start + branch
    # A sum that is normalised is not Gaussian from then on: its length is fixed.
    outer, outer_slope = factors(total, fixed=True) if spec.sum_norm else (1.0, 1.0)
    to_skip = skip * slope if spec.skip_from == "pre_norm" else skip
    to_branch = spec.branch_scale**2 * after_slope

    def forward(p: Array, of_block: Array) -> Array:
        start = of_block if spec.skip_from == "block" else p
        return outer_slope * (to_skip * start + to_branch * mix(slope * p, transposed=False))

    def backward(g: Array) -> tuple[Array, Array]:
        g = outer_slope * g
        of_branch, of_skip = slope * mix(to_branch * g, transposed=True), to_skip * g
        return (of_branch, of_skip) if spec.skip_from == "block" else (of_branch + of_skip, np.zeros_like(g))

    return Step(outer * total, float(branch.diagonal().mean()), forward, backward)


class Mix(Protocol):
    """Maps p through a sub-layer, or `transposed` g backwards through it, up to its norm and scale."""

    def __call__(self, kernel: Array, *, transposed: bool) -> Array: ...


def attention(
    n: Array, c: Mapping[str, float], norms: Mapping[str, Callable[[Array], tuple[Array, Array]]]
) -> tuple[Array, Mix]:
    """The kernel of attention's output on the kernel n, and the same map of p and, transposed, of g.

    `norms` are the factors of the norms of queries, keys and values, by the letters q, k and v.
    """
    # The factors of projections and norms from n to the kernels of queries, keys and values; those of a derivative.
    (to_q, dq), (to_k, dk), (to_v, dv) = (
        [inputs * factor for factor in (norms[name](inputs * n) if name in norms else (1, 1))]
        for name, inputs in ((name, c[f"{name}_proj"]) for name in "qkv")
    )
    queries, values = to_q * n, to_v * n
    key_spread, value_spread = spread_of(to_k * n), spread_of(values)
    count = np.arange(1, TOKENS + 1)
    ones = np.tril(np.ones((TOKENS, TOKENS)))
    mean = ones / count[:, None]
    # Covariance of the attention weights of tokens t and s on one earlier token, from that of their logits.
    most = np.maximum.outer(count, count)
    logits = np.minimum(queries * key_spread, np.log(most))
    weights = np.expm1(logits) * (1 - 1 / most) / np.outer(count, count)
    # Its derivative; a softmax of a single token, or of one that dominates, does not follow its logits.
    slope = value_spread * np.exp(logits) * (1 - np.exp(logits) / most) / np.outer(count, count)
    through_keys, through_queries = slope * queries, slope * key_spread * np.minimum.outer(count, count)

    def sums(kernel: Array) -> Array:
        """The sums over earlier tokens of what differs from token to token."""
        return ones @ np.diag(kernel.diagonal() - off_diagonal(kernel)) @ ones.T

    def sums_transposed(kernel: Array) -> Array:
        return np.diag((ones.T @ kernel @ ones).diagonal())

    def mix(kernel: Array, *, transposed: bool) -> Array:
        if transposed:
            of_values = dv * (mean.T @ kernel @ mean + sums_transposed(weights * kernel))
            of_logits = dk * sums_transposed(through_keys * kernel) + dq * through_queries * kernel
        else:
            of_values = mean @ (dv * kernel) @ mean.T + weights * sums(dv * kernel)
            of_logits = through_keys * sums(dk * kernel) + through_queries * dq * kernel
        return c["o_proj"] * (of_values + of_logits)

    return c["o_proj"] * (mean @ values @ mean.T + weights * sums(values)), mix


def spread_of(kernel: Array) -> float:
    """The part of the variance that differs from token to token."""
    return float(kernel.diagonal().mean()) - off_diagonal(kernel)


def feed_forward(n: Array, c: Mapping[str, float]) -> tuple[Array, Mix]:
    """The kernel of SwiGLU's output on the kernel n, and the map of p and g."""
    gate, factor = c["gate_proj"] * n, c["up_proj"] * c["down_proj"]
    product = pair_mean(lambda x: x * sigmoid(x), gate)
    slope = pair_mean(lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))), gate)
    return factor * product * n, lambda kernel, *, transposed: factor * (product + gate * slope) * kernel


def pair_mean(function: Callable[[Array], Array], kernel: Array) -> Array:
    """E[f(x_t) f(x_s)] of Gaussians with covariances `kernel`, by twelve terms of the Hermite series of f."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    factorials = np.array([math.sqrt(math.factorial(k)) for k in range(12)])
    basis = np.polynomial.hermite_e.hermevander(nodes, 11) / factorials
    std = np.sqrt(kernel.diagonal())
    coefficients = function(std[:, None] * nodes) @ (weights[:, None] / weights.sum() * basis)
    correlation = np.clip(kernel / np.maximum(np.outer(std, std), 1e-300), -1, 1)
    return sum(np.outer(column, column) * correlation**k for k, column in enumerate(coefficients.T))


def norm_factors(
    q: Array,
    config: DecoderConfig,
    weight: float = 1.0,
    size: int | None = None,
    input_scale: float = 1.0,
    fixed: bool = False,
    alpha: float | None = None,
) -> tuple[Array, Array]:
    """The factors of a norm on the kernel q of its input, and on the kernel of a perturbation.

    Args:
        q: at a norm of the kind in `config`.
        config: the configuration.
        weight: initial weight times gain.
        size: number of channels; None: the hidden size.
        input_scale: of the norm.
        fixed: the input has a fixed length instead of being Gaussian.
        alpha: initial alpha of a bounded function; None: the default of its kind.
    """
    size = size or config.hidden_size
    scale = 1 / np.sqrt(q.diagonal() + config.norm_eps / input_scale**2)
    kernel = np.outer(scale, scale)
    # The mean square of a norm's Jacobian: (size - 1) E[1 / |x|^2] of a standard Gaussian x.
    removed = 1.0 if fixed else (size - 1) / max(size - 2, 1)
    if config.norm not in BOUNDED:
        return weight**2 * kernel, weight**2 * kernel * removed
    # The function reads Gaussians of covariance into * q.
    alpha = ALPHA[config.norm] if alpha is None else alpha
    into = (alpha / KAPPA) ** 2 * kernel if config.norm == "bhyt" else np.full_like(q, (alpha * input_scale) ** 2)
    if config.norm == "derf":
        value, derivative = np.vectorize(math.erf), lambda z: 2 / math.sqrt(math.pi) * np.exp(-(z**2))
    else:
        value, derivative = np.tanh, lambda z: 1 - np.tanh(z) ** 2
    slopes = pair_mean(derivative, into * q) * into
    ratios = np.divide(pair_mean(value, into * q), q, out=slopes.copy(), where=q != 0)
    return weight**2 * ratios, weight**2 * slopes * (removed if config.norm == "bhyt" else 1.0)


def off_diagonal(kernel: Array) -> float:
    return float((kernel.sum() - kernel.trace()) / (kernel.size - len(kernel)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def fan_variances(spec: SublayerSpec, module: torch.nn.Module, config: DecoderConfig) -> dict[str, float]:
    """For each projection, the number of its inputs times the variance of its initial weights."""
    c = {}
    for name, weight in module.named_parameters():
        if weight.ndim == 2:
            projection = name.removesuffix(".weight")
            factor = 1.0 if projection in OUTPUT_PROJECTIONS else spec.input_init
            std = projection_std(weight, projection, spec, config) * factor
            c[projection] = weight.shape[1] * std**2 * truncated_variance(config)
    return c


def truncated_variance(config: DecoderConfig) -> float:
    """Variance of a standard normal number that is truncated at `init_cutoff`."""
    if (cutoff := config.init_cutoff) is None:
        return 1.0
    density = math.exp(-(cutoff**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * cutoff * density / math.erf(cutoff / math.sqrt(2))
