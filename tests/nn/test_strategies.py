"""Every strategy against a transcription of its published equation, outputs and gradients."""

import copy
import dataclasses
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import silu

from cod_lightning.errors import UserError
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder, rotary, rotate, run_blocks, set_step
from cod_lightning.nn.init import build_decoder, initialise, seed_of
from cod_lightning.nn.spec import SublayerSpec, spec_problems, spec_warnings
from cod_lightning.nn.strategies import (
    STRATEGIES,
    BlockSpec,
    Rates,
    Schedule,
    block,
    build,
    build_all,
    mix_ln,
    register,
)
from operator_calls import OperatorCalls

L, STEP = 8, 2500
CONFIG = DecoderConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=L, num_attention_heads=2, vocab_size=61, norm_eps=1e-3
)


def rms(x, w, eps=1e-3):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


def attention(x, b, rope, norms="", values=lambda v: v):
    """Causal attention with 2 heads of 16 channels; `norms` of q, k, v over the channels of a head."""
    q, k, v = (
        rms(h, b[f"self_attn.{name}_norm.weight"]) if name in norms else h
        for name in "qkv"
        for h in [(x @ b[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (2, 16)).transpose(1, 2)]
    )
    turn = torch.complex(rope[0][:, 8:], rope[1][:, 8:])
    q, k = (torch.complex(h[..., :8], h[..., 8:]) * turn for h in (q, k))
    logits = (q @ k.mH).real / 4
    later = torch.ones(logits.shape[-2:]).triu(1).bool()
    y = logits.masked_fill(later, -math.inf).softmax(-1) @ values(v)
    return y.transpose(1, 2).flatten(2) @ b["self_attn.o_proj.weight"].T


def pre(x, f, g, b, inside=(1, 1), outside=(1, 1)):
    """Pre-LN with factors on the norms and on the sub-layers `f`, `g`; `b` are the parameters of the block."""
    x = x + outside[0] * f(rms(x, b["input_layernorm.weight"]) * inside[0])
    return x + outside[1] * g(rms(x, b["post_attention_layernorm.weight"]) * inside[1])


def post(x, f, g, b, alpha=1.0, beta=1.0):
    x = rms(alpha * x + f(x), b["attention_residual.sum_norm.weight"])
    return rms(beta * x + g(x), b["ffn_residual.sum_norm.weight"])


def sandwich(x, f, g, b):
    x = x + rms(f(rms(x, b["input_layernorm.weight"])), b["attention_residual.branch_norm.weight"])
    return x + rms(g(rms(x, b["post_attention_layernorm.weight"])), b["ffn_residual.branch_norm.weight"])


def peri(x, f, g, b, layer):
    return sandwich(rms(x, b["entry_norm.weight"]) if layer == 1 else x, f, g, b)


def grouped(x, f, g, b):
    def norm(x, w):
        return torch.cat([rms(part, 1.0) for part in x.split(4, dim=-1)], -1) * w

    x = x + f(norm(x, b["input_layernorm.weight"]))
    return x + g(norm(x, b["post_attention_layernorm.weight"]))


def before_ln(x, f, g, b, s):
    x = x + f(rms(x * s, b["input_layernorm.weight"]))
    return x + g(rms(x * s, b["post_attention_layernorm.weight"]))


def after_residual(x, f, g, b, s):
    x = s * (x + f(rms(x, b["input_layernorm.weight"])))
    return s * (x + g(rms(x, b["post_attention_layernorm.weight"])))


def gpas_after(x, f, g, b, s=1.0):
    x = x + f(rms(x, b["input_layernorm.weight"]) * s)
    x = x - silu(b["gate"]) * x.detach()
    x = x + g(rms(x, b["post_attention_layernorm.weight"]) * s)
    return x - silu(b["gate"]) * x.detach()


def gpas_before(x, f, g, b, alpha):
    x = rms(alpha * (x - silu(b["gate"]) * x.detach()) + f(x), b["attention_residual.sum_norm.weight"])
    return rms(alpha * (x - silu(b["gate"]) * x.detach()) + g(x), b["ffn_residual.sum_norm.weight"])


def reordered(x, f, g, b):
    x = x + rms(f(x), b["attention_residual.branch_norm.weight"])
    return x + rms(g(x), b["ffn_residual.branch_norm.weight"])


def keel(x, f, g, b, alpha):
    x = rms(alpha * x + f(rms(x, b["input_layernorm.weight"])), b["attention_residual.sum_norm.weight"])
    return rms(alpha * x + g(rms(x, b["post_attention_layernorm.weight"])), b["ffn_residual.sum_norm.weight"])


def mixed(x, f, g, b, skip, branch):
    x = skip * x + branch * f(rms(x, b["input_layernorm.weight"]))
    return skip * x + branch * g(rms(x, b["post_attention_layernorm.weight"]))


def normless(x, f, g, b, scales):
    x = x + scales[0] * f(x)
    return x + scales[1] * g(x)


def hybrid(x, f, g, b):
    z = rms(x + f(x, norms="qkv"), b["post_attention_layernorm.weight"])
    return z + g(z)


def hybrid_star(x, f, g, b, layer):
    return pre(x, lambda h: f(h, norms="qkv"), g, b) if layer == 1 else hybrid(x, f, g, b)


def span(x, f, g, b, layer):
    h = rms(x, b["input_layernorm.weight"]) if layer == 1 else x
    y = rms(x + f(h), b["attention_residual.sum_norm.weight"])
    return rms(x + g(y), b["ffn_residual.sum_norm.weight"])


def mixed_x0(x, f, g, b, inside=(1, 1)):
    return pre(b["embedding_skip"][0] * x + b["embedding_skip"][1] * b["x0"], f, g, b, inside)


def normalised_values(v, b):
    s, a1, a2 = b["self_attn.value_mix"]
    return s * (a1 * v + a2 * b["v1"]) / (a1**2 + a2**2 + 1e-8).sqrt()


def value_residual(x, f, g, b, values, inside=(1, 1)):
    return pre(x, lambda h: f(h, values=lambda v: values(v, b)), g, b, inside)


def warmed(layer):
    """The factor of ProRes at step `STEP`."""
    return min(STEP / (1000 * layer), 1)


def bounded(x, f, g, b, function, inside=(1, 1)):
    """Pre-LN with a function of x and the parameters of a norm, by name, in place of norms."""

    def norm(h, name):
        return function(h, lambda parameter: b[f"{name}.{parameter}"])

    x = x + f(inside[0] * norm(x, "input_layernorm"))
    return x + g(inside[1] * norm(x, "post_attention_layernorm"))


def dyt(x, p):
    return p("weight") * torch.tanh(p("alpha") * x) + p("bias")


def derf(x, p):
    return p("weight") * torch.erf(p("alpha") * x + p("shift")) + p("bias")


def bhyt(x, p, kappa=10.0):
    return p("weight") * torch.tanh(p("alpha") / (kappa * (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()) * x)


def learned(b, name):
    return b[f"attention_residual.{name}"], b[f"ffn_residual.{name}"]


EQUATIONS = {
    "pre_ln": ({}, lambda *a, layer: pre(*a)),
    "post_ln": ({}, lambda *a, layer: post(*a)),
    "sandwich_ln": ({}, lambda *a, layer: sandwich(*a)),
    "peri_ln": ({}, peri),
    "peri_ln plain": ({"embedding_norm": False}, lambda *a, layer: sandwich(*a)),
    "mix_ln": ({}, lambda *a, layer: (post if layer <= L / 4 else pre)(*a)),
    "group_ln": ({}, lambda *a, layer: grouped(*a)),
    "deep_norm": ({}, lambda *a, layer: post(*a, (2 * L) ** 0.25, (2 * L) ** 0.25)),
    "deep_norm_released": ({}, lambda *a, layer: post(*a, 2.8284271247461903, 2.8284271247461903)),
    "admin": ({}, lambda *a, layer: post(*a, *learned(a[3], "skip"))),
    "lns": ({}, lambda *a, layer: pre(*a, inside=2 * [1 / math.sqrt(layer)])),
    "lns before_ln": ({"position": "before_ln"}, lambda *a, layer: before_ln(*a, 1 / math.sqrt(layer))),
    "lns after_branch": (
        {"position": "after_branch"},
        lambda *a, layer: pre(*a, outside=2 * [1 / math.sqrt(layer)]),
    ),
    "lns after_residual": ({"position": "after_residual"}, lambda *a, layer: after_residual(*a, 1 / math.sqrt(layer))),
    "lns only_attention": (
        {"position": "only_attention"},
        lambda *a, layer: pre(*a, inside=(1 / math.sqrt(layer), 1)),
    ),
    "lns only_ffn": ({"position": "only_ffn"}, lambda *a, layer: pre(*a, inside=(1, 1 / math.sqrt(layer)))),
    "lns_learnable": ({}, lambda *a, layer: pre(*a)),
    "lns_as_rates": ({}, lambda *a, layer: pre(*a)),
    "lns_as_norm_weights": ({}, lambda *a, layer: pre(*a)),
    "lns_init_only": ({}, lambda *a, layer: pre(*a)),
    "lns_rate_only": ({}, lambda *a, layer: pre(*a)),
    "complete_p": ({}, lambda *a, layer: pre(*a, outside=2 * [1 / (L / 2)])),
    "depth_mup": ({"base_depth": 3}, lambda *a, layer: pre(*a, outside=2 * [math.sqrt(3 / L)])),
    "olmo2": ({}, lambda *a, layer: reordered(*a)),
    "depth_scaled_sandwich": ({}, lambda *a, layer: sandwich(*a)),
    "keel": ({}, lambda *a, layer: pre(*a) if layer == 1 else keel(*a, 2 * L)),
    "deep_loop": ({}, lambda *a, layer: post(*a, math.sqrt(2 * L), math.sqrt(2 * L))),
    "minicpm": ({}, lambda *a, layer: pre(*a, outside=2 * [1.4 / math.sqrt(L)])),
    "granite": ({}, lambda *a, layer: pre(*a, outside=2 * [0.22])),
    "esm_c": ({}, lambda *a, layer: pre(*a, outside=2 * [1 / math.sqrt(L / 36)])),
    "norm_preserving": (
        {},
        lambda *a, layer: mixed(*a, math.sqrt(1 - math.log(2) / L), math.sqrt(math.log(2) / L)),
    ),
    "rezero": ({}, lambda *a, layer: normless(*a, learned(a[3], "branch_scale"))),
    "nf_residual": ({}, lambda *a, layer: normless(*a, 2 * [0.2])),
    "hybrid_norm": ({}, lambda *a, layer: hybrid(*a)),
    "hybrid_norm star": ({"star": True}, hybrid_star),
    "span_norm": ({}, span),
    "qk_norm": ({}, lambda x, f, *a, layer: pre(x, lambda h: f(h, norms="qk"), *a)),
    "qk_norm on olmo2": ({"base": "olmo2"}, lambda x, f, *a, layer: reordered(x, lambda h: f(h, norms="qk"), *a)),
    "x0_mix": ({}, lambda *a, layer: mixed_x0(*a)),
    "x0_mix on lns": ({"base": "lns"}, lambda *a, layer: mixed_x0(*a, [1 / math.sqrt(layer)] * 2)),
    "value_residual": ({}, lambda *a, layer: value_residual(*a, normalised_values)),
    "value_residual on lns": (
        {"base": "lns"},
        lambda *a, layer: value_residual(*a, normalised_values, 2 * [1 / math.sqrt(layer)]),
    ),
    "value_residual mean": (
        {"form": "mean"},
        lambda *a, layer: value_residual(*a, lambda v, b: 0.5 * b["v1"] + 0.5 * v),
    ),
    "dyt": ({}, lambda *a, layer: bounded(*a, dyt)),
    "dyt on lns": ({"base": "lns"}, lambda *a, layer: bounded(*a, dyt, 2 * [1 / math.sqrt(layer)])),
    "dyt on before_ln": (
        {"base": "lns", "position": "before_ln"},
        lambda *a, layer: bounded(*a, lambda x, p: dyt(x / math.sqrt(layer), p)),
    ),
    "derf": ({}, lambda *a, layer: bounded(*a, derf)),
    "bhyt": ({}, lambda *a, layer: bounded(*a, bhyt)),
    "bhyt on before_ln": (
        {"base": "lns", "position": "before_ln"},
        lambda *a, layer: bounded(*a, lambda x, p: bhyt(x / math.sqrt(layer), p)),
    ),
    "layer_scale": ({}, lambda *a, layer: pre(*a, outside=learned(a[3], "branch_scale"))),
    "skip_init": ({}, lambda *a, layer: pre(*a, outside=learned(a[3], "branch_scale"))),
    "ds_init": ({}, lambda *a, layer: pre(*a)),
    "scaled_init": ({}, lambda *a, layer: pre(*a)),
    "scaled_init on lns": ({"base": "lns"}, lambda *a, layer: pre(*a, inside=2 * [1 / math.sqrt(layer)])),
    "gpas": ({}, lambda *a, layer: gpas_after(*a)),
    "pro_res": ({}, lambda *a, layer: pre(*a, outside=2 * [warmed(layer)])),
    "pro_res on skip_init": (
        {"base": "skip_init"},
        lambda *a, layer: pre(*a, outside=[warmed(layer) * scale for scale in learned(a[3], "branch_scale")]),
    ),
    "pro_res on deep_norm": (
        {"base": "deep_norm"},
        lambda x, f, g, b, layer: post(
            x, lambda h: warmed(layer) * f(h), lambda h: warmed(layer) * g(h), b, (2 * L) ** 0.25, (2 * L) ** 0.25
        ),
    ),
    "gpas on lns": ({"base": "lns"}, lambda *a, layer: gpas_after(*a, 1 / math.sqrt(layer))),
    "gpas on mix_ln": (
        {"base": "mix_ln"},
        lambda *a, layer: gpas_before(*a, 1) if layer <= L / 4 else gpas_after(*a),
    ),
    "gpas on deep_norm": ({"base": "deep_norm"}, lambda *a, layer: gpas_before(*a, (2 * L) ** 0.25)),
}
"""Options and equation (x, f, g, b, layer) of every strategy."""


def decoder_of(case: str, config: DecoderConfig = CONFIG) -> Decoder:
    specs = build_all({"name": case.split()[0], **EQUATIONS[case][0]}, config.num_hidden_layers)
    return build_decoder(config, specs, seed=3)


def test_every_strategy_has_its_equation_here():
    assert {case.split()[0] for case in EQUATIONS} == set(STRATEGIES)


@pytest.mark.parametrize("case", EQUATIONS)
def test_outputs_and_gradients_equal_the_published_equation(case, shaken):
    decoder = shaken(decoder_of(case).double(), 0.1)
    set_step(decoder, STEP)
    generator = torch.Generator().manual_seed(0)
    for layer, ours in enumerate(decoder.model.layers, start=1):
        theirs = copy.deepcopy(ours)
        parameters = dict(theirs.named_parameters())
        x = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        x0 = torch.randn(2, 5, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        v1 = torch.randn(2, 2, 5, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        parameters |= {name: h.detach().clone().requires_grad_() for name, h in (("x0", x0), ("v1", v1))}
        rope = rotary(5, 16, 1e4, x)
        y, _ = ours(x, rope, None, x0, v1)
        f = partial(attention, b=parameters, rope=rope)
        expected = EQUATIONS[case][1](z, f, theirs.mlp, parameters, layer=layer)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        y.backward(cotangent)
        expected.backward(cotangent)
        torch.testing.assert_close(x.grad, z.grad, rtol=1e-10, atol=1e-12)
        for shared, name in ((x0, "x0"), (v1, "v1")):
            assert (shared.grad is None) == (parameters[name].grad is None)
            if shared.grad is not None:
                torch.testing.assert_close(shared.grad, parameters[name].grad, rtol=1e-10, atol=1e-12)
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["dyt", "derf", "bhyt"])
def test_the_final_norm_has_the_kind_of_the_last_block(name):
    assert decoder_of(name).model.norm.kind == name


def test_the_final_norm_does_not_have_the_kind_of_the_first_block():
    specs = [*build_all("pre_ln", L)[:-1], build("derf", L, L, {})]
    assert build_decoder(CONFIG, specs, seed=3).model.norm.kind == "derf"


def test_a_name_belongs_to_one_module(monkeypatch):
    monkeypatch.setattr("cod_lightning.nn.strategy_lookup.STRATEGIES", {"lns": STRATEGIES["lns"]})

    def lns(layer, depth):
        return block(gain=0.5)

    with pytest.raises(
        UserError, match=r"norm='lns' is a strategy of cod_lightning\.nn\.strategies: give the function"
    ):
        register(lns)
    with pytest.raises(UserError, match="has no name to be registered under"):
        register(partial(lns))

    def mine(layer, depth):
        return block()

    assert register(register(mine)) is mine  # a cell of a notebook that runs twice
    mine.__module__ = "__main__"
    again = copy.copy(mine)  # norm=script:mine, while the script runs
    again.__module__ = "script"
    assert register(again) is again


@pytest.mark.parametrize("base", ["peri_ln", "post_ln", "hybrid_norm"])
def test_every_alpha_starts_at_the_option_of_its_sublayer(base):
    specs = build_all({"name": "dyt", "base": base, "alpha": 0.2, "attention_alpha": 0.8}, L)
    alphas = {n: p.item() for n, p in build_decoder(CONFIG, specs, seed=3).named_parameters() if n.endswith("alpha")}
    attention = re.compile("entry_norm|input_layernorm|self_attn|attention_residual")
    assert alphas == {name: pytest.approx(0.8 if attention.search(name) else 0.2) for name in alphas}
    assert "model.norm.alpha" in alphas


def test_every_block_of_x0_mix_reads_the_embeddings():
    decoder = decoder_of("x0_mix")
    x = torch.randn(2, 5, 32, requires_grad=True)
    with torch.no_grad():
        for block_ in decoder.blocks:
            block_.embedding_skip.copy_(torch.tensor([0.0, 1.0]))
    rope = rotary(5, 16, 1e4, x)
    expected, _ = decoder.blocks[-1](x, rope, None, x)
    torch.testing.assert_close(run_blocks(decoder.blocks, x, rope, None), expected)


def test_every_block_of_value_residual_reads_the_values_of_the_first():
    blocks = decoder_of("value_residual").blocks
    with torch.no_grad():
        for block_ in blocks:
            block_.self_attn.value_mix.copy_(torch.tensor([1.0, 0.0, 1.0]))
    x, rope = torch.randn(2, 5, 32), rotary(5, 16, 1e4, torch.ones(1))
    v1 = blocks[0].self_attn.v_proj(blocks[0].input_layernorm(x)).unflatten(-1, (2, 16)).transpose(1, 2)
    y = x
    for block_ in blocks:
        y, first = block_(y, rope, None, None, v1)
        assert torch.equal(first, v1)
    torch.testing.assert_close(run_blocks(blocks, x, rope, None), y)


@pytest.mark.parametrize("case", [case for case in EQUATIONS if case.split()[0] not in ("rezero", "pro_res")])
def test_every_layer_changes_its_input(case):
    decoder = decoder_of(case)
    seen = {}
    decoder(torch.randint(61, (2, 9)), hook=lambda name, layer, x: seen.__setitem__((name, layer), x))
    before = seen["embedding", 0]
    for layer in range(1, L + 1):
        after = seen["residual", layer]
        assert (after - before).norm() > 1e-6 * before.norm(), layer
        assert seen["attention", layer].norm() > 0
        assert seen["ffn", layer].norm() > 0
        before = after


@pytest.mark.parametrize("name", ["rezero", "pro_res"])
def test_a_branch_that_starts_at_zero_is_the_identity(name):
    seen = {}
    decoder_of(name)(torch.randint(61, (2, 9)), hook=lambda name, layer, x: seen.__setitem__((name, layer), x))
    assert torch.equal(seen["residual", L], seen["embedding", 0])


@pytest.mark.parametrize("case", EQUATIONS)
def test_initialisation_sets_every_parameter(case):
    expected = decoder_of(case)
    decoder = expected.empty_like()
    for parameter in decoder.parameters():
        parameter.data.fill_(float("nan"))
    initialise(decoder, seed=3)
    for name, parameter in decoder.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


@pytest.mark.parametrize("case", EQUATIONS)
def test_a_bfloat16_model_survives_a_checkpoint(case, tmp_path):
    decoder = decoder_of(case).to(torch.bfloat16)
    torch.save(decoder.state_dict(), tmp_path / "decoder.pt")
    loaded = decoder.empty_like().to(torch.bfloat16)
    loaded.load_state_dict(torch.load(tmp_path / "decoder.pt", weights_only=True))
    tokens = torch.randint(61, (2, 9))
    assert torch.equal(loaded(tokens), decoder(tokens))


@pytest.mark.parametrize("case", EQUATIONS)
def test_constants_are_not_buffers(case):
    assert not list(decoder_of(case).buffers())


def test_bfloat16_does_not_round_the_gains_of_lns():
    gains = [block.input_layernorm.gain for block in decoder_of("lns").to(torch.bfloat16).blocks]
    assert gains == pytest.approx([1 / math.sqrt(layer) for layer in range(1, L + 1)], rel=1e-15)


OUTPUT_SCALES = {
    "ds_init": lambda layer: (2 * layer) ** -0.5,
    "scaled_init": lambda layer: (2 * L) ** -0.5,
    "deep_norm": lambda layer: (8 * L) ** -0.25,
    "deep_norm_released": lambda layer: (8 * L) ** 0.25,
    "deep_loop": lambda layer: (8 * L) ** -0.5,
}


@pytest.mark.parametrize("name", OUTPUT_SCALES)
def test_initialisation_rescales_the_output_projections(name):
    plain, scaled = decoder_of("pre_ln"), decoder_of(name)
    for layer in range(1, L + 1):
        for projection in ("self_attn.o_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj"):
            parameter = f"model.layers.{layer - 1}.{projection}.weight"
            expected = plain.get_parameter(parameter)
            if name.startswith("deep_"):  # Xavier-normal instead of a standard deviation of 0.02
                expected = expected / 0.02 * math.sqrt(2 / sum(expected.shape))
            factor = 1 if projection.endswith(("q_proj", "k_proj")) else OUTPUT_SCALES[name](layer)
            torch.testing.assert_close(scaled.get_parameter(parameter), expected * factor)


@pytest.mark.parametrize("name", ["lns_as_rates", "lns_init_only"])
def test_initialisation_rescales_the_projections_behind_the_norms(name):
    plain, scaled = decoder_of("pre_ln"), decoder_of(name)
    for parameter, expected in plain.named_parameters():
        layer = int(parameter.split(".")[2]) + 1 if ".layers." in parameter else 1
        factor = layer**-0.5 if re.search("[qkv]_proj|gate_proj|up_proj", parameter) else 1.0
        assert torch.equal(scaled.get_parameter(parameter), expected * factor), parameter


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("lns_as_norm_weights", "post_attention_layernorm.weight", lambda layer: layer**-0.5),
        ("lns_learnable", "input_layernorm.weight", lambda layer: layer**-0.5),
        ("depth_scaled_sandwich", "ffn_residual.branch_norm.weight", lambda layer: L**-0.5),
        ("rezero", "attention_residual.branch_scale", lambda layer: 0),
        ("layer_scale", "ffn_residual.branch_scale", lambda layer: 1e-4),
        ("skip_init", "ffn_residual.branch_scale", lambda layer: L**-0.5),
        ("gpas", "gate", lambda layer: 0),
        ("dyt", "input_layernorm.alpha", lambda layer: 0.5),
        ("derf", "post_attention_layernorm.shift", lambda layer: 0),
        ("bhyt", "input_layernorm.alpha", lambda layer: 1),
    ],
)
def test_initial_values_of_learned_coefficients(name, parameter, value):
    for layer, block_ in enumerate(decoder_of(name).blocks, start=1):
        assert block_.get_parameter(parameter).unique().item() == pytest.approx(value(layer))


def test_embeddings_have_a_standard_deviation_of_their_own():
    decoder = build_decoder(dataclasses.replace(CONFIG, embedding_std=0.5, init_std=0.02), build_all("pre_ln", L), 3)
    assert float(decoder.model.embed_tokens.weight.detach().std()) == pytest.approx(0.5, rel=0.05)
    assert float(decoder.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_scaled_initialisation_of_olmo(tied):
    """The official "mitchell": 1/sqrt(d), the last projections with 1/sqrt(2 inputs (l + 1)), l from 0; cut at 3."""
    config = dataclasses.replace(CONFIG, init_cutoff=3.0, tie_word_embeddings=tied)
    draws = build_decoder(
        dataclasses.replace(config, init_std=1.0, embedding_std=1.0), build_all({"name": "pre_ln"}, L), 3
    )
    ours = build_decoder(dataclasses.replace(config, init="fan_in"), build_all({"name": "ds_init"}, L), 3)
    d, ff_in = config.hidden_size, config.intermediate_size
    for name, weight in ours.named_parameters():
        if weight.ndim == 2:
            std = 1 / math.sqrt(d)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                layer = int(name.split(".")[2])
                std = 1 / math.sqrt(2 * (d if "o_proj" in name else ff_in) * (layer + 1))
            torch.testing.assert_close(weight, draws.get_parameter(name) * std)
    everything = torch.cat([weight.detach().flatten() for weight in draws.parameters() if weight.ndim == 2])
    # 190 of 70,000 normal numbers lie beyond 3; truncated there, their standard deviation is 0.9866.
    assert 2.9 < everything.abs().max() <= 3
    assert float(everything.std()) == pytest.approx(0.9866, abs=0.01)


def test_admin_profiles_the_variance_of_all_earlier_branches():
    config = dataclasses.replace(CONFIG, init_std=0.3)
    decoder = decoder_of("admin", config)
    residuals = [r for layer in decoder.model.layers for r in (layer.attention_residual, layer.ffn_residual)]
    skips = [residual.skip.detach().clone() for residual in residuals]
    for residual in residuals:
        residual.skip.data.fill_(1)
    generator = torch.Generator().manual_seed(seed_of(3, "admin profile"))
    branches = []
    decoder(
        torch.randint(61, (4, 64), generator=generator),
        hook=lambda name, layer, x: branches.append(x.detach().var()) if name in ("attention", "ffn") else None,
    )
    for index, skip in enumerate(skips):
        expected = (1 + sum(float(v.detach()) for v in branches[:index])) ** 0.5
        torch.testing.assert_close(skip, torch.full((32,), expected), rtol=1e-5, atol=0)
    assert skips[-1][0] > 1.5 * skips[0][0]
    assert torch.equal(decoder_of("admin", config).model.layers[-1].ffn_residual.skip, skips[-1])


def test_strategies_with_one_seed_share_their_random_weights():
    ours, theirs = decoder_of("lns"), decoder_of("sandwich_ln")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    other = build_decoder(CONFIG, build_all({"name": "lns"}, L), seed=4)
    assert not torch.equal(other.lm_head.weight, ours.lm_head.weight)


@pytest.mark.parametrize("depth", [12, 24])
def test_deep_norm_and_mix_ln_have_the_constants_of_their_depth(depth):
    assert build("deep_norm", 1, depth, {}).attention.skip == pytest.approx({12: 2.213, 24: 2.632}[depth], abs=1e-3)
    beta = build("deep_norm_released", 1, depth, {}).ffn.xavier
    assert beta == pytest.approx((8 * depth) ** 0.25)
    post = [not build("mix_ln", layer, depth, {}).attention.pre_norm for layer in range(1, depth + 1)]
    assert sum(post) == {12: 3, 24: 6}[depth]
    assert post == sorted(post, reverse=True)


PUBLISHED = {
    ("keel", 1, 24): {"skip": 1.0, "pre_norm": True, "sum_norm": False},
    ("keel", 2, 24): {"skip": 48.0, "pre_norm": True, "sum_norm": True},
    ("deep_loop", 3, 18): {"skip": 6.0, "xavier": 1 / 12, "pre_norm": False, "sum_norm": True},
    ("minicpm", 5, 40): {"branch_scale": 0.2213594},
    ("granite", 5, 40): {"branch_scale": 0.22},
    ("esm_c", 5, 36): {"branch_scale": 1.0},
    ("esm_c", 5, 81): {"branch_scale": 2 / 3},
    ("norm_preserving", 5, 10): {"skip": 0.9647203, "branch_scale": 0.2632769},
    ("olmo2", 5, 16): {"pre_norm": False, "branch_norm": True, "branch_norm_weight": 1.0},
    ("depth_scaled_sandwich", 5, 64): {"pre_norm": True, "branch_norm": True, "branch_norm_weight": 0.125},
    ("rezero", 5, 12): {"pre_norm": False, "branch_scale": 0.0},
    ("nf_residual", 1, 12): {"pre_norm": False, "branch_scale": 0.2, "input_init": 1.0},
    ("nf_residual", 13, 26): {"branch_scale": 0.2, "input_init": 0.7142857},
}
"""Coefficients of attention in a layer at a depth, as numbers; 1 + 0.04 * 24 is 1.4 squared."""


@pytest.mark.parametrize(("case", "expected"), PUBLISHED.items(), ids=lambda value: "-".join(map(str, value)))
def test_coefficients_have_their_published_values(case, expected):
    name, layer, depth = case
    spec = build(name, layer, depth, {})
    assert {field: getattr(spec.attention, field) for field in expected} == pytest.approx(expected, rel=1e-6)
    if name != "nf_residual":
        assert spec.ffn == spec.attention


def test_nf_residual_divides_by_the_deviation_after_all_earlier_branches():
    """Initial weights and rates divide: the branch after k others reads x / b, b^2 = 1 + 0.04 k."""
    for k, part in enumerate(part for spec in build_all("nf_residual", 4) for part in spec.sublayers):
        b = math.sqrt(1 + 0.04 * k)
        assert part.input_init == pytest.approx(1 / b)
        assert dataclasses.asdict(part.input_rates) == pytest.approx(
            {"lr": 1 / b, "eps": b, "weight_decay": b, "clip": 1 / b}
        )


@pytest.mark.parametrize(("fraction", "depth", "post"), [(15 / 22, 22, 15), (0.29, 100, 29), (0.3, 8, 2), (1.0, 8, 8)])
def test_mix_ln_starts_with_a_fraction_of_post_ln_blocks(fraction, depth, post):
    specs = [mix_ln(layer, depth, fraction) for layer in range(1, depth + 1)]
    assert [not spec.attention.pre_norm for spec in specs] == [True] * post + [False] * (depth - post)


def test_mix_ln_has_n_post_ln_blocks_of_d_for_the_fraction_n_over_d():
    for depth in range(1, 101):
        for post in range(1, depth):
            last_post_ln, first_pre_ln = mix_ln(post, depth, post / depth), mix_ln(post + 1, depth, post / depth)
            assert (last_post_ln.attention.pre_norm, first_pre_ln.attention.pre_norm) == (False, True), (post, depth)


def returns_nothing(layer, depth):
    return None


def leaves(layer, depth):
    raise SystemExit(0)


def rate_of_zero(layer, depth):
    return block(input_rates=Rates(lr=0.0, eps=math.nan), input_init=-1.0, skip=10**400)


def skip_without_norm(layer, depth):
    return block(pre_norm=False, skip_from="pre_norm")


def input_of_zero(layer, depth):
    return block(input_scale=0.0)


def alpha_of_a_norm(layer, depth):
    return block(norm_alpha=0.5)


def norm_of_heads(layer, depth):
    return dataclasses.replace(block(), head_norm="kv")


def no_schedule(layer, depth):
    return BlockSpec(block(branch_schedule=0.5).attention, block(branch_schedule=Schedule(3, end=0)).ffn)


def one_argument(layer):
    return block()


def test_a_custom_strategy_is_imported_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_norms.py").write_text(
        "from cod_lightning.nn.strategies import block\n"
        "def half(layer, depth, power=0.25):\n    return block(gain=layer**-power)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    specs = build_all({"name": "my_norms:half", "power": 0.5}, 4)
    assert specs == build_all({"name": "lns"}, 4)
    assert isinstance(build("my_norms:half", 2, 4, {}), BlockSpec)


def test_a_strategy_without_options_is_built_by_its_name():
    assert build_all("lns", 4) == build_all({"name": "lns"}, 4)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        ({"name": "mixln"}, ["norm='mixln'", "did you mean 'mix_ln'", "pre_ln"]),
        ({"name": "lns", "position": "after"}, ["norm.position='after'", "after_branch"]),
        ({"name": "lns", "positon": "after_ln"}, ["norm.positon", "did you mean 'position'"]),
        ({"name": "pre_ln", "alpha": 1}, ["norm.alpha", "it has none"]),
        ({"name": "mix_ln", "fraction": 2.0}, ["norm.fraction=2.0", "between 0 and 1"]),
        ({"name": "mix_ln", "fraction": "x"}, ["norm.fraction='x'", "wrong type"]),
        ({"name": "group_ln", "groups": 0}, ["attention.groups=0, expected a whole number from 1"]),
        ({"name": "gpas", "base": "nope"}, ["norm.base='nope'", "known:"]),
        ({"name": "gpas", "base": "lns", "fraction": 0.5}, ["norm.fraction", "position"]),
        ({"name": "no.such:f"}, ["norm='no.such:f'", "package.module:function"]),
        ({"name": "math:nothing"}, ["norm='math:nothing'", "package.module:function"]),
        ({"name": "math:pi"}, ["is not a function"]),
        ({"name": "test_strategies:returns_nothing"}, ["returned NoneType", "BlockSpec"]),
        (
            {"name": "test_strategies:rate_of_zero"},
            [
                *("attention.input_rates.lr=0.0, expected a finite number above 0", "ffn.input_rates.eps=nan"),
                "ffn.input_init=-1.0, expected a finite number above 0",
                "000... (401 characters), expected a finite number,",  # an integer too large for a float
            ],
        ),
        (
            {"name": "test_strategies:no_schedule"},
            [
                "attention.branch_schedule=0.5, expected Schedule",
                "ffn.branch_schedule.function=3, expected a function of the step",
                "ffn.branch_schedule.end=0, expected a whole number from 1",
            ],
        ),
        ({"name": "pro_res", "schedule": "cosine"}, ["norm.schedule='cosine'", "linear", "stagewise_sqrt_L"]),
        ({"name": "pro_res", "warmup": 0}, ["norm.warmup=0 must be at least 1"]),
        ({"name": "pro_res", "base": "admin"}, ["norm='pro_res'", "norm.base, which sets learned_skip itself"]),
        ({"name": "ds_init", "base": "deep_norm"}, ["norm='ds_init'", "norm.base, which sets xavier itself"]),
        (
            {"name": "lns", "position": "after_residual", "base": "admin"},
            ["norm='lns'", "which sets learned_skip itself"],
        ),
        ({"name": "scaled_init", "base": "deep_norm"}, ["norm='scaled_init'", "norm.base, which sets xavier itself"]),
        ({"name": "lns", "base": "lns_as_rates"}, ["norm='lns'", "norm.base, which sets input_rates itself"]),
        ({"name": "lns", "base": "lns_learnable"}, ["norm='lns'", "norm.base, which sets pre_norm_weight itself"]),
        ({"name": "lns", "base": "lns_init_only"}, ["norm='lns'", "norm.base, which sets input_init itself"]),
        ({"name": "lns", "base": "lns_rate_only", "position": "only_ffn"}, ["which sets input_rates itself"]),
        ({"name": "norm_preserving", "beta": 4.5}, ["norm.beta=4.5", "between 0 and the number of blocks, 4"]),
        ({"name": "complete_p", "base_depth": 0}, ["norm.base_depth=0", "at least 1"]),
        ({"name": "qk_norm", "base": "hybrid_norm"}, ["norm='qk_norm'", "norm.base", "sets head_norm itself"]),
        ({"name": "test_strategies:leaves"}, ["raised SystemExit for layer=1"]),
        ({"name": "test_strategies:skip_without_norm"}, ["ffn.skip_from='pre_norm' without pre_norm"]),
        ({"name": "lns", "base": "post_ln"}, ["attention.gain=0.7", "ffn.gain=0.7", "without pre_norm", "layer=2"]),
        ({"name": "lns", "position": "before_ln", "base": "olmo2"}, ["attention.input_scale=0.7", "without pre_norm"]),
        ({"name": "test_strategies:norm_of_heads"}, ["block.head_norm='kv', expected one of no, qk, qkv"]),
        ({"name": "value_residual", "form": "sum"}, ["norm.form='sum'", "known: learned, mean"]),
        ({"name": "dyt", "base": "group_ln"}, ["norm_kind='dyt' with groups"]),
        ({"name": "dyt", "alpha": 0.0}, ["attention.norm_alpha=0.0, expected a finite number above 0"]),
        ({"name": "dyt", "attention_alpha": "x"}, ["attention.norm_alpha='x', expected a finite number"]),
        ({"name": "dyt", "alpha": True}, ["attention.norm_alpha=True, expected a finite number"]),
        ({"name": "skip_init", "init": [1]}, ["attention.branch_scale=[1], expected a finite number"]),
        ({"name": "bhyt", "base": "dyt"}, ["norm='bhyt'", "norm.base", "sets norm_kind itself"]),
        ({"name": "test_strategies:input_of_zero"}, ["attention.input_scale=0.0, expected a finite number above 0"]),
        ({"name": "test_strategies:alpha_of_a_norm"}, ["norm_alpha without a bounded norm_kind"]),
        ({"name": "test_strategies:one_argument"}, ["cannot be called as (layer, depth"]),
    ],
)
def test_errors_name_strategy_and_option(norm, words, monkeypatch):
    monkeypatch.syspath_prepend(str(__file__).rsplit("/", 1)[0])
    with pytest.raises(UserError) as error:
        build_all(norm, 4)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("coefficients", "problem"),
    [
        ({"pre_norm": False, "groups": 4}, "ffn.groups=4 without pre_norm"),
        ({"pre_norm": False, "pre_norm_weight": 0.3}, "ffn.pre_norm_weight=0.3 without pre_norm"),
        ({"pre_norm": False, "norm_rates": Rates(lr=2.0)}, "ffn.norm_rates=Rates"),
        ({"branch_norm_weight": 0.3}, "ffn.branch_norm_weight=0.3 without branch_norm"),
        ({"learned_skip": True, "skip": 0.3}, "ffn.skip=0.3 with learned_skip"),
        ({"xavier": 0.5, "output_init": 0.1}, "ffn.output_init=0.1 with xavier"),
    ],
)
def test_a_coefficient_without_effect_is_a_problem(coefficients, problem):
    assert [line for line in spec_problems(block(**coefficients)) if line.startswith(problem)]


TWICE = "LayerNorm Scaling and depth-scaled initialisation both damp the deep blocks"
UNDONE = "norms of the branches undo the initial scale of the output projections"


@pytest.mark.parametrize("name", ["scaled_init", "ds_init"])
@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("pre_ln", None),
        ("nf_residual", None),
        *((base, TWICE) for base in ("lns", "lns_as_rates", "lns_as_norm_weights", "lns_learnable", "lns_init_only")),
        *((base, UNDONE) for base in ("peri_ln", "sandwich_ln", "olmo2", "depth_scaled_sandwich")),
    ],
)
def test_an_initialisation_that_acts_twice_or_not_at_all_is_a_warning(name, base, expected):
    found = spec_warnings(build_all({"name": name, "base": base}, 4))
    assert [message.partition(";")[0].partition(":")[0] for message in found] == ([expected] if expected else [])


@pytest.mark.parametrize("norm", [{"name": "lns"}, {"name": "qk_norm", "base": "lns"}, {"name": "peri_ln"}])
def test_a_strategy_alone_is_no_warning(norm):
    assert not spec_warnings(build_all(norm, 4))


def test_norms_of_values_that_undo_a_gain_are_a_warning():
    undone = dataclasses.replace(block(gain=0.5), head_norm="qkv")
    assert "norms of queries, keys and values undo the gain" in spec_warnings([undone])[0]


def test_a_pre_ln_block_runs_the_operations_of_its_equation_alone():
    pre_ln = decoder_of("pre_ln").blocks[0]
    x = torch.randn(2, 5, 32, requires_grad=True)
    rope = rotary(5, 16, 1e4, x)

    def ours():
        return pre_ln(x, rope)[0]

    def theirs():
        y = x + pre_ln.self_attn.o_proj(heads(F.rms_norm(x, (32,), pre_ln.input_layernorm.weight, 1e-3)))
        return y + pre_ln.mlp(F.rms_norm(y, (32,), pre_ln.post_attention_layernorm.weight, 1e-3))

    def heads(h):
        projections = pre_ln.self_attn.q_proj, pre_ln.self_attn.k_proj, pre_ln.self_attn.v_proj
        q, k, v = (projection(h).unflatten(-1, (-1, 16)).transpose(1, 2) for projection in projections)
        y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True)
        return y.transpose(1, 2).flatten(-2)

    counts = []
    for block_ in (ours, theirs):
        with OperatorCalls() as operators:
            torch.autograd.grad(block_().sum(), [x, *pre_ln.parameters()])
        counts.append(operators.calls)
    assert counts[0] == counts[1]


def returns_nothing_in_a_script(layer, depth): ...


returns_nothing_in_a_script.__module__ = "__main__"


@pytest.mark.parametrize(
    ("function", "place"),
    [
        (returns_nothing, "test_strategies:returns_nothing"),
        (partial(returns_nothing), "package.module:function"),
        (lambda layer, depth: None, "package.module:function"),
        (returns_nothing_in_a_script, "package.module:function"),
    ],
    ids=["function", "partial", "lambda", "script"],
)
def test_a_function_in_place_of_its_name_is_told_a_place(function, place):
    message = f"norm is a function: give its place as text, such as '{place}'"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build_all({"name": function}, 2)


@pytest.mark.parametrize("make", [block, SublayerSpec])
def test_a_misspelled_coefficient_is_named_with_the_nearest(make, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "gentler", lambda layer, depth: make(gian=0.5))
    with pytest.raises(UserError, match="'gian'; did you mean 'gain'"):
        build_all({"name": "gentler"}, 1)
