"""The decoder against transformers with the same weights, and its size against the paper's."""

import pytest
import torch
import torch.nn.functional as F

from cod_lightning.config.compose import choices, compose
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import seed_of
from cod_lightning.nn.strategies import block, build_all

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 2}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {"qkv_bias": True, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ],
)
def test_logits_and_gradients_equal_transformers(decoder, family, fields):
    ours = decoder(**fields).double()
    config = ours.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: getattr(config, name) for name in (*names, "tie_word_embeddings")}
    shape |= {"num_key_value_heads": config.key_value_heads, "rms_norm_eps": config.norm_eps}
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**shape)).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):  # theirs computes in float32 whatever the dtype
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
    tokens = torch.randint(101, (2, 23), generator=torch.Generator().manual_seed(2))
    y, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y.backward(cotangent)
    expected.backward(cotangent)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-10)


def test_non_parametric_layer_norm_has_no_weights(decoder):
    model = decoder(norm="layer", norm_affine=False).double()
    assert not [name for name, _ in model.named_parameters() if "norm" in name]
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    torch.testing.assert_close(model.model.norm(x), F.layer_norm(x, (48,), eps=1e-6), rtol=1e-12, atol=1e-12)
    assert model(torch.randint(101, (1, 4))).isfinite().all()


def test_no_token_sees_a_later_one(decoder):
    model, tokens = decoder(), torch.randint(101, (1, 12))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 101
    assert torch.equal(model(tokens)[0, :7], model(changed)[0, :7])
    assert not torch.allclose(model(tokens)[0, 7:], model(changed)[0, 7:])


PUBLISHED = {"60m": 58.1, "71m": 70.6, "130m": 134.1, "250m": 247.4, "350m": 368.0, "1b": 1339, "7b": 6738}


@pytest.mark.parametrize("name", choices("model"))
def test_every_shape_has_its_published_number_of_parameters(name):
    config = compose([f"model={name}"]).model
    config.vocab_size = config.vocab_size or 4096
    with torch.device("meta"):
        model = Decoder(config, build_all({"name": "lns"}, config.num_hidden_layers))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == config.num_parameters()
    if (size := name.removeprefix("llama_")) in PUBLISHED:
        digits = 1 if PUBLISHED[size] < 1000 else 0
        assert round(count / 1e6, digits) == PUBLISHED[size]


@pytest.mark.parametrize(
    "fields",
    [{"qkv_bias": True}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"norm_affine": False}],
)
def test_parameters_are_counted_for_every_option(decoder, fields):
    model = decoder(**fields)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()


@pytest.mark.parametrize(
    ("fields", "message"),
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
def test_an_impossible_shape_is_an_error_that_names_the_field(decoder, fields, message):
    with pytest.raises(ValueError, match=message):
        decoder(**fields)


def test_a_coefficient_of_the_wrong_type_is_an_error_that_names_the_block(decoder):
    config = decoder().config
    specs = [block(), *[block(gain="x")] * (config.num_hidden_layers - 1)]
    with pytest.raises(ValueError, match=r"block 2: attention\.gain='x', expected a finite number"):
        Decoder(config, specs)


def test_seeds_depend_on_the_name():
    assert seed_of(1, "a") != seed_of(1, "b") != seed_of(2, "b")
    assert 0 <= seed_of(1, "a") < 2**63
