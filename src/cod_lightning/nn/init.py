"""Initialisation: a pure function of (seed, parameter name), independent of strategy, device and sharding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Attention, Block, Decoder, Residual
from cod_lightning.nn.norms import Norm
from cod_lightning.nn.parallel import Model
from cod_lightning.nn.strategies import BlockSpec, SublayerSpec
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.nn.weights import copy_, is_sharded

M = TypeVar("M", bound=Model)

OUTPUT_PROJECTIONS = ("o_proj", "down_proj")
"""The last projections of the sub-layers; all others read the pre-norm."""

PROFILE_BATCH, PROFILE_LENGTH = 4, 64
"""Random sequences, or images, and tokens in a sequence that Admin profiles."""


def build_decoder(
    config: DecoderConfig,
    specs: list[BlockSpec],
    seed: int,
    device: torch.device | str = "cpu",
    wrap: Callable[[Decoder], object] = lambda decoder: None,
) -> Decoder:
    """An initialised decoder, whose random weights depend on `seed` and their names alone.

    Args:
        config: shape; with `vocab_size`.
        specs: of the blocks, the first one first, as `build_all` gives them.
        seed: of the initial weights.
        device: of the parameters.
        wrap: changes the decoder in place while it is on the meta device, as sharding does.

    Raises:
        ValueError: as `Decoder`.
    """
    return build_model(lambda: Decoder(config, specs), seed, device, wrap)


def build_model(
    construct: Callable[[], M],
    seed: int,
    device: torch.device | str = "cpu",
    wrap: Callable[[M], object] = lambda model: None,
) -> M:
    """The initialised model that `construct` makes; other arguments are those of `build_decoder`."""
    with torch.device("meta"):
        model = construct()
    wrap(model)
    return initialise(model.to_empty(device=device), seed)


@torch.no_grad()
def initialise(model: M, seed: int) -> M:
    """Set every parameter of `model` in place, and return it.

    A weight is its standard deviation times standard-normal numbers that depend only on `seed`, on its name and on
    `init_cutoff`, so that strategies are compared from the same random weights.
    """
    if isinstance(model, Decoder):
        model.tie()
    for name, std in outer_stds(model).items():
        draw_(model, name, std, seed)
    layers = "model.layers" if isinstance(model, Decoder) else "layers"
    for index, block in enumerate(model.blocks):
        for part, spec in (("self_attn", block.spec.attention), ("mlp", block.spec.ffn)):
            for name, weight in block.get_submodule(part).named_parameters():
                if weight.ndim == 2:
                    projection = name.removesuffix(".weight")
                    std = projection_std(weight, projection, spec, model.config)
                    draw_(model, f"{layers}.{index}.{part}.{name}", std, seed)
                    weight.mul_(1.0 if projection in OUTPUT_PROJECTIONS else spec.input_init)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", ".gate")):
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, Norm):
            module.reset()
        if isinstance(module, Residual) and module.branch_scale is not None:
            module.branch_scale.fill_(module.spec.branch_scale)
        if isinstance(module, Residual) and module.skip is not None:
            module.skip.fill_(module.spec.skip)
        if isinstance(module, Block) and module.embedding_skip is not None:
            copy_(module.embedding_skip, torch.tensor([1.0, 0.0], device="cpu"))
        if isinstance(module, Attention) and module.value_mix is not None:
            copy_(module.value_mix, torch.tensor([1.0, 1.0, 0.0], device="cpu"))
    profile_skips(model, seed)
    return model


def outer_stds(model: Model) -> dict[str, float]:
    """Standard deviations by name for the weights outside of the blocks."""
    config = model.config
    if isinstance(model, VisionTransformer):
        names = ("embedding.class_token", "embedding.positions", "head.weight")
        std = base_std(config, config.hidden_size, config.init_std)
        pixels = model.embedding.projection.in_features
        return dict.fromkeys(names, std) | {"embedding.projection.weight": base_std(config, pixels, config.init_std)}
    stds = {"model.embed_tokens.weight": base_std(config, config.hidden_size, config.embedding_std)}
    if not config.tie_word_embeddings:
        stds["lm_head.weight"] = base_std(config, config.hidden_size, config.init_std)
    return stds


def base_std(config: DecoderConfig, inputs: int, std: float) -> float:
    """Standard deviation of a weight with this many inputs, before the factor of a strategy."""
    return inputs**-0.5 if config.init == "fan_in" else std


def projection_std(weight: Tensor, name: str, spec: SublayerSpec, config: DecoderConfig) -> float:
    """Standard deviation of the weight of a projection, such as `o_proj`, under a strategy."""
    fan_out, fan_in = weight.shape
    if spec.xavier is not None:
        gain = 1.0 if name in ("q_proj", "k_proj") else spec.xavier
        return gain * (2 / (fan_in + fan_out)) ** 0.5
    std = base_std(config, fan_in, config.init_std)
    return std * spec.output_init if name in OUTPUT_PROJECTIONS else std


def draw_(model: Model, name: str, std: float, seed: int) -> None:
    """Set the parameter `name` to random normal values."""
    parameter = model.get_parameter(name)
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    # Device and dtype are explicit because Lightning changes the defaults while it builds a model.
    normal = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
    if (cutoff := model.config.init_cutoff) is None:
        normal.normal_(generator=generator)
    else:
        torch.nn.init.trunc_normal_(normal, a=-cutoff, b=cutoff, generator=generator)
    copy_(parameter, (normal * std).to(parameter.dtype))


def seed_of(seed: int, purpose: str) -> int:
    """A 63-bit seed for the random numbers of one purpose under the seed of a run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode()).digest()[:8], "little") >> 1


def profile_skips(model: Model, seed: int) -> None:
    """Admin: with all w = 1, run a random batch and set w_i = sqrt(1 + sum over j < i of Var[f_j]).

    For a sharded model, every rank profiles the whole model in float32 on the CPU.
    """
    skips = residual_skips(model)
    if all(skip is None for skip in skips):
        return
    if is_sharded(model):
        with torch.device("meta"):
            whole = model.empty_like()
        for skip, values in zip(skips, residual_skips(initialise(whole.to_empty(device="cpu"), seed)), strict=True):
            if skip is not None and values is not None:
                copy_(skip, values)
        return
    variances: list[Tensor] = []

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name in ("attention", "ffn"):
            variances.append(x.float().var())

    with torch.compiler.set_stance("force_eager"):
        model(random_batch(model, seed).to(next(model.parameters()).device), hook=hook)
    squared = torch.ones_like(variances[0])
    for skip, variance in zip(skips, variances, strict=True):
        if skip is not None:
            skip.fill_(squared.sqrt())
        squared = squared + variance


def residual_skips(model: Model) -> list[Tensor | None]:
    """The learned skips of all sub-layers in order."""
    return [residual.skip for block in model.blocks for residual in (block.attention_residual, block.ffn_residual)]


def random_batch(model: Model, seed: int) -> Tensor:
    """Random tokens [sequences, tokens], or images, on the CPU."""
    generator = torch.Generator().manual_seed(seed_of(seed, "admin profile"))
    if isinstance(model, Decoder):
        vocabulary = model.model.embed_tokens.num_embeddings
        return torch.randint(vocabulary, (PROFILE_BATCH, PROFILE_LENGTH), generator=generator, device="cpu")
    shape = (PROFILE_BATCH, 3, model.image_size, model.image_size)
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
