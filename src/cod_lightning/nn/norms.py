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

    The gain is a constant of the strategy, a Python float and not state.

    With `before_matmul`, autocast rounds the output to its dtype, which the matrix product would do anyway. `size` is
    the number of channels, by default the hidden size, and `alpha` the initial alpha of a bounded function.
    """

    def __init__(
        self,
        config: DecoderConfig,
        spec: SublayerSpec | None = None,
        before_matmul: bool = False,
        size: int | None = None,
        alpha: float | None = None,
    ):
        super().__init__()
        spec = spec or SublayerSpec()
        if config.hidden_size % spec.groups:
            raise ValueError(f"norm.groups={spec.groups} does not divide model.hidden_size={config.hidden_size}")
        self.kind, self.groups, self.gain, self.input_scale = config.norm, spec.groups, spec.gain, spec.input_scale
        # norm(s x) with eps equals norm(x) with eps / s^2, so that the input needs no multiplication.
        self.eps = config.norm_eps / spec.input_scale**2
        self.before_matmul, self.backend = before_matmul, config.norm_backend
        self.initial_weight = spec.pre_norm_weight
        self.initial_alpha = ALPHA.get(self.kind, 0.0) if alpha is None else alpha
        size = size or config.hidden_size
        self.weight = nn.Parameter(torch.empty(size)) if config.norm_affine else None
        self.alpha = nn.Parameter(torch.empty(1)) if self.kind in BOUNDED else None
        self.shift = nn.Parameter(torch.empty(1)) if self.kind == "derf" else None
        self.bias = nn.Parameter(torch.empty(size)) if self.kind in ("dyt", "derf") and config.norm_affine else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """gain * weight * norm(x)."""
        _, y_BTD = self.fused_add_norm(x_BTD)
        return y_BTD

    def fused_add_norm(self, x_BTD: Tensor, branch_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + branch and gain * weight * norm(x + branch), in one kernel, whose backward adds up both gradients.

        For this, use the first output in place of x.
        """
        device = x_BTD.device.type
        cast = self.before_matmul and torch.is_autocast_enabled(device)
        settings: dict[str, Any] = {
            "kind": self.kind,
            "eps": self.eps,
            "gain": self.gain,
            "dtype": torch.get_autocast_dtype(device) if cast else None,
            "backend": self.backend,
        }
        if self.alpha is None:
            return add_norm(x_BTD, self.weight, branch_BTD, groups=self.groups, **settings)
        # BHyT divides by the size of its input, as norms do.
        alpha = self.alpha if self.kind == "bhyt" else self.alpha * self.input_scale
        return bounded_norm(x_BTD, alpha, self.weight, self.bias, self.shift, branch_BTD, **settings)

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

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def fused_add_norm(self, x_BTD: Tensor, branch_BTD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        sum_BTD = x_BTD if branch_BTD is None else x_BTD + branch_BTD
        return sum_BTD, sum_BTD


def with_kind(config: DecoderConfig, spec: BlockSpec) -> DecoderConfig:
    """The shape for the norms of a block, whose kind the strategy may set."""
    return config if spec.norm_kind == "model" else replace(config, norm=spec.norm_kind)


def norm_if(present: bool, config: DecoderConfig, **options: Any) -> Norm | IdentityNorm:
    return Norm(config, **options) if present else IdentityNorm()


def pre_norm(config: DecoderConfig, spec: SublayerSpec) -> Norm | IdentityNorm:
    """The norm before a sub-layer; autocast rounds its output unless it becomes the residual stream."""
    before_matmul = spec.skip_from != "pre_norm"
    return norm_if(spec.pre_norm, config, spec=spec, before_matmul=before_matmul, alpha=spec.norm_alpha)


def final_norm(config: DecoderConfig, specs: Sequence[BlockSpec]) -> Norm:
    """The norm before the head, of the kind of the last block."""
    return Norm(with_kind(config, specs[-1]), before_matmul=True, alpha=specs[-1].ffn.norm_alpha)
