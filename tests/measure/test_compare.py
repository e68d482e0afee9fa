import re
from types import SimpleNamespace

import pytest

from cod_lightning.measure.compare import comparison_page, panels, summary
from cod_lightning.measure.panels import draw_panels

DEPTH = 4


def results(scale):
    layers = [scale * (layer + 1) for layer in range(DEPTH)]
    return {
        "variance": SimpleNamespace(residual=SimpleNamespace(variance=layers)),
        "jacobian": SimpleNamespace(distance=layers, largest_singular_value=layers),
        "angular": SimpleNamespace(distances=[layers, layers[1:]]),
        "removal": SimpleNamespace(loss=2.0, losses=[2 + value for value in layers]),
        "linear_replacement": SimpleNamespace(usefulness=0.5),
        "influence": SimpleNamespace(influence=layers),
    }


def test_a_panel_has_a_line_for_each_model():
    models = {"pre": results(1.0), "lns": results(0.5)}
    assert len(panels(models)) == 6
    for panel in panels(models):
        assert panel.lines == {
            "pre": pytest.approx([1.0, 2.0, 3.0, 4.0]),
            "lns": pytest.approx([0.5, 1.0, 1.5, 2.0]),
        }


def test_all_panels_share_a_legend():
    figure = draw_panels(panels({"pre": results(1.0), "lns": results(0.5)}), shared_legend=True)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["pre", "lns"]
    assert not any(axes.get_legend() for axes in figure.axes)


def test_the_summary_of_a_model():
    row = summary(results(1.0))
    assert row["last over first"] == "4"
    assert row["mean increase of the loss when a block of the deeper half is removed"] == "3.5000"
    assert row["usefulness (share of layers that are not linear)"] == "0.50"


@pytest.fixture(scope="module")
def comparison():
    return comparison_page({"pre": results(1.0), "<lns>": results(0.5)})


def test_the_page_escapes_names(comparison):
    _, page = comparison
    assert "<h1>pre beside &lt;lns&gt;</h1>" in page
    assert "<lns>" not in page


def test_the_page_fits_a_phone(comparison):
    _, page = comparison
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert not re.search(r"[^-(]width\s*[:=]\s*\"?\d", page)


def test_the_page_needs_no_other_file(comparison):
    _, page = comparison
    assert re.search(r'<img src="data:image/png;base64,[A-Za-z0-9+/=]+"', page)
    assert not re.search(r'(src|href)="http', page)
