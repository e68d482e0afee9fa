"""Give a trained decoder another norm strategy without changing its function.

The weights next to a constant factor make up for it: with g times the gain, a norm needs 1/g of the weights behind it
(q, k, v; gate, up); with g times the scale, a branch needs 1/g of its last projection (o; down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import INITIAL
from cod_lightning.nn.strategies import BlockSpec, build_all

FACTORS = ("gain", "branch_scale")
"""Coefficients that weights make up for."""


@torch.no_grad()
def convert(decoder: Decoder, norm: Mapping[str, Any]) -> Decoder:
    """The decoder under another strategy, with the same logits up to the rounding of one product per weight.

    Args:
        decoder: trained under any strategy; it does not change.
        norm: `name` of the new strategy, and its options as further entries.

    Raises:
        UserError: an unknown strategy, or one with coefficients that weights cannot make up for; names each of them.
    """
    specs = build_all(norm, len(decoder.blocks))
    if problems := obstacles(decoder, specs):
        raise UserError("\n".join(f"norm={norm['name']!r} sets {problem}" for problem in problems))
    with torch.device("meta"):
        converted = Decoder(decoder.config, specs)
    converted.load_state_dict({name: tensor.clone() for name, tensor in decoder.state_dict().items()}, assign=True)
    converted.tie()
    for old, block in zip(decoder.blocks, converted.blocks, strict=True):
        attention, ffn = block.self_attn, block.mlp
        inputs = [attention.q_proj, attention.k_proj, attention.v_proj], [ffn.gate_proj, ffn.up_proj]
        outputs = attention.o_proj, ffn.down_proj
        for before, after, behind_norm, last in zip(
            old.spec.sublayers, block.spec.sublayers, inputs, outputs, strict=True
        ):
            for linear in behind_norm:
                divide(linear, after.gain / before.gain)
            if after.learned_branch_scale == "no":
                divide(last, after.branch_scale / before.branch_scale)
    return converted


def obstacles(decoder: Decoder, specs: Sequence[BlockSpec]) -> list[str]:
    """One line for each coefficient of new specs that the weights of a decoder cannot make up for."""
    problems: dict[str, str] = {}
    for layer, (block, spec) in enumerate(zip(decoder.blocks, specs, strict=True), start=1):
        pairs = [("entry_norm", block.spec.entry_norm, spec.entry_norm)]
        for old, new in zip(block.spec.sublayers, spec.sublayers, strict=True):
            pairs += [(field.name, getattr(old, field.name), getattr(new, field.name)) for field in fields(old)]
        for name, old, new in pairs:
            if (name not in FACTORS + INITIAL and new != old) or (name in FACTORS and new == 0):
                text = f"{name}={new!r} (layer {layer}), for which weights cannot make up: the model has {old!r}"
                problems.setdefault(name, text)
    return list(problems.values())


def divide(linear: Any, factor: float) -> None:
    """Divide the weight of a linear layer, in float64; its bias stays."""
    if factor != 1:
        linear.weight.copy_(linear.weight.double() / factor)
