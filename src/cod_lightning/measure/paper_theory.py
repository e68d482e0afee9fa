"""The paper's theory compared with measured variances: Lemmas 3.2 and 4.1, Theorems 3.3 and 4.2, and growth laws.

`variances` are sigma_{x_l}^2 for l = 1, 2, ...: those of the INPUTS of blocks 1, 2, ..., as in the paper. The first is
that of the embeddings, then come the outputs of blocks 1, 2, ...; the output of the last block, x_{L+1}, is optional.

    Lemma 3.2, 4.1      sigma_{x_l}^2 = sigma_{x_1}^2 prod_{k<l} (1 + c / (g_k sigma_{x_k}))
    Theorem 3.3, 4.2    ||d y_l / d x_1||_2 <= prod_{k<l} (1 + A / (g_k^2 sigma_{x_k}) + B / (g_k^4 sigma_{x_k}^2))

with g_k = 1 for Pre-LN (3.2, 3.3) and sqrt(k) for LayerNorm Scaling (4.1, 4.2). The paper has c = 1 inside a Theta;
here it is fitted too. docs/audit.md lists the steps of the paper's proofs that contradict these equations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.measure.activation_stats import activation_stats, token_variance
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.batches import RunningMean, at_least_fp32, first_sequences, iter_batches
from cod_lightning.measure.jacobians import jacobian_growth
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.result import Progress, Result, table_rows
from cod_lightning.measure.weight_sparsity import linear_weights
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.layouts import find_sites

GROWTH_SEQUENCES = 2
"""Sequences that the growth up to every layer is measured on: its time grows with the square of the depth."""


@dataclass(frozen=True)
class Shapes:
    """The quantities in the constants A and B of Theorem 3.3."""

    hidden: int
    """The width d of the residual stream."""
    intermediate: int
    """d_FFN."""
    heads: int
    """h."""
    length: int
    """s, tokens in a sequence."""
    std: float
    """sigma, the standard deviation of the weights."""
    head_dim: int | None = None
    """d_head; None: d / h."""


@dataclass(frozen=True)
class Growth:
    """Least-squares fits to the logarithms of variances at l = 1, 2, ...."""

    rate: float
    """a of exp(a l + const)."""
    rate_r2: float
    exponential: list[float]
    """The fitted curve at every l."""
    power: float
    """p of const * l^p."""
    power_r2: float
    polynomial: list[float]
    """The fitted curve at every l."""


@dataclass(frozen=True)
class Theory(Result):
    """Measured variances and gains, and the paper's lemmas and bounds; entries are for l = 1, 2, ...."""

    lns: bool
    """True: Lemma 4.1 and Theorem 4.2; False: Lemma 3.2 and Theorem 3.3."""
    variances: list[float]
    """Variances of the inputs of the blocks."""
    lemma: list[float]
    """The lemma's product with c = 1 and the measured sigma_{x_k}."""
    c: float
    """c fitted to the logarithms of the variances, not negative."""
    lemma_fitted: list[float]
    """The lemma's product with the fitted c."""
    recursion: list[float]
    """The lemma with c = 1, applied to its own result from sigma_{x_1}^2 on."""
    growth: Growth
    gains: list[float]
    """||d y_l / d x_1||, or other gains."""
    shape_constants: list[float]
    """A and B from the shapes; empty without them."""
    shape_log_bound: list[float]
    """Natural logarithm of the theorem's bound with these; the bound often overflows a float."""
    log_m: float | None
    """Natural logarithm of M of Theorem 3.3 with these; None without shapes, and for LNS."""
    fitted_constants: list[float]
    """A and B fitted to the logarithms of the gains relative to the first, not negative."""
    fitted_log_bound: list[float]
    """Natural logarithm of the first gain times the theorem's product with these."""

    def series(self) -> dict[str, Sequence[Any]]:
        """Columns of equal length, padded with None."""
        columns: dict[str, Sequence[float]] = {
            "layer": range(1, len(self.variances) + 1),
            "variance": self.variances,
            "lemma": self.lemma,
            "lemma_fitted": self.lemma_fitted,
            "recursion": self.recursion,
            "exponential": self.growth.exponential,
            "polynomial": self.growth.polynomial,
            "gain": self.gains,
            "log_bound_shapes": self.shape_log_bound,
            "log_bound_fitted": self.fitted_log_bound,
        }
        depth = len(self.variances)
        return {name: [*values, *[None] * (depth - len(values))] for name, values in columns.items()}

    def rows(self) -> list[dict[str, Any]]:
        rows = table_rows(self.series())
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def panels(self) -> list[Panel]:
        """Variance and lemma; gradient norm and theorem, fitted, and in another panel from shapes."""
        lemma, theorem = ("Lemma 4.1", "Theorem 4.2") if self.lns else ("Lemma 3.2", "Theorem 3.3")
        layers = range(1, len(self.variances) + 1)
        curves = {
            f"{lemma}, c = 1": self.lemma,
            f"{lemma}, c = {self.c:.3g}": self.lemma_fitted,
            f"exp({self.growth.rate:.3g} l), $R^2$ = {self.growth.rate_r2:.2f}": self.growth.exponential,
            f"$l^{{{self.growth.power:.3g}}}$, $R^2$ = {self.growth.power_r2:.2f}": self.growth.polynomial,
        }
        variances = {"measured": (layers, self.variances)}
        panels: list[Panel] = [
            Lines("variance of the block's input", curves, log=True, xlabel="layer l", points=variances)
        ]
        gains = [math.log10(gain) for gain in self.gains]  # logarithms, because the bound from shapes overflows an axis
        points = {"gradient norm, measured": (layers[: len(gains)], gains)}
        for constants, values in {"fitted": self.fitted_log_bound, "from shapes": self.shape_log_bound}.items():
            if values:
                bound = {f"{theorem}, A and B {constants}": [value / math.log(10) for value in values]}
                ylabel = r"$\log_{10}\,\|\partial y_l/\partial x_1\|_2$"
                panels.append(Lines(ylabel, bound, xlabel="layer l", points=points))
        return panels


def theory(
    variances: Sequence[float],
    gains: Sequence[float],
    *,
    lns: bool = False,
    shapes: Shapes | None = None,
    model: str = "model",
) -> Theory:
    """Compare measured variances and gains with the lemmas, the bounds and the growth laws.

    Args:
        variances: sigma_{x_l}^2 of the inputs of blocks l = 1, 2, ..., at least 3.
        gains: ||d y_l / d x_1|| or other gains in the sense of the bound, for l = 1, 2, ..., to fit A and B to; at
            most as many as variances.
        lns: the model has LayerNorm Scaling.
        shapes: to compute A and B from.
        model: its name, for tables and figures.

    Raises:
        UserError: a number is not positive, or there are too few variances, or too few or too many gains.
    """
    for name, values in (("variances", variances), ("gains", gains)):
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(f"{name}={list(values)}: expected positive finite numbers")
    if len(variances) < 3:
        raise UserError(f"{len(variances)} variances: expected at least 3")
    if not 3 <= len(gains) <= len(variances):
        raise UserError(f"{len(gains)} gains for {len(variances)} variances: expected 3 to {len(variances)}")
    c = fit_lemma(variances, lns)
    shape_constants = [] if shapes is None else list(bound_constants(shapes))
    fitted_constants = list(fit_bound(variances, gains, lns))
    fitted = log_gain_bound(variances[: len(gains)], *fitted_constants, lns=lns)
    return Theory(
        model=model,
        lns=lns,
        variances=list(variances),
        lemma=lemma(variances, lns),
        c=c,
        lemma_fitted=lemma(variances, lns, c),
        recursion=recursion(variances[0], len(variances), lns),
        growth=growth(variances),
        gains=list(gains),
        shape_constants=shape_constants,
        shape_log_bound=log_gain_bound(variances, *shape_constants, lns=lns) if shape_constants else [],
        log_m=log_m(*shape_constants) if shape_constants and not lns else None,
        fitted_constants=fitted_constants,
        fitted_log_bound=[math.log(gains[0]) + value for value in fitted],
    )


def lemma(variances: Sequence[float], lns: bool = False, c: float = 1.0) -> list[float]:
    """Return sigma_{x_l}^2 for every l by Lemma 3.2, or 4.1 for LNS, from the measured sigma_{x_k}, k < l."""
    return [variances[0] * math.exp(value) for value in log_products(lemma_terms(variances, lns), [c])]


def recursion(first: float, count: int, lns: bool = False) -> list[float]:
    """Return sigma_{x_l}^2 for l = 1..count by the lemma, from sigma_{x_1}^2 only."""
    values = [first]
    for k in range(1, count):
        values.append(values[-1] * (1 + 1 / (damping(k, lns) * values[-1] ** 0.5)))
    return values


def log_gain_bound(variances: Sequence[float], a: float, b: float, lns: bool = False) -> list[float]:
    """Return the logarithm of the bound of Theorem 3.3, or 4.2 for LNS, on ||d y_l / d x_1||_2 for every l."""
    return log_products(bound_terms(variances, lns), [a, b])


def bound_constants(shapes: Shapes) -> tuple[float, float]:
    """Return A and B of Theorem 3.3.

    With d, d_FFN, h, d_head, s and sigma as in `Shapes`, and n = 2 d h (sqrt(s) + 2 + 1 / sqrt(s)),

        A = sigma^2 (sqrt(d) + sqrt(d_FFN))^2 + n sigma^2 (d sqrt(d_head) + 1 + sqrt(d_head / d))
        B = n sigma^4 d sqrt(d_head)

    Some radicals are inferred, because the text of the paper used here had lost them.
    """
    d, head, square = shapes.hidden, shapes.head_dim or shapes.hidden / shapes.heads, shapes.std**2
    n = 2 * d * shapes.heads * (shapes.length**0.5 + 2 + shapes.length**-0.5)
    attention = n * square * (d * head**0.5 + 1 + (head / d) ** 0.5)
    return square * (d**0.5 + shapes.intermediate**0.5) ** 2 + attention, n * square**2 * d * head**0.5


def log_m(a: float, b: float) -> float:
    """Return the logarithm of M of Theorem 3.3, the paper's limit for exponentially growing variances.

    It is sum_{l >= 1} u - u^2 / 2 with u = A e^-l + B e^-2l. A large A or B makes it negative, and no bound.
    """
    e = math.e
    first = a / (e - 1) + b / (e**2 - 1)
    return first - (a**2 / (e**2 - 1) + 2 * a * b / (e**3 - 1) + b**2 / (e**4 - 1)) / 2


def growth(variances: Sequence[float]) -> Growth:
    """Fit exp(a l) and l^p to the variances, both by least squares in their logarithms."""
    layers = torch.arange(1, len(variances) + 1, dtype=torch.float64, device="cpu")
    logs = torch.tensor(list(variances), dtype=torch.float64, device="cpu").log()
    rate, rate_r2, exponential = fit_line(layers, logs)
    power, power_r2, polynomial = fit_line(layers.log(), logs)
    return Growth(rate, rate_r2, exponential.exp().tolist(), power, power_r2, polynomial.exp().tolist())


def fit_line(x: Tensor, y: Tensor) -> tuple[float, float, Tensor]:
    """Return slope, R^2 and values of the least-squares line through points; R^2 is 1 if y is constant."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    residual, total = (dy - slope * dx).square().sum(), dy.square().sum()
    return float(slope), float(1 - residual / total) if total > 0 else 1.0, y.mean() + slope * dx


def fit_lemma(variances: Sequence[float], lns: bool = False) -> float:
    """Fit c >= 0 of the lemma to the logarithms of the variances relative to the first."""
    return fit_nonnegative(lemma_terms(variances, lns), [math.log(value / variances[0]) for value in variances])[0]


def fit_bound(variances: Sequence[float], gains: Sequence[float], lns: bool = False) -> tuple[float, float]:
    """Fit A, B >= 0 of the bound to the logarithms of the gains relative to the first.

    Relative, because the bound has no factor for the first block.
    """
    terms = bound_terms(variances[: len(gains)], lns)
    a, b = fit_nonnegative(terms, [math.log(gain / gains[0]) for gain in gains])
    return a, b


def damping(k: int, lns: bool) -> float:
    """g_k of the equations above."""
    return k**0.5 if lns else 1.0


def lemma_terms(variances: Sequence[float], lns: bool) -> Tensor:
    """1 / (g_k sigma_k) for all k but the last [n - 1, 1]."""
    terms = [[1 / (damping(k, lns) * value**0.5)] for k, value in enumerate(variances[:-1], start=1)]
    return torch.tensor(terms, dtype=torch.float64, device="cpu").view(-1, 1)


def bound_terms(variances: Sequence[float], lns: bool) -> Tensor:
    """1 / (g_k^2 sigma_k) and 1 / (g_k^4 sigma_k^2) for all k but the last [n - 1, 2]."""
    terms = [1 / (damping(k, lns) ** 2 * value**0.5) for k, value in enumerate(variances[:-1], start=1)]
    return torch.tensor([[term, term**2] for term in terms], dtype=torch.float64, device="cpu").view(-1, 2)


def log_products(terms: Tensor, weights: Sequence[float]) -> list[float]:
    """sum_{k<l} log(1 + terms_k . weights) for l = 1..n, of terms [n - 1, weights]."""
    factors = torch.log1p(terms @ torch.tensor(list(weights), dtype=torch.float64, device="cpu"))
    return [0.0, *factors.cumsum(0).tolist()]


def fit_nonnegative(terms: Tensor, logs: Sequence[float]) -> list[float]:
    """Fit weights >= 0 whose `log_products` are nearest to `logs` in least squares, by Levenberg-Marquardt steps.

    A weight of zero that a step would make negative stays zero. numpy and torch have no solver with bounds.

    Args:
        terms: [n - 1, weights].
        logs: [n], the first is 0.
    """
    target = torch.tensor(list(logs[1:]), dtype=torch.float64, device="cpu")
    # Scale each weight, so that the damping is the same for all.
    scale = terms.mean(0)
    terms = terms / scale

    def loss(weights: Tensor) -> float:
        return float((torch.log1p(terms @ weights).cumsum(0) - target).square().sum())

    weights = torch.ones(terms.shape[1], dtype=torch.float64, device="cpu")
    best, damp = loss(weights), 1e-3
    for _ in range(500):
        inside = 1 + terms @ weights
        slopes = (terms / inside[:, None]).cumsum(0)
        downhill = slopes.T @ (target - inside.log().cumsum(0))
        free = (weights > 0) | (downhill > 0)
        curvature = slopes.T @ slopes
        curvature += damp * curvature.diagonal().diag()
        curvature = curvature.where(free & free[:, None], torch.eye(len(free), dtype=torch.float64, device="cpu"))
        moved = (weights + torch.linalg.solve(curvature, downhill * free)).clamp(min=0)
        new = loss(moved)
        if new < best:
            weights, best, damp = moved, new, max(damp / 4, 1e-12)
        elif damp > 1e12:  # no step lowers the loss
            break
        else:
            damp *= 4
    return (weights / scale).tolist()


def measured_theory(
    model: ModelAdapter,
    batches: Sequence[Tensor],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    lns: bool | None = None,
) -> Theory:
    """Measure variances and gradient growth, and compare them with the paper's lemma and theorem.

    The growth is measured on the first `GROWTH_SEQUENCES` sequences. There are no constants from shapes for experts and
    adapters, whose weights are not those of linear layers, and for models whose configuration has no heads.

    Options:
        lns: the model has LayerNorm Scaling. None: detect it, which an exported model with folded gains does not allow.
    """
    outputs = activation_stats(model, batches, pad_id).residual.variance
    has_shapes = not model.why_not_sparse and model.config_value("num_attention_heads", None)
    few, layers = first_sequences(batches, GROWTH_SEQUENCES), range(1, model.depth + 1)
    return theory(
        [embedding_variance(model, batches, pad_id), *outputs],
        jacobian_growth(model, few, pad_id, progress, layers=layers).spectral,
        lns=has_lns(model) if lns is None else lns,
        shapes=shapes_of(model, batches[0].shape[1]) if has_shapes else None,
        model=model.name,
    )


@torch.no_grad()
def embedding_variance(model: ModelAdapter, batches: Sequence[Tensor], pad_id: int | None) -> float:
    """Variance of the first block's input, as in `activation_stats`; with Peri-LN that of the normalised embeddings."""
    mean = RunningMean()
    for tokens, mask in iter_batches(model, batches, pad_id):
        mean.add(token_variance(model.block_functions(tokens, mask)[0][0][mask]))
    return float(mean.mean)


def has_lns(model: ModelAdapter) -> bool:
    """Whether every norm before a sub-layer of block l is scaled by 1/sqrt(l), as ours are or those after `apply`."""
    if isinstance(model.model, Decoder):
        specs = [block.spec for block in model.model.blocks]
        gains = [(layer, part.gain) for layer, spec in enumerate(specs, start=1) for part in spec.sublayers]
    else:
        sites = find_sites(model.model, model.layout)
        gains = [(site.layer, getattr(site.norm, "cod_output_scale", 1.0)) for site in sites]
    return all(math.isclose(gain, layer**-0.5) for layer, gain in gains)


def shapes_of(model: ModelAdapter, length: int) -> Shapes:
    """Shapes of a model; `std` is that of all weights of the blocks' linear layers."""
    config, hidden = model.config, model.hidden
    weights = [weight for block in model.blocks for weight in linear_weights(block).values()]
    count = sum(weight.numel() for weight in weights)
    total = sum(float(weight.sum(dtype=torch.float64)) for weight in weights)
    squares = sum(float(at_least_fp32(weight).square().sum(dtype=torch.float64)) for weight in weights)
    return Shapes(
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        heads=config.num_attention_heads,
        length=length,
        std=math.sqrt(max(squares - total**2 / count, 0.0) / (count - 1)),
        head_dim=model.config_value("head_dim", None),
    )
