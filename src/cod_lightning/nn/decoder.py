"""The decoder: LLaMA with the residual wiring of any strategy. Read it from top to bottom.

Parameters are named as in `transformers.LlamaForCausalLM`; a Pre-LN or LNS decoder has exactly its parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.kernels.norm import norm
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.strategies import BlockSpec, SublayerSpec

Tap = Callable[[str, int, Tensor], object]
"""Called with (`embedding` | `attention` | `ffn` | `residual`, layer, tensor [rows, length, hidden]); layers count from
1, the embedding is layer 0. `attention` and `ffn` are what the sub-layer adds to the stream, `residual` is the output
of the block."""


class Norm(nn.Module):
    """gain * weight * norm(x); the gain is a constant of the strategy, a Python float and not state."""

    def __init__(self, config: DecoderConfig, spec: SublayerSpec | None = None):
        super().__init__()
        spec = spec or SublayerSpec()
        if config.hidden_size % spec.groups:
            raise ValueError(f"norm.groups={spec.groups} does not divide model.hidden_size={config.hidden_size}")
        self.kind, self.groups, self.gain = config.norm, spec.groups, spec.gain
        # norm(s x) with eps is norm(x) with eps / s^2: scaling the input is a matter of eps alone.
        self.eps = config.norm_eps / spec.input_scale**2
        self.initial_weight = spec.pre_norm_weight
        self.weight = nn.Parameter(torch.empty(config.hidden_size)) if config.norm_affine else None

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, kind=self.kind, eps=self.eps, gain=self.gain, groups=self.groups)

    def extra_repr(self) -> str:
        return f"{self.kind}, gain={self.gain:.4g}, groups={self.groups}, eps={self.eps:.3g}"


class Attention(nn.Module):
    """Causal self-attention with rotary embeddings and grouped key/value heads."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        d, kv, self.head_dim = config.hidden_size, config.key_value_heads * config.head_dim, config.head_dim
        self.grouped = config.key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Residual(nn.Module):
    """gate( sum_norm( skip * x + branch ) ), branch = branch_scale * branch_norm(f(...)); no parameters in Pre-LN."""

    def __init__(self, config: DecoderConfig, spec: SublayerSpec):
        super().__init__()
        self.spec = spec
        self.branch_norm = Norm(config) if spec.branch_norm else None
        self.sum_norm = Norm(config) if spec.sum_norm else None
        shape = {"no": None, "scalar": (), "channel": (config.hidden_size,)}[spec.learned_branch_scale]
        self.branch_scale = None if shape is None else nn.Parameter(torch.empty(shape))
        self.skip = nn.Parameter(torch.empty(config.hidden_size)) if spec.learned_skip else None

    def branch(self, y: Tensor) -> Tensor:
        if self.branch_norm is not None:
            y = self.branch_norm(y)
        return scale(y, self.spec.branch_scale if self.branch_scale is None else self.branch_scale)

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        if self.spec.gate == "input":
            x = gpas(x, gate)
        y = scale(x, self.spec.skip if self.skip is None else self.skip) + branch
        if self.sum_norm is not None:
            y = self.sum_norm(y)
        return gpas(y, gate) if self.spec.gate == "output" else y


class Block(nn.Module):
    """Attention and feed-forward network, wired by the coefficients of a `BlockSpec`."""

    def __init__(self, config: DecoderConfig, spec: BlockSpec):
        super().__init__()
        self.spec = spec
        self.entry_norm = Norm(config) if spec.entry_norm else None
        self.input_layernorm = Norm(config, spec.attention) if spec.attention.pre_norm else nn.Identity()
        self.self_attn = Attention(config)
        self.attention_residual = Residual(config, spec.attention)
        self.post_attention_layernorm = Norm(config, spec.ffn) if spec.ffn.pre_norm else nn.Identity()
        self.mlp = FeedForward(config)
        self.ffn_residual = Residual(config, spec.ffn)
        self.gate = nn.Parameter(torch.empty(())) if any(s.gate != "no" for s in spec.sublayers) else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], tap: Callable[[str, Tensor], object] | None = None
    ) -> Tensor:
        if self.entry_norm is not None:
            x = self.entry_norm(x)
        attention = self.attention_residual.branch(self.self_attn(self.input_layernorm(x), rope))
        x = self.attention_residual(x, attention, self.gate)
        ffn = self.ffn_residual.branch(self.mlp(self.post_attention_layernorm(x)))
        x = self.ffn_residual(x, ffn, self.gate)
        if tap is not None:
            tap("attention", attention)
            tap("ffn", ffn)
            tap("residual", x)
        return x


class Stack(nn.Module):
    """Embeddings, blocks, final norm: `LlamaForCausalLM.model`."""

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size or 0, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, spec) for spec in specs)
        self.norm = Norm(config)


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape, with `vocab_size` filled in.
        specs: one `BlockSpec` per block, from `strategies.build_all`.

    Raises:
        ValueError: the shape cannot be built, or the number of specs is not the number of blocks.
    """

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec]):
        super().__init__()
        found = config.problems() + (["model.vocab_size is not set"] if config.vocab_size is None else [])
        if len(specs) != config.num_hidden_layers:
            found.append(f"{len(specs)} block specs for model.num_hidden_layers={config.num_hidden_layers}")
        if found:
            raise ValueError("; ".join(found))
        self.config = config
        self.model = Stack(config, specs)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size or 0, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make head and embeddings one parameter where the shape says so; leaving the meta device separates them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.model.layers if isinstance(block, Block)]

    def forward(self, tokens: Tensor, tap: Tap | None = None) -> Tensor:
        """Logits [rows, length, vocabulary] of tokens [rows, length]; `tap` sees every layer's tensors on the way."""
        x = self.model.embed_tokens(tokens)
        if tap is not None:
            tap("embedding", 0, x)
        rope = rotary(tokens.shape[1], self.config.head_dim, self.config.rope_theta, x)
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, rope, None if tap is None else lambda what, y, layer=layer: tap(what, layer, y))
        return self.lm_head(self.model.norm(x))


def scale(x: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return x * factor.to(x.dtype)
    return x if factor == 1 else x * factor


def gpas(x: Tensor, gate: Tensor | None) -> Tensor:
    """X - silu(gate) * stop_gradient(x)."""
    assert gate is not None
    return x - F.silu(gate).to(x.dtype) * x.detach()


def rotary(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim] of the rotary angles, computed in float32, in the dtype of `like`."""
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), 1 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings to x [rows, heads, length, head_dim], halves paired as in LLaMA."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]
