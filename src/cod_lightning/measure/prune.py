"""Blocks removed for good: a smaller model of the same kind, written to a folder, with its perplexity."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.measure.layered import Layered
from cod_lightning.measure.perplexity import exp
from cod_lightning.measure.result import Progress, figure
from cod_lightning.measure.tokens import evaluate
from cod_lightning.nn.decoder import Decoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Export = Callable[[nn.Module, Path], object]
"""Writes a model into a folder that it makes."""


@dataclass(frozen=True)
class Pruned:
    """A model before and after some of its blocks were removed."""

    model: str
    removed: list[int]
    """The blocks, counting from 1."""
    layers_before: int
    layers_after: int
    loss_before: float
    """Mean over target tokens, in nats."""
    loss_after: float
    ppl_before: float
    ppl_after: float

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "model": f"{self.model} {when}",
                "layers": getattr(self, f"layers_{when}"),
                "loss": getattr(self, f"loss_{when}"),
                "ppl": getattr(self, f"ppl_{when}"),
            }
            for when in ("before", "after")
        ]

    def plot(self) -> Figure:
        made, (axes,) = figure()
        names = [f"{row['layers']} layers" for row in self.rows()]
        axes.bar(["before\n" + names[0], "after\n" + names[1]], [self.loss_before, self.loss_after])
        axes.set(ylabel="loss (nats per token)", title=f"{self.model} without {', '.join(map(str, self.removed))}")
        return made


def removed(model: Layered, layers: Collection[int]) -> Layered:
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
    with model.arranged([blocks[layer - 1] for layer in kept]):  # so that nothing else is copied
        copy = Layered(deepcopy(model.model), model.name)
    if isinstance(copy.model, Decoder):
        copy.model.config = dataclasses.replace(copy.model.config, num_hidden_layers=len(kept))
    else:
        renumber(copy, kept, depth)
    return copy


def renumber(model: Layered, kept: list[int], depth: int) -> None:
    """Let the configuration and attention of a `transformers` model fit the blocks `kept` of `depth`, in place."""
    config: Any = model.model.config
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


def save_hf(model: nn.Module, folder: Path) -> None:
    """Write a model of `transformers` for its `from_pretrained`.

    Raises:
        UserError: it is one of ours, which has to be converted first.
    """
    save: Any = getattr(model, "save_pretrained", None)
    if save is None:
        raise UserError(f"{type(model).__name__} is no model of transformers: pass an export that can write it")
    save(folder)


def prune(
    model: Layered,
    batches: Iterable[Tensor],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    layers: Collection[int],
    folder: Path,
    export: Export = save_hf,
) -> Pruned:
    """Write the model without `layers` into `folder`, whole or not at all, and take the perplexity before and after.

    Args:
        model: stays as it is.
        batches: tokens [rows, length].
        pad_id: tokens that are no targets.
        progress: told of every batch, of the model before and then after.
        layers: the blocks to remove, counting from 1.
        folder: does not exist yet.
        export: writes the smaller model.

    Raises:
        UserError: as `removed` and `evaluate`, the folder exists, or `export` does not take such a model.
    """
    if folder.exists():
        raise UserError(f"folder={folder} exists already: choose another")
    batches = list(batches)
    smaller = removed(model, layers)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    losses = []
    try:
        export(smaller.model, partial)  # before the long part, so that a model that it cannot write is refused at once
        for turn, which in enumerate((model, smaller)):

            def told(done: int, total: int, before: int = turn * len(batches)) -> None:
                if progress is not None:
                    progress(before + done, 2 * total)

            losses.append(evaluate(which, batches, pad_id, told)[0])
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Pruned(
        model=model.name,
        removed=sorted(set(layers)),
        layers_before=model.depth,
        layers_after=smaller.depth,
        loss_before=losses[0],
        loss_after=losses[1],
        ppl_before=exp(losses[0]),
        ppl_after=exp(losses[1]),
    )
