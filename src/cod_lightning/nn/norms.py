"""The norms of a model: a layer around the kernels, with the gain of a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cod_lightning.kernels.norm import add_norm, bounded_norm
from cod_lightning.kernels.reference import BOUNDED
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.spec import BlockSpec, SublayerSpec

ALPHA = {"dyt": 0.5, "derf": 0.5, "bhyt": 1.0}
"""Initial alpha of the bounded kinds, if a strategy names none."""


class Norm(nn.Module):
    """gain * weight * norm(x), or a bounded function of x (`reference_bounded_norm`) in place of the norm.

    Args:
        config: kind, eps and backend of the norm, and whether it has a weight.
        size: number of channels; None: the hidden size.
        gain: constant factor of the output, a Python float and not state.
        input_scale: constant factor of x.
        groups: equal parts of the hidden dimension with their own statistics.
        initial_weight: initial value of the weight.
        alpha: initial alpha of a bounded function; None: that of its kind in `ALPHA`.
        before_matmul: autocast rounds the output to its dtype, which the matrix product would do anyway.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        size: int | None = None,
        gain: float = 1.0,
        input_scale: float = 1.0,
        groups: int = 1,
        initial_weight: float = 1.0,
        alpha: float | None = None,
        before_matmul: bool = False,
    ):
        super().__init__()
        if config.hidden_size % groups:
            raise ValueError(f"norm.groups={groups} does not divide model.hidden_size={config.hidden_size}")
        self.kind, self.groups, self.gain, self.input_scale = config.norm, groups, gain, input_scale
        # norm(s x) with eps equals norm(x) with eps / s^2, so that the input needs no multiplication.
        self.eps = config.norm_eps / input_scale**2
        self.before_matmul, self.backend = before_matmul, config.norm_backend
        self.initial_weight = initial_weight
        self.initial_alpha = ALPHA.get(self.kind, 0.0) if alpha is None else alpha
        size = size or config.hidden_size
        self.weight = nn.Parameter(torch.empty(size)) if config.norm_affine else None
        self.alpha = nn.Parameter(torch.empty(1)) if self.kind in BOUNDED else None
        self.shift = nn.Parameter(torch.empty(1)) if self.kind == "derf" else None
        self.bias = nn.Parameter(torch.empty(size)) if self.kind in ("dyt", "derf") and config.norm_affine else None

    def forward(self, x: Tensor) -> Tensor:
        """gain * weight * norm(x)."""
        _, y = self.fused_add_norm(x)
        return y

    def fused_add_norm(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum s = x + branch and gain * weight * norm(s), both [..., channels].

        Use s in place of x: the Triton kernel then adds and normalises at once, and its backward sums both gradients.
        """
        device = x.device.type
        cast = self.before_matmul and torch.is_autocast_enabled(device)
        settings: dict[str, Any] = {
            "kind": self.kind,
            "eps": self.eps,
            "gain": self.gain,
            "dtype": torch.get_autocast_dtype(device) if cast else None,
            "backend": self.backend,
        }
        if self.alpha is None:
            return add_norm(x, self.weight, branch, groups=self.groups, **settings)
        # BHyT divides by the size of its input, as norms do.
        alpha = self.alpha if self.kind == "bhyt" else self.alpha * self.input_scale
        return bounded_norm(x, alpha, self.weight, self.bias, self.shift, branch, **settings)

    @torch.no_grad()
    def reset(self) -> None:
        """Set the parameters to their initial values."""
        for parameter, value in (
            (self.weight, self.initial_weight),
            (self.alpha, self.initial_alpha),
            (self.shift, 0.0),
            (self.bias, 0.0),
        ):
            if parameter is not None:
                parameter.fill_(value)

    def extra_repr(self) -> str:
        return f"{self.kind}, gain={self.gain:.4g}, groups={self.groups}, eps={self.eps:.3g}"


class IdentityNorm(nn.Module):
    """Replaces a `Norm` that the strategy does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    def fused_add_norm(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s = x if branch is None else x + branch
        return s, s


def with_norm_kind(config: DecoderConfig, spec: BlockSpec) -> DecoderConfig:
    """The configuration for the norms of a block, whose kind the strategy may set."""
    return config if spec.norm_kind == "model" else replace(config, norm=spec.norm_kind)


def norm_if(present: bool, config: DecoderConfig, **options: Any) -> Norm | IdentityNorm:
    return Norm(config, **options) if present else IdentityNorm()


def pre_norm(config: DecoderConfig, spec: SublayerSpec) -> Norm | IdentityNorm:
    """The norm before a sub-layer; autocast rounds its output unless it becomes the residual stream."""
    return norm_if(
        spec.pre_norm,
        config,
        gain=spec.gain,
        input_scale=spec.input_scale,
        groups=spec.groups,
        initial_weight=spec.pre_norm_weight,
        alpha=spec.norm_alpha,
        before_matmul=spec.skip_from != "pre_norm",
    )


def final_norm(config: DecoderConfig, specs: Sequence[BlockSpec]) -> Norm:
    """The norm before the head, of the kind of the last block."""
    return Norm(with_norm_kind(config, specs[-1]), before_matmul=True, alpha=specs[-1].ffn.norm_alpha)
