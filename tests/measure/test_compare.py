import re

import pytest

from cod_lightning.measure.compare import comparison_figure, comparison_page, headline, panels

DEPTH = 4


def found(scale):
    layers = [scale * (layer + 1) for layer in range(DEPTH)]
    return {
        "variance": {"residual": {"variance": layers}},
        "jacobian": {"distance": layers, "largest_singular_value": layers},
        "angular": {"distances": [layers, layers[1:]]},
        "removal": {"loss": 2.0, "losses": [2 + value for value in layers]},
        "linear_replacement": {"usefulness": 0.5},
        "influence": {"influence": layers},
    }


def test_one_panel_for_each_quantity_and_one_line_for_each_run():
    runs = {"pre": found(1.0), "lns": found(0.5)}
    figure = comparison_figure(runs)
    axes = [axes for axes in figure.axes if axes.lines]
    assert len(axes) == len(panels(runs["pre"])) == 6
    for place, (title, (values, _)) in zip(axes, panels(runs["lns"]).items(), strict=True):
        assert place.get_ylabel() == title
        assert list(place.lines[1].get_ydata()) == pytest.approx(values)


def test_the_headline():
    row = headline(found(1.0))
    assert row["last over first"] == "4"
    assert row["loss added by removing a block of the deeper half, mean"] == "3.5000"
    assert row["usefulness (share of layers that are not linear)"] == "0.50"


def test_the_page_holds_everything_and_escapes_names():
    image, page = comparison_page({"pre": found(1.0), "<lns>": found(0.5)})
    assert image[:4] == b"\x89PNG"
    assert "<h1>pre beside &lt;lns&gt;</h1>" in page
    assert "<lns>" not in page
    assert re.search(r'<img alt="[^"]*" src="data:image/png;base64,[A-Za-z0-9+/=]+">', page)
    assert not re.search(r'(src|href)="http', page)
