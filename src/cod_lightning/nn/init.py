"""Initialisation: a pure function of (seed, parameter name), whatever the strategy, the device or the sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder, Norm, Residual
from cod_lightning.nn.parallel import Model
from cod_lightning.nn.strategies import BlockSpec, SublayerSpec
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.nn.weights import copy_

PROFILE_ROWS, PROFILE_LENGTH = 4, 64
"""The random tokens that Admin is profiled on; of images, the same number of rows."""


def build_decoder(
    config: DecoderConfig,
    specs: list[BlockSpec],
    seed: int,
    device: torch.device | str = "cpu",
    wrap: Callable[[Decoder], object] = lambda decoder: None,
) -> Decoder:
    """An initialised decoder. It is built on the meta device, so that nothing is allocated or drawn twice.

    Args:
        config: its shape.
        specs: one for each block.
        seed: of the draws.
        device: to build it on.
        wrap: changes the decoder in place while it is on the meta device, such as `parallelise`.

    Raises:
        ValueError: as `Decoder`.
    """
    with torch.device("meta"):
        decoder = Decoder(config, specs)
    wrap(decoder)
    decoder.to_empty(device=device)
    initialise(decoder, seed)
    return decoder


@torch.no_grad()
def initialise(decoder: Decoder, seed: int) -> None:
    """Set every parameter of `decoder` in place.

    A weight is its standard deviation times standard-normal numbers that depend on `seed` and on its name alone (and on
    `init_cutoff`), so that two strategies compared under one seed start from the same draws.
    """
    decoder.tie()
    config = decoder.config
    std = base_std(config, config.hidden_size, config.embedding_std)
    draw_(decoder, "model.embed_tokens.weight", std, seed)
    if not config.tie_word_embeddings:
        draw_(decoder, "lm_head.weight", base_std(config, config.hidden_size, config.init_std), seed)
    initialise_blocks(decoder, "model.layers", seed)
    shape, vocabulary = (PROFILE_ROWS, PROFILE_LENGTH), decoder.model.embed_tokens.num_embeddings
    rows = torch.randint(vocabulary, shape, generator=profile_generator(seed), device="cpu")
    profile_skips(decoder, rows, seed, initialise)


def build_vit(
    config: DecoderConfig,
    specs: list[BlockSpec],
    seed: int,
    *,
    image_size: int,
    patch_size: int,
    classes: int,
    device: torch.device | str = "cpu",
    wrap: Callable[[VisionTransformer], object] = lambda vit: None,
) -> VisionTransformer:
    """`build_decoder` for images.

    Raises:
        ValueError: as `VisionTransformer`.
    """
    with torch.device("meta"):
        vit = VisionTransformer(config, specs, image_size, patch_size, classes)
    wrap(vit)
    vit.to_empty(device=device)
    initialise_vit(vit, seed)
    return vit


@torch.no_grad()
def initialise_vit(vit: VisionTransformer, seed: int) -> None:
    """`initialise` for images: class token, positions and every weight with `init_std`, biases 0."""
    for name in ("embedding.projection.weight", "embedding.class_token", "embedding.positions", "head.weight"):
        draw_(vit, name, vit.config.init_std, seed)
    for layer in (vit.embedding.projection, vit.head):
        layer.bias.zero_()
    initialise_blocks(vit, "layers", seed)
    shape = (PROFILE_ROWS, 3, vit.image_size, vit.image_size)
    rows = torch.randn(shape, generator=profile_generator(seed), device="cpu", dtype=torch.float32)
    profile_skips(vit, rows, seed, initialise_vit)


def initialise_blocks(model: Model, prefix: str, seed: int) -> None:
    """Set the parameters of all blocks, named from `prefix` on, and of the final norm."""
    for index, block in enumerate(model.blocks):
        for part, sublayer, spec in (
            ("self_attn", block.self_attn, block.spec.attention),
            ("mlp", block.mlp, block.spec.ffn),
        ):
            for name, weight in sublayer.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
                else:
                    full_name = f"{prefix}.{index}.{part}.{name}"
                    draw_(model, full_name, projection_std(weight, name, spec, model.config), seed)
        if block.gate is not None:
            block.gate.zero_()
    for module in model.modules():
        if isinstance(module, Norm) and module.weight is not None:
            module.weight.fill_(module.initial_weight)
        if isinstance(module, Residual):
            if module.branch_scale is not None:
                module.branch_scale.fill_(module.spec.branch_scale)
            if module.skip is not None:
                module.skip.fill_(module.spec.skip)


def base_std(config: DecoderConfig, inputs: int, std: float) -> float:
    """Standard deviation before a strategy's factor of a weight that has `inputs` inputs, or else `std`."""
    return inputs**-0.5 if config.init == "fan_in" else std


def projection_std(weight: Tensor, name: str, spec: SublayerSpec, config: DecoderConfig) -> float:
    """Standard deviation of a projection's weight under a strategy; `name` is such as "o_proj.weight"."""
    name = name.removesuffix(".weight")
    fan_out, fan_in = weight.shape
    if spec.xavier is not None:
        gain = 1.0 if name in ("q_proj", "k_proj") else spec.xavier
        return gain * (2 / (fan_in + fan_out)) ** 0.5
    std = base_std(config, fan_in, config.init_std)
    return std * spec.output_init if name in ("o_proj", "down_proj") else std


def draw_(model: Model, name: str, std: float, seed: int) -> None:
    parameter = model.get_parameter(name)
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    # Named, because Lightning makes the accelerator and its precision the defaults while a model is built.
    normal = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
    if (cutoff := model.config.init_cutoff) is None:
        normal.normal_(generator=generator)
    else:
        torch.nn.init.trunc_normal_(normal, a=-cutoff, b=cutoff, generator=generator)
    copy_(parameter, (normal * std).to(parameter.dtype))


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for the random numbers of one purpose under a run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def profile_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, "admin profile"))


def profile_skips(model: Model, rows: Tensor, seed: int, initialise: Callable[[Any, int], None]) -> None:
    """Admin: with all w = 1, run random `rows` and set w_i = sqrt(1 + sum over j < i of Var[f_j]).

    A sharded model takes them from a whole one, which every rank draws on the CPU: in memory for that long, and in
    float32 under any precision.
    """
    skips = [r.skip for block in model.blocks for r in (block.attention_residual, block.ffn_residual)]
    if all(skip is None for skip in skips):
        return
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        with torch.device("meta"):
            whole = model.empty_like()
        initialise(whole.to_empty(device="cpu"), seed)
        found = [r.skip for block in whole.blocks for r in (block.attention_residual, block.ffn_residual)]
        for skip, values in zip(skips, found, strict=True):
            if skip is not None and values is not None:
                copy_(skip, values)
        return
    variances: list[Tensor] = []

    def hook(name: str, layer: int, branch: Tensor) -> None:
        if name in ("attention", "ffn"):
            variances.append(branch.float().var())

    with torch.compiler.set_stance("force_eager"):
        model(rows.to(next(model.parameters()).device), hook=hook)
    total = torch.ones_like(variances[0])
    for skip, variance in zip(skips, variances, strict=True):
        if skip is not None:
            skip.fill_(total.sqrt())
        total = total + variance
