"""The configuration of a decoder; free of torch, so that it is checked quickly."""

from __future__ import annotations

from dataclasses import dataclass

from cod_lightning.settings import MAX_TOKENS, setting, setting_errors

MAX_LAYERS = 10_000
"""More than any trained model has; a mistyped depth is an error instead of running out of memory."""


@dataclass
class DecoderConfig:
    """A LLaMA-style decoder, with the field names of `transformers.LlamaConfig`.

    `configs/model/` has the paper's shapes (60M to 7B).
    """

    hidden_size: int = setting(96, at_least=1, at_most=2**20)
    intermediate_size: int = setting(256, at_least=1, at_most=2**22)
    num_hidden_layers: int = setting(24, at_least=1, at_most=MAX_LAYERS)
    num_attention_heads: int = setting(3, at_least=1)
    num_key_value_heads: int | None = setting(None, at_least=1)
    """Fewer than `num_attention_heads` for grouped-query attention; None: the same number."""
    vocab_size: int | None = setting(None, at_least=1, at_most=MAX_TOKENS)
    """Size of the vocabulary; None: that of the tokenizer."""
    norm: str = setting("rms", choices=("rms", "layer"))
    """`rms` (RMSNorm) or `layer` (LayerNorm, without bias)."""
    norm_affine: bool = True
    """False: norms without a weight (OLMo's non-parametric LayerNorm)."""
    norm_eps: float = setting(1e-6, above=0)
    norm_backend: str = setting("auto", runtime=True, choices=("auto", "torch", "triton"))
    """Implementation of the norms: `triton`, `torch`, or `auto` (Triton on a GPU, else torch)."""
    rope_theta: float = setting(10000.0, above=0)
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen2.5)."""
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = setting(None, runtime=True, at_least=1)
    """Longest sequence that an imported model supports, in tokens; None: any."""
    init: str = setting("normal", choices=("normal", "fan_in"))
    """Initial standard deviations. `normal`: `init_std` for linear weights, `embedding_std` for embeddings (those of
    tokens; a ViT has `init_std` for all); `fan_in`: 1/sqrt(inputs) and 1/sqrt(hidden_size). The strategy may multiply
    them: `fan_in` with norm=ds_init is OLMo's scaled initialisation ("mitchell")."""
    init_cutoff: float | None = setting(None, above=0)
    """Truncates the normal distribution at this many standard deviations (OLMo: 3); None: no truncation."""
    init_std: float = setting(0.02, at_least=0)
    """Initial standard deviation of linear weights, before the factor of the strategy."""
    embedding_std: float = setting(0.02, at_least=0)
    """Initial standard deviation of embeddings; the released code used sqrt(2/5) from February 2025 to January 2026."""

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def problems(self, rotary: bool = True) -> list[str]:
        """Every error of this configuration, each with the name of its field; a ViT has no `rotary` embeddings."""
        errors = setting_errors(self, "model.")
        if errors:
            return errors
        if self.hidden_size % self.num_attention_heads:
            errors.append(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}"
            )
        elif rotary and self.head_dim % 2:
            errors.append(
                f"model.hidden_size={self.hidden_size} over model.num_attention_heads={self.num_attention_heads} gives "
                f"heads of width {self.head_dim}; rotary embeddings need an even width"
            )
        if self.num_attention_heads % self.key_value_heads:
            errors.append(
                f"model.num_key_value_heads={self.num_key_value_heads} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        return errors

    def num_parameters(self, vocab_size: int | None = None) -> int:
        """Parameters of the Pre-LN decoder; strategies with learnable scales or more norms add theirs.

        Args:
            vocab_size: that of the tokenizer, used if the configuration has none.
        """
        vocab = self.vocab_size or vocab_size
        if vocab is None:
            raise ValueError("vocab_size is None: pass that of the tokenizer")
        d, kv = self.hidden_size, self.key_value_heads * self.head_dim
        attention = 2 * d * d + 2 * d * kv + (d + 2 * kv if self.qkv_bias else 0)
        norm = d if self.norm_affine else 0
        block = attention + 3 * d * self.intermediate_size + 2 * norm
        return self.num_hidden_layers * block + norm + vocab * d * (1 if self.tie_word_embeddings else 2)


def num_vit_parameters(config: DecoderConfig, image_size: int, patch_size: int, classes: int) -> int:
    """`DecoderConfig.num_parameters` of a `VisionTransformer`."""
    d, kv, ffn = config.hidden_size, config.key_value_heads * config.head_dim, config.intermediate_size
    attention = 2 * d * d + 2 * d * kv + d + (d + 2 * kv if config.qkv_bias else 0)
    mlp = 2 * d * ffn + ffn + d
    norm = d if config.norm_affine else 0
    embedding = 3 * patch_size**2 * d + 2 * d + (1 + (image_size // patch_size) ** 2) * d
    return embedding + config.num_hidden_layers * (attention + mlp + 2 * norm) + norm + (d + 1) * classes
