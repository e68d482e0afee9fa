"""Pruned copies of a model: without selected blocks, with a run of blocks replaced, or with sparse weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import removal
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import step_counter
from cod_lightning.measure.block_removal import remove_blocks, train_replacement
from cod_lightning.measure.layer_importance import block_influence
from cod_lightning.measure.linear_maps import fold_linear_map
from cod_lightning.measure.reordering import LOSS_INCREASE, mean_loss
from cod_lightning.measure.result import Progress
from cod_lightning.measure.weight_sparsity import (
    Calibration,
    Method,
    alpha_sparsities,
    arithmetic_sparsities,
    input_norms,
    largest_difference,
    layer_alphas,
    linear_weights,
    outlier_ratios,
    owl_sparsities,
    sparsify,
    sparsify_sequentially,
)

Signal = Literal["influence", "streamline", "removal"]
Replace = Literal["layer", "ffn", "linear"]
REPLACED = {"layer": "trained layer", "ffn": "trained FFN", "linear": "linear map"}
"""In the `how` of a result."""
Allocation = Literal["owl", "alpha_pruning", "arithmetic", "uniform"]
TRIED_DIFFERENCES = 9
"""Differences of `allocation=arithmetic` that are tried; the search of its paper tries as many for 32 blocks."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned copy of a model, and how it was selected; see `Pruned`."""

    model: ModelAdapter
    how: str
    removed: list[int]
    signal: list[float]
    label: str
    without_run: ModelAdapter | None = None
    """The model without the run and without what replaces it."""


def prune_blocks(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    progress: Progress | None,
    by: Signal,
    blocks: int,
    earliest: int = 1,
) -> PrunedModel:
    """Remove a number of blocks that are selected by a signal; see `prune`.

    A run of `streamline` starts at block `earliest` or later.

    Raises:
        UserError: the number removes no block or all.
    """
    if not 1 <= blocks < model.depth:
        raise UserError(f"blocks={blocks}: expected 1 to {model.depth - 1} of the {model.depth} of {model.name}")
    if by == "streamline":
        influence = block_influence(model, batches, pad_id, progress, longest=blocks)
        signal = [value for value in influence.distance[-1] if value is not None]
        first = min(range(earliest, len(signal) + 1), key=lambda layer: signal[layer - 1])
        layers = list(range(first, first + blocks))
        return PrunedModel(remove_blocks(model, layers), by, layers, signal, f"1 - mean cosine over {blocks} blocks")
    if by == "removal":
        signal, label = removal(model, batches, pad_id, progress).series()["delta_loss"], LOSS_INCREASE
    else:
        signal = block_influence(model, batches, pad_id, progress, longest=1).influence
        label = "block influence"
    ascending = sorted(range(1, model.depth + 1), key=lambda layer: signal[layer - 1])
    layers = sorted(ascending[:blocks])
    return PrunedModel(remove_blocks(model, layers), by, layers, list(signal), label)


def replace_run(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    progress: Progress | None,
    blocks: int,
    replace: Replace,
    steps: int,
    lr: float,
) -> PrunedModel:
    """Replace the run with the smallest distance so that the model has `blocks` blocks less; see `prune`.

    Raises:
        UserError: the run would be no run, or all blocks.
    """
    how = f"streamline, {REPLACED[replace]}"
    if replace == "linear":
        run = prune_blocks(model, batches, pad_id, progress, "streamline", blocks, earliest=2)
        mapped = fold_linear_map(model, run.removed[0], run.removed[-1], batches, pad_id, progress)
        return dataclasses.replace(run, model=mapped, how=how, without_run=run.model)
    if not 1 <= blocks < model.depth - 1:
        raise UserError(
            f"blocks={blocks} with replace=: expected 1 to {model.depth - 2}, because the run is one block longer"
        )
    run = prune_blocks(model, batches, pad_id, progress, "streamline", blocks + 1)
    first, last = run.removed[0], run.removed[-1]
    attention = replace == "layer"
    trained = train_replacement(model, first, last, batches, pad_id, progress, steps=steps, lr=lr, attention=attention)
    return dataclasses.replace(run, model=trained, how=how, without_run=run.model)


def prune_weights(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    progress: Progress | None,
    sparsity: float,
    allocation: Allocation,
    method: Method,
    calibration: Calibration,
    *,
    threshold: float,
    owl_lambda: float,
    epsilon: float,
    difference: float | None,
) -> PrunedModel:
    """Set a share of the weights to zero; see `prune`.

    Raises:
        UserError: a sparsity is outside [0, 1], or the model is a mixture of experts or has adapters.
    """
    if model.why_not_sparse:
        raise UserError(f"{model.name}: {model.why_not_sparse}")
    sequential = calibration == "sequential"
    needs_norms = allocation == "owl" or (method == "wanda" and not sequential)
    norms = input_norms(model, batches, pad_id, progress) if needs_norms else []

    def sparse(sparsities: list[float], progress: Progress | None = None) -> ModelAdapter:
        if sequential:
            return sparsify_sequentially(model, sparsities, batches, pad_id, progress)
        return sparsify(model, sparsities, method, norms)

    if allocation == "owl":
        sparsities = owl_sparsities(outlier_ratios(model, norms, threshold), sparsity, owl_lambda)
    elif allocation == "alpha_pruning":
        sparsities = alpha_sparsities(layer_alphas(model), sparsity, epsilon)
    elif allocation == "arithmetic":
        share = largest_difference(model.depth, sparsity) / TRIED_DIFFERENCES
        tried = [share * step for step in range(1, TRIED_DIFFERENCES + 1)] if difference is None else [difference]
        candidates = [arithmetic_sparsities(model.depth, sparsity, each) for each in tried]
        advance = step_counter(progress, len(candidates) * len(batches))

        def loss_with(sparsities: list[float]) -> float:
            return mean_loss(sparse(sparsities), batches, pad_id, lambda *_: advance())[0]

        sparsities = candidates[0] if len(candidates) == 1 else min(candidates, key=loss_with)
    else:
        sparsities = [sparsity] * model.depth
    how = f"{method}, {allocation}" + (", sequential" if sequential else "")
    return PrunedModel(sparse(sparsities, progress), how, [], sparsities, "share of weights removed")


def share_of_zeros(model: ModelAdapter) -> float:
    """Share of zeros among the weights of the blocks' linear layers."""
    weights = [weight for block in model.blocks for weight in linear_weights(block).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
