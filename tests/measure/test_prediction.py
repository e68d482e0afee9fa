"""The closed form of the residual stream against an untrained decoder."""

import json
from dataclasses import replace

import pytest

from cod_lightning.cli import main
from cod_lightning.errors import UserError
from cod_lightning.kernels.reference import BOUNDED
from cod_lightning.measure.prediction import QUANTITIES, predict
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.strategies import STRATEGIES, block

CONFIG = DecoderConfig(
    hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2, vocab_size=512
)
TOLERANCE = 0.15
"""Three times the spread over seeds, which falls as 1/sqrt(width)."""
WIDE = {"deep_norm_released": 0.3}
"""Its logits have variance 1 and its branches are larger than the stream: seeds differ by 0.1 to 0.2."""

ALPHAS = {"alpha": 0.2, "attention_alpha": 0.8}


def assert_measured(prediction, tolerance=TOLERANCE):
    for quantity in QUANTITIES:
        expected, measured = getattr(prediction, quantity), getattr(prediction, f"{quantity}_measured")
        assert expected == pytest.approx(measured, rel=tolerance), quantity


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_closed_form_meets_the_measurement(name):
    assert_measured(predict(CONFIG, {"name": name}), WIDE.get(name, TOLERANCE))


def test_a_strategy_may_be_given_by_its_name():
    config = DecoderConfig(32, 48, 3, 2, vocab_size=64)
    assert predict(config, "lns") == predict(config, {"name": "lns"})


def growing(layer, depth):
    """Multiplies the stream by 16 in a block."""
    return block(skip=4.0)


def test_the_layer_that_overflows_fp16_is_named(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "growing", growing)
    config = DecoderConfig(32, 48, num_hidden_layers=6, num_attention_heads=2, vocab_size=64)
    # 6 * 0.02 * 16^4 is 7,864 and 6 * 0.02 * 16^5 is 125,829; the largest number is 65,504.
    assert predict(config, {"name": "growing"}).overflow_layer == 5
    assert predict(config, {"name": "pre_ln"}).overflow_layer is None


@pytest.mark.parametrize("coefficients", [{"skip": 1e200}, {"skip": 1e30}, {"skip": 0.0, "branch_scale": 0.0}], ids=str)
def test_a_stream_that_is_zero_or_infinite_is_an_error(coefficients, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "extreme", lambda layer, depth: block(**coefficients))
    with pytest.raises(UserError, match="norm: the stream of 3 blocks, its gradient or its gain is zero or infinite"):
        predict(DecoderConfig(32, 48, 3, 2, vocab_size=64), {"name": "extreme"})


@pytest.mark.parametrize("name", ["rezero", "pro_res"])
def test_the_identity_does_not_grow_with_the_depth(name):
    config = DecoderConfig(32, 48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    prediction = predict(config, {"name": name})
    assert prediction.doubled == pytest.approx(dict.fromkeys(QUANTITIES, 1.0))
    assert prediction.gain == [1.0, 1.0]


def test_a_strategy_without_a_closed_form_is_an_error():
    with pytest.raises(UserError, match="value_residual='mean' has no closed form"):
        predict(CONFIG, {"name": "value_residual", "form": "mean"})


@pytest.mark.parametrize("norm", [{"name": kind} for kind in BOUNDED] + [{"name": "dyt", **ALPHAS}], ids=str)
@pytest.mark.parametrize("base", ["peri_ln", "hybrid_norm"])
def test_the_closed_form_of_bounded_functions_holds_where_they_are_not_linear(norm, base):
    config = replace(CONFIG, embedding_std=3.0, init_std=0.1)
    assert_measured(predict(config, {**norm, "base": base}))


OTHERS = {
    "truncated weights": ({"name": "pre_ln"}, {"init_cutoff": 1.0}),
    "the scale before a norm": (
        {"name": "lns", "position": "before_ln"},
        {"norm_eps": 1.0, "embedding_std": 0.5, "init_std": 0.15},
    ),
    "the scale before a bounded function": (
        {"name": "dyt", "base": "lns", "position": "before_ln"},
        {"embedding_std": 0.5, "init_std": 0.15},
    ),
    "groups of four channels": ({"name": "group_ln", "groups": 24}, {"init_std": 0.1}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_closed_form_holds_for(case):
    norm, changes = OTHERS[case]
    assert_measured(predict(replace(CONFIG, **changes), norm))


def test_a_depth_that_cannot_be_doubled_is_an_error():
    with pytest.raises(UserError, match="num_hidden_layers=5001 is doubled: expected at most 5000"):
        predict(DecoderConfig(num_hidden_layers=5001, vocab_size=64), {"name": "lns"})


def test_the_command_prints_a_table_and_writes_its_files(tmp_path, capsys):
    assert main(["predict", "model=tiny", "norm=keel", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "fp16 overflow at 6 standard deviations: no layer" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keel.csv", "keel.json", "keel.pdf", "keel.png"]
    assert len(json.loads((tmp_path / "keel.json").read_text())["gain_measured"]) == 3
