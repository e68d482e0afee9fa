"""The decoder against transformers on shared weights, and its size against the paper's."""

import pytest
import torch
import torch.nn.functional as F

from cod_lightning.config.compose import choices, compose
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder, seed_of
from cod_lightning.nn.strategies import build_all

transformers = pytest.importorskip("transformers")


def ours(**changes) -> Decoder:
    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 101,
    }
    config = DecoderConfig(**(settings | changes))
    decoder = build_decoder(config, build_all({"name": "pre_ln"}, 3), seed=0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return decoder


def theirs(decoder: Decoder, family: str):
    config = decoder.config
    settings, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[family]
    twin = model(
        settings(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.key_value_heads,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).double()
    twin.load_state_dict(decoder.state_dict(), strict=True)
    for module in twin.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # Theirs computes in float32 whatever the dtype; the comparison is made in float64.
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    return twin


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 2}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {"qkv_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ],
)
def test_logits_and_gradients_equal_transformers(family, changes):
    decoder = ours(**changes)
    twin = theirs(decoder, family)
    tokens = torch.randint(101, (2, 23), generator=torch.Generator().manual_seed(2))
    y, expected = decoder(tokens), twin(tokens).logits
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y.backward(cotangent)
    expected.backward(cotangent)
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert gradients.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-10)


def test_non_parametric_layer_norm():
    decoder = ours(norm="layer", norm_affine=False)
    assert not [name for name, _ in decoder.named_parameters() if "norm" in name]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    expected = F.layer_norm(x, (48,), eps=1e-6)
    torch.testing.assert_close(decoder.model.norm(x), expected, rtol=1e-12, atol=1e-12)
    assert decoder(torch.randint(101, (1, 4))).isfinite().all()


def test_no_token_sees_a_later_one():
    decoder = ours()
    tokens = torch.randint(101, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 101
    assert torch.equal(decoder(tokens)[0, :7], decoder(changed)[0, :7])
    assert not torch.allclose(decoder(tokens)[0, 7:], decoder(changed)[0, 7:])


PUBLISHED = {"60m": 58.1, "71m": 70.6, "130m": 134.1, "250m": 247.4, "350m": 368.0, "1b": 1339, "7b": 6738}


@pytest.mark.parametrize("name", choices("model"))
def test_every_shape_has_its_published_number_of_parameters(name):
    config = compose([f"model={name}"]).model
    config.vocab_size = config.vocab_size or 4096
    with torch.device("meta"):
        decoder = Decoder(config, build_all({"name": "lns"}, config.num_hidden_layers))
    count = sum(parameter.numel() for parameter in decoder.parameters())
    assert count == config.num_parameters()
    if (size := name.removeprefix("llama_")) in PUBLISHED:
        digits = 1 if PUBLISHED[size] < 1000 else 0
        assert round(count / 1e6, digits) == PUBLISHED[size]


@pytest.mark.parametrize(
    "changes",
    [{"qkv_bias": True}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"norm_affine": False}],
)
def test_parameters_are_counted_for_every_option(changes):
    decoder = ours(**changes)
    assert sum(p.numel() for p in decoder.parameters()) == decoder.config.num_parameters()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_attention_heads": 5}, "model.num_attention_heads=5"),
        ({"num_attention_heads": 16}, "even width"),
        ({"num_key_value_heads": 3}, "model.num_key_value_heads=3"),
        ({"hidden_size": 0}, "model.hidden_size=0"),
        ({"norm": "batch"}, "model.norm='batch'"),
        ({"vocab_size": None}, "model.vocab_size"),
        ({"init_std": -1.0}, "model.init_std"),
        ({"init": "mitchell"}, "model.init='mitchell'"),
        ({"init_cutoff": 0.0}, "model.init_cutoff=0.0"),
    ],
)
def test_impossible_shapes_are_refused_by_field(changes, word):
    with pytest.raises(ValueError, match=word.replace("[", r"\[")):
        ours(**changes)


def test_seeds_depend_on_the_name():
    assert seed_of(1, "a") != seed_of(1, "b") != seed_of(2, "b")
    assert 0 <= seed_of(1, "a") < 2**63
