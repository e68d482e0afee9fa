"""The decoder: LLaMA with the residual wiring of any strategy. Read it from top to bottom.

Parameters are named as in `transformers.LlamaForCausalLM`; a Pre-LN or LNS decoder has exactly its parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.kernels.loss import TokenLoss, linear_cross_entropy
from cod_lightning.kernels.norm import norm
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.strategies import BlockSpec, SublayerSpec

ActivationHook = Callable[[str, int, Tensor], object]
"""Called as hook(name, layer, tensor) during a forward pass, in order; layers count from 1.

`embedding` (layer 0), `attention` and `ffn` (the scaled branch of each sub-layer) and `residual` (the output of the
block) are [rows, length, hidden]. `variance` [rows, length] is the unbiased variance over the hidden dimension of the
input of block `layer`, or of the final norm as layer depth + 1; only norms that compute it call the hook with it."""


class Norm(nn.Module):
    """gain * weight * norm(x); the gain is a constant of the strategy, a Python float and not state.

    With `projected`, what follows is a matrix product: under autocast the output is rounded to its dtype at once.
    """

    def __init__(self, config: DecoderConfig, spec: SublayerSpec | None = None, projected: bool = False):
        super().__init__()
        spec = spec or SublayerSpec()
        if config.hidden_size % spec.groups:
            raise ValueError(f"norm.groups={spec.groups} does not divide model.hidden_size={config.hidden_size}")
        self.kind, self.groups, self.gain = config.norm, spec.groups, spec.gain
        # norm(s x) with eps is norm(x) with eps / s^2: scaling the input is a matter of eps alone.
        self.eps = config.norm_eps / spec.input_scale**2
        self.projected, self.backend = projected, config.norm_backend
        self.initial_weight = spec.pre_norm_weight
        self.weight = nn.Parameter(torch.empty(config.hidden_size)) if config.norm_affine else None

    def forward(
        self, x: Tensor, branch: Tensor | None = None, hook: Callable[[str, Tensor], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The stream, x with the branch added to it, and its norm."""
        device = x.device.type
        cast = self.projected and torch.is_autocast_enabled(device)
        stream, y, rstd = norm(
            x,
            self.weight,
            branch,
            kind=self.kind,
            eps=self.eps,
            gain=self.gain,
            groups=self.groups,
            dtype=torch.get_autocast_dtype(device) if cast else None,
            backend=self.backend,
        )
        if hook is not None and rstd is not None and self.kind == "layer" and self.groups == 1:
            width = x.shape[-1]
            hook("variance", (rstd.squeeze(-1) ** -2 - self.eps) * (width / (width - 1)))
        return stream, y

    def extra_repr(self) -> str:
        return f"{self.kind}, gain={self.gain:.4g}, groups={self.groups}, eps={self.eps:.3g}"


class NoNorm(nn.Module):
    """In the place of a pre-norm where the strategy has none."""

    def forward(
        self, x: Tensor, branch: Tensor | None = None, hook: Callable[[str, Tensor], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        stream = total(x, branch)
        return stream, stream


class Attention(nn.Module):
    """Self-attention with grouped key/value heads; the decoder's is causal and has rotary embeddings."""

    def __init__(self, config: DecoderConfig, causal: bool = True, output_bias: bool = False):
        super().__init__()
        self.causal = causal
        d, kv, self.head_dim = config.hidden_size, config.key_value_heads * config.head_dim, config.head_dim
        self.grouped = config.key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d, d, bias=output_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.grouped)
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
        # Not 0-dimensional, which `fully_shard` refuses.
        shape = {"no": None, "scalar": (1,), "channel": (config.hidden_size,)}[spec.learned_branch_scale]
        self.branch_scale = None if shape is None else nn.Parameter(torch.empty(shape))
        self.skip = nn.Parameter(torch.empty(config.hidden_size)) if spec.learned_skip else None

    def branch(self, y: Tensor) -> Tensor:
        if self.branch_norm is not None:
            y = self.branch_norm(y)[1]
        return scale(y, self.spec.branch_scale if self.branch_scale is None else self.branch_scale)

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The result, as two summands wherever it is a sum, so that the norm that reads it can add them."""
        if self.spec.gate == "input":
            x = gpas(x, gate)
        x = scale(x, self.spec.skip if self.skip is None else self.skip)
        if self.sum_norm is not None:
            y = self.sum_norm(x, branch)[1]
        elif self.spec.gate == "output":
            y = x + branch
        else:
            return x, branch
        return (gpas(y, gate) if self.spec.gate == "output" else y), None


class Block(nn.Module):
    """Attention and feed-forward network, wired by the coefficients of a `BlockSpec`; the decoder's unless given."""

    def __init__(
        self, config: DecoderConfig, spec: BlockSpec, attention: Attention | None = None, mlp: nn.Module | None = None
    ):
        super().__init__()
        self.spec = spec
        self.entry_norm = Norm(config) if spec.entry_norm else None
        self.input_layernorm = pre_norm(config, spec.attention)
        self.self_attn = attention or Attention(config)
        self.attention_residual = Residual(config, spec.attention)
        self.post_attention_layernorm = pre_norm(config, spec.ffn)
        self.mlp = mlp or FeedForward(config)
        self.ffn_residual = Residual(config, spec.ffn)
        self.gate = nn.Parameter(torch.empty(1)) if any(s.gate != "no" for s in spec.sublayers) else None

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, hook: Callable[[str, Tensor], object] | None = None
    ) -> Tensor:
        if self.entry_norm is None:
            x, y = self.input_layernorm(x, hook=hook)
        else:
            x, y = self.input_layernorm(self.entry_norm(x)[1])
        attention = self.attention_residual.branch(self.self_attn(y, rope))
        x, y = self.post_attention_layernorm(*self.attention_residual(x, attention, self.gate))
        ffn = self.ffn_residual.branch(self.mlp(y))
        x = total(*self.ffn_residual(x, ffn, self.gate))
        if hook is not None:
            hook("attention", attention)
            hook("ffn", ffn)
            hook("residual", x)
        return x


class Stack(nn.Module):
    """Embeddings, blocks, final norm: `LlamaForCausalLM.model`."""

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size or 0, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, spec) for spec in specs)
        self.norm = Norm(config, projected=True)


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

    def empty_like(self) -> Decoder:
        """An uninitialised decoder of the same shape, on the default device."""
        return Decoder(self.config, [block.spec for block in self.blocks])

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.model.layers if isinstance(block, Block)]

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, hook: ActivationHook | None = None
    ) -> Tensor | TokenLoss:
        """Logits of tokens [rows, length], or their loss against `targets`, which never holds all logits at once.

        Args:
            tokens: [rows, length], integers.
            targets: [rows, length], from `next_tokens`, or None.
            hook: called with the activations of every layer.

        Returns:
            Logits [rows, length, vocabulary]; with targets, a `TokenLoss`.
        """
        x = self.model.embed_tokens(tokens)
        rope = rotary(tokens.shape[1], self.config.head_dim, self.config.rope_theta, x)
        x = run_blocks(self.blocks, self.model.norm, x, rope, hook)
        return self.lm_head(x) if targets is None else linear_cross_entropy(x, self.lm_head.weight, targets)


def run_blocks(
    blocks: list[Block], norm: Norm, x: Tensor, rope: tuple[Tensor, Tensor] | None, hook: ActivationHook | None
) -> Tensor:
    """The embeddings x [rows, length, hidden] behind all blocks and the final norm."""

    def at(layer: int) -> Callable[[str, Tensor], object] | None:
        return None if hook is None else lambda name, x: hook(name, layer, x)

    if hook is not None:
        hook("embedding", 0, x)
    for layer, block in enumerate(blocks, start=1):
        x = block(x, rope, at(layer))
    return norm(x, hook=at(len(blocks) + 1))[1]


def pre_norm(config: DecoderConfig, spec: SublayerSpec) -> Norm | NoNorm:
    return Norm(config, spec, projected=True) if spec.pre_norm else NoNorm()


def total(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else x + branch


def scale(x: Tensor, factor: float | Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return x * factor.to(x.dtype)
    return x if factor == 1 else x * factor


def gpas(x: Tensor, gate: Tensor | None) -> Tensor:
    """X - silu(gate) * stop_gradient(x)."""
    assert gate is not None
    return x - F.silu(gate).to(x.dtype) * x.detach()


def rotary(length: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the rotary angles, as `rotate` takes them.

    Both are [length, head_dim], computed in float32, in the dtype of `like`; the first half of the sines is negative.
    """
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), 1 / theta**exponents)
    cosines, sines = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings to x [rows, heads, length, head_dim], halves paired as in LLaMA."""
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((second, first), dim=-1) * rope[1]
