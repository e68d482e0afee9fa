"""Pretrained models: loaded with all of their weights, or refused by name."""

import json
import re
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cod_lightning.errors import UserError
from cod_lightning.nn.apply import apply
from cod_lightning.nn.huggingface import import_hf
from cod_lightning.nn.pretrained import load_checkpoint, require_embeddings, require_length, save_pretrained

transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, "max_position_embeddings": 64}
TOKENS = torch.arange(20)[None]
EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.fixture(scope="session")
def llama():
    """A tiny model whose head is not its embedding."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


@pytest.fixture(scope="session")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model, to edit."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(model):
    with torch.no_grad():
        return getattr(model(TOKENS), "logits", None)


def edit_weights(folder, change):
    state = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    changed = {name: tensor.clone() for name, tensor in change(state).items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def edit_json(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without(*names):
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def filled(name, value):
    def change(state):
        state[name][0] = value
        return state

    return change


def bare(state):
    """The state dict of a `LlamaModel`."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if name != HEAD}


def third_layer(state):
    return state | {name.replace(".1.", ".2."): tensor for name, tensor in state.items() if ".layers.1." in name}


REFUSED = {
    "compiled": (prefixed("_orig_mod."), r"holds _orig_mod\.lm_head\.weight and 20 other weights .*model\._orig_mod"),
    "parallel": (prefixed("module."), r"lacks lm_head\.weight and 20 other .*inside torch\.compile or DDP"),
    "compiled block": (
        lambda s: {name.replace("layers.1.", "layers.1._orig_mod."): x for name, x in s.items()},
        r"lacks model\.layers\.1\..* and 8 other weights .*_orig_mod",
    ),
    "without head": (without(HEAD), r"lacks lm_head\.weight: save the whole model with its head"),
    "bare": (
        bare,
        r"lacks lm_head\.weight: save the whole model with its head",
    ),
    "without a weight": (without(DOWN), rf"lacks {DOWN}: "),
    "bias": (lambda s: s | {BIAS: torch.ones(16)}, rf"holds {BIAS} without a place .*use the config\.json"),
    "more layers": (
        third_layer,
        r"holds model\.layers\.2\.input_layernorm\.weight and 8 other weights without",
    ),
    "shape": (
        lambda s: s | {EMBEDDING: torch.ones(40, 16)},
        rf"holds {EMBEDDING} of another shape than \[37, 16\]: ",
    ),
    "NaN": (filled(DOWN, float("nan")), rf"{DOWN} holds NaN or Inf \(1 weights do\)"),
    "Inf": (filled(EMBEDDING, float("inf")), rf"{EMBEDDING} holds NaN or Inf"),
    "int8": (lambda s: s | {DOWN: s[DOWN].to(torch.int8)}, rf"{DOWN} holds torch\.int8 \(1 weights do\)"),
    "empty": (lambda s: {"x": torch.ones(1)}, r"lacks lm_head\.weight and 20 other weights"),
}


@pytest.mark.parametrize(("kind", "load"), [*((kind, load_checkpoint) for kind in REFUSED), ("compiled", import_hf)])
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(folder, kind, load):
    change, message = REFUSED[kind]
    edit_weights(folder, change)
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


ACCEPTED = {
    "unchanged": lambda s: s,
    "rotary frequencies": lambda s: s | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_names_that_transformers_accepts_keep_the_logits(folder, llama, kind):
    edit_weights(folder, ACCEPTED[kind])
    torch.testing.assert_close(logits(load_checkpoint(folder).model), logits(llama))


def test_heads_of_bert_for_whole_texts_are_left_out(tmp_path):
    shape = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    bert = transformers.BertForPreTraining(transformers.BertConfig(**shape, num_attention_heads=2)).eval()
    bert.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = bert.cls.predictions(bert.bert(TOKENS).last_hidden_state)
    torch.testing.assert_close(logits(load_checkpoint(tmp_path).model), expected)


def test_an_encoder_without_a_head_is_loaded_without_its_pooler(tmp_path):
    shape = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    encoder = transformers.BertModel(transformers.BertConfig(**shape, num_attention_heads=2)).eval()
    encoder.save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path).model
    assert loaded.pooler is None
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).last_hidden_state, encoder(TOKENS).last_hidden_state)
    edit_weights(tmp_path, lambda s: {key: x for key, x in s.items() if "layer.0.output.dense" not in key})
    with pytest.raises(UserError, match=r"lacks encoder\.layer\.0\.output\.dense\.bias and 1 other weight:"):
        load_checkpoint(tmp_path)


# A strategy in config.json --------------------------------------------------------------------------------------------


def test_a_strategy_that_the_configuration_names_is_applied(llama, tmp_path):
    model = apply(deepcopy(llama), "lns", position="after_branch")
    model.save_pretrained(tmp_path)
    assert not torch.allclose(logits(model), logits(llama), atol=1e-3)
    assert torch.equal(logits(load_checkpoint(tmp_path).model), logits(model))
    torch.testing.assert_close(import_hf(tmp_path)(TOKENS), logits(model))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("lns", "not a strategy: expected its name and options"),
        ({}, "norm.name is missing"),
        ({"name": "lnss"}, "did you mean 'lns'"),
        ({"name": "lns", "trained": "change"}, "norm.trained is not an option"),
        ({"name": "post_ln"}, "pre_norm=False"),
        ({"name": "evil:run"}, "'evil:run' is code outside of this package"),
        ({"name": "lns", "base": "evil:run"}, "'evil:run' is code outside of this package"),
    ],
)
def test_a_strategy_that_cannot_be_applied_is_refused(folder, section, message):
    edit_json(folder, "config.json", cod_lightning=section)
    with pytest.raises(UserError, match=f"config.json: cod_lightning=.*{message}"):
        load_checkpoint(folder)


# Tied embeddings ------------------------------------------------------------------------------------------------------


def test_two_different_matrices_are_never_tied(folder, llama, tmp_path):
    edit_json(folder, "config.json", tie_word_embeddings=True)
    model = load_checkpoint(folder).model
    torch.testing.assert_close(logits(model), logits(llama))
    assert not model.config.tie_word_embeddings
    imported = import_hf(folder)
    assert not imported.config.tie_word_embeddings
    torch.testing.assert_close(imported(TOKENS), logits(llama))
    (tmp_path / "again").mkdir()
    save_pretrained(model, tmp_path / "again")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "again").model), logits(llama))


@pytest.mark.parametrize("change", [without(HEAD), bare, lambda s: s | {HEAD: s[EMBEDDING]}])
def test_one_matrix_is_tied(folder, change):
    edit_json(folder, "config.json", tie_word_embeddings=True)
    edit_weights(folder, change)
    model = load_checkpoint(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


# Files ----------------------------------------------------------------------------------------------------------------


def shard(folder, first="a.safetensors", second="b.safetensors"):
    """Split the weights into two shards with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {first: {EMBEDDING: state.pop(EMBEDDING)}, second: state}
    for name, part in shards.items():
        save_file(part, folder / name, {"format": "pt"})
    weight_map = {weight: str(name) for name, part in shards.items() for weight in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("outside", ["../outside.safetensors", "{parent}/outside.safetensors"])
def test_an_index_names_files_of_its_folder_alone(folder, outside):
    shard(folder, second=outside.format(parent=folder.parent))
    with pytest.raises(UserError, match=r"index\.json: .*outside\.safetensors leads out of the folder"):
        load_checkpoint(folder)


def to_bin(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("change", [shard, to_bin])
def test_other_formats_keep_the_logits(folder, llama, change):
    change(folder)
    torch.testing.assert_close(logits(load_checkpoint(folder).model), logits(llama))


def test_links_to_a_shared_disk_are_followed(folder, llama):
    shard(folder)
    (folder.parent / "shared").mkdir()
    for path in list(folder.iterdir()):
        path.rename(folder.parent / "shared" / path.name)
        path.symlink_to(f"../shared/{path.name}")
    torch.testing.assert_close(logits(load_checkpoint(folder).model), logits(llama))


def damage(folder, kind):
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "lost shard":
        shard(folder)
        (folder / "b.safetensors").unlink()
    elif kind == "twice":
        shard(folder)
        state = load_file(folder / "b.safetensors")
        save_file(state | {EMBEDDING: torch.zeros(37, 16)}, folder / "b.safetensors")
    elif kind == "training checkpoint":
        to_bin(folder)
        torch.save({"state_dict": {}, "step": 3}, folder / "pytorch_model.bin")
    elif kind == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "quantized":
        edit_json(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    elif kind == "large":
        edit_json(folder, "config.json", vocab_size=10**12)
        weights.unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", r"no weights: expected one of model\.safetensors, "),
        ("lost shard", r"b\.safetensors is missing, which model\.safetensors\.index\.json lists"),
        ("twice", rf"{EMBEDDING} is in two shards"),
        ("training checkpoint", r"pytorch_model\.bin: not a state dict"),
        ("adapter", r"adapter_config\.json makes it an adapter"),
        ("quantized", "quantization_config is not supported"),
        ("large", r"out of memory: [\d,]+ parameters in float32 take 128,000\.0 GB, and [\d,.]+ GB are free: use a "),
    ],
)
def test_damaged_and_other_files_are_refused_by_name(folder, kind, message):
    damage(folder, kind)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "page": lambda content: b"<html>Not found</html>",
}
PARTS = {
    "config.json": lambda folder: None,
    "model.safetensors": lambda folder: None,
    "b.safetensors": shard,
    "model.safetensors.index.json": shard,
    "pytorch_model.bin": to_bin,
}


@pytest.mark.parametrize("damaged", DAMAGES)
@pytest.mark.parametrize("part", [*PARTS, "tiny.gguf"])
def test_a_damaged_file_is_named_with_its_size(folder, llama, part, damaged):
    path = folder / part
    if part in PARTS:
        PARTS[part](folder)
    else:
        write_gguf(path, llama)
    path.write_bytes(DAMAGES[damaged](path.read_bytes()))
    with pytest.raises(UserError) as error:
        load_checkpoint(path if part == "tiny.gguf" else folder)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"damaged or truncated ({path.stat().st_size:,} bytes on disk): fetch it again")
    assert not re.search(r"\n|numpy|struct|buffer|reshape|Error", message)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_list_of_shards_is_named(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: .*; damaged .*: fetch it again$"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{"])
def test_generation_settings_that_are_no_json_object_are_named(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=rf"^{folder}/generation_config.json: .*; damaged .*: fetch it again$"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"model_max_length": "x"}'])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_the_folder_of_a_damaged_tokenizer_is_named(folder, file, content):
    (folder / "tokenizer.json").write_text("{}")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=rf"^{folder}: its tokenizer cannot be read: .*: correct it, or fetch it ag"):
        load_checkpoint(folder).tokenizer()


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("generation_config.json", {"do_sample": "x", "temperature": 0}, "_config.json is invalid: .*do_sample.*"),
        ("generation_config.json", {"cache_implementation": "zz"}, "/generation_config.json: not a generation .*zz"),
    ],
)
def test_a_setting_of_another_file_is_named(folder, file, settings, message):
    (folder / file).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda x: x.to_sparse(), r"embed_tokens\.weight is torch\.sparse_coo: save dense weights"),
        (lambda x: x.to("meta"), r"embed_tokens\.weight is without values: save dense weights"),
    ],
)
def test_weights_that_are_not_arrays_are_named(folder, weight, message):
    to_bin(folder)
    path = folder / "pytorch_model.bin"
    state = torch.load(path)
    torch.save(state | {EMBEDDING: weight(state[EMBEDDING])}, path)
    with pytest.raises(UserError, match=rf"pytorch_model\.bin: .*{message}"):
        load_checkpoint(folder)


def test_weights_without_names_are_refused(folder):
    to_bin(folder)
    path = folder / "pytorch_model.bin"
    torch.save(dict(enumerate(torch.load(path).values())), path)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: not a state dict of names and tensors"):
        load_checkpoint(folder)


def test_rotary_frequencies_that_are_not_finite_are_refused(folder):
    edit_json(folder, "config.json", rope_theta=-5.0, rope_parameters={"rope_type": "default", "rope_theta": -5.0})
    with pytest.raises(UserError, match=r"/config\.json: .*inv_freq holds NaN or Inf .*rotary"):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_file_that_may_not_be_read_is_named(folder, part, forbid):
    PARTS[part](folder)
    forbid(folder / part)
    with pytest.raises(UserError, match=rf"/model/{part}: permission denied: change its permissions \(chmod\) or"):
        load_checkpoint(folder)


IMPOSSIBLE = [
    ({"num_attention_heads": 0}, "num_attention_heads=0 must be a positive integer: correct it, or fetch"),
    ({"num_attention_heads": -2, "vocab_size": 1.5}, "vocab_size=1.5, num_attention_heads=-2 must be a positive"),
    ({"hidden_size": -16}, "hidden_size=-16 must be"),
    ({"hidden_size": "16"}, "hidden_size='16' must be"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be"),
    ({"head_dim": 0}, "head_dim=0 must be"),
    ({"num_attention_heads": 3}, "not a checkpoint of a causal language model: .*3"),
    ({"rms_norm_eps": "x"}, "not a checkpoint of a causal language model: .*rms_norm_eps.*float.*'x'"),
    ({"model_type": "lama"}, "not a checkpoint of a causal language model: .*lama"),
    ({"model_type": None}, "not a checkpoint of a causal language model: .*model_type"),
    (
        {"dtype": "nonsense"},
        "not a checkpoint of .*cannot use one of its values .*nonsense.*: correct it, or fetch",
    ),
    ({"auto_map": 3}, "not a checkpoint of a causal language model: transformers cannot use one of its values"),
]


@pytest.mark.parametrize(
    ("settings", "message", "load"),
    [*((*case, load_checkpoint) for case in IMPOSSIBLE), (*IMPOSSIBLE[0], import_hf)],
)
def test_a_configuration_with_impossible_values_is_named(folder, settings, message, load):
    content = json.loads((folder / "config.json").read_text()) | settings
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^{folder}/config.json: {message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_a_model_that_exceeds_the_limit_of_a_container_is_refused(saved, tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("cod_lightning.memory.LIMITS", [str(limit)])
    limit.write_text("max\n")
    parameters = sum(x.numel() for x in load_checkpoint(saved).model.parameters())
    limit.write_text(f"{4 * parameters - 1}\n")
    with pytest.raises(UserError, match=f"out of memory: {parameters:,} parameters"):
        load_checkpoint(saved)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_that_the_configuration_names_is_not_loaded(folder, field):
    edit_json(folder, "config.json", **{field: "kernels-community/flash-attn"})
    assert load_checkpoint(folder).model.config._attn_implementation == "sdpa"


# Limits ---------------------------------------------------------------------------------------------------------------


def test_an_imported_model_keeps_its_context_length(saved):
    assert import_hf(saved).config.max_position_embeddings == 64


@pytest.mark.parametrize(("length", "fits"), [(64, True), (65, False)])
def test_sequences_longer_than_the_context_are_refused(llama, length, fits):
    if fits:
        return require_length(llama.config, "model", length)
    with pytest.raises(UserError, match=r"data\.seq_len=65 is longer than max_position_embeddings=64 of model"):
        require_length(llama.config, "model", length)


class Words:
    """A tokenizer of 40 words."""

    def __len__(self):
        return 40

    def convert_ids_to_tokens(self, token):
        return f"w{token}"


def test_a_token_without_an_embedding_is_named(llama):
    require_embeddings(llama, Words(), torch.tensor([[36]]), "model")
    with pytest.raises(UserError, match=r"token 39 \('w39'\) has no embedding: the tokenizer has 40 .* the model 37"):
        require_embeddings(llama, Words(), torch.tensor([[1, 39]]), "model")


# Saving ---------------------------------------------------------------------------------------------------------------


def tokenizer():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(37)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", eos_token="w1", additional_special_tokens=["w2"]
    )


def saved_again(checkpoint, folder):
    folder.mkdir()
    save_pretrained(checkpoint.model.to(checkpoint.dtype), folder, tokenizer())
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_saved_model_keeps_the_dtype_of_its_file(folder, tmp_path, dtype):
    edit_weights(folder, lambda state: {name: tensor.to(dtype) for name, tensor in state.items()})
    checkpoint = load_checkpoint(folder)
    assert checkpoint.model.dtype == torch.float32
    saved_again(checkpoint, tmp_path / "again")
    first, again = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "again"))
    assert all(torch.equal(tensor, again[name]) and again[name].dtype == dtype for name, tensor in first.items())


def test_a_saved_folder_has_the_names_of_both_versions_of_transformers(folder, tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    edit_json(folder, "config.json", rope_parameters=rope, rope_theta=500.0, rope_scaling=rope)
    config, words = saved_again(load_checkpoint(folder), tmp_path / "again")
    assert (config["rope_theta"], config["rope_scaling"]["factor"]) == (500.0, 2.0)
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["additional_special_tokens"] == ["w2"]
    assert not words.get("extra_special_tokens")  # version 4 expects a mapping
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert (again.eos_token_id, "w2" in again.all_special_tokens) == (1, True)


@pytest.mark.parametrize(
    ("settings", "dropped"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
        ({"do_sample": True, "temperature": 0.9, "top_p": 0.6}, []),
        ({"top_k": 5}, ["top_k"]),
        ({"num_beams": 1, "early_stopping": True}, ["early_stopping"]),
        ({"max_new_tokens": 7}, []),
    ],
)
def test_generation_settings_that_contradict_others_are_dropped(folder, tmp_path, settings, dropped):
    (folder / "generation_config.json").write_text(json.dumps(settings))
    edit_json(folder, "config.json", **settings)  # as older models do
    checkpoint = load_checkpoint(folder)
    assert checkpoint.dropped == dropped
    saved_again(checkpoint, tmp_path / "again")
    again, defaults = transformers.GenerationConfig.from_pretrained(tmp_path / "again"), transformers.GenerationConfig()
    for name, value in settings.items():
        assert getattr(again, name) == (getattr(defaults, name) if name in dropped else value)


# GGUF -----------------------------------------------------------------------------------------------------------------


def write_gguf(path, model, change=lambda tensors: tensors, family="llama", scaling="none"):
    """Write a Llama with the tensor names and the order of rotary pairs of llama.cpp."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", *"0123456", "ab", "cd"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (config.vocab_size - 2))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {}
    for name, x in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            x = x.view(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        tensors[names.get_name(name, (".weight",))] = x.numpy()
    for name, x in change(tensors).items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_without_sizes_is_named(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"/a\.gguf: no llama\.block_count in its metadata: fetch"):
        load_checkpoint(tmp_path / "a.gguf")


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_gguf_file_keeps_logits_and_tokenizer(llama, tmp_path, named):
    write_gguf(tmp_path / "tiny.gguf", llama)
    name = tmp_path / "tiny.gguf" if named == "file" else tmp_path
    checkpoint = load_checkpoint(name)
    torch.testing.assert_close(logits(checkpoint.model), logits(llama))
    torch.testing.assert_close(import_hf(name)(TOKENS), logits(llama))
    assert checkpoint.tokenizer()("b0")["input_ids"] == [3, 28]
    assert checkpoint.model.config.max_position_embeddings == 64


def test_a_model_from_a_gguf_file_is_saved_as_safetensors(llama, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", llama)
    saved_again(load_checkpoint(tmp_path), tmp_path / "again")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "again").model), logits(llama))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": lambda t: t | {"rope_freqs.weight": t["output_norm.weight"]}}, r"no place for rope_freqs\.weight"),
        (
            {"change": lambda t: t | {"blk.2.attn_q.weight": t["blk.1.attn_q.weight"]}},
            r"no place for blk\.2\.attn_q\.weight",
        ),
        (
            {"change": lambda t: {name: x for name, x in t.items() if name != "blk.1.ffn_up.weight"}},
            r"lacks model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        ({"scaling": "yarn"}, r"leaves out llama\.rope\.scaling\.type='yarn'"),
        ({"family": "mamba2"}, "architecture mamba2 is not supported"),
    ],
    ids=["rotary factors", "more layers", "fewer weights", "rotary scaling", "family"],
)
def test_a_gguf_file_that_transformers_does_not_read_whole_is_refused(llama, tmp_path, options, message):
    write_gguf(tmp_path / "tiny.gguf", llama, **options)
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "tiny.gguf")


def test_one_of_several_gguf_files_must_be_named(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"has 2 \.gguf files: name one, such as .*a\.gguf"):
        load_checkpoint(tmp_path)


def test_a_gguf_file_without_the_package_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_text("")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'cod_lightning\[gguf\]'"):
        load_checkpoint(tmp_path)
