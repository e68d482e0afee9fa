"""Exported decoders against stock transformers, and back."""

import json
import sys

import pytest
import torch

from cod_lightning.data.tokenizers import PAD, DocumentTokenizer, train_bpe
from cod_lightning.errors import UserError
from cod_lightning.nn.decoder import set_step
from cod_lightning.nn.huggingface import export, import_hf, to_hf, to_hf_tokenizer
from cod_lightning.nn.strategies import STRATEGIES, BlockSpec, SublayerSpec, block

transformers = pytest.importorskip("transformers")

TEXT = "the norm of a deep block grows with depth and its branch adds less"


@torch.no_grad()
def assert_same_logits(decoder, hf_model):
    tokens = torch.randint(101, (2, 23), generator=torch.Generator().manual_seed(2))
    expected = decoder(tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(hf_model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def assert_equal_states(ours, expected):
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())


# Strategies ----------------------------------------------------------------------------------------------------------


def uneven(layer, depth):
    """A custom strategy with gains and scales that differ between the sub-layers."""
    return BlockSpec(SublayerSpec(gain=0.3 * layer, branch_scale=-0.5), SublayerSpec(gain=1.5, branch_scale=1 / layer))


FOLDABLE = [
    {"name": "pre_ln"},
    *({"name": "lns", "position": place} for place in ("after_ln", "after_branch", "only_attention", "only_ffn")),
    {"name": "lns_learnable"},
    *({"name": name} for name in ("lns_as_rates", "lns_as_norm_weights", "lns_init_only", "lns_rate_only")),
    {"name": "complete_p"},
    {"name": "depth_mup"},
    *({"name": name} for name in ("minicpm", "granite", "esm_c")),
    {"name": "layer_scale", "init": 0.5},
    {"name": "skip_init", "init": 0.5},
    {"name": "ds_init"},
    {"name": "scaled_init"},
    {"name": "layer_scale", "base": "lns", "init": 0.5},
    {"name": "skip_init", "base": "ds_init"},
    {"name": "pro_res"},
    {"name": "pro_res", "base": "lns"},
    {"name": f"{__name__}:uneven"},
]

UNSUPPORTED = [
    ({"name": "post_ln"}, ["pre_norm=False", "sum_norm=True"]),
    ({"name": "sandwich_ln"}, ["branch_norm=True"]),
    ({"name": "peri_ln"}, ["branch_norm=True", "entry_norm=True (layer 1)"]),
    ({"name": "mix_ln"}, ["pre_norm=False (layer 1, 2 of 8", "sum_norm=True"]),
    ({"name": "group_ln"}, ["groups=8"]),
    ({"name": "deep_norm"}, ["pre_norm=False", "skip=1.68", "sum_norm=True"]),
    ({"name": "deep_norm_released"}, ["pre_norm=False", "skip=2.82", "sum_norm=True"]),
    ({"name": "deep_loop"}, ["pre_norm=False", "skip=2.82", "sum_norm=True"]),
    ({"name": "keel"}, ["skip=8.0 (layer 2, 6 of 8", "sum_norm=True (layer 2, 6 of 8"]),
    ({"name": "olmo2"}, ["pre_norm=False", "branch_norm=True"]),
    ({"name": "depth_scaled_sandwich"}, ["branch_norm=True"]),
    ({"name": "norm_preserving"}, ["skip=0.909"]),
    ({"name": "rezero"}, ["pre_norm=False"]),
    ({"name": "nf_residual"}, ["pre_norm=False"]),
    ({"name": "admin"}, ["pre_norm=False", "learned_skip=True", "sum_norm=True"]),
    ({"name": "hybrid_norm"}, ["pre_norm=False (layer 1, 4 of 8", "skip_from='pre_norm'", "head_norm='qkv' (layer 1)"]),
    ({"name": "span_norm"}, ["pre_norm=False", "skip_from='block' (layer 1, 4 of 8", "sum_norm=True"]),
    ({"name": "x0_mix"}, ["embedding_skip=True (layer 1)"]),
    *(({"name": kind}, [f"norm_kind={kind!r} (layer 1)"]) for kind in ("dyt", "derf", "bhyt")),
    ({"name": "value_residual"}, ["value_residual='learned' (layer 1)"]),
    ({"name": "qk_norm"}, ["head_norm='qk' (layer 1)"]),
    ({"name": "gpas"}, ["gate='output'"]),
    ({"name": "lns", "position": "before_ln"}, ["input_scale=0.707"]),
    ({"name": "lns", "position": "after_residual"}, ["skip=0.707"]),
    ({"name": "gpas", "base": "peri_ln"}, ["branch_norm=True", "gate='output'", "entry_norm=True"]),
]


def name_of(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else ""


@pytest.mark.parametrize("norm", FOLDABLE, ids=name_of)
def test_an_exported_strategy_has_the_same_logits_in_transformers(decoder, norm):
    assert_same_logits(decoder(norm), to_hf(decoder(norm)))


@pytest.mark.parametrize(("norm", "reasons"), UNSUPPORTED, ids=name_of)
def test_an_unsupported_strategy_is_an_error_with_every_reason_and_writes_nothing(decoder, norm, reasons, tmp_path):
    with pytest.raises(UserError) as error:
        export(decoder(norm), tmp_path / "below/model")
    lines = str(error.value).splitlines()
    assert [line.startswith(reason) for line, reason in zip(lines, reasons, strict=True)] == [True] * len(reasons)
    assert all("cannot be expressed in a Llama checkpoint" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_strategy_in_the_middle_of_its_schedule_is_refused(decoder):
    ours = decoder({"name": "pro_res", "warmup": 5})
    set_step(ours, 20)
    to_hf(ours)
    set_step(ours, 19)
    with pytest.raises(UserError, match=r"^branch_schedule ends at step 20, and the model is at step 19: train it"):
        to_hf(ours)


def test_every_strategy_is_exportable_or_unsupported():
    names = {norm["name"] for norm in FOLDABLE if ":" not in norm["name"]} | {norm["name"] for norm, _ in UNSUPPORTED}
    assert names == set(STRATEGIES)


def test_layer_norm_is_reported_together_with_the_coefficients(decoder):
    with pytest.raises(UserError, match=r"model\.norm='layer'.*\nbranch_norm=True"):
        to_hf(decoder("sandwich_ln", norm="layer"))


def test_a_custom_strategy_is_reported_by_its_coefficient(decoder):
    with pytest.raises(UserError, match=r"^skip=0\.5 \(layer 1, 8 of 8 sub-layers\)"):
        to_hf(decoder(specs=[block(skip=0.5)] * 4))


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"num_key_value_heads": 2}, "Llama"),
        ({"tie_word_embeddings": True}, "Llama"),
        ({"norm_affine": False}, "Llama"),
        ({"rope_theta": 500.0, "norm_eps": 1e-2}, "Llama"),
        ({"qkv_bias": True}, "Qwen2"),
        ({"qkv_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}, "Qwen2"),
    ],
)
def test_every_shape_survives_export_and_import(decoder, fields, family, tmp_path):
    ours = decoder("lns", **fields)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    export(ours, tmp_path / "model")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(hf_model) is getattr(transformers, f"{family}ForCausalLM")
    assert_same_logits(ours, hf_model)
    assert_equal_states(ours.state_dict(), before)
    imported = import_hf(tmp_path / "model")
    assert_equal_states(imported.state_dict(), hf_model.state_dict())
    assert (imported.lm_head.weight is imported.model.embed_tokens.weight) == ours.config.tie_word_embeddings
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "key_value_heads")
    for field in (*fields, "vocab_size", "norm_eps", "rope_theta", "qkv_bias", "tie_word_embeddings"):
        assert getattr(imported.config, field) == getattr(ours.config, field)
    assert_same_logits(imported, hf_model)


def test_pre_ln_survives_export_and_import_bit_identically(decoder, tmp_path):
    export(decoder(), tmp_path / "model")
    assert_equal_states(import_hf(tmp_path / "model").state_dict(), decoder().state_dict())


def test_the_folder_states_dtype_length_and_rope_theta(decoder, tmp_path):
    export(decoder("lns", rope_theta=500.0), tmp_path / "model", dtype=torch.bfloat16, max_length=77)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["max_position_embeddings"], config["rope_theta"]) == (77, 500.0)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16
    assert (tmp_path / "model/generation_config.json").is_file()
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}


# Folders and tokenizers ----------------------------------------------------------------------------------------------


def test_a_failed_export_leaves_nothing(decoder, tmp_path, monkeypatch):
    def full_disk(model, folder):
        (folder / "model.safetensors").write_text("half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        export(decoder(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["used", "used/file"])
def test_an_export_overwrites_nothing(decoder, tmp_path, place):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/file").write_text("")
    with pytest.raises(UserError, match="is not an empty folder"):
        export(decoder(), tmp_path / place)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "file"]


def test_an_export_replaces_an_empty_folder(decoder, tmp_path):
    (tmp_path / "model").mkdir()
    export(decoder(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_exported_tokenizer_adds_no_special_tokens(decoder, tmp_path):
    bpe = train_bpe([TEXT] * 20, 300)
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}]
    adds_eos = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    tokenizer = DocumentTokenizer(json.dumps(json.loads(bpe.json) | {"post_processor": adds_eos}), pad_id=0, eos_id=1)
    assert tokenizer.backend.encode("norm").ids[-1] == 1
    export(decoder("lns", vocab_size=bpe.vocab_size), tmp_path / "model", tokenizer)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    encoded = exported(TEXT, return_tensors="pt")
    assert encoded.input_ids[0].tolist() == tokenizer.encode([TEXT])[0][:-1]
    assert exported.decode(encoded.input_ids[0]) == TEXT
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for ids in (exported, hf_model.config, hf_model.generation_config):
        assert (ids.pad_token_id, ids.eos_token_id, ids.bos_token_id) == (0, 1, None)
    assert hf_model.generate(**encoded, max_new_tokens=2, do_sample=False).shape[1] > encoded.input_ids.shape[1]


def test_the_exported_tokenizer_drops_any_step_that_adds_tokens():
    bpe = train_bpe([TEXT] * 20, 300)
    adds = {"type": "BertProcessing", "sep": ["<eos>", 1], "cls": ["<pad>", 0]}
    tokenizer = DocumentTokenizer(json.dumps(json.loads(bpe.json) | {"post_processor": adds}), pad_id=0, eos_id=1)
    assert tokenizer.backend.encode(TEXT).ids[0] == 0
    assert to_hf_tokenizer(tokenizer, bpe.vocab_size, 64)(TEXT)["input_ids"] == bpe.encode([TEXT])[0][:-1]


def test_a_pad_token_beyond_the_embedding_becomes_eos(decoder, tmp_path):
    bpe = train_bpe([TEXT] * 20, 300)
    backend = bpe.backend
    backend.add_special_tokens(["[extra pad]"])
    tokenizer = DocumentTokenizer(backend.to_str(), pad_id=bpe.vocab_size, eos_id=1)
    export(decoder("lns", vocab_size=bpe.vocab_size), tmp_path / "model", tokenizer)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (exported.pad_token_id, len(exported)) == (1, bpe.vocab_size)
    assert PAD in exported.get_vocab()


# Import --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(shaken, tmp_path):
    """`checkpoint(family, **fields)` saves a model of `transformers` in `tmp_path` and returns it."""
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"vocab_size": 101, "num_key_value_heads": 2, "initializer_range": 0.2}

    def save(family, **fields):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**(shape | fields))
        hf_model = shaken(getattr(transformers, f"{family}ForCausalLM")(config).eval(), 0.2)
        hf_model.save_pretrained(tmp_path)
        return hf_model

    return save


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "rope_theta": 777.0}),
        ("Mistral", {"sliding_window": None, "rope_theta": 777.0}),
        ("Qwen2", {}),
    ],
)
def test_an_imported_checkpoint_keeps_its_logits(checkpoint, family, fields, tmp_path):
    hf_model = checkpoint(family, **fields)
    imported = import_hf(tmp_path)
    assert_same_logits(imported, hf_model)
    assert all(parameter.requires_grad for parameter in imported.parameters())
    assert imported.config.rope_theta == fields.get("rope_theta", 10000.0)


@pytest.mark.parametrize(
    ("family", "fields", "reported"),
    [
        ("Llama", {"hidden_act": "gelu"}, ["hidden_act='gelu'"]),
        ("Qwen2", {"is_causal": False}, ["is_causal=False"]),
        ("Llama", {"head_dim": 16}, ["head_dim=16"]),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_type='linear'"]),
        ("Llama", {"attention_bias": True, "mlp_bias": True}, ["attention_bias=True", "mlp_bias=True"]),
        ("Mistral", {"sliding_window": 16}, ["sliding_window=16"]),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 16}, ["sliding_window=16"]),
        ("Gemma", {"head_dim": 12}, ["model_type='gemma'"]),
    ],
)
def test_unsupported_features_of_a_checkpoint_are_reported_by_field(checkpoint, family, fields, reported, tmp_path):
    checkpoint(family, **fields)
    with pytest.raises(UserError) as error:
        import_hf(tmp_path)
    for line, field in zip(str(error.value).splitlines(), reported, strict=True):
        assert field in line


def test_a_missing_checkpoint_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist: name the folder of a model"):
        import_hf(tmp_path / "nowhere")


def test_a_truncated_checkpoint_is_an_error(checkpoint, tmp_path):
    checkpoint("Llama")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or truncated"):
        import_hf(tmp_path)


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"importing needs transformers: pip install 'cod_lightning\[hf\]'"):
        import_hf("x")
