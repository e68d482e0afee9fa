"""Pruning of blocks or weights: a smaller or sparser model in a folder, and its perplexity before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cod_lightning.errors import UserError
from cod_lightning.evaluate.perplexity import perplexity_of
from cod_lightning.files import check_new_folder, new_folder
from cod_lightning.measure.ablation import LOSS_INCREASE, removal
from cod_lightning.measure.adapter import Batch, ModelAdapter, family
from cod_lightning.measure.batches import mean_loss, step_counter
from cod_lightning.measure.layer_importance import block_influence
from cod_lightning.measure.options import require_choice
from cod_lightning.measure.panels import Bars, Lines, Panel
from cod_lightning.measure.result import Progress, Result
from cod_lightning.measure.weight_sparsity import (
    Method,
    alpha_sparsities,
    arithmetic_sparsities,
    check_sparsities,
    input_norms,
    largest_difference,
    layer_alphas,
    linear_weights,
    outlier_ratios,
    owl_sparsities,
    sparsify,
)
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import unsupported_features

Export = Callable[[Any, Path], object]
"""Writes a model into an existing empty folder."""
Signal = Literal["influence", "streamline", "removal"]
Allocation = Literal["owl", "alpha_pruning", "arithmetic", "uniform"]
TRIED_DIFFERENCES = 9
"""Differences of `allocation=arithmetic` that are tried; the search of its paper tries as many for 32 blocks."""


@dataclass(frozen=True)
class Pruned(Result):
    """A model before and after pruning of blocks, or of weights in its blocks."""

    tokens: int
    """Number of targets."""
    how: str
    """`named`, or the signal that selected the blocks; for weights, method and allocation."""
    removed: list[int]
    """The blocks, counting from 1."""
    signal: list[float]
    """Signal of each block, or of each run of blocks by its first; empty for named blocks. For weights, the sparsity
    of each block."""
    label: str
    """Name of the signal."""
    layers_before: int
    layers_after: int
    zeros_before: float
    """Share of zeros among the weights of the blocks' linear layers."""
    zeros_after: float
    loss_before: float
    """Mean loss over targets, in nats."""
    loss_after: float
    ppl_before: float
    ppl_after: float

    def rows(self) -> list[dict[str, Any]]:
        """Two rows: before and after."""
        names = ("layers", "zeros", "loss", "ppl")
        return [
            {"model": f"{self.model} {when}"} | {name: getattr(self, f"{name}_{when}") for name in names}
            for when in ("before", "after")
        ]

    def title(self) -> str:
        change = f"without blocks {', '.join(map(str, self.removed))}" if self.removed else "sparse"
        return f"{super().title()} {change} ({self.how})"

    def panels(self) -> list[Panel]:
        before, after = f"before\n{self.layers_before} blocks", f"after\n{self.layers_after} blocks"
        bars = Bars("loss (nats per token)", {before: self.loss_before, after: self.loss_after})
        if not self.signal:
            return [bars]
        run = self.how == "streamline"
        marked = self.removed[:1] if run else self.removed
        points = {"removed": (marked, [self.signal[layer - 1] for layer in marked])} if marked else {}
        xlabel = "first block of the run" if run else "layer"
        return [bars, Lines(self.label, {"signal": self.signal}, xlabel=xlabel, points=points)]


@dataclass(frozen=True)
class Pruning:
    """A pruned copy of a model, and how it was selected; see `Pruned`."""

    model: ModelAdapter
    how: str
    removed: list[int]
    signal: list[float]
    label: str


def remove_blocks(model: ModelAdapter, layers: Collection[int]) -> ModelAdapter:
    """Return a copy of the model without some of its blocks; the others keep their weights and, in ours, their specs.

    The copy's configuration has the new depth. For `transformers`, attention layers are renumbered for the key/value
    cache, and configuration lists with one entry per layer are shortened, so `save_pretrained` writes a model that
    loads unchanged. Peri-LN keeps the norm of its embeddings, also without its first block.

    Args:
        model: not modified.
        layers: the blocks to remove, counting from 1.

    Raises:
        UserError: a layer does not exist, no layer would remain, or the configuration of `transformers` builds other
            blocks than those that remain.
    """
    depth, blocks = model.depth, model.blocks
    if unknown := sorted(set(layers) - set(range(1, depth + 1))):
        raise UserError(f"layers={unknown} do not exist: {model.name} has 1 to {depth}")
    remaining = [layer for layer in range(1, depth + 1) if layer not in layers]
    if not remaining:
        raise UserError(f"layers={sorted(set(layers))} are all layers of {model.name}: keep at least one")
    with model.with_blocks([blocks[layer - 1] for layer in remaining]):  # so that only these are copied
        copy = ModelAdapter(deepcopy(model.model), model.name)
    if isinstance(copy.model, Decoder):
        copy.model.config = dataclasses.replace(copy.model.config, num_hidden_layers=len(remaining))
        move_entry_norm(blocks[0], copy.blocks[0])
    else:
        renumber_layers(copy, remaining, depth)
        require_same_blocks(copy)
    return copy


def move_entry_norm(first: Any, new_first: Any) -> None:
    """Give a Decoder's new first block a copy of the norm of the embeddings, which its old first block has."""
    if first.spec.entry_norm and not new_first.spec.entry_norm:
        new_first.spec = dataclasses.replace(new_first.spec, entry_norm=True)
        new_first.entry_norm = deepcopy(first.entry_norm)


def renumber_layers(model: ModelAdapter, remaining: list[int], depth: int) -> None:
    """Adapt configuration and attention of a `transformers` model to the layers `remaining` of `depth`, in place."""
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"{model.name}: scale_attn_by_inverse_layer_idx divides attention by the layer's number, so blocks cannot "
            "move; prune a model without it"
        )
    changes: dict[str, Any] = {"num_hidden_layers": len(remaining)}
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
            changes[name] = type(value)(value[layer - 1] for layer in remaining)
    for name in ("moe_layers", "mlp_only_layers"):  # numbers of layers, from 0
        if numbers := getattr(config, name, None):
            changes[name] = [remaining.index(number + 1) for number in numbers if number + 1 in remaining]
    for name, value in changes.items():
        setattr(config, name, value)
    for index, block in enumerate(model.blocks):
        modules: list[Any] = list(block.modules())
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def require_same_blocks(model: ModelAdapter) -> None:
    """Check that the configuration of a `transformers` model builds its blocks.

    Raises:
        UserError: a module has another class, shape or setting; families that place experts, windows or rotary
            embeddings by the layer's number in a way that `renumber_layers` does not know.
    """
    kind: Any = type(model.model)
    with torch.device("meta"):
        built = kind(deepcopy(model.model.config)).get_submodule(model.layout.blocks)
    for layer, (block, expected) in enumerate(zip(model.blocks, built, strict=True), start=1):
        if settings_of(block) != settings_of(expected):
            raise UserError(
                f"{model.name}: block {layer} of the smaller model is not what its configuration builds, because "
                f"{family(model.model)} gives its blocks different parts by their number; remove other layers"
            )


def settings_of(block: nn.Module) -> dict[str, Any]:
    """Class, parameter shapes and plain attributes of every module of a block, by its path."""
    settings: dict[str, Any] = {}
    for path, module in block.named_modules():
        plain = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str) and name != "training" and not name.startswith("_")
        }
        shapes = {name: parameter.shape for name, parameter in module.named_parameters(recurse=False)}
        settings[path] = type(module), plain, shapes
    return settings


def prune(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    folder: Path,
    export: Export,
    layers: Sequence[int] | None = None,
    by: Signal | None = None,
    blocks: int | None = None,
    sparsity: float | None = None,
    allocation: Allocation | None = None,
    method: Method | None = None,
    threshold: float = 5.0,
    owl_lambda: float = 0.08,
    epsilon: float = 0.3,
    difference: float | None = None,
) -> Pruned:
    """Write the model without some of its blocks or weights into `folder`, completely or not at all.

    Exactly one of `layers`, `by` with `blocks`, and `sparsity` selects what is removed.

    Options:
        folder: new or empty.
        export: writes the pruned model.
        layers: blocks to remove, counting from 1.
        by: select blocks by `influence`, the lowest (ShortGPT); `streamline`, the contiguous ones with the smallest
            distance (LLM-Streamline); or `removal`, those that alone raise the loss least.
        blocks: number of blocks to select.
        sparsity: share of the weights of the blocks' linear layers to set to zero.
        allocation: how the sparsity is divided among blocks: `owl` (default), `alpha_pruning`, `arithmetic` (ATP), or
            `uniform`.
        method: selects the weights: the smallest by `wanda` (default) or by `magnitude`, see `sparsify`.
        threshold: M of OWL, see `outlier_ratios`.
        owl_lambda: lambda of OWL, see `owl_sparsities`.
        epsilon: epsilon of AlphaPruning, see `alpha_sparsities`.
        difference: of ATP, see `arithmetic_sparsities`; None: that of nine with the lowest loss on `batches`.

    Raises:
        UserError: the options do not select exactly one way, or have invalid values; the folder is in use; or a stock
            Llama checkpoint cannot represent the model's strategy.
    """
    require_one_selection(layers, by, blocks, sparsity, allocation, method)
    check_new_folder(folder)
    if isinstance(model.model, Decoder) and (features := unsupported_features(model.model)):
        raise UserError("\n".join([f"{model.name} cannot be written as a checkpoint of transformers", *features]))
    batches = list(batches)
    if layers is not None:
        pruning = Pruning(remove_blocks(model, layers), "named", sorted(set(layers)), [], "")
    elif by is not None and blocks is not None:
        pruning = prune_blocks(model, batches, pad_id, progress, by, blocks)
    else:
        assert sparsity is not None
        pruning = prune_weights(
            model,
            batches,
            pad_id,
            progress,
            sparsity,
            allocation or "owl",
            method or "wanda",
            threshold=threshold,
            owl_lambda=owl_lambda,
            epsilon=epsilon,
            difference=difference,
        )
    advance = step_counter(progress, 2 * len(batches))
    loss_before, tokens = mean_loss(model, batches, pad_id, lambda *_: advance())
    loss_after, _ = mean_loss(pruning.model, batches, pad_id, lambda *_: advance())
    with new_folder(folder) as partial:
        export(pruning.model.model, partial)
    return Pruned(
        model=model.name,
        tokens=tokens,
        how=pruning.how,
        removed=pruning.removed,
        signal=pruning.signal,
        label=pruning.label,
        layers_before=model.depth,
        layers_after=pruning.model.depth,
        zeros_before=share_of_zeros(model),
        zeros_after=share_of_zeros(pruning.model),
        loss_before=loss_before,
        loss_after=loss_after,
        ppl_before=perplexity_of(loss_before),
        ppl_after=perplexity_of(loss_after),
    )


def require_one_selection(
    layers: Sequence[int] | None,
    by: Signal | None,
    blocks: int | None,
    sparsity: float | None,
    allocation: Allocation | None,
    method: Method | None,
) -> None:
    """Check that the options of `prune` select what is removed in exactly one way.

    Raises:
        UserError: they do not.
    """
    selections = {"layers": layers, "by": by, "sparsity": sparsity}
    given = [name for name, value in selections.items() if value is not None]
    if len(given) != 1:
        raise UserError(
            "prune takes one of layers=, by= with blocks=, and sparsity="
            + (f"; given: {', '.join(given)}" if given else "; none is given")
        )
    if (by is None) != (blocks is None):
        raise UserError("by= selects blocks and blocks= is their number: give both, or layers= or sparsity=")
    if sparsity is None and (allocation is not None or method is not None):
        raise UserError("allocation= and method= need sparsity=")


def prune_blocks(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    progress: Progress | None,
    by: Signal,
    blocks: int,
) -> Pruning:
    """Remove a number of blocks that are selected by a signal; see `prune`.

    Raises:
        UserError: the signal is unknown, or the number removes no block or all.
    """
    require_choice(Signal, by=by)
    if not 1 <= blocks < model.depth:
        raise UserError(f"blocks={blocks}: expected 1 to {model.depth - 1} of the {model.depth} of {model.name}")
    if by == "streamline":
        influence = block_influence(model, batches, pad_id, progress, longest=blocks)
        first, last = influence.best[-1]
        layers = list(range(first, last + 1))
        signal = [value for value in influence.distance[-1] if value is not None]
        return Pruning(remove_blocks(model, layers), by, layers, signal, f"1 - mean cosine over {blocks} blocks")
    if by == "removal":
        signal, label = removal(model, batches, pad_id, progress).series()["delta_loss"], LOSS_INCREASE
    else:
        signal = block_influence(model, batches, pad_id, progress, longest=1).influence
        label = "block influence"
    ascending = sorted(range(1, model.depth + 1), key=lambda layer: signal[layer - 1])
    layers = sorted(ascending[:blocks])
    return Pruning(remove_blocks(model, layers), by, layers, list(signal), label)


def prune_weights(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    progress: Progress | None,
    sparsity: float,
    allocation: Allocation,
    method: Method,
    *,
    threshold: float,
    owl_lambda: float,
    epsilon: float,
    difference: float | None,
) -> Pruning:
    """Set a share of the weights to zero; see `prune`.

    Raises:
        UserError: the allocation or the method is unknown, or a sparsity is outside [0, 1].
    """
    require_choice(Allocation, allocation=allocation)
    require_choice(Method, method=method)
    needs_norms = allocation == "owl" or method == "wanda"
    norms = input_norms(model, batches, pad_id, progress) if needs_norms else []
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
            return mean_loss(sparsify(model, sparsities, method, norms), batches, pad_id, lambda *_: advance())[0]

        sparsities = candidates[0] if len(candidates) == 1 else min(candidates, key=loss_with)
    else:
        sparsities = check_sparsities([sparsity] * model.depth, sparsity, "allocation=uniform")
    sparse = sparsify(model, sparsities, method, norms)
    return Pruning(sparse, f"{method}, {allocation}", [], sparsities, "share of weights removed")


def share_of_zeros(model: ModelAdapter) -> float:
    """Share of zeros among the weights of the blocks' linear layers."""
    weights = [weight for block in model.blocks for _, weight in linear_weights(block).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
