"""Smaller copies of a model: without some of its blocks, or with one block in the place of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cod_lightning.errors import UserError, first_line
from cod_lightning.measure.adapter import Batch, ModelAdapter, family
from cod_lightning.measure.batches import iter_batches, step_counter
from cod_lightning.measure.result import Progress
from cod_lightning.nn.decoder import Block, Decoder
from cod_lightning.nn.layouts import Site, find_sites, unwrapped


def remove_blocks(model: ModelAdapter, layers: Collection[int]) -> ModelAdapter:
    """Return a copy of the model without some of its blocks; the others keep their weights and, in ours, their specs.

    The copy's configuration has the new depth. For `transformers`, attention layers are renumbered for the key/value
    cache, and configuration lists with one entry per layer are shortened, so `save_pretrained` writes a model that
    loads unchanged. Peri-LN keeps the norm of its embeddings, also without its first block.

    Args:
        model: not modified.
        layers: the blocks to remove, counting from 1.

    Raises:
        UserError: a layer does not exist, no layer would remain, the blocks need that of the first (`value_residual`),
            or the configuration of `transformers` builds other blocks than those that remain.
    """
    depth, blocks = model.depth, model.blocks
    if unknown := sorted(set(layers) - set(range(1, depth + 1))):
        raise UserError(f"layers={unknown} do not exist: {model.name} has 1 to {depth}")
    remaining = [layer for layer in range(1, depth + 1) if layer not in layers]
    if not remaining:
        raise UserError(f"layers={sorted(set(layers))} are all layers of {model.name}: keep at least one")
    if 1 in layers and any(isinstance(b, Block) and b.spec.value_residual != "no" for b in map(unwrapped, blocks)):
        raise UserError(f"{model.name}: its blocks read the values of block 1 (value_residual): keep block 1")
    with model.with_blocks([blocks[layer - 1] for layer in remaining]):  # so that only these are copied
        copy = dataclasses.replace(model, model=deepcopy(model.model))
    if isinstance(copy.model, Decoder):
        copy.model.config = dataclasses.replace(copy.model.config, num_hidden_layers=len(remaining))
        move_entry_norm(unwrapped(blocks[0]), unwrapped(copy.blocks[0]))
    else:
        try:
            renumber_layers(copy, remaining, depth)
            require_same_blocks(copy)
        except ValueError as error:  # a configuration of `transformers` that checks itself
            raise UserError(
                f"{model.name}: the configuration of {family(model.model)} does not allow layers {remaining} alone: "
                f"{first_line(error)}; remove other layers"
            ) from error
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
        if settings_of(unwrapped(block)) != settings_of(expected):
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


def train_replacement(
    model: ModelAdapter,
    first: int,
    last: int,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    steps: int,
    lr: float,
    attention: bool = True,
) -> ModelAdapter:
    """A copy of the model with one block in the place of several, trained to do what they do (LLM-Streamline).

    The block starts as the first of them. AdamW, without weight decay, lowers the mean squared error between its output
    and theirs on hidden states of the whole model, which are kept in memory; each step takes one batch in turn.

    Args:
        model: not modified.
        first: the first block that is replaced, counting from 1.
        last: the last one.
        batches: to train on.
        pad_id: padding token, which does not count.
        progress: called after each step.
        steps: number of optimizer steps.
        lr: constant learning rate.
        attention: False: the block has an FFN only. Its attention stays, as every block of a checkpoint has one, with
            parameters of zero that are not trained.
    """
    smaller = remove_blocks(model, range(first + 1, last + 1))
    block = smaller.blocks[first - 1].requires_grad_(True)
    if not attention:
        with torch.no_grad():
            for parameter in find_site(smaller, first, "attention").sublayer.parameters():
                parameter.zero_().requires_grad_(False)
    examples = []
    for batch, mask in iter_batches(model, batches, pad_id):
        inputs, blocks = model.block_functions(batch, mask)
        with torch.no_grad():
            target = blocks[last - 1](inputs[last - 1])[mask]
        examples.append((smaller.block_functions(batch, mask)[1][first - 1], inputs[first - 1], mask, target))
    optimizer = torch.optim.AdamW(block.parameters(), lr, weight_decay=0)
    advance = step_counter(progress, steps)
    for step in range(steps):
        function, x, mask, target = examples[step % len(examples)]
        optimizer.zero_grad()
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            F.mse_loss(function(x)[mask], target).backward()
        optimizer.step()
        advance()
    optimizer.zero_grad()
    return smaller


def find_site(model: ModelAdapter, layer: int, part: str) -> Site:
    """The attention or the FFN ("ffn") of a block, counting from 1."""
    return next(site for site in find_sites(model.model, model.layout) if (site.layer, site.part) == (layer, part))
