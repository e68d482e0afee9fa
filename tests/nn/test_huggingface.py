"""Exported decoders against stock transformers, and back; what cannot be exchanged is refused by name."""

import json
import subprocess
import sys

import pytest
import torch

from cod_lightning.data.tokenizers import PAD, DocumentTokenizer, train_bpe
from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import export, import_hf, to_hf
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import STRATEGIES, BlockSpec, SublayerSpec, block, build_all

transformers = pytest.importorskip("transformers")

DEPTH = 4
TEXT = "the norm of a deep block grows with depth and its branch adds less"


def ours(strategy, specs=None, **changes) -> Decoder:
    """A decoder whose every parameter, scale of a branch included, is far from where it starts."""
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    config = DecoderConfig(**(shape | {"vocab_size": 101} | changes))
    decoder = build_decoder(config, specs or build_all(strategy, DEPTH), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return decoder.eval()


@torch.no_grad()
def assert_same_logits(decoder, twin):
    tokens = torch.randint(101, (2, 23), generator=torch.Generator().manual_seed(2))
    expected, found = decoder(tokens), twin(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def uneven(layer, depth):
    """A strategy of one's own: gains and scales that differ between the sub-layers."""
    return BlockSpec(SublayerSpec(gain=0.3 * layer, branch_scale=-0.5), SublayerSpec(gain=1.5, branch_scale=1 / layer))


FOLDABLE = [
    {"name": "pre_ln"},
    *({"name": "lns", "position": place} for place in ("after_ln", "after_branch", "only_attention", "only_ffn")),
    {"name": "lns_learnable"},
    {"name": "layer_scale", "init": 0.5},
    {"name": "skip_init", "init": 0.5},
    {"name": "ds_init"},
    {"name": "scaled_init"},
    {"name": "layer_scale", "base": "lns", "init": 0.5},
    {"name": "skip_init", "base": "ds_init"},
    {"name": f"{__name__}:uneven"},
]


@pytest.mark.parametrize("norm", FOLDABLE, ids=lambda norm: "-".join(map(str, norm.values())))
def test_a_folded_strategy_gives_its_logits_in_transformers(norm):
    assert_same_logits(ours(norm), to_hf(ours(norm)))


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"num_key_value_heads": 2}, "Llama"),
        ({"tie_word_embeddings": True}, "Llama"),
        ({"norm_affine": False}, "Llama"),
        ({"rope_theta": 500.0, "norm_eps": 1e-2}, "Llama"),
        ({"qkv_bias": True}, "Qwen2"),
        ({"qkv_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}, "Qwen2"),
    ],
)
def test_every_shape_is_exported_and_imported_again(changes, family, tmp_path):
    decoder = ours({"name": "lns"}, **changes)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    export(decoder, tmp_path / "model")
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(twin) is getattr(transformers, f"{family}ForCausalLM")
    assert_same_logits(decoder, twin)
    again = import_hf(tmp_path / "model")
    expected = twin.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == decoder.config.tie_word_embeddings
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "key_value_heads"):
        assert getattr(again.config, field) == getattr(decoder.config, field)
    for field in ("vocab_size", "norm_eps", "rope_theta", "qkv_bias", "tie_word_embeddings"):
        assert getattr(again.config, field) == getattr(decoder.config, field)
    assert_same_logits(decoder, lambda tokens: transformers.modeling_outputs.CausalLMOutput(logits=again(tokens)))


def test_pre_ln_comes_back_to_the_bit(tmp_path):
    decoder = ours({"name": "pre_ln"})
    export(decoder, tmp_path / "model")
    again = import_hf(tmp_path / "model").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in decoder.state_dict().items())
    assert again.keys() == decoder.state_dict().keys()


def test_the_folder_names_its_dtype_its_length_and_its_rotary_base(tmp_path):
    export(ours({"name": "lns"}, rope_theta=500.0), tmp_path / "model", dtype=torch.bfloat16, max_length=77)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["max_position_embeddings"] == 77
    assert config["rope_theta"] == 500.0
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert twin.dtype == torch.bfloat16
    assert (tmp_path / "model/generation_config.json").is_file()
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


# What has no place ---------------------------------------------------------------------------------------------------

REFUSED = {
    "post_ln": ["pre_norm=False", "sum_norm=True"],
    "sandwich_ln": ["branch_norm=True"],
    "peri_ln": ["branch_norm=True", "entry_norm=True (layer 1)"],
    "mix_ln": ["pre_norm=False (layer 1, 2 of 8", "sum_norm=True"],
    "group_ln": ["groups=8"],
    "deep_norm": ["pre_norm=False", "skip=1.68", "sum_norm=True"],
    "deep_norm_released": ["pre_norm=False", "skip=2.82", "sum_norm=True"],
    "admin": ["pre_norm=False", "learned_skip=True", "sum_norm=True"],
    "gpas": ["gate='output'"],
}


def test_every_strategy_is_either_folded_or_refused():
    assert {norm["name"] for norm in FOLDABLE if ":" not in norm["name"]} | REFUSED.keys() == STRATEGIES.keys()


@pytest.mark.parametrize(
    ("norm", "reasons"),
    [
        *(({"name": name}, reasons) for name, reasons in REFUSED.items()),
        ({"name": "lns", "position": "before_ln"}, ["input_scale=0.707"]),
        ({"name": "lns", "position": "after_residual"}, ["skip=0.707"]),
        ({"name": "gpas", "base": "peri_ln"}, ["branch_norm=True", "gate='output'", "entry_norm=True"]),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_what_has_no_place_is_refused_with_every_reason_and_nothing_is_written(norm, reasons, tmp_path):
    with pytest.raises(UserError) as error:
        export(ours(norm), tmp_path / "below/model")
    lines = str(error.value).splitlines()
    assert [line.startswith(reason) for line, reason in zip(lines, reasons, strict=True)] == [True] * len(reasons)
    assert all("has no place in a Llama checkpoint" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_layer_norms_are_refused_together_with_the_rest():
    with pytest.raises(UserError, match=r"model\.norm='layer'.*\nbranch_norm=True"):
        to_hf(ours({"name": "sandwich_ln"}, norm="layer"))


def test_another_strategy_of_ones_own_is_refused_by_its_coefficient():
    with pytest.raises(UserError, match=r"^skip=0\.5 \(layer 1, 8 of 8 sub-layers\)"):
        to_hf(ours(None, specs=[block(skip=0.5)] * DEPTH))


# Folders -------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    decoder = ours({"name": "lns"})
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine").write_text("")
    for place in (tmp_path / "taken", tmp_path / "taken/mine"):
        with pytest.raises(UserError, match="is not an empty folder"):
            export(decoder, place)
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "mine"]

    def full(*arguments, **options):
        (arguments[1] / "model.safetensors").write_text("half of")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(UserError, match="No space left on device"):
            export(decoder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "model").mkdir()
    check_new_folder(tmp_path / "model")
    export(decoder, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "taken"]


def test_the_tokenizer_travels_along_and_adds_nothing(tmp_path):
    bpe = train_bpe([TEXT] * 20, 300)
    content = json.loads(bpe.json)
    ids = {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": ids,
    }
    tokenizer = DocumentTokenizer(json.dumps(content), pad_id=0, eos_id=1)
    assert tokenizer.backend.encode("norm").ids[-1] == 1
    export(ours({"name": "lns"}, vocab_size=bpe.vocab_size), tmp_path / "model", tokenizer)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    encoded = found(TEXT, return_tensors="pt")
    assert encoded.input_ids[0].tolist() == tokenizer.encode([TEXT])[0][:-1]
    assert (found.pad_token_id, found.eos_token_id, found.bos_token_id) == (0, 1, None)
    assert found.decode(encoded.input_ids[0]) == TEXT
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for config in (twin.config, twin.generation_config):
        assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, None)
    assert twin.generate(**encoded, max_new_tokens=2, do_sample=False).shape[1] > encoded.input_ids.shape[1]


def test_a_pad_without_a_row_becomes_the_eos(tmp_path):
    bpe = train_bpe([TEXT] * 20, 300)
    backend = bpe.backend
    backend.add_special_tokens(["[extra pad]"])
    tokenizer = DocumentTokenizer(backend.to_str(), pad_id=bpe.vocab_size, eos_id=1)
    export(ours({"name": "lns"}, vocab_size=bpe.vocab_size), tmp_path / "model", tokenizer)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (found.pad_token_id, len(found)) == (1, bpe.vocab_size)
    assert PAD in found.get_vocab()


def test_without_transformers_it_is_asked_for():
    script = (
        "import sys\nsys.modules['transformers'] = None\nfrom cod_lightning.nn.huggingface import import_hf\n"
        "from cod_lightning.errors import UserError\n"
        "try:\n    import_hf('x')\nexcept UserError as error:\n    print(error)"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "importing needs transformers: pip install 'cod_lightning[hf]'" in process.stdout, process.stderr


# Import --------------------------------------------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def saved(family, folder, **changes):
    """A checkpoint of `transformers` with lively norms, on disk."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    twin = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in twin.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    twin.save_pretrained(folder)
    return twin


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "rope_theta": 777.0}),
        ("Mistral", {"sliding_window": None, "rope_theta": 777.0}),
        ("Qwen2", {}),
    ],
)
def test_a_checkpoint_of_transformers_gives_its_logits_here(family, changes, tmp_path):
    twin = saved(family, tmp_path, **changes)
    decoder = import_hf(tmp_path)
    assert_same_logits(decoder, twin)
    assert all(parameter.requires_grad for parameter in decoder.parameters())
    assert decoder.config.rope_theta == changes.get("rope_theta", 10000.0)


@pytest.mark.parametrize(
    ("family", "changes", "fields"),
    [
        ("Llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ("Llama", {"head_dim": 16}, ["head_dim=16"]),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_type='linear'"]),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, ["attention_bias=True", "mlp_bias=True"]),
        ("Mistral", {"sliding_window": 16}, ["sliding_window=16"]),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 16}, ["sliding_window=16"]),
        ("Gemma", {"head_dim": 12}, ["model_type='gemma'"]),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused_by_field(family, changes, fields, tmp_path):
    saved(family, tmp_path, **changes)
    with pytest.raises(UserError) as error:
        import_hf(tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == len(fields)
    assert all(field in line for field, line in zip(fields, lines, strict=True))


def test_a_damaged_or_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: not a checkpoint"):
        import_hf(tmp_path / "nowhere")
    saved("Llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a checkpoint"):
        import_hf(tmp_path)
    from safetensors.torch import load, save

    saved("Llama", tmp_path)
    state = load(weights.read_bytes())
    del state["model.layers.1.mlp.up_proj.weight"]
    weights.write_bytes(save(state, {"format": "pt"}))
    with pytest.raises(UserError, match=r"lacks 1 weights of its model, model\.layers\.1\.mlp\.up_proj\.weight"):
        import_hf(tmp_path)
