"""Blocks or weights removed for good: a smaller or sparser model in a folder, and its perplexity before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cod_lightning.errors import UserError
from cod_lightning.evaluate.perplexity import perplexity_of
from cod_lightning.files import check_new_folder, new_folder
from cod_lightning.measure.ablation import LOSS_INCREASE, removal
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import evaluate
from cod_lightning.measure.importance import block_influence
from cod_lightning.measure.options import require_choice
from cod_lightning.measure.result import Progress, figure, layer_lines, legend
from cod_lightning.measure.sparsity import (
    Method,
    alpha_sparsities,
    checked,
    input_norms,
    layer_alphas,
    matrices,
    outlier_ratios,
    owl_sparsities,
    sparsified,
)
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import unsupported_features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Export = Callable[[Any, Path], object]
"""Writes a model into a folder, which is there and empty."""
Signal = Literal["influence", "streamline", "removal"]
Allocation = Literal["owl", "alpha_pruning", "uniform"]


@dataclass(frozen=True)
class Pruned:
    """A model before and after some of its blocks, or of its blocks' weights, were removed."""

    model: str
    tokens: int
    """Targets."""
    how: str
    """`named`, or the signal that chose the blocks; for weights, method and allocation."""
    removed: list[int]
    """The blocks, counting from 1."""
    signal: list[float]
    """What they were chosen by, for every block, or for the run of blocks from each on; empty if they were named. For
    weights, the share of them to remove from each block."""
    label: str
    """What the signal is."""
    layers_before: int
    layers_after: int
    zeros_before: float
    """Share of zeros among the weights of the blocks' matrices."""
    zeros_after: float
    loss_before: float
    """Mean over target tokens, in nats."""
    loss_after: float
    ppl_before: float
    ppl_after: float

    def rows(self) -> list[dict[str, Any]]:
        """Before and after."""
        names = ("layers", "zeros", "loss", "ppl")
        return [
            {"model": f"{self.model} {when}"} | {name: getattr(self, f"{name}_{when}") for name in names}
            for when in ("before", "after")
        ]

    def plot(self) -> Figure:
        """Loss before and after, beside what the choice went by."""
        what = f"without blocks {', '.join(map(str, self.removed))}" if self.removed else "sparse"
        made, (left, *others) = figure(f"{self.model} {what} ({self.how})", columns=2 if self.signal else 1)
        rows = self.rows()
        names = [f"{when}\n{row['layers']} blocks" for when, row in zip(("before", "after"), rows, strict=True)]
        left.bar_label(left.bar(names, [row["loss"] for row in rows], width=0.6), fmt="%.3f")
        left.set_ylabel("loss (nats per token)")
        left.margins(y=0.1)
        for place in others:
            layer_lines(place, {"signal": self.signal}, self.label)
            chosen = [layer for layer in self.removed if layer <= len(self.signal)]
            if self.how == "streamline":
                place.set_xlabel("first block of the run")
                chosen = chosen[:1]
            if chosen:
                place.plot(
                    chosen, [self.signal[layer - 1] for layer in chosen], "o", color="C3", zorder=3, label="removed"
                )
                legend(place)
        return made


@dataclass(frozen=True)
class Choice:
    """A pruned copy of a model, and how it was chosen; see `Pruned`."""

    model: ModelAdapter
    how: str
    removed: list[int]
    signal: list[float]
    label: str


def removed(model: ModelAdapter, layers: Collection[int]) -> ModelAdapter:
    """A copy of the model without some of its blocks; what remains keeps its weights and, in ours, its specs.

    The copy's configuration counts the blocks that are left. One of `transformers` also has its attention layers
    numbered anew, for the key/value cache, and the lists with an entry for each layer cut, so that it comes back from
    `save_pretrained` as it is.

    Args:
        model: stays as it is.
        layers: the blocks to remove, counting from 1.

    Raises:
        UserError: no such layer, no layer would be left, or the model's attention is a function of a layer's number.
    """
    depth, blocks = model.depth, model.blocks
    unknown = sorted(set(layers) - set(range(1, depth + 1)))
    if unknown:
        raise UserError(f"layers={unknown} do not exist: {model.name} has 1 to {depth}")
    kept = [layer for layer in range(1, depth + 1) if layer not in layers]
    if not kept:
        raise UserError(f"layers={sorted(set(layers))} are all that {model.name} has: at least one must stay")
    with model.with_blocks([blocks[layer - 1] for layer in kept]):  # so that nothing else is copied
        copy = ModelAdapter(deepcopy(model.model), model.name)
    if isinstance(copy.model, Decoder):
        copy.model.config = dataclasses.replace(copy.model.config, num_hidden_layers=len(kept))
    else:
        renumber(copy, kept, depth)
    return copy


def renumber(model: ModelAdapter, kept: list[int], depth: int) -> None:
    """Let the configuration and attention of a `transformers` model fit the blocks `kept` of `depth`, in place."""
    config = model.config
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError(
            f"{model.name}: scale_attn_by_inverse_layer_idx divides attention by the number of its layer, so that a "
            "block cannot move up; expected a model without it"
        )
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
            changes[name] = type(value)(value[layer - 1] for layer in kept)
    for name, value in changes.items():
        setattr(config, name, value)
    for index, block in enumerate(model.blocks):
        modules: list[Any] = list(block.modules())
        for module in modules:
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


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
) -> Pruned:
    """Write the model without some of its blocks or weights into `folder`, whole or not at all.

    Either `layers`, or `by` and `blocks`, or `sparsity` says what is removed.

    Args:
        model: stays as it is.
        batches: tokens [rows, length], to choose by and to take the perplexity on.
        pad_id: tokens that do not count.
        progress: told of every batch, as the choice is made, and of the model before and then after.
        folder: must not exist yet, or be empty.
        export: writes the smaller model.
        layers: blocks to remove, counting from 1.
        by: choose blocks by `influence`, the lowest (ShortGPT); `streamline`, the contiguous ones that turn the stream
            least (LLM-Streamline); or `removal`, those that alone raise the loss least.
        blocks: how many.
        sparsity: share of the weights of the blocks' matrices to set to zero.
        allocation: how that share is spread over the blocks: `owl` (if not given), `alpha_pruning`, or `uniform`.
        method: which weights: the least by `wanda` (if not given) or by `magnitude`, see `sparsified`.
        threshold: OWL's M.
        owl_lambda: OWL's, see `owl_sparsities`.
        epsilon: AlphaPruning's, see `alpha_sparsities`.

    Raises:
        UserError: none or several of the three ways, an option of another way or a value that it cannot have; the
            folder is in use; or the model's strategy has no equal among Llama checkpoints.
    """
    ways = {"layers": layers, "by": by, "sparsity": sparsity}
    if len(given := [name for name, value in ways.items() if value is not None]) != 1:
        raise UserError(
            f"prune takes one of layers=, by= with blocks=, and sparsity=; given: {', '.join(given) or 'none'}"
        )
    if (by is None) != (blocks is None):
        raise UserError("by= says which blocks and blocks= how many: give both, or layers= or sparsity=")
    if sparsity is None and (allocation is not None or method is not None):
        raise UserError("allocation= and method= are for sparsity=")
    check_new_folder(folder)
    if isinstance(model.model, Decoder) and (found := unsupported_features(model.model)):
        raise UserError("\n".join([f"{model.name} cannot be written as a checkpoint of transformers", *found]))
    batches = list(batches)
    if layers is not None:
        choice = Choice(removed(model, layers), "named", sorted(set(layers)), [], "")
    elif by is not None and blocks is not None:
        choice = without_blocks(model, batches, pad_id, progress, by, blocks)
    else:
        assert sparsity is not None
        spread, rule = allocation or "owl", method or "wanda"
        require_choice(Allocation, allocation=spread)
        require_choice(Method, method=rule)
        needs_norms = spread == "owl" or rule == "wanda"
        norms = input_norms(model, batches, pad_id, progress) if needs_norms else []
        if spread == "owl":
            shares = owl_sparsities(outlier_ratios(model, norms, threshold), sparsity, owl_lambda)
        elif spread == "alpha_pruning":
            shares = alpha_sparsities(layer_alphas(model), sparsity, epsilon)
        else:
            shares = checked([sparsity] * model.depth, sparsity, "allocation=uniform")
        smaller = sparsified(model, shares, rule, norms)
        choice = Choice(smaller, f"{rule}, {spread}", [], shares, "share of weights removed")
    losses, tokens = [], 0
    for turn, which in enumerate((model, choice.model)):

        def told(done: int, total: int, before: int = turn * len(batches)) -> None:
            if progress is not None:
                progress(before + done, 2 * total)

        loss, tokens = evaluate(which, batches, pad_id, told)
        losses.append(loss)
    with new_folder(folder) as partial:
        export(choice.model.model, partial)
    return Pruned(
        model=model.name,
        tokens=tokens,
        how=choice.how,
        removed=choice.removed,
        signal=choice.signal,
        label=choice.label,
        layers_before=model.depth,
        layers_after=choice.model.depth,
        zeros_before=zeros(model),
        zeros_after=zeros(choice.model),
        loss_before=losses[0],
        loss_after=losses[1],
        ppl_before=perplexity_of(losses[0]),
        ppl_after=perplexity_of(losses[1]),
    )


def without_blocks(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    progress: Progress | None,
    by: Signal,
    blocks: int,
) -> Choice:
    """The model without so many blocks, chosen by a signal.

    Raises:
        UserError: an unknown signal, or a number that leaves no block or removes none.
    """
    require_choice(Signal, by=by)
    if not 1 <= blocks < model.depth:
        raise UserError(f"blocks={blocks}: 1 to {model.depth - 1} of the {model.depth} of {model.name} can be removed")
    if by == "removal":
        found = removal(model, batches, pad_id, progress)
        signal, label = [loss - found.loss for loss in found.losses], LOSS_INCREASE
    else:
        length = blocks if by == "streamline" else 1
        influence = block_influence(model, batches, pad_id, progress, longest=length)
        signal = [value for value in influence.distance[-1] if value is not None]
        label = "block influence" if by == "influence" else f"1 - mean cosine over {length} blocks"
    if by == "streamline":
        first, last = influence.best[-1]
        chosen = list(range(first, last + 1))
    else:
        chosen = sorted(sorted(range(1, model.depth + 1), key=lambda layer: signal[layer - 1])[:blocks])
    return Choice(removed(model, chosen), by, chosen, signal, label)


def zeros(model: ModelAdapter) -> float:
    """Share of zeros among the weights of the blocks' matrices."""
    weights = [weight for block in model.blocks for _, weight in matrices(block).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
