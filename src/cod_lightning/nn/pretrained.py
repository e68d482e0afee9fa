"""Model folders of `transformers`: load one, with a check that its weights are those of its configuration; save one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError, first_of, no_permission, one_line
from cod_lightning.files import damage_message
from cod_lightning.memory import require_memory
from cod_lightning.nn.apply import CONFIG_KEY, apply, checked_sublayer_specs, strategy_of
from cod_lightning.nn.gguf import open_gguf, read_gguf
from cod_lightning.nn.model_files import Source, find_file, find_source, read_weights, require_tokenizer
from cod_lightning.nn.weights import require_finite
from cod_lightning.typed_json import read_json

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
)
"""Fields of a configuration that are positive integers, where it has them."""

MASKS = re.compile(r"(position_ids|(attn|attention)\.(masked_)?bias|num_batches_tracked)$")
"""Buffers of older checkpoints that hold integers and are not weights."""

OTHER_HEADS = re.compile(r"(^|\.)(pooler|seq_relationship)\.")
"""BERT's heads for whole texts, which a language model leaves out."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Generation settings without a meaning for `do_sample=false`."""

BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")
"""Generation settings without a meaning for one beam."""


@dataclass(frozen=True)
class Checkpoint:
    """A language model of `transformers`, with all of its weights from the checkpoint."""

    model: Any
    """On the CPU, in evaluation mode."""
    source: Source
    dtype: torch.dtype
    """Dtype of the weights in the file; the model may have another."""
    dropped: list[str]
    """Settings of generation_config.json that contradict others and were removed."""

    def tokenizer(self) -> Any:
        """The tokenizer of the checkpoint.

        Raises:
            UserError: it is missing or cannot be read.
        """
        require_tokenizer(self.source)
        transformers = import_transformers(f"reading {self.source.name}")
        with named_errors(self.source.name, "its tokenizer cannot be read"), quiet_transformers():
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.source.name, **self.source.options)
        if not isinstance(longest := tokenizer.model_max_length, int | float):
            raise UserError(f"{self.source.name}: model_max_length={longest!r} of its tokenizer is not a number")
        return tokenizer


# Load -----------------------------------------------------------------------------------------------------------------


def load_checkpoint(
    name: str | Path, dtype: torch.dtype = torch.float32, check: Callable[[Any], object] | None = None
) -> Checkpoint:
    """Load a causal language model, a multimodal one with a language model, or BERT with or without its head.

    If config.json names a strategy, as after `apply` and `save_pretrained`, it is applied.

    Args:
        name: a folder with config.json and weights (safetensors or .bin, sharded or not); a .gguf file, or a folder
            with one; the short name of a packaged model (`PACKAGED`); or a name on the hub.
        dtype: dtype of the weights; quantized ones of a .gguf file are dequantized.
        check: called with the configuration before the weights are read; raises a UserError to refuse it.

    Raises:
        UserError: a package is missing; the model is larger than the free memory; a file is damaged or outside the
            folder; weights are missing, left over, of another shape, quantized, integers, NaN or Inf; names the first
            and their number. Or config.json names a strategy that cannot be applied.
    """
    transformers = import_transformers(f"reading {name}")
    source = find_source(str(name))
    reader = None if source.gguf is None else open_gguf(Path(source.name) / source.gguf)
    problem = "not a checkpoint of a causal language model"
    with named_errors(source.config_file, problem), quiet_transformers():
        check_sizes(source)
        config = transformers.AutoConfig.from_pretrained(source.name, **source.options)
        if check is not None:
            check(config)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{name}: quantization_config is not supported: save the model with dequantized weights")
        empty, options = empty_model(config)
    with named_errors(str(name), problem), quiet_transformers():
        parameters = sum(parameter.numel() for parameter in empty.parameters())
        require_memory(parameters, str(name), str(dtype).removeprefix("torch."), dtype.itemsize)
        state = read_weights(source) if reader is None else read_gguf(reader, source.config_file, empty)
        if integers := [key for key, x in state.items() if not x.is_floating_point() and not MASKS.search(key)]:
            raise UserError(
                f"{name}: {integers[0]} holds {state[integers[0]].dtype} ({len(integers)} weights do): save the model "
                "with floating-point weights"
            )
        if has_own_head(empty, state):
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        model, info = type(empty).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            # A configuration can name a kernel on the hub.
            attn_implementation="sdpa" if empty._supports_sdpa else "eager",
            ignore_mismatched_sizes=True,  # so that all are reported below
            output_loading_info=True,
            **options,
        )
        if error := weight_errors(empty, info):
            raise UserError(f"{name}: {error}")
        require_finite(model.named_parameters(), str(name))
        frequencies = [(key, x) for key, x in model.named_buffers() if key.endswith("inv_freq")]
        require_finite(frequencies, source.config_file, "correct its settings of the rotary embeddings")
        dropped = load_generation_config(model, source)
        apply_saved_strategy(model, source.config_file)
    largest = max((x for x in state.values() if x.is_floating_point()), key=Tensor.numel)
    return Checkpoint(model.eval(), source, largest.dtype, dropped)


def empty_model(config: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a configuration on the meta device, and the options of its `from_pretrained`."""
    import transformers

    kind, options = transformers.AutoModelForCausalLM, {}
    if hasattr(config, "vision_config"):
        kind = transformers.AutoModelForImageTextToText
    elif config.architectures == ["BertModel"]:
        kind, options = transformers.AutoModel, {"add_pooling_layer": False}
    with torch.device("meta"):
        empty = kind.from_config(deepcopy(config), attn_implementation="eager", trust_remote_code=False, **options)
    return empty, options


def check_sizes(source: Source) -> None:
    """Check the sizes in config.json, from which `transformers` computes before it checks them.

    Raises:
        UserError: the file is missing or damaged, or a size is not a positive integer.
    """
    if source.gguf is not None:
        return
    path = find_file(source, "config.json")
    if path is None:
        if Path(source.name).is_dir():
            raise UserError(f"{source.name}: not a checkpoint of a causal language model: it has no config.json")
        return
    config = read_json(path, dict[str, Any], damage_message(path))
    wrong = [
        f"{name}={value!r}"
        for name in SIZES
        if isinstance(value := config.get(name), str | float) or (isinstance(value, int) and value < 1)
    ]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)} must be a positive integer: correct it, or fetch the file again")


def has_own_head(empty: Any, state: Mapping[str, Tensor]) -> bool:
    """Whether the weights hold a head and embeddings that differ, whatever the configuration says."""
    matrices = []
    for end in (empty.get_input_embeddings(), empty.get_output_embeddings()):
        name = next((name for name, module in empty.named_modules() if module is end), "none")
        suffix = f".{name.rpartition('.')[2]}.weight"  # older checkpoints have other prefixes
        matrices += [tensor for key, tensor in state.items() if f".{key}".endswith(suffix)][:1]
    return len(matrices) == 2 and not torch.equal(*matrices)


def weight_errors(empty: Any, info: Mapping[str, Any]) -> str | None:
    """The names and shapes of weights that do not match the `empty` model, with advice; None if all match."""
    missing = sorted(info["missing_keys"])
    unexpected = sorted(key for key in info["unexpected_keys"] if not OTHER_HEADS.search(key))
    # Version 5 adds the shapes.
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    problems = []
    if missing:
        problems.append(f"lacks {first_of(missing)}")
    if unexpected:
        problems.append(f"holds {first_of(unexpected)} without a place in the model")
    if mismatched:
        shape = list(empty.get_parameter(mismatched[0]).shape)
        problems.append(f"holds {first_of(mismatched)} of another shape than {shape}")
    if not problems:
        return None
    if any(re.search(r"(^|\.)(_orig_mod|module)\.", key) for key in unexpected):
        advice = "save the state dict of the model inside torch.compile or DDP (model._orig_mod, model.module)"
    elif len(missing) == 1 and not unexpected:
        advice = "save the whole model with its head, such as LlamaForCausalLM"
    else:
        advice = "use the config.json that the weights were saved with"
    return f"the checkpoint {' and '.join(problems)}: {advice}"


def apply_saved_strategy(model: Any, file: str) -> None:
    """Apply the strategy that the configuration of a model names, if any; the weights are those of the strategy.

    Raises:
        UserError: the model cannot have it, or it is not one of this package, because a downloaded file must not choose
            what is imported; names the `file` of the configuration.
    """
    section = strategy_of(model)
    if section is None:
        return
    where = f"{file}: {CONFIG_KEY}={section!r}"
    if not isinstance(section, dict):
        raise UserError(f"{where} is not a strategy: expected its name and options, such as {{'name': 'lns'}}")
    if names := [value for value in section.values() if isinstance(value, str) and ":" in value]:
        raise UserError(
            f"{where}: {names[0]!r} is code outside of this package, which is not imported for a checkpoint: load "
            "it with transformers, call cod.apply and cod.fold, and save it again"
        )
    try:
        checked_sublayer_specs(section, depth=1)
        options = {name: value for name, value in section.items() if name != "name"}
        apply(model, section["name"], initial_weights="scaled", **options)
    except UserError as error:
        raise UserError(
            f"{where} cannot be applied: {error}. Load the model with transformers, call cod.apply and cod.fold, and "
            "save it again"
        ) from error


def load_generation_config(model: Any, source: Source) -> list[str]:
    """Read generation_config.json into the model, without settings that have no effect; return their names.

    Raises:
        UserError: `transformers` would refuse to save the rest.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        return []
    path = find_file(source, "generation_config.json") if source.gguf is None else None
    if path is not None:
        read_json(path, dict[str, Any], damage_message(path))
        with named_errors(str(path), "not a generation configuration"):
            model.generation_config = GenerationConfig.from_pretrained(source.name)
    generation, defaults = model.generation_config, GenerationConfig()
    names = (() if generation.do_sample else SAMPLING) + (() if (generation.num_beams or 1) > 1 else BEAMS)
    dropped = [name for name in names if getattr(generation, name, None) != getattr(defaults, name, None)]
    for name in dropped:
        setattr(generation, name, getattr(defaults, name))
        vars(model.config).pop(name, None)  # version 4 would copy it from there
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise UserError(f"{source.name}: generation_config.json is invalid: {one_line(error)}") from error
    return dropped


def require_length(config: Any, name: str, length: int) -> None:
    """Check that a configuration supports sequences of `length` tokens.

    Raises:
        UserError: it supports shorter ones only.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise UserError(f"data.seq_len={length} is longer than max_position_embeddings={longest} of {name}: shorten it")


def require_embeddings(model: Any, tokenizer: Any, tokens: Tensor, name: str) -> None:
    """Check that every token has an embedding.

    Raises:
        UserError: one does not; names it.
    """
    largest, rows = int(tokens.max()), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"{name}: token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) has no embedding: the tokenizer "
            f"has {len(tokenizer)} tokens and the model {rows}: use the tokenizer that the model was trained with"
        )


# Save -----------------------------------------------------------------------------------------------------------------


def save_pretrained(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write a model and its tokenizer into an existing folder, readable by `transformers` 4.57 and 5.

    Raises:
        UserError: the folder is not writable, or a weight holds NaN or Inf, as one beyond the range of float16.
    """
    from safetensors import SafetensorError

    dtype = str(model.dtype).removeprefix("torch.")
    require_finite(model.named_parameters(), f"the {dtype} model to write", "use other weights, or another dtype")
    with quiet_transformers():
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise UserError(f"{folder} cannot be written: {error}") from error
        edit_json(folder / "config.json", with_rope_of_version_4)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            edit_json(folder / "tokenizer_config.json", with_tokenizer_of_version_4)


def edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content), indent=2) + "\n")


def with_rope_of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Add `rope_theta` and `rope_scaling`, which version 5 writes as `rope_parameters` only."""
    if isinstance(text := config.get("text_config"), dict):
        config = config | {"text_config": with_rope_of_version_4(text)}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old = {"rope_theta": rope["rope_theta"]}
    if scaling.get("rope_type", "default") != "default":
        old["rope_scaling"] = scaling
    return old | config


def with_tokenizer_of_version_4(config: dict[str, Any]) -> dict[str, Any]:
    """Replace the class and the list of special tokens that version 4 does not know; version 5 reads both."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config = config | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokens := config.get("extra_special_tokens"), list):
        config = {key: value for key, value in config.items() if key != "extra_special_tokens"}
        config["additional_special_tokens"] = tokens
    return config


# Dependency -----------------------------------------------------------------------------------------------------------


def import_transformers(purpose: str) -> Any:
    """The optional package `transformers`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"{purpose} needs transformers: pip install 'cod_lightning[hf]'") from error
    return transformers


@contextmanager
def named_errors(name: str, problem: str) -> Generator[None]:
    """Turn the errors of a damaged checkpoint, which are of many kinds, into a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise no_permission(error, name) from error
    except Exception as error:
        reason = shorten(one_line(error), 400, placeholder=" ...")
        if isinstance(error, AttributeError | KeyError | TypeError):
            reason = f"transformers cannot use one of its values ({reason})"
        raise UserError(f"{name}: {problem}: {reason}: correct it, or fetch it again") from error


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Silence the progress bars and warnings of `transformers`."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
