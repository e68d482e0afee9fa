"""Pruning of blocks or weights: a smaller or sparser model in a folder, and its perplexity before and after."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder, new_folder
from cod_lightning.kernels.loss import perplexity_of
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import step_counter
from cod_lightning.measure.block_removal import remove_blocks
from cod_lightning.measure.options import Positive, require_options
from cod_lightning.measure.panels import Bars, Lines, Panel
from cod_lightning.measure.pruned_models import (
    Allocation,
    PrunedModel,
    Replace,
    Signal,
    prune_blocks,
    prune_weights,
    replace_run,
    share_of_zeros,
)
from cod_lightning.measure.reordering import mean_loss
from cod_lightning.measure.result import Progress, Result
from cod_lightning.measure.weight_sparsity import Calibration, Method, OwlLambda, Share, Threshold
from cod_lightning.nn.apply import fold, strategy_of
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import unsupported_features

Export = Callable[[Any, Path], object]
"""Writes a model into an existing empty folder."""


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
    loss_without: float | None = None
    """Mean loss without the replaced blocks and without what replaces them."""

    def rows(self) -> list[dict[str, Any]]:
        """Two rows, before and after; with a replacement of the run a third, without both."""

        def row(which: str, layers: int, zeros: float, loss: float) -> dict[str, Any]:
            name = f"{self.model} {which}"
            return {"model": name, "layers": layers, "zeros": zeros, "loss": loss, "ppl": perplexity_of(loss)}

        rows = [row("before", self.layers_before, self.zeros_before, self.loss_before)]
        if self.loss_without is not None:
            layers = self.layers_before - len(self.removed)
            rows.append(row("without the run", layers, self.zeros_before, self.loss_without))
        return [*rows, row("after", self.layers_after, self.zeros_after, self.loss_after)]

    def title(self) -> str:
        removed = ", ".join(map(str, self.removed))
        change = f"without blocks {removed}" if self.removed else "sparse"
        if self.loss_without is not None:
            change = f"with a {self.how.rpartition(', ')[2]} for {removed}"
        return f"{super().title()} {change} ({self.how})"

    def panels(self) -> list[Panel]:
        before, after = f"before\n{self.layers_before} blocks", f"after\n{self.layers_after} blocks"
        without = {} if self.loss_without is None else {"without\nthe run": self.loss_without}
        bars = Bars("loss (nats per token)", {before: self.loss_before, **without, after: self.loss_after})
        if not self.signal:
            return [bars]
        run = self.how.startswith("streamline")
        marked = self.removed[:1] if run else self.removed
        points = {"removed": (marked, [self.signal[layer - 1] for layer in marked])} if marked else {}
        xlabel = "first block of the run" if run else "layer"
        return [bars, Lines(self.label, {"signal": self.signal}, xlabel=xlabel, points=points)]


def prune(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    folder: Path,
    export: Export,
    layers: Sequence[int] | None = None,
    by: Signal | None = None,
    blocks: int | None = None,
    replace: Replace | None = None,
    replace_steps: Positive = 500,
    replace_lr: Annotated[float, ("above", 0)] = 3e-4,
    sparsity: Share | None = None,
    allocation: Allocation | None = None,
    method: Method | None = None,
    calibration: Calibration | None = None,
    threshold: Threshold = 5.0,
    owl_lambda: OwlLambda = 0.08,
    epsilon: Share = 0.3,
    difference: Annotated[float | None, ("at_least", -1), ("at_most", 1)] = None,
) -> Pruned:
    """Write the model without some of its blocks or weights into `folder`, completely or not at all.

    The factors of a strategy that was applied to a stock model are folded into the weights that are written.

    Exactly one of `layers`, `by` with `blocks`, and `sparsity` selects what is removed.

    Options:
        folder: new or empty.
        export: writes the pruned model.
        layers: blocks to remove, counting from 1.
        by: select blocks by `influence`, the lowest (ShortGPT); `streamline`, the contiguous ones with the smallest
            distance (LLM-Streamline); or `removal`, those that alone raise the loss least.
        blocks: number of blocks to select.
        replace: with `by=streamline`, put something in the place of the run that every second batch trains, or every
            second sequence of a single batch; losses are those of the others. `layer`: one block, and the run is one
            block longer (LLM-Streamline); `ffn`: a block whose attention is zero (its FFN, with norm and skip), see
            `train_replacement`; `linear`: a linear map in the last projection before the run (ReplaceMe), see
            `fold_linear_map`.
        replace_steps: number of steps of `layer` and `ffn`.
        replace_lr: their learning rate.
        sparsity: share of the weights of the blocks' linear layers to set to zero.
        allocation: how the sparsity is divided among blocks: `owl` (default), `alpha_pruning`, `arithmetic` (ATP), or
            `uniform`.
        method: selects the weights: the smallest by `wanda` (default) or by `magnitude`, see `sparsify`.
        calibration: input norms for `wanda`: `once` (default), all of the dense model; or `sequential`, those of the
            model whose earlier blocks are pruned, as in the released code, see `sparsify_sequentially`.
        threshold: M of OWL, see `outlier_ratios`.
        owl_lambda: lambda of OWL, see `owl_sparsities`.
        epsilon: epsilon of AlphaPruning, see `alpha_sparsities`.
        difference: of ATP, see `arithmetic_sparsities`; None: that of nine with the lowest loss on `batches`.

    Raises:
        UserError: the options do not select exactly one way, or have invalid values; the folder is in use; or a stock
            Llama checkpoint cannot represent the model's strategy.
    """
    options: dict[str, Any] = {"layers": layers, "by": by, "blocks": blocks, "sparsity": sparsity}
    options |= {"replace": replace, "replace_steps": replace_steps, "replace_lr": replace_lr}
    options |= {"allocation": allocation, "method": method, "calibration": calibration}
    options |= {"threshold": threshold, "owl_lambda": owl_lambda, "epsilon": epsilon, "difference": difference}
    require_one_way(options)
    require_options(prune, options, model.depth)
    check_new_folder(folder)
    if isinstance(model.model, Decoder) and (features := unsupported_features(model.model)):
        raise UserError("\n".join([f"{model.name} cannot be written as a checkpoint of transformers", *features]))
    if strategy_of(model.model) is not None:  # its factors depend on the layer's number
        model = dataclasses.replace(model, model=fold(deepcopy(model.model)))
    if layers is not None:
        pruning = PrunedModel(remove_blocks(model, layers), "named", sorted(set(layers)), [], "")
    elif replace is not None and blocks is not None:
        training, batches = split_batches(batches)
        pruning = replace_run(model, training, pad_id, progress, blocks, replace, replace_steps, replace_lr)
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
            calibration or "once",
            threshold=threshold,
            owl_lambda=owl_lambda,
            epsilon=epsilon,
            difference=difference,
        )
    advance = step_counter(progress, 2 * len(batches))
    loss_before, tokens = mean_loss(model, batches, pad_id, lambda *_: advance())
    loss_after, _ = mean_loss(pruning.model, batches, pad_id, lambda *_: advance())
    if replace is not None and math.isfinite(loss_before) and not math.isfinite(loss_after):
        raise UserError(f"replace={replace}: its training diverged, nothing is written: lower replace_lr={replace_lr}")
    loss_without = None if pruning.without_run is None else mean_loss(pruning.without_run, batches, pad_id)[0]
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
        loss_without=loss_without,
    )


def split_batches(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """Every second batch, and the others; of a single batch every second sequence.

    Raises:
        UserError: there is only one sequence.
    """
    if len(batches) > 1:
        return batches[::2], batches[1::2]
    if sum(map(len, batches)) < 2:
        raise UserError("replace= trains on one sequence and measures on another: give at least two, as in rows=32")
    return [batches[0][::2]], [batches[0][1::2]]


def require_one_way(options: Mapping[str, Any]) -> None:
    """Check that the options of `prune` select what is removed in exactly one way, and that this way uses them all.

    Raises:
        UserError: they do not.
    """
    selections = [name for name in ("layers", "by", "sparsity") if options[name] is not None]
    if len(selections) != 1:
        raise UserError(
            "prune takes one of layers=, by= with blocks=, and sparsity="
            + (f"; given: {', '.join(selections)}" if selections else "; none is given")
        )
    if (options["by"] is None) != (options["blocks"] is None):
        raise UserError("by= selects blocks and blocks= is their number: give both, or layers= or sparsity=")
    sparse, allocation = options["sparsity"] is not None, options["allocation"]
    owl = ("allocation=owl", sparse and allocation in (None, "owl"))
    trained = ("replace=layer or ffn", options["replace"] in ("layer", "ffn"))
    needs = {
        "replace": ("by=streamline, which selects neighbouring blocks", options["by"] == "streamline"),
        "replace_steps": trained,
        "replace_lr": trained,
        "allocation": ("sparsity=", sparse),
        "method": ("sparsity=", sparse),
        "calibration": (
            "sparsity= with method=wanda: magnitude reads no text",
            sparse and options["method"] != "magnitude",
        ),
        "threshold": owl,
        "owl_lambda": owl,
        "epsilon": ("allocation=alpha_pruning", allocation == "alpha_pruning"),
        "difference": ("allocation=arithmetic", allocation == "arithmetic"),
    }
    parameters = signature(prune).parameters
    if errors := [
        f"{name}= needs {way}"
        for name, (way, used) in needs.items()
        if not used and options[name] != parameters[name].default
    ]:
        raise UserError("\n".join(errors))
