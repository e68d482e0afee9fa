"""Exchange with Hugging Face: a decoder as a Llama or Qwen2 checkpoint that stock `transformers` loads, and back.

A constant that multiplies a norm's output or a branch is part of the weights next to it: the gain of LayerNorm Scaling
goes into the norm's weight, the scale of a branch into the rows of its last projection. The exported model computes
the same logits up to the rounding of one product per weight. A strategy that has no such weights is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder, new_folder
from cod_lightning.nn.apply import fold, strategy_of
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.pretrained import import_transformers, load_checkpoint, quiet_transformers, save_pretrained
from cod_lightning.nn.spec import (
    BLOCK_COEFFICIENTS,
    COEFFICIENTS,
    FACTORS,
    INITIAL,
    OPTIMIZER,
    nondefaults,
    schedule_end,
)
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.weights import state_dict

EXPORTED = (*FACTORS, "learned_branch_scale", "branch_schedule", *INITIAL, *OPTIMIZER)
"""Coefficients of a sub-layer that are folded into weights, a schedule if it has ended, or that only training needs.
All others must have the values of Pre-LN; `input_scale` too, which changes the eps of a norm, and a checkpoint has one
eps for all norms."""

FAMILIES = ("llama", "mistral", "qwen2")
"""`model_type` of importable families; DeepSeek-LLM is a Llama."""

CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "tie_word_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}
"""Fields of `DecoderConfig` and their names in `transformers`."""


# Export -----------------------------------------------------------------------------------------------------


def unsupported_features(decoder: Decoder) -> list[str]:
    """One line for each coefficient that a Llama checkpoint cannot express; empty if `decoder` can be exported."""
    problems = []
    if decoder.config.norm != "rms":
        problems.append(
            f"model.norm={decoder.config.norm!r} cannot be expressed in a Llama checkpoint, whose norms are 'rms'"
        )
    changed = [
        (layer, nondefaults(part))
        for layer, block in enumerate(decoder.blocks, start=1)
        for part in (*block.spec.sublayers, block.spec)
    ]
    for name in [name for name in (*COEFFICIENTS, *BLOCK_COEFFICIENTS) if name not in EXPORTED]:
        if others := [(layer, values[name]) for layer, values in changed if name in values]:
            layer, value = others[0]
            count = f", {len(others)} of {2 * len(decoder.blocks)} sub-layers" if name in COEFFICIENTS else ""
            problems.append(f"{name}={value!r} (layer {layer}{count}) cannot be expressed in a Llama checkpoint")
    return problems + unfinished_schedule(decoder)


def unfinished_schedule(decoder: Decoder) -> list[str]:
    """One line if the factors of a `branch_schedule` still change at the step of `decoder`."""
    end = schedule_end([block.spec for block in decoder.blocks])
    if decoder.step >= end:
        return []
    return [f"branch_schedule ends at step {end}, and the model is at step {decoder.step}: train it to the end first"]


@torch.no_grad()
def to_llama_state_dict(decoder: Decoder, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state dict of the equivalent `LlamaForCausalLM`, on the CPU; products are rounded once, to `dtype`.

    Raises:
        UserError: a Llama checkpoint cannot express the decoder; names every coefficient at fault.
    """
    if problems := unsupported_features(decoder):
        raise UserError("\n".join(problems))
    state = {name: tensor.cpu() for name, tensor in state_dict(decoder).items() if "_residual." not in name}
    ones = torch.ones(decoder.config.hidden_size)
    state.setdefault("model.norm.weight", ones)
    for index, block in enumerate(decoder.blocks):
        for norm, gain, projection, residual in (
            ("input_layernorm", block.spec.attention.gain, "self_attn.o_proj", block.attention_residual),
            ("post_attention_layernorm", block.spec.ffn.gain, "mlp.down_proj", block.ffn_residual),
        ):
            name = f"model.layers.{index}.{norm}.weight"
            state[name] = state.get(name, ones).double() * gain
            scale = residual.spec.branch_scale if residual.branch_scale is None else residual.branch_scale.cpu()
            name = f"model.layers.{index}.{projection}.weight"
            # [1, 1] or [hidden, 1]: a row of the projection is a channel of its output.
            state[name] = (state[name].double() * torch.as_tensor(scale, dtype=torch.float64).view(-1, 1)).to(dtype)
    return {name: tensor.to(dtype) for name, tensor in state.items()}


def to_hf(decoder: Decoder, tokenizer: Any = None, dtype: torch.dtype = torch.float32, max_length: int = 2048) -> Any:
    """The `LlamaForCausalLM` (`Qwen2ForCausalLM` with `qkv_bias`) with the logits of `decoder`, on the CPU.

    Args:
        decoder: on any device; it does not change.
        tokenizer: a `data.tokenizers.DocumentTokenizer`, whose pad and EOS tokens the configuration gets, or None.
        dtype: dtype of the weights.
        max_length: `max_position_embeddings`, the longest supported sequence in tokens.

    Raises:
        UserError: as `to_llama_state_dict`, or transformers is not installed.
    """
    transformers = import_transformers("exporting")
    state, decoder_config = to_llama_state_dict(decoder, dtype), decoder.config
    family = "Qwen2" if decoder_config.qkv_bias else "Llama"
    config = getattr(transformers, f"{family}Config")(
        **{theirs: getattr(decoder_config, ours) for ours, theirs in CONFIG_FIELDS.items()},
        num_key_value_heads=decoder_config.key_value_heads,
        rope_theta=decoder_config.rope_theta,
        max_position_embeddings=max_length,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_id if tokenizer else None,
        pad_token_id=pad_token_id(tokenizer, decoder_config.vocab_size or 0) if tokenizer else None,
    )
    with quiet_transformers():
        model = getattr(transformers, f"{family}ForCausalLM")
        return model.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def export(
    decoder: Decoder,
    folder: Path,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
    max_length: int = 2048,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and, with a tokenizer, `AutoTokenizer` load.

    Args:
        decoder: as for `to_hf`.
        folder: must not exist, or be empty; on an error nothing is written.
        tokenizer: also exported, if given.
        dtype: as for `to_hf`.
        max_length: as for `to_hf`.

    Raises:
        UserError: as `to_hf`, or `folder` is not empty or not writable.
    """
    check_new_folder(folder)
    model = to_hf(decoder, tokenizer, dtype, max_length)
    hf_tokenizer = None if tokenizer is None else to_hf_tokenizer(tokenizer, model.config.vocab_size, max_length)
    with new_folder(folder) as partial:
        save_pretrained(model, partial, hf_tokenizer)


def to_hf_tokenizer(tokenizer: Any, vocab_size: int, max_length: int) -> Any:
    """The tokenizer as a `PreTrainedTokenizerFast` that adds no special tokens to a text, as in training.

    Added tokens beyond `vocab_size`, the number of embeddings, are dropped; `max_length` is its `model_max_length`.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.json)
    if tokenizer.backend.num_special_tokens_to_add(is_pair=False):
        content["post_processor"] = None
    # A pad token that was added to the tokenizer of an imported model has no row in its embedding.
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=backend.id_to_token(tokenizer.eos_id),
        pad_token=backend.id_to_token(pad_token_id(tokenizer, vocab_size)),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def pad_token_id(tokenizer: Any, vocab_size: int) -> int:
    """The pad token if the embedding has a row for it, else EOS."""
    return tokenizer.pad_id if tokenizer.pad_id < vocab_size else tokenizer.eos_id


# Import ---------------------------------------------------------------------------------------------------


def import_hf(name: str | Path) -> Decoder:
    """A `pre_ln` decoder in float32 with the logits of a Llama, Mistral or Qwen2 checkpoint.

    The factors of a strategy that its config.json names are folded into the weights.

    Args:
        name: folder of the checkpoint, or its name on the hub.

    Raises:
        UserError: no such checkpoint, or the decoder does not compute what it needs; names every field at fault.
    """
    import_transformers("importing")
    hf_model = load_checkpoint(name, check=lambda config: config_from_hf(config, name)).model
    if strategy_of(hf_model) is not None:
        fold(hf_model)
    decoder_config = config_from_hf(hf_model.config, name)
    with torch.device("meta"):
        decoder = Decoder(decoder_config, build_all({"name": "pre_ln"}, decoder_config.num_hidden_layers))
    decoder.load_state_dict(hf_model.state_dict(), assign=True)
    decoder.tie()
    return decoder


def config_from_hf(config: Any, name: str | Path) -> DecoderConfig:
    """The `DecoderConfig` of a `transformers` configuration.

    Raises:
        UserError: names every field that our decoder does not support.
    """
    if config.model_type not in FAMILIES:
        raise UserError(f"{name}: model_type={config.model_type!r} cannot be imported; known: {', '.join(FAMILIES)}")
    # transformers 5 has `rope_parameters`; version 4 has the base in `rope_theta` and the rest in `rope_scaling`.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    head_dim = config.hidden_size // config.num_attention_heads
    expected = {
        "hidden_act": (config.hidden_act, "silu"),
        "is_causal": (getattr(config, "is_causal", True), True),
        "head_dim": (getattr(config, "head_dim", None) or head_dim, head_dim),
        "rope_type": (rope_type, "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
        "sliding_window": (getattr(config, "sliding_window", None), None),
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
        "quantization_config": (getattr(config, "quantization_config", None), None),
    }
    problems = [
        f"{name}: {field}={value!r} is not supported: expected {ours!r}"
        for field, (value, ours) in expected.items()
        if value != ours
    ]
    decoder_config = DecoderConfig(
        **{ours: getattr(config, theirs) for ours, theirs in CONFIG_FIELDS.items()},
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=getattr(config, "max_position_embeddings", None),
        rope_theta=float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))),
        qkv_bias=config.model_type == "qwen2",
    )
    if problems := problems or [f"{name}: {problem}" for problem in decoder_config.problems()]:
        raise UserError("\n".join(problems))
    return decoder_config
