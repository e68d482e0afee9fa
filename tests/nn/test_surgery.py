"""`convert` gives a decoder another strategy and keeps its function; `grow` makes it deeper."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cod_lightning as cod
from cod_lightning.cli import main
from cod_lightning.errors import UserError
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder, set_step
from cod_lightning.nn.layer_prediction import predict_between
from cod_lightning.nn.strategies import STRATEGIES, block, build, build_all
from cod_lightning.nn.surgery import convert, grow, source_layers

SHAPE = DecoderConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    qkv_bias=True,
    tie_word_embeddings=True,
    vocab_size=11,
)
TOKENS = torch.arange(11)[None]


def trained(**norm):
    """A decoder in float64 whose parameters are all random, as after training."""
    decoder = Decoder(SHAPE, build_all(norm, 4)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, 0.5, 0.5, generator=generator)
    return decoder


@pytest.mark.parametrize("before", ["pre_ln", "lns"])
@pytest.mark.parametrize(
    "norm",
    [
        {"name": "pre_ln"},
        {"name": "lns"},
        {"name": "lns", "position": "only_ffn"},
        {"name": "lns", "position": "after_branch"},
        {"name": "lns_learnable"},
        {"name": "scaled_init"},
    ],
    ids=lambda norm: "-".join(norm.values()),
)
def test_the_logits_stay_equal(before, norm):
    decoder = trained(name=before)
    logits = decoder(TOKENS)
    converted = convert(decoder, norm)
    assert [block.spec for block in converted.blocks] == build_all(norm, 4)
    torch.testing.assert_close(converted(TOKENS), logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(decoder(TOKENS), logits)


def test_a_learned_scale_keeps_its_value():
    decoder = trained(name="layer_scale")
    converted = convert(decoder, {"name": "layer_scale", "base": "lns", "init": 0.5})
    torch.testing.assert_close(converted(TOKENS), decoder(TOKENS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "coefficients"),
    [
        ({"name": "post_ln"}, ["pre_norm=False (layer 1)", "sum_norm=True (layer 1)"]),
        ({"name": "peri_ln"}, ["entry_norm=True (layer 1)", "branch_norm=True (layer 1)"]),
        ({"name": "gpas"}, ["gate='output' (layer 1)"]),
        ({"name": "pro_res"}, ["branch_schedule=Schedule(end=1000) (layer 1)"]),
        ({"name": "qk_norm"}, ["head_norm='qk' (layer 1)"]),
        ({"name": "layer_scale"}, ["learned_branch_scale='channel' (layer 1)"]),
        ({"name": "lns", "position": "before_ln"}, ["input_scale=0.7071067811865476 (layer 2)"]),
        ({"name": "lns", "position": "after_residual"}, ["skip=0.7071067811865476 (layer 2)"]),
    ],
)
def test_a_strategy_that_weights_cannot_compensate_is_refused(norm, coefficients):
    with pytest.raises(UserError) as error:
        convert(trained(name="pre_ln"), norm)
    lines = str(error.value).splitlines()
    assert [line.partition(" sets ")[2].partition(", which")[0] for line in lines] == coefficients


def test_a_schedule_that_has_ended_is_dropped():
    decoder = trained(name="pro_res")
    set_step(decoder, 3999)
    with pytest.raises(UserError, match="branch_schedule ends at step 4000, and the model is at step 3999"):
        convert(decoder, {"name": "lns"})
    set_step(decoder, 4000)
    torch.testing.assert_close(convert(decoder, {"name": "lns"})(TOKENS), decoder(TOKENS), rtol=1e-12, atol=1e-12)


def test_a_deeper_model_cannot_begin_a_schedule_that_has_ended():
    decoder = trained(name="pro_res")
    set_step(decoder, 4000)
    with pytest.raises(UserError, match=r"cannot compensate for: the model has one that has ended: convert it to"):
        grow(decoder, {"name": "pro_res"}, 6, "stack")


@pytest.mark.parametrize(("before", "after"), [("silent", "pre_ln"), ("pre_ln", "silent"), ("silent", "silent")])
def test_a_gain_of_zero_is_refused(before, after, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "silent", lambda layer, depth: block(gain=0.0))
    with pytest.raises(UserError, match=r"gain=.* \(layer 1\), which weights cannot compensate for"):
        convert(trained(name=before), {"name": after})


def test_a_scale_that_no_weight_can_compensate_is_refused(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "faint", lambda layer, depth: block(branch_scale=1e-300))
    with pytest.raises(UserError, match="norm= changes a factor by 1e-300, too much for finite weights"):
        convert(trained(name="pre_ln").float(), {"name": "faint"})


def test_a_scaled_branch_behind_a_norm_is_refused(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "damped", lambda layer, depth: block(branch_norm=True, branch_scale=layer**-0.5))
    with pytest.raises(UserError, match=r"branch_scale=0.7.* \(layer 2\), which weights cannot compensate for"):
        convert(trained(name="sandwich_ln"), {"name": "damped"})


def test_a_gain_that_the_skip_takes_as_well_is_refused(monkeypatch):
    for name, gain in (("plain", 1.0), ("scaled", 0.5)):
        spec = block(skip_from="pre_norm", gain=gain)
        monkeypatch.setitem(STRATEGIES, name, lambda layer, depth, spec=spec: spec)
    with pytest.raises(UserError, match=r"gain=0.5 \(layer 1\), which weights cannot compensate for"):
        convert(trained(name="plain"), {"name": "scaled"})


def test_training_continues_at_the_loss_of_the_converted_run(train, toy, tmp_path):
    record, run = train("norm=pre_ln", "name=before")
    assert main(["convert", str(run), "norm=lns", "--output", str(tmp_path / "converted")]) == 0
    after, _ = train("norm=lns", f"init_from={tmp_path / 'converted'}", "name=after", "optim.lr=1e-9")
    assert after["val_loss"] == pytest.approx(record["val_loss"], rel=1e-6)
    assert cod.load_run(tmp_path / "converted")[0].blocks[1].spec.ffn.gain == 2**-0.5


def test_a_conversion_to_a_configuration_that_no_command_reads_is_refused(train, tmp_path, capsys):
    _, run = train("norm=pre_ln", "optim.weight_decay=0.1", "trainer.max_steps=1", "name=before")
    assert main(["convert", str(run), "norm=lns_as_rates", "--output", str(tmp_path / "converted")]) == 2
    assert "would have an invalid configuration: optim.weight_decay=0.1 of optim.name='adam'" in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("how", "depth", "blocks", "sources", "inserted"),
    [
        ("stack", 32, 48, [*range(1, 25), *range(9, 33)], []),  # SOLAR
        ("stack", 4, 7, [1, 2, 3, 4, 2, 3, 4], []),
        ("interpolate", 3, 6, [1, 1, 2, 2, 3, 3], []),
        ("interpolate", 4, 5, [1, 1, 2, 3, 4], []),
        ("identity", 4, 6, [1, 2, 2, 3, 4, 4], [3, 6]),  # LLaMA Pro: 32 to 40 puts one after every fourth
        ("identity", 3, 6, [1, 1, 2, 2, 3, 3], [2, 4, 6]),
        ("lesa", 5, 7, [1, 2, 3, 3, 4, 4, 5], [4, 6]),  # LESA: 32 to 48 fills the last 16 gaps
    ],
)
def test_the_copied_layers_are_those_of_the_method(how, depth, blocks, sources, inserted):
    assert source_layers(depth, blocks, how) == (sources, inserted)


@pytest.mark.parametrize(
    "norm", [{"name": "pre_ln"}, {"name": "lns"}, {"name": "lns", "position": "after_branch"}, {"name": "skip_init"}]
)
def test_identity_blocks_keep_the_function(norm):
    decoder = trained(**norm)
    grown = grow(decoder, norm, 6, "identity")
    assert [block.spec for block in grown.blocks] == build_all(norm, 6)
    torch.testing.assert_close(grown(TOKENS), decoder(TOKENS), rtol=1e-12, atol=1e-12)


def test_a_learned_scale_that_starts_at_zero_is_no_obstacle():
    decoder = trained(name="rezero")
    grown = grow(decoder, {"name": "rezero"}, 6, "identity")
    torch.testing.assert_close(grown(TOKENS), decoder(TOKENS), rtol=1e-12, atol=1e-12)


def test_identity_blocks_of_pre_ln_keep_every_bit():
    decoder = trained(name="pre_ln")
    assert torch.equal(grow(decoder, {"name": "pre_ln"}, 8, "identity")(TOKENS), decoder(TOKENS))


def test_a_norm_with_a_bias_is_no_identity():
    norm = {"name": "dyt", "base": "sandwich_ln"}
    with pytest.raises(UserError, match=r"how=identity needs blocks x \+ f\(x\)"):
        grow(trained(**norm), norm, 6, "identity")


def test_gains_are_kept_or_those_of_the_new_layers():
    decoder, lns = trained(name="lns"), {"name": "lns"}
    kept, new = (grow(decoder, lns, 8, "interpolate", gains) for gains in ("kept", "new"))
    source = decoder.blocks[3].self_attn.q_proj.weight  # of layer 4, copied to layers 7 and 8
    assert torch.equal(new.blocks[7].self_attn.q_proj.weight, source)
    torch.testing.assert_close(kept.blocks[7].self_attn.q_proj.weight, source * (8 / 4) ** 0.5)


def lesa(weights, layer):
    """The matrix between blocks `layer` and `layer` + 1, after the notebook train_LESA of yangyifei729/LESA."""
    size = weights[0].shape[1]
    v, s, ut = torch.linalg.svd(torch.cat(weights, dim=1).mT, full_matrices=False)  # u s vt, with the same free signs
    u, vt = ut.mT, v.mT
    v = [vt[:, i * size : (i + 1) * size] for i in range(len(weights))]
    x = torch.cat([torch.cat([v[i - 1], v[i + 1]], dim=1) for i in range(1, len(v) - 1)])
    y = torch.cat([v[i] for i in range(1, len(v) - 1)])
    torch.manual_seed(0)
    fc1, fc2, fc3 = (nn.Linear(*shape, dtype=x.dtype) for shape in ((2 * size, 256), (256, 256), (256, size)))

    def model(x):
        return fc3(F.relu(fc2(F.relu(fc1(x)))))

    optimizer = torch.optim.AdamW([*fc1.parameters(), *fc2.parameters(), *fc3.parameters()], lr=0.001)
    for _ in range(10):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            outputs = model(x[batch])
            norm_loss = F.mse_loss(torch.norm(outputs, p=2), torch.norm(y[batch], p=2))
            ((1 - 0.0005) * F.mse_loss(outputs, y[batch]) + 0.0005 * norm_loss).backward()
            optimizer.step()
    return u @ torch.diag(s) @ model(torch.cat([v[layer - 1], v[layer]], dim=1))


def test_a_matrix_is_predicted_as_by_the_released_code_of_lesa():
    weights = list(torch.randn(5, 24, 16, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(predict_between(weights, [4, 2]), [lesa(weights, 4), lesa(weights, 2)])


def test_predicted_blocks_have_the_factors_of_the_block_before():
    decoder, norm = trained(name="lns"), {"name": "lns"}
    weights = [block.mlp.gate_proj.weight.detach() for block in decoder.blocks]
    predicted, _ = predict_between(weights, [2, 3])
    kept, new = (grow(decoder, norm, 6, "lesa", gains).blocks[2] for gains in ("kept", "new"))
    torch.testing.assert_close(new.mlp.gate_proj.weight, predicted)
    torch.testing.assert_close(kept.mlp.gate_proj.weight * kept.spec.ffn.gain, predicted * 2**-0.5)
    for name in ("post_attention_layernorm.weight", "self_attn.q_proj.bias"):
        assert torch.equal(new.get_parameter(name), decoder.blocks[1].get_parameter(name))


@pytest.mark.parametrize(
    ("norm", "blocks", "how", "message"),
    [
        ("pre_ln", 4, "stack", "blocks=4: the model has 4 blocks, and how=stack makes 5 to 8"),
        ("pre_ln", 9, "identity", "makes 5 to 8"),
        ("pre_ln", 6, "stacked", "how='stacked' does not exist: did you mean 'stack'?"),
        ("pre_ln", 3, "interpolate", "makes 5 to 10000"),
        ("pre_ln", 8, "lesa", "how=lesa makes 5 to 7"),
        ("post_ln", 6, "identity", "how=identity needs blocks x [+] f[(]x[)], which those of norm='post_ln' are not"),
        ("deep_norm", 6, "stack", "skip=1.86.* which weights cannot compensate for"),
    ],
)
def test_unsupported_growth_is_refused(norm, blocks, how, message):
    with pytest.raises(UserError, match=message):
        grow(trained(name=norm), {"name": norm}, blocks, how)
    with pytest.raises(UserError, match=message):
        grow(trained(name=norm), norm, blocks, how)


def test_unknown_gains_are_refused():
    with pytest.raises(UserError, match="gains='old' does not exist: known: kept, new"):
        grow(trained(name="pre_ln"), {"name": "pre_ln"}, 6, "stack", gains="old")


def by_layer(layer, depth):
    return build("dyt", layer, depth, {"alpha": 1 / layer})


def test_initial_values_that_differ_by_layer_do_not_matter_for_growing(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "by_layer", by_layer)
    decoder = trained(name="by_layer")
    grown = grow(decoder, {"name": "by_layer"}, 6, "stack")
    assert torch.equal(grown.blocks[-1].input_layernorm.alpha, decoder.blocks[-1].input_layernorm.alpha)


def test_blocks_that_do_not_fit_into_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("cod_lightning.memory.free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"blocks=6: out of memory: [\d,]+ parameters in float32 take"):
        grow(trained(name="pre_ln"), {"name": "pre_ln"}, 6, "stack")


def test_two_blocks_are_too_few_for_a_prediction():
    with pytest.raises(UserError, match="how=lesa learns from three neighbouring blocks, and the model has 2"):
        source_layers(2, 3, "lesa")


def test_training_continues_at_the_loss_of_the_grown_run(train, tmp_path):
    record, run = train("norm=lns", "name=before")
    assert main(["grow", str(run), "blocks=6", "--output", str(tmp_path / "grown")]) == 0
    words = ["norm=lns", "model.num_hidden_layers=6", f"init_from={tmp_path / 'grown'}", "name=after", "optim.lr=1e-9"]
    after, _ = train(*words)
    assert after["val_loss"] == pytest.approx(record["val_loss"], rel=1e-6)
