"""Give a trained decoder another norm strategy, or more blocks.

The weights next to a constant factor compensate for it: with g times the gain, a norm needs 1/g of the weights after it
(q, k, v; gate, up); with g times the scale, a branch needs 1/g of its last projection (o; down).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from cod_lightning.errors import UserError
from cod_lightning.memory import require_memory
from cod_lightning.nn.config import MAX_LAYERS
from cod_lightning.nn.decoder import Block, Decoder
from cod_lightning.nn.huggingface import unfinished_schedule
from cod_lightning.nn.layer_prediction import predict_blocks
from cod_lightning.nn.layouts import LLAMA, find_sites
from cod_lightning.nn.spec import BLOCK_COEFFICIENTS, FACTORS, INITIAL, OPTIMIZER
from cod_lightning.nn.strategies import BlockSpec, build_all
from cod_lightning.nn.strategy_lookup import norm_section
from cod_lightning.nn.weights import state_dict
from cod_lightning.settings import require_choice

How = Literal["stack", "interpolate", "identity", "lesa"]
Gains = Literal["kept", "new"]


def convert(decoder: Decoder, norm: str | Mapping[str, Any]) -> Decoder:
    """The decoder under another strategy, with the same logits up to the rounding of one product per weight.

    Args:
        decoder: trained under any strategy; it does not change.
        norm: the new strategy, as in `build_all`.

    Raises:
        UserError: an unknown strategy, or one with coefficients that weights cannot compensate for; names each of them.
    """
    return rebuild(decoder, norm, decoder.blocks, compensate=True)


@torch.no_grad()
def grow(
    decoder: Decoder,
    norm: str | Mapping[str, Any],
    blocks: int,
    how: How,
    gains: Gains = "kept",
    progress: Callable[[int, int], object] | None = None,
) -> Decoder:
    """A deeper decoder with the blocks of `decoder`, which does not change, and copies or predictions of them.

    Args:
        decoder: trained.
        norm: its strategy, as in `build_all`.
        blocks: new number of blocks.
        how: "stack": the first blocks, then the last ones again (SOLAR, arXiv 2312.15166); "interpolate": blocks
            repeated in their places, spread evenly; "identity": copies between groups of blocks whose last projections
            are zero, so that the function stays the same (LLaMA Pro, arXiv 2401.02415); "lesa": blocks between the
            last ones that a network predicts from their neighbours (LESA, arXiv 2502.13794, see `layer_prediction`).
        gains: where the strategy depends on the layer or depth, weights compensate for the factors of the new place
            ("kept": every block computes what it did, and a predicted one has the factors of the block before it), or
            stay as they are ("new").
        progress: see `predict_blocks`.

    Raises:
        UserError: `how` or `gains` does not exist, `blocks` is out of range or does not fit into the free memory, or
            the strategy has coefficients for the new depth that weights cannot compensate for.
    """
    require_choice("how", how, How)
    require_choice("gains", gains, Gains)
    sources, inserted = source_layers(len(decoder.blocks), blocks, how)
    require_memory(replace(decoder.config, num_hidden_layers=blocks).num_parameters(), f"blocks={blocks}")
    originals = [decoder.blocks[source - 1] for source in sources]
    if how == "lesa":
        predicted = predict_blocks(decoder.blocks, [sources[layer - 1] for layer in inserted], progress)
        for layer, block in zip(inserted, predicted, strict=True):
            originals[layer - 1] = block
    grown = rebuild(decoder, norm, originals, compensate=gains == "kept")
    for site in find_sites(grown, LLAMA) if how == "identity" else ():
        if site.layer not in inserted:
            continue
        spec = site.block.spec
        part = getattr(spec, site.part)
        changed = part.skip != 1 or part.skip_from != "input" or part.learned_skip or part.sum_norm or part.gate != "no"
        biased = part.branch_norm and spec.norm_kind in ("dyt", "derf")
        if spec.embedding_skip or changed or biased:
            raise UserError(
                f"how=identity needs blocks x + f(x), which those of norm={norm_section(norm)['name']!r} are not"
            )
        site.output.weight.zero_()
    return grown


def source_layers(depth: int, blocks: int, how: How) -> tuple[list[int], list[int]]:
    """For every new block the layer that it copies, and the layers of the blocks that "identity" and "lesa" insert.

    Raises:
        UserError: `blocks` is out of range, or there are too few for "lesa".
    """
    if how == "lesa" and depth < 3:
        raise UserError(f"how=lesa learns from three neighbouring blocks, and the model has {depth}: use another how=")
    most = {"interpolate": MAX_LAYERS, "lesa": depth * 2 - 1}.get(how, depth * 2)
    if not depth < blocks <= most:
        raise UserError(f"blocks={blocks}: the model has {depth} blocks, and how={how} makes {depth + 1} to {most}")
    if how == "stack":
        second = blocks // 2
        return [*range(1, blocks - second + 1), *range(depth - second + 1, depth + 1)], []
    if how == "interpolate":
        return [1 + layer * depth // blocks for layer in range(blocks)], []
    added = blocks - depth
    after = set(range(depth - added, depth)) if how == "lesa" else {(i + 1) * depth // added for i in range(added)}
    sources = [copy for layer in range(1, depth + 1) for copy in [layer] * (1 + (layer in after))]
    return sources, [layer for layer in range(2, blocks + 1) if sources[layer - 1] == sources[layer - 2]]


@torch.no_grad()
def rebuild(decoder: Decoder, norm: str | Mapping[str, Any], originals: Sequence[Block], compensate: bool) -> Decoder:
    """A decoder under a strategy whose blocks are copies of `originals`.

    Args:
        decoder: gives the configuration and the weights outside of the blocks; it does not change.
        norm: the strategy.
        originals: one for each new block; they do not change.
        compensate: let the weights compensate for factors that differ.

    Raises:
        UserError: the strategy has coefficients that weights cannot compensate for; names each of them. Or the schedule
            of `decoder` has not ended.
    """
    specs = build_all(norm, len(originals))
    if problems := unfinished_schedule(decoder):
        raise UserError(problems[0])
    if problems := unsupported_coefficients(originals, specs):
        raise UserError("\n".join(f"norm={norm_section(norm)['name']!r} sets {problem}" for problem in problems))
    with torch.device("meta"):
        rebuilt = Decoder(replace(decoder.config, num_hidden_layers=len(originals)), specs)
    state = {name: tensor for name, tensor in state_dict(decoder).items() if not name.startswith("model.layers.")}
    for index, block in enumerate(originals):
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in state_dict(block).items()}
    rebuilt.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    rebuilt.tie()
    for site in find_sites(rebuilt, LLAMA) if compensate else ():
        old, new = (getattr(block.spec, site.part) for block in (originals[site.layer - 1], site.block))
        for linear in site.inputs:
            divide(linear, new.gain / old.gain)
        if new.learned_branch_scale == "no":
            divide(site.output, new.branch_scale / old.branch_scale)
    return rebuilt


def unsupported_coefficients(originals: Sequence[Block], specs: Sequence[BlockSpec]) -> list[str]:
    """One line for each coefficient of new specs that the weights of copied blocks cannot compensate for."""
    problems: dict[str, str] = {}
    for layer, (block, spec) in enumerate(zip(originals, specs, strict=True), start=1):
        pairs = [(name, getattr(block.spec, name), getattr(spec, name)) for name in BLOCK_COEFFICIENTS]
        for old, new in zip(block.spec.sublayers, spec.sublayers, strict=True):
            # A learned scale is copied; the coefficient is only its initial value.
            learned = () if new.learned_branch_scale == "no" else ("branch_scale",)
            ignored = (*INITIAL, *OPTIMIZER, *learned, "branch_schedule")
            names = [field.name for field in fields(old) if field.name not in ignored]
            pairs += [(name, getattr(old, name), getattr(new, name)) for name in names]
            if new.branch_schedule is not None:
                has = "one that has ended: convert it to its norm.base first" if old.branch_schedule else "none"
                text = f"branch_schedule={new.branch_schedule!r} (layer {layer}), which weights cannot compensate for: "
                problems.setdefault("branch_schedule", f"{text}the model has {has}")
        # A norm of the branch would undo the change of its last projection, and a skip after a norm takes its gain.
        lost = {"branch_scale" for sublayer in spec.sublayers if sublayer.branch_norm}
        lost |= {"gain" for sublayer in spec.sublayers if sublayer.skip_from == "pre_norm"}
        factors = [name for name in FACTORS if name not in lost]
        for name, old, new in pairs:
            if (name not in factors and new != old) or (name in factors and 0 in (old, new)):
                text = f"{name}={new!r} (layer {layer}), which weights cannot compensate for: the model has {old!r}"
                problems.setdefault(name, text)
    return list(problems.values())


def divide(linear: Any, factor: float) -> None:
    """Divide the weight of a linear layer, in float64; its bias stays."""
    if factor != 1:
        linear.weight.copy_(linear.weight.double() / factor)
        if not linear.weight.isfinite().all():
            raise UserError(f"norm= changes a factor by {factor:.3g}, too much for finite weights: use another option")
