"""How many weights each block can lose: the layer-wise sparsities of OWL and AlphaPruning, and pruning by them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import at_least_fp32, iter_batches
from cod_lightning.measure.options import require_choice
from cod_lightning.measure.result import Progress, figure, layer_lines, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["wanda", "magnitude"]


@dataclass(frozen=True)
class LayerSparsity:
    """One number per block, first block first."""

    model: str
    tokens: int
    sparsity: float
    """Wanted mean share of weights to remove."""
    outlier_ratio: list[float]
    """OWL's layer outlier distribution, a share of the block's weights."""
    owl: list[float]
    """The sparsities it gives."""
    alpha: list[float]
    """PL_Alpha_Hill, mean over the block's matrices; low is heavy-tailed, which is read as well trained."""
    alpha_pruning: list[float]
    """The sparsities it gives."""

    def series(self) -> dict[str, list[Any]]:
        rows = self.rows()
        return {name: [row.get(name) for row in rows] for name in rows[0]}

    def rows(self) -> list[dict[str, Any]]:
        names = ("outlier_ratio", "owl", "alpha", "alpha_pruning")
        columns = zip(*(getattr(self, name) for name in names), strict=True)
        return [
            {"layer": layer} | dict(zip(names, values, strict=True)) for layer, values in enumerate(columns, start=1)
        ]

    def plot(self) -> Figure:
        made, (left, middle, right) = figure(self.model, columns=3)
        layer_lines(left, {"outlier ratio": self.outlier_ratio}, "share of outliers (OWL)")
        layer_lines(middle, {"alpha": self.alpha}, "PL_Alpha_Hill (AlphaPruning)")
        layer_lines(right, {"OWL": self.owl, "AlphaPruning": self.alpha_pruning}, "share of weights to remove")
        right.axhline(self.sparsity, color="black", lw=1, ls=":", label="mean")
        legend(right)
        return made


@torch.no_grad()
def layer_sparsity(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    sparsity: float = 0.5,
    threshold: float = 5.0,
    owl_lambda: float = 0.08,
    epsilon: float = 0.3,
) -> LayerSparsity:
    """The signals and sparsities of OWL and of AlphaPruning, which needs no tokens.

    Args:
        model: any.
        batches: tokens [rows, length].
        pad_id: tokens that do not count.
        progress: told of every batch.
        sparsity: wanted mean over the blocks; up to 0.53 every spectrum gives shares below 1, at 0.7 some give none.
        threshold: OWL's M.
        owl_lambda: OWL's, see `owl_sparsities`.
        epsilon: AlphaPruning's, see `alpha_sparsities`.

    Raises:
        UserError: there are no tokens, or a sparsity leaves [0, 1].
    """
    batches = list(batches)
    ratios = outlier_ratios(model, input_norms(model, batches, pad_id, progress), threshold)
    alphas = layer_alphas(model)
    return LayerSparsity(
        model=model.name,
        tokens=sum(int(keep.sum()) for _, keep in iter_batches(model, batches, pad_id)),
        sparsity=sparsity,
        outlier_ratio=ratios,
        owl=owl_sparsities(ratios, sparsity, owl_lambda),
        alpha=alphas,
        alpha_pruning=alpha_sparsities(alphas, sparsity, epsilon),
    )


def matrices(block: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """The linear layers of a block by name, with their weights as views [out, in], to be changed in place.

    Raises:
        UserError: there is none.
    """
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module, module.weight.detach()
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer in transformers keeps its weight as [in, out]
            found[name] = module, module.get_parameter("weight").detach().T
    if not found:
        raise UserError(f"{type(block).__name__} has no linear layers to prune: expected nn.Linear or Conv1D")
    return found


@torch.no_grad()
def input_norms(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """||X_j||_2 over all tokens but pads of every input channel j of every linear layer, in one pass.

    Returns:
        For each block the norms [in] of its linear layers, in float64.
    """
    keep = torch.empty(0)
    squares: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    handles = []
    for sums, block in zip(squares, model.blocks, strict=True):
        for name, (module, weight) in matrices(block).items():
            sums[name] = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)

            def hook(module: nn.Module, args: tuple[Tensor, ...], total: Tensor = sums[name]) -> None:
                x = args[0].flatten(0, -2)[keep]
                total += at_least_fp32(x).square().sum(0, dtype=torch.float64)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        for tokens, counted in iter_batches(model, batches, pad_id, progress):
            keep = counted.flatten()
            model.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return [{name: total.sqrt() for name, total in sums.items()} for sums in squares]


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """A = |W| * ||X||_2 of a weight [out, in] with input norms [in], at least in float32."""
    sizes = at_least_fp32(weight.abs())
    return sizes * norms.to(sizes.dtype)


def outlier_ratios(model: ModelAdapter, norms: Sequence[dict[str, Tensor]], threshold: float = 5.0) -> list[float]:
    """OWL's D_l: the share of entries of A beyond M times their mean, all linear layers of a block together.

    Args:
        model: any.
        norms: from `input_norms`.
        threshold: M; 5 in the paper.
    """
    ratios = []
    for block, norm in zip(model.blocks, norms, strict=True):
        scores = [wanda_scores(weight, norm[name]) for name, (_, weight) in matrices(block).items()]
        size = sum(score.numel() for score in scores)
        mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / size
        ratios.append(sum(int((score > threshold * mean).sum()) for score in scores) / size)
    return ratios


def owl_sparsities(ratios: Sequence[float], sparsity: float, owl_lambda: float = 0.08) -> list[float]:
    """Blocks with more outliers keep more: ratios scaled to [0, 2 lambda], minus their mean, plus 1 - S, are kept.

    Args:
        ratios: from `outlier_ratios`.
        sparsity: S, the mean over the blocks.
        owl_lambda: half of how far the sparsities differ.

    Raises:
        UserError: a sparsity leaves [0, 1].
    """
    scaled = [2 * owl_lambda * x for x in unit_range(ratios)]
    mean = fmean(scaled)
    return checked([sparsity - (x - mean) for x in scaled], sparsity, f"owl_lambda={owl_lambda}")


def pl_alpha_hill(weight: Tensor) -> float:
    """AlphaPruning's PL_Alpha_Hill of a matrix: 1 + n / sum_i log(lambda_i / lambda_min), a Hill estimate.

    The sum is over the n eigenvalues of W^T W from their median lambda_min upwards; those that are zero to the
    precision of the matrix do not count.

    Returns:
        Above 1; NaN where the eigenvalues are all equal or zero, so that there is no tail.
    """
    weight = at_least_fp32(weight)
    values = torch.linalg.svdvals(weight).double()
    values = values[values > values.max() * max(weight.shape) * torch.finfo(weight.dtype).eps]
    logs = 2 * values.log().sort().values[len(values) // 2 :]
    total = float((logs - logs[:1]).sum())
    return 1 + len(logs) / total if total > 0 else math.nan


@torch.no_grad()
def layer_alphas(model: ModelAdapter) -> list[float]:
    """Mean of `pl_alpha_hill` over the matrices of each block that have one.

    Raises:
        UserError: a block has no such matrix.
    """
    means = []
    for layer, block in enumerate(model.blocks, start=1):
        alphas = torch.tensor([pl_alpha_hill(weight) for _, weight in matrices(block).values()], dtype=torch.float64)
        means.append(float(alphas.nanmean()))
        if math.isnan(means[-1]):
            raise UserError(f"layer {layer}: no weight matrix has a spectrum with a tail, as if never initialised")
    return means


def alpha_sparsities(alphas: Sequence[float], sparsity: float, epsilon: float = 0.3) -> list[float]:
    """Heavy-tailed blocks keep more: alpha mapped linearly to S [1 - epsilon, 1 + epsilon], scaled to the mean S.

    Args:
        alphas: from `layer_alphas`.
        sparsity: S, the mean over the blocks.
        epsilon: how far the sparsities differ, relative to S.

    Raises:
        UserError: a sparsity leaves [0, 1].
    """
    mapped = [1 - epsilon + 2 * epsilon * x for x in unit_range(alphas)]
    mean = fmean(mapped)
    return checked([sparsity * x / mean if mean else math.nan for x in mapped], sparsity, f"epsilon={epsilon}")


def unit_range(values: Sequence[float]) -> list[float]:
    """The values mapped linearly so that they span [0, 1]; 0.5 where they are all the same."""
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high > low else 0.5 for x in values]


def checked(sparsities: list[float], sparsity: float, option: str) -> list[float]:
    if not 0 <= sparsity <= 1:
        raise UserError(f"sparsity={sparsity} is not a share of weights: expected 0 to 1")
    for layer, value in enumerate(sparsities, start=1):
        if not 0 <= value <= 1:
            raise UserError(f"{option} with sparsity={sparsity} takes layer {layer} to {value:.3f}, outside 0 to 1")
    return sparsities


@torch.no_grad()
def sparsified(
    model: ModelAdapter,
    sparsities: Sequence[float],
    method: Method = "wanda",
    norms: Sequence[dict[str, Tensor]] | None = None,
) -> ModelAdapter:
    """A copy of the model without the least weights of the linear layers of its blocks.

    Args:
        model: stays as it is.
        sparsities: share of weights to set to zero in each block.
        method: `wanda`: in each output row the smallest |W| * ||X||, with norms of the dense model's inputs;
            `magnitude`: in each matrix the smallest |W|.
        norms: from `input_norms`, for `wanda`.

    Raises:
        UserError: no such method, no norms for it, or not one sparsity in [0, 1] for each block.
    """
    require_choice(Method, method=method)
    if method == "wanda" and norms is None:
        raise UserError("method='wanda' needs norms, the input norms of every linear layer: pass those of input_norms")
    if len(sparsities) != model.depth or not all(0 <= share <= 1 for share in sparsities):
        raise UserError(f"sparsities={list(sparsities)}: expected {model.depth} numbers from 0 to 1, one a block")
    copy = ModelAdapter(deepcopy(model.model), model.name)
    for index, (block, share) in enumerate(zip(copy.blocks, sparsities, strict=True)):
        for name, (_, weight) in matrices(block).items():
            if norms is None or method == "magnitude":
                removed = least(weight.abs().flatten(), share).view(weight.shape)
            else:
                removed = least(wanda_scores(weight, norms[index][name]), share)
            weight.masked_fill_(removed, 0)
    return copy


def least(scores: Tensor, share: float) -> Tensor:
    """Where the smallest `share` of the last dimension is, rounded to a whole number, in every row."""
    count = round(share * scores.shape[-1])
    index = scores.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
