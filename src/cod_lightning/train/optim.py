"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from cod_lightning.config.schema import OptimConfig
from cod_lightning.nn.init import seed_of
from cod_lightning.nn.param_groups import adamw_groups, model_rates


def lr_multiplier(update: int, *, warmup: int, total: int, floor: float, schedule: str, start: float = 0.0) -> float:
    """Learning rate of an update as a fraction of the peak rate.

    Linear warm-up from `start` to 1 over `warmup` updates, then cosine or linear decay to `floor` at the last of
    `total` updates. `cosine_released` is one update later, as in the released code.

    Args:
        update: number of the update, from 0.
        warmup: updates of the warm-up.
        total: updates of the run.
        floor: the last fraction.
        schedule: `cosine`, `cosine_released` or `linear`.
        start: the fraction before the first update of the warm-up.
    """
    k = update if schedule == "cosine_released" else update + 1
    if k < warmup:
        return start + (1 - start) * k / warmup
    progress = min((k - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "linear":
        return floor + (1 - floor) * (1 - progress)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(module: nn.Module, config: OptimConfig, max_steps: int) -> tuple[Optimizer, LambdaLR]:
    """Adam or AdamW over the trainable parameters of `module`, and its learning-rate schedule."""
    groups = parameter_groups(module, config)
    parameters = [parameter for group in groups for parameter in group["params"]]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    beta1, beta2 = config.betas
    # The fused kernel rounds once per step; the released bfloat16 runs used the default one, which rounds more often.
    fused = True if all(p.dtype == torch.float32 for p in parameters) else None
    optimizer = kind(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=fused)
    multiplier = partial(
        lr_multiplier,
        warmup=config.warmup(max_steps),
        total=max_steps,
        floor=config.min_lr_ratio,
        schedule=config.schedule,
        start=config.warmup_start_ratio,
    )
    return optimizer, LambdaLR(optimizer, multiplier)


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters with weight decay, those without it, and groups with the rates of the strategy.

    An empty group is left out. Weight decay applies to parameters with at least two dimensions, except position
    embeddings (as in DeiT and timm) and, with `decay_embeddings=false`, token embeddings.
    """
    exempt = ("embedding.positions",) if config.decay_embeddings else ("embedding.positions", "embed_tokens.weight")
    settings = {"lr": config.lr, "eps": config.eps, "weight_decay": config.weight_decay}
    return adamw_groups(module.named_parameters(), model_rates(module), **settings, exempt=exempt)


def frozen_blocks(step: int, depth: int, config: OptimConfig, seed: int) -> list[int]:
    """The blocks that LISA freezes in a step, counted from 0; [] without `lisa_layers`.

    LISA (Pan et al., 2024) samples `lisa_layers` of `depth` blocks every `lisa_interval` steps and freezes the others.
    The sample is a function of the run's seed and the step, counted from 0.
    """
    if not config.lisa_layers:
        return []
    generator = torch.Generator().manual_seed(seed_of(seed, f"lisa {step // config.lisa_interval}"))
    return sorted(torch.randperm(depth, generator=generator)[config.lisa_layers :].tolist())


@contextmanager
def freeze(modules: Iterable[nn.Module]) -> Generator[None]:
    """Disable the gradients of `modules`, so that the optimizer changes neither parameters nor their state."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
