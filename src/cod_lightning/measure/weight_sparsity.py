"""Layer-wise sparsities of OWL (arXiv 2310.05175), AlphaPruning (arXiv 2410.10912) and ATP, and pruning of weights."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import at_least_fp32, iter_batches, step_counter
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.result import Progress, Result

Method = Literal["wanda", "magnitude"]
Calibration = Literal["once", "sequential"]
Share = Annotated[float, ("at_least", 0), ("at_most", 1)]
Threshold = Annotated[float, ("above", 0)]
OwlLambda = Annotated[float, ("at_least", 0), ("at_most", 0.5)]


@dataclass(frozen=True)
class LayerSparsity(Result):
    """Signals and sparsities of each block."""

    tokens: int
    sparsity: float
    """Requested mean share of weights to remove."""
    outlier_ratio: list[float]
    """OWL's layer outlier distribution, a share of the block's weights."""
    owl: list[float]
    """OWL's sparsities."""
    alpha: list[float]
    """PL_Alpha_Hill, mean over the block's matrices; low is heavy-tailed, interpreted as well trained."""
    alpha_pruning: list[float]
    """AlphaPruning's sparsities."""

    def panels(self) -> list[Panel]:
        sparsities = {"OWL": self.owl, "AlphaPruning": self.alpha_pruning}
        return [
            Lines("share of outliers (OWL)", {"outlier ratio": self.outlier_ratio}),
            Lines("PL_Alpha_Hill (AlphaPruning)", {"alpha": self.alpha}),
            Lines("share of weights to remove", sparsities, level=("mean", self.sparsity)),
        ]


@torch.no_grad()
def layer_sparsity(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    sparsity: Share = 0.5,
    threshold: Threshold = 5.0,
    owl_lambda: OwlLambda = 0.08,
    epsilon: Share = 0.3,
) -> LayerSparsity:
    """Compute signals and sparsities of OWL and of AlphaPruning; the latter needs no tokens.

    Options:
        sparsity: requested mean over the blocks; up to 0.53 all sparsities are below 1, at 0.7 some are not.
        threshold: OWL's M.
        owl_lambda: OWL's, see `owl_sparsities`.
        epsilon: AlphaPruning's, see `alpha_sparsities`.

    Raises:
        UserError: a sparsity is out of range.
    """
    ratios = outlier_ratios(model, input_norms(model, batches, pad_id, progress), threshold)
    alphas = layer_alphas(model)
    return LayerSparsity(
        model=model.name,
        tokens=sum(int(mask.sum()) for _, mask in iter_batches(model, batches, pad_id)),
        sparsity=sparsity,
        outlier_ratio=ratios,
        owl=owl_sparsities(ratios, sparsity, owl_lambda),
        alpha=alphas,
        alpha_pruning=alpha_sparsities(alphas, sparsity, epsilon),
    )


def linear_weights(block: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the linear layers of a block by the layer's name, as views [out, in] to modify.

    Raises:
        UserError: the block has no linear layers.
    """
    weights: dict[str, Tensor] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            weights[name] = module.weight.detach()
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer in transformers, with weight [in, out]
            weights[name] = module.get_parameter("weight").detach().T
    if not weights:
        raise UserError(f"{type(block).__name__} has no linear layers to prune: expected nn.Linear or Conv1D")
    return weights


@torch.no_grad()
def input_norms(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """Compute ||X_j||_2 over all tokens but padding, for every input channel j of every linear layer, in one pass.

    Returns:
        For each block the norms [in] of its linear layers, in float64.
    """
    masks: list[Tensor] = []
    with input_squares(model.blocks, masks) as squares:
        for tokens, mask in iter_batches(model, batches, pad_id, progress):
            masks[:] = [mask.flatten()]
            model.run(tokens, keep=mask)
    return [{name: total.sqrt() for name, total in sums.items()} for sums in squares]


@contextmanager
def input_squares(blocks: Iterable[nn.Module], masks: list[Tensor]) -> Generator[list[dict[str, Tensor]]]:
    """Sum the squares of every input channel of the blocks' linear layers, inside the `with`, in float64.

    Args:
        blocks: to watch.
        masks: its only entry is the mask [batch * length] of the tokens that count in the batch that runs.
    """
    squares: list[dict[str, Tensor]] = []
    with ExitStack() as handles:
        for block in blocks:
            squares.append({})
            for name, weight in linear_weights(block).items():
                squares[-1][name] = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)

                def hook(module: nn.Module, args: tuple[Tensor, ...], total: Tensor = squares[-1][name]) -> None:
                    x = args[0].flatten(0, -2)[masks[0]]
                    total += at_least_fp32(x).square().sum(0, dtype=torch.float64)

                handles.enter_context(block.get_submodule(name).register_forward_pre_hook(hook))
        yield squares


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Return A = |W| * ||X||_2 of a weight [out, in] with input norms [in], at least in float32."""
    magnitudes = at_least_fp32(weight.abs())
    return magnitudes * norms.to(magnitudes.dtype)


def outlier_ratios(model: ModelAdapter, norms: Sequence[dict[str, Tensor]], threshold: float = 5.0) -> list[float]:
    """Return OWL's D_l: the share of entries of A above M times their mean, over all linear layers of a block.

    `norms` are from `input_norms`; M, the threshold, is 5 in the paper.
    """
    ratios = []
    for block, norm in zip(model.blocks, norms, strict=True):
        scores = [wanda_scores(weight, norm[name]) for name, weight in linear_weights(block).items()]
        size = sum(score.numel() for score in scores)
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / size
        ratios.append(sum(int((score > threshold * mean).sum()) for score in scores) / size)
    return ratios


def owl_sparsities(ratios: Sequence[float], sparsity: float, owl_lambda: float = 0.08) -> list[float]:
    """Let blocks with more outliers keep more: ratios scaled to [0, 2 lambda], minus their mean, plus 1 - S are kept.

    S is the mean of the sparsities, and lambda half their range; `ratios` are from `outlier_ratios`.

    Raises:
        UserError: a sparsity is outside [0, 1].
    """
    scaled = [2 * owl_lambda * x for x in scale_to_unit_range(ratios)]
    mean = fmean(scaled)
    return check_sparsities([sparsity - (x - mean) for x in scaled], "owl_lambda")


def pl_alpha_hill(weight: Tensor) -> float:
    """Return AlphaPruning's PL_Alpha_Hill of a matrix: 1 + n / sum_i log(lambda_i / lambda_min), a Hill estimate.

    The sum is over the n eigenvalues of W^T W from their median lambda_min upwards. Eigenvalues that are zero to the
    precision of the matrix do not count.

    Returns:
        A value above 1; NaN if all eigenvalues are equal or zero, so that there is no tail.
    """
    weight = at_least_fp32(weight)
    values = torch.linalg.svdvals(weight).double()
    values = values[values > values.max() * max(weight.shape) * torch.finfo(weight.dtype).eps]
    logs = 2 * values.log().sort().values[len(values) // 2 :]
    total = float((logs - logs[:1]).sum())
    return 1 + len(logs) / total if total > 0 else math.nan


@torch.no_grad()
def layer_alphas(model: ModelAdapter) -> list[float]:
    """Return the mean `pl_alpha_hill` of each block over its matrices that have a tail.

    Raises:
        UserError: a block has no such matrix, or a weight that is not finite.
    """
    means = []
    for layer, block in enumerate(model.blocks, start=1):
        weights = linear_weights(block).values()
        if not all(weight.isfinite().all() for weight in weights):
            raise UserError(f"{model.name}: layer {layer}: a weight is NaN or infinite")
        alphas = [pl_alpha_hill(weight) for weight in weights]
        means.append(float(torch.tensor(alphas, dtype=torch.float64, device="cpu").nanmean()))
        if math.isnan(means[-1]):
            raise UserError(
                f"{model.name}: layer {layer}: the spectrum of no weight matrix has a tail; is the model initialised?"
            )
    return means


def alpha_sparsities(alphas: Sequence[float], sparsity: float, epsilon: float = 0.3) -> list[float]:
    """Let heavy-tailed blocks keep more: map alpha linearly to S [1 - epsilon, 1 + epsilon] and scale to the mean S.

    `alphas` are from `layer_alphas`.

    Raises:
        UserError: a sparsity is outside [0, 1].
    """
    mapped = [1 - epsilon + 2 * epsilon * x for x in scale_to_unit_range(alphas)]
    mean = fmean(mapped)
    return check_sparsities([sparsity * x / mean for x in mapped], "epsilon")


def arithmetic_sparsities(depth: int, sparsity: float, difference: float) -> list[float]:
    """Let every block lose more than the block before it by a constant difference (ATP, arXiv 2502.14770).

    The mean over the blocks is `sparsity`, and `largest_difference` the largest possible difference.

    Raises:
        UserError: a sparsity is outside [0, 1].
    """
    # Rounded, so that at the largest difference none is 1 + 2e-16.
    sparsities = [round(sparsity + difference * (layer - (depth - 1) / 2), 12) for layer in range(depth)]
    return check_sparsities(sparsities, "difference")


def largest_difference(depth: int, sparsity: float) -> float:
    """The largest difference of `arithmetic_sparsities` with which all lie in [0, 1]."""
    return 2 * min(sparsity, 1 - sparsity) / max(depth - 1, 1)


def scale_to_unit_range(values: Sequence[float]) -> list[float]:
    """Map values linearly onto [0, 1]; 0.5 if all are equal."""
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high > low else 0.5 for x in values]


def check_sparsities(sparsities: list[float], option: str) -> list[float]:
    """Return the sparsities of the blocks if all are in [0, 1]; `option` makes them differ.

    Raises:
        UserError: names the block that is farthest outside.
    """
    worst = max(range(len(sparsities)), key=lambda index: abs(sparsities[index] - 0.5))
    if not 0 <= (value := sparsities[worst]) <= 1:
        change = f"bring {option}= nearer to 0, or {'lower' if value > 1 else 'raise'} sparsity="
        raise UserError(f"layer {worst + 1} would lose {value:.3g} of its weights: {change}")
    return sparsities


@torch.no_grad()
def sparsify(
    model: ModelAdapter,
    sparsities: Sequence[float],
    method: Method = "wanda",
    norms: Sequence[dict[str, Tensor]] = (),
) -> ModelAdapter:
    """Return a copy of the model with the smallest weights of the blocks' linear layers set to zero.

    Args:
        model: not modified.
        sparsities: share of weights to set to zero in each block.
        method: `wanda`: the smallest |W| * ||X|| of each output row, with input norms of the dense model;
            `magnitude`: the smallest |W| of each matrix.
        norms: from `input_norms`, for `wanda`.
    """
    copy = replace(model, model=deepcopy(model.model))
    for index, (block, share) in enumerate(zip(copy.blocks, sparsities, strict=True)):
        for name, weight in linear_weights(block).items():
            if method == "magnitude":
                pruned = smallest(weight.abs().flatten(), round(share * weight.numel())).view(weight.shape)
            else:
                pruned = smallest(wanda_scores(weight, norms[index][name]), round(share * weight.shape[1]))
            weight.masked_fill_(pruned, 0)
    return copy


@torch.no_grad()
def sparsify_sequentially(
    model: ModelAdapter,
    sparsities: Sequence[float],
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
) -> ModelAdapter:
    """Return a copy of the model pruned by Wanda block by block, with the masks of the released code (locuslab/wanda).

    The input norms of a block are measured with the blocks before it pruned, and the number of weights to
    remove from a row is rounded down. The hidden states of all batches are in memory.

    Raises:
        UserError: there are no tokens.
    """
    copy = replace(model, model=deepcopy(model.model))
    streams = []
    for batch, mask in iter_batches(copy, batches, pad_id):
        inputs, functions = copy.block_functions(batch, mask)
        streams.append((inputs[0], functions, mask.flatten()))
    advance = step_counter(progress, copy.depth)
    masks: list[Tensor] = []
    for index, (block, share) in enumerate(zip(copy.blocks, sparsities, strict=True)):
        with input_squares([block], masks) as squares:
            for x, functions, mask in streams:
                masks[:] = [mask]
                functions[index](x)
        for name, weight in linear_weights(block).items():
            scores = wanda_scores(weight, squares[0][name].sqrt())
            weight.masked_fill_(smallest(scores, int(share * weight.shape[1])), 0)
        streams = [(functions[index](x), functions, mask) for x, functions, mask in streams]
        advance()
    return copy


def smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` smallest entries along the last dimension."""
    index = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
