"""The notebooks of the documentation run, and their text has the numbers that they compute."""

import re
import runpy
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "docs/notebooks"


@pytest.fixture
def notebook(monkeypatch):
    """`notebook(name)` runs a notebook, shortened, and returns its text and its variables."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("NOTEBOOK_STEPS", "1")
    yield lambda name: ((NOTEBOOKS / name).read_text(), runpy.run_path(str(NOTEBOOKS / name)))
    plt.close("all")


def test_every_notebook_is_a_page():
    pages = re.findall(r"notebooks/(\w+)\.md", (NOTEBOOKS.parents[1] / "mkdocs.yml").read_text())
    assert sorted(pages) == sorted(path.stem for path in NOTEBOOKS.glob("*.py"))


def test_how_deep_reads_the_numbers_that_it_measures(notebook):
    pytest.importorskip("glassllm", reason="pip install 'cod_lightning[models]'")
    text, names = notebook("how_deep.py")
    variance = [row["variance"] for row in names["variance"].rows() if row["of"] == "residual"]
    added = [row["delta_loss"] for row in names["removal"].rows()]
    distances = names["angular"].distances[0]
    for row, values, digits in (
        ("variance", variance, 2),
        ("angular distance", distances, 3),
        ("added loss", added, 2),
    ):
        assert f"# | {row} | " + " | ".join(f"{value:.{digits}f}" for value in values) + " |" in text


def test_a_custom_strategy_is_compared(notebook):
    _, names = notebook("add_a_strategy.py")
    assert names["losses"].keys() == names["strategies"].keys() == {"Pre-LN", "LNS", "gentler"}
    assert all(4 < loss < 6 for loss in names["losses"].values())  # 256 bytes: 5.5 nats
    assert [len(axes.lines) for axes in (names["left"], names["right"])] == [3, 3]
