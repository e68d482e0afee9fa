"""The decoder: LLaMA with the residual connections of any strategy. Read it from top to bottom.

Each block computes, for attention and then for the feed-forward network f,

    y = gate( sum_norm( skip * x + branch_scale * branch_norm( f( gain * pre_norm(x) ) ) ) )

where `skip_from` may start the skip after the pre-norm or at the block's input instead of at x.

Parameters have the names of `transformers.LlamaForCausalLM`; a Pre-LN or LNS decoder has exactly its parameters.
Shape suffixes: B sequences, T tokens, D hidden size, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.kernels.loss import TokenLoss, linear_cross_entropy
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.norms import IdentityNorm, Norm, final_norm, norm_if, pre_norm, with_norm_kind
from cod_lightning.nn.spec import BlockSpec, SublayerSpec, spec_problems

ActivationHook = Callable[[str, int, Tensor], object]
"""Called as hook(name, layer, x_BTD): `embedding` (layer 0), then for each block, counted from 1, `attention` and `ffn`
(the scaled branches) and `residual` (the output of the block)."""

Rope = tuple[Tensor, Tensor]
"""Cosines and signed sines [T, K] of the rotary embeddings."""


class Attention(nn.Module):
    """Self-attention with grouped key/value heads; the decoder's is causal and has rotary embeddings."""

    def __init__(self, config: DecoderConfig, spec: BlockSpec, causal: bool = True, output_bias: bool = False):
        super().__init__()
        self.causal = causal
        d, kv, self.head_dim = config.hidden_size, config.key_value_heads * config.head_dim, config.head_dim
        self.grouped = config.key_value_heads != config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=config.qkv_bias)
        self.k_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(d, kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(d, d, bias=output_bias)
        options = {"before_matmul": True, "size": self.head_dim, "alpha": spec.attention.norm_alpha}
        self.q_norm, self.k_norm, self.v_norm = (norm_if(name in spec.head_norm, config, **options) for name in "qkv")
        self.value_residual = spec.value_residual
        self.value_mix = nn.Parameter(torch.empty(3)) if spec.value_residual == "learned" else None

    def forward(
        self, x_BTD: Tensor, rope: Rope | None, first_v_BGTK: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y [B, T, D] and `first_v_BGTK`, the values of the first block, which a value residual sets if it is None."""
        q_BHTK, k_BGTK, v_BGTK = (
            norm(projection(x_BTD).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
            for projection, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, self.v_norm))
        )
        if self.value_residual != "no":
            first_v_BGTK = v_BGTK if first_v_BGTK is None else first_v_BGTK
            v_BGTK = self.mix_values(v_BGTK, first_v_BGTK)
        if rope is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, rope), rotate(k_BGTK, rope)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BGTK, v_BGTK, is_causal=self.causal, enable_gqa=self.grouped)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(-2)), first_v_BGTK

    def mix_values(self, v_BGTK: Tensor, first_v_BGTK: Tensor) -> Tensor:
        """(v + first) / 2, or s * (a * v + b * first) / sqrt(a^2 + b^2)."""
        if self.value_mix is None:
            return (v_BGTK + first_v_BGTK) / 2
        s, a, b = self.value_mix
        s = s * (a * a + b * b + 1e-8).rsqrt()  # 1e-8 as in the code of IMU-1, for a = b = 0
        return scale(v_BGTK, s * a) + scale(first_v_BGTK, s * b)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Residual(nn.Module):
    """The outer part of the equation, from f to y; without parameters in Pre-LN and LNS."""

    def __init__(self, config: DecoderConfig, spec: SublayerSpec):
        super().__init__()
        self.spec = spec
        alpha = spec.norm_alpha
        self.branch_norm = norm_if(spec.branch_norm, config, initial_weight=spec.branch_norm_weight, alpha=alpha)
        self.sum_norm = norm_if(spec.sum_norm, config, alpha=alpha)
        # [1] and not 0-dimensional, which `fully_shard` refuses.
        shape = {"no": None, "scalar": (1,), "channel": (config.hidden_size,)}[spec.learned_branch_scale]
        self.branch_scale = None if shape is None else nn.Parameter(torch.empty(shape))
        self.skip = nn.Parameter(torch.empty(config.hidden_size)) if spec.learned_skip else None
        # A tensor, so that a new value needs no compilation; neither state nor a buffer, which `.to(bfloat16)` would
        # round and leaving the meta device would lose. On the CPU every device reads it without a wait.
        self.factor = None if spec.branch_schedule is None else torch.ones((), dtype=torch.float64, device="cpu")

    def scaled_branch(self, f_BTD: Tensor) -> Tensor:
        """branch_scale * branch_norm(f), times the factor of the step if there is a `branch_schedule`."""
        branch_scale = self.spec.branch_scale if self.branch_scale is None else self.branch_scale
        branch_BTD = scale(self.branch_norm(f_BTD), branch_scale)
        return branch_BTD if self.factor is None else branch_BTD * self.factor

    def scaled_skip(self, x_BTD: Tensor, h_BTD: Tensor, block_input_BTD: Tensor, gate: Tensor | None) -> Tensor:
        """skip * x, from the sub-layer's input x, its pre-norm h, or the input of the block."""
        x_BTD = {"input": x_BTD, "pre_norm": h_BTD, "block": block_input_BTD}[self.spec.skip_from]
        x_BTD = gpas(x_BTD, gate) if self.spec.gate == "input" else x_BTD
        return scale(x_BTD, self.spec.skip if self.skip is None else self.skip)

    def forward(self, skip_BTD: Tensor, branch_BTD: Tensor, gate: Tensor | None) -> Tensor:
        """y = gate( sum_norm( skip + branch ) ), of the scaled skip and branch."""
        _, y_BTD = self.sum_norm.fused_add_norm(skip_BTD, branch_BTD)
        return gpas(y_BTD, gate) if self.spec.gate == "output" else y_BTD

    def fused_with_norm(
        self, skip_BTD: Tensor, branch_BTD: Tensor, gate: Tensor | None, next_norm: Norm | IdentityNorm
    ) -> tuple[Tensor, Tensor]:
        """y and next_norm(y); if y = skip + branch, one kernel adds and normalises."""
        if self.spec.sum_norm or self.spec.gate == "output":
            return next_norm.fused_add_norm(self(skip_BTD, branch_BTD, gate))
        return next_norm.fused_add_norm(skip_BTD, branch_BTD)


class Block(nn.Module):
    """Attention and feed-forward network (the decoder's unless given) under the coefficients of a `BlockSpec`."""

    def __init__(
        self, config: DecoderConfig, spec: BlockSpec, attention: Attention | None = None, mlp: nn.Module | None = None
    ):
        super().__init__()
        self.spec, config = spec, with_norm_kind(config, spec)
        self.entry_norm = norm_if(spec.entry_norm, config, alpha=spec.attention.norm_alpha)
        self.input_layernorm = pre_norm(config, spec.attention)
        self.self_attn = attention or Attention(config, spec)
        self.attention_residual = Residual(config, spec.attention)
        self.post_attention_layernorm = pre_norm(config, spec.ffn)
        self.mlp = mlp or FeedForward(config)
        self.ffn_residual = Residual(config, spec.ffn)
        self.gate = nn.Parameter(torch.empty(1)) if any(s.gate != "no" for s in spec.sublayers) else None
        self.embedding_skip = nn.Parameter(torch.empty(2)) if spec.embedding_skip else None

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None,
        hook: Callable[[str, Tensor], object] | None = None,
        embedding_BTD: Tensor | None = None,
        first_v_BGTK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output y [B, T, D], and the values of the first block as `Attention` returns them.

        Args:
            x_BTD: the input.
            rope: rotary embeddings, or None.
            hook: called with the scaled branches and the output.
            embedding_BTD: for `embedding_skip`, the input of the first block.
            first_v_BGTK: for a value residual, the values of the first block; None in that block.
        """
        x_BTD = self.mix_embedding(self.entry_norm(x_BTD), embedding_BTD)
        # h = gain * pre_norm(x)
        x_BTD, h_BTD = self.input_layernorm.fused_add_norm(x_BTD)
        block_input_BTD = x_BTD
        # branch = branch_scale * branch_norm( attention(h) )
        f_BTD, first_v_BGTK = self.self_attn(h_BTD, rope, first_v_BGTK)
        attention_BTD = self.attention_residual.scaled_branch(f_BTD)
        # x = gate( sum_norm( skip * x + branch ) ) and h = gain * pre_norm(x)
        skip_BTD = self.attention_residual.scaled_skip(x_BTD, h_BTD, block_input_BTD, self.gate)
        x_BTD, h_BTD = self.attention_residual.fused_with_norm(
            skip_BTD, attention_BTD, self.gate, next_norm=self.post_attention_layernorm
        )
        # branch = branch_scale * branch_norm( ffn(h) )
        ffn_BTD = self.ffn_residual.scaled_branch(self.mlp(h_BTD))
        # y = gate( sum_norm( skip * x + branch ) )
        skip_BTD = self.ffn_residual.scaled_skip(x_BTD, h_BTD, block_input_BTD, self.gate)
        y_BTD = self.ffn_residual(skip_BTD, ffn_BTD, self.gate)
        if hook is not None:
            hook("attention", attention_BTD)
            hook("ffn", ffn_BTD)
            hook("residual", y_BTD)
        return y_BTD, first_v_BGTK

    def mix_embedding(self, x_BTD: Tensor, embedding_BTD: Tensor | None) -> Tensor:
        """x, or with `embedding_skip` a * x + b * embedding."""
        if self.embedding_skip is None:
            return x_BTD
        assert embedding_BTD is not None
        a, b = self.embedding_skip
        return scale(x_BTD, a) + scale(embedding_BTD, b)


class Stack(nn.Module):
    """Embeddings, blocks, final norm: `LlamaForCausalLM.model`."""

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec]):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size or 0, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, spec) for spec in specs)
        self.norm = final_norm(config, specs)


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: the configuration, with `vocab_size` set.
        specs: one `BlockSpec` for each block, from `strategies.build_all`.

    Raises:
        ValueError: `config` or a spec is invalid, or the number of specs is not the number of blocks.
    """

    step: int
    """Optimizer steps done so far, as of `set_step`."""

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec]):
        super().__init__()
        problems = config.problems() + (["model.vocab_size is not set"] if config.vocab_size is None else [])
        if len(specs) != config.num_hidden_layers:
            problems.append(f"{len(specs)} block specs for model.num_hidden_layers={config.num_hidden_layers}")
        problems += [f"block {i}: {problem}" for i, spec in enumerate(specs, 1) for problem in spec_problems(spec)]
        if problems:
            raise ValueError("; ".join(problems))
        self.config = config
        self.model = Stack(config, specs)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size or 0, bias=False)
        self.tie()
        set_step(self, 0)

    def tie(self) -> None:
        """Share one parameter between head and embeddings if the configuration says so; leaving the meta device undoes
        it.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def empty_like(self) -> Decoder:
        """An uninitialised decoder of the same configuration, on the default device."""
        return Decoder(self.config, [block.spec for block in self.blocks])

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.model.layers))  # a user may wrap them, as torch.compile does

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        hook: ActivationHook | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor | TokenLoss:
        """Logits of `tokens`, or the loss against `targets`, which never holds all logits at once.

        Args:
            tokens: [B, T], integers.
            targets: [B, T], from `next_tokens`, or None.
            hook: called with the activations of every layer.
            logits_to_keep: only the logits of this many last tokens, as in transformers; 0: all.

        Returns:
            Logits [B, T, vocabulary]; with targets, a `TokenLoss`.
        """
        x_BTD = self.model.embed_tokens(tokens)
        rope = rotary(tokens.shape[1], self.config.head_dim, self.config.rope_theta, x_BTD)
        y_BTD = self.model.norm(run_blocks(self.blocks, x_BTD, rope, hook))
        if targets is not None:
            return linear_cross_entropy(y_BTD, self.lm_head.weight, targets)
        return self.lm_head(y_BTD[:, -logits_to_keep:])


def run_blocks(blocks: list[Block], x_BTD: Tensor, rope: Rope | None, hook: ActivationHook | None) -> Tensor:
    """Run all blocks on the embeddings x, calling `hook`."""
    if hook is not None:
        hook("embedding", 0, x_BTD)
    embedding_BTD, first_v_BGTK = x_BTD, None
    for layer, block in enumerate(blocks, start=1):
        block_hook = None if hook is None else lambda name, x, layer=layer: hook(name, layer, x)
        embedding = embedding_BTD if block.spec.embedding_skip else None
        x_BTD, first_v_BGTK = block(x_BTD, rope, block_hook, embedding, first_v_BGTK)
    return x_BTD


def set_step(model: Any, step: int) -> None:
    """Set the factors of `branch_schedule` in all blocks; a new model is at step 0.

    Args:
        model: a `Decoder` or `VisionTransformer`; `model.step` becomes `step`.
        step: optimizer steps done so far.

    Raises:
        UserError: a factor is not a finite number; names layer and step.
    """
    model.step = step
    for layer, block in enumerate(model.blocks, start=1):
        for residual in (block.attention_residual, block.ffn_residual):
            if residual.factor is not None:
                residual.factor.fill_(residual.spec.factor(layer, step))


def scale(x: Tensor, factor: float | Tensor) -> Tensor:
    """factor * x; a tensor is rounded to the dtype of x, and a float of 1 costs nothing."""
    if isinstance(factor, Tensor):
        return x * factor.to(x.dtype)
    return x if factor == 1 else x * factor


def gpas(x: Tensor, gate: Tensor | None) -> Tensor:
    """x - silu(gate) * stop_gradient(x)."""
    assert gate is not None
    return x - F.silu(gate).to(x.dtype) * x.detach()


def rotary(length: int, head_dim: int, theta: float, like: Tensor) -> Rope:
    """Cosines and signed sines of the rotary angles, for `rotate`.

    Both are [length, head_dim], computed in float32, in the dtype of `like`; the first half of the sines is negative.
    """
    exponents = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), 1 / theta**exponents)
    cosines, sines = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


def rotate(x_BHTK: Tensor, rope: Rope) -> Tensor:
    """Apply rotary embeddings, halves paired as in LLaMA."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * rope[0] + torch.cat((second, first), dim=-1) * rope[1]
