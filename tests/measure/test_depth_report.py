"""Numbers and sentences of the depth report from planted results."""

import pytest

from cod_lightning.measure.depth_page import maps, panels, report_page, summary
from cod_lightning.measure.depth_report import SECTIONS, format_number, headline, headline_sentence
from cod_lightning.measure.panels import draw_panels


def results(costs, variance=None, **longest):
    """Fields as in the JSON files of a model with these costs of its blocks and a loss of 2 nats."""
    layers = variance or [float(layer) for layer in range(1, len(costs) + 1)]
    residual = {"variance": layers, "variance_error": layers, "variance_median": layers, "variance_top_share": layers}
    found = {
        "variance": {"residual": residual, "massive": [], "massive_channels": 0},
        "removal": {
            "loss": 2.0,
            "losses": [2 + cost for cost in costs],
            "error": [0.03 for _ in costs],
            "tokens": 50,
        },
    }
    return found | ({"longest_run": longest} if longest else {})


SIX = results(
    [0.5, 0.019, 0.021, 0.01, -0.1, 0.019],
    limits=[1.0, 10.0],
    blocks=[0, 2],
    first=[5, 4],
    losses=[1.9, 2.05],
    loss=2.0,
)


def test_a_cheap_block_costs_less_than_a_hundredth_of_the_loss():
    numbers = headline(SIX)
    assert numbers["cheap_blocks"] == [2, 4, 5, 6]
    assert numbers["cheap_by_third"] == {"early": 1, "middle": 1, "late": 2}
    assert numbers["longest_runs"]["10"] == {"blocks": 2, "first": 4, "last": 5}
    assert numbers["longest_runs"]["1"] == {"blocks": 0, "first": None, "last": None}


def test_the_headline_names_the_cheap_blocks_and_the_longest_run():
    sentence = headline_sentence(headline(SIX), SIX["removal"], uniform=9.0)
    assert sentence == (
        "4 of 6 blocks cost less than 1% of the loss when removed alone (1 early, 1 middle, 2 late); the cheapest adds "
        "-0.1 ± 0.03 nats (block 5). The longest run found whose removal raises the perplexity by at most 1%: no "
        "block; 10%: 2 blocks, 4 to 5."
    )
    poor = headline_sentence(headline(SIX), SIX["removal"], uniform=2.2)
    assert poor == sentence + (
        " With a loss of 2 nats, where a uniform guess has 2.2, the model has not learned this text, and these numbers "
        "say nothing about its depth."
    )


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (999.4, 99.4, "999 ± 99"),
        (999.7, 99.7, "1,000 ± 100"),
        (-999.7, None, "-1,000"),
        (4077.8, 0.031, "4,078 ± 0.031"),
    ],
)
def test_large_numbers_are_rounded_without_an_exponent(value, error, text):
    assert format_number(value, error) == text


def test_numbers_that_are_not_finite_are_named():
    diverged = results([0.5, 0.5], variance=[1.0, None])
    diverged["removal"]["losses"] = [None, 2.5]
    assert "1 after block 1 and not finite after block 2" in SECTIONS["variance"].sentence(diverged["variance"])
    assert "0.5 ± 0.03 (block 2) and 0.5 ± 0.03 (block 2)" in SECTIONS["removal"].sentence(diverged["removal"])
    assert summary(diverged, 9.0)["last over first"] == "not finite"


READOUTS = [([9, 5, 2.1, 2.3, 2.1, 2.0], 5), ([9, 8, 7], 3), ([2.0], 1)]


@pytest.mark.parametrize(("losses", "block"), READOUTS)
def test_the_logit_lens_is_readable_from_the_last_block_above_the_limit_on(losses, block):
    sentence = SECTIONS["readout"].sentence({"loss": losses, "tokens": 9})
    assert f"From block {block} of {len(losses)} on it stays within 10% of the last." in sentence


def test_a_massive_activation_is_named():
    top = {"channel": 3, "layer": 2, "row": 0, "position": 1, "token": 5, "text": "a`\n", "value": -4096.4}
    found = SIX["variance"] | {"massive": [top], "massive_channels": 1}
    assert (
        SECTIONS["variance"]
        .sentence(found)
        .endswith(
            "1 channel with massive activations; the largest is -4,096 in channel 3 after block 2, at position 1 "
            '(`"a\'\\n"`) of sequence 0.'
        )
    )


def test_the_contributions_and_the_erasing_blocks_are_counted():
    values = {"attention": [0.5, 0.2], "ffn": [2.0, 3.0], "attention_cosine": [-0.1, None], "ffn_cosine": [0.1, 0.2]}
    errors = {name: [0.1, 0.1] for name in values}
    assert SECTIONS["contribution"].sentence({**values, "errors": errors, "tokens": 9}) == (
        "As a share of the stream's norm, attention adds between 0.2 ± 0.1 (block 2) and 0.5 ± 0.1 (block 1) and the "
        "FFN adds between 2 ± 0.1 (block 1) and 3 ± 0.1 (block 2). A negative mean cosine, which erases a part of the "
        "stream, occurs in 1 of 2 blocks for attention and in 0 of 2 blocks for the FFN. Standard errors over 9 tokens."
    )


@pytest.mark.parametrize(("costs", "log"), [([1.0, 0.1], True), ([1.0, -0.1], False), ([1.0, 0.0], False)])
def test_costs_of_removal_are_drawn_on_a_logarithmic_axis_if_all_are_positive(costs, log):
    assert panels({"model": results(costs)}, "removal")[0].log is log


def test_maps_of_angles_share_their_colours():
    angles = {name: {"angular": {"distances": [[0.1, top], [0.3, None]]}} for name, top in (("a", 0.2), ("b", 0.5))}
    assert [panel.limits for panel in maps(angles)] == [(0.1, 0.5)] * 2


def test_models_of_different_depth_share_relative_depth():
    models = {"six": SIX, "two": results([1.0, 2.0])}
    panel = panels(models, "removal")[0]
    assert panel.xlabel == "relative depth"
    assert panel.x["two"] == [0.5, 1.0]
    assert panel.errors["two"] == [0.03, 0.03]
    assert panels({"six": SIX, "other": SIX}, "removal")[0].x["other"] == [1, 2, 3, 4, 5, 6]


def test_all_panels_share_a_legend():
    figure = draw_panels(panels({"pre": SIX, "lns": SIX}, "variance"), shared_legend=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pre", "lns"]
    assert not any(axes.get_legend() for axes in figure.axes)


def test_a_summary_compares_the_last_block_with_the_first_and_halves():
    row = summary(results([0.5, 1.5, 2.5, 3.5]), 9.0)
    assert row["last over first"] == "4"
    assert row["mean increase of the loss when a block of the deeper half is removed"] == "3.0000"


def test_the_page_escapes_names():
    text = {"source": "files: <a>", "sha256": "0", "sequences": 1, "tokens": 2}
    page, _ = report_page({"<lns>": results([1.0, 2.0])}, {"<lns>": text}, {"<lns>": 9.0})
    assert "<h1>How much of its depth &lt;lns&gt; uses</h1>" in page
    assert "<lns>" not in page
    assert "<a>" not in page
