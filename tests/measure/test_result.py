import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.style
import pytest

from cod_lightning import plots
from cod_lightning.errors import UserError
from cod_lightning.measure.panels import Bars, HeatMap, Lines, draw_panels
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.result import Result, finite_or_none
from cod_lightning.nn import strategies
from cod_lightning.typed_json import from_json

RESULTS = Path(__file__).parents[2] / "experiments/results"
COMMITTED = sorted(path for path in RESULTS.glob("*/*/*.json") if path.stem in MEASURES)


@dataclass(frozen=True)
class Example(Result):
    tokens: int
    loss: list[float]
    gain: list[float]

    def panels(self):
        return [
            Lines("loss (nats)", {"loss": self.loss, "gain": self.gain}, log=True, level=("half", 0.5)),
            HeatMap([[1.0, None], [0.5, 2.0]], "x", "y", "colour", points={"best": ([1], [2])}),
            Bars("loss (nats)", {"before": 1.0, "after": 2.0}),
            Lines("one line", {"loss": self.loss}, x=[2, 5]),
        ]


EXAMPLE = Example("small", 3, [0.5, 2.0], [1.0, math.nan])


def test_results_are_committed():
    assert COMMITTED


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_committed_result_survives_loading_and_saving(path):
    saved = json.loads(path.read_text())
    result = from_json(MEASURES[path.stem].result_type, saved)
    assert has_all(finite_or_none(asdict(result)), saved)
    assert result.rows()


def has_all(new, saved):
    """Whether a value has all of another; results of later versions have more keys."""
    if isinstance(saved, dict):
        return all(has_all(new[key], value) for key, value in saved.items())
    return new == saved


def test_the_fields_are_the_keys_of_the_json_file(tmp_path):
    path = EXAMPLE.save(tmp_path, "example")[0]
    assert json.loads(path.read_text()) == {"model": "small", "tokens": 3, "loss": [0.5, 2.0], "gain": [1.0, None]}


def test_the_lists_are_the_columns_of_the_table(tmp_path):
    path = EXAMPLE.save(tmp_path, "example")[1]
    assert list(csv.DictReader(path.read_text().splitlines())) == [
        {"layer": "1", "loss": "0.5", "gain": "1.0"},
        {"layer": "2", "loss": "2.0", "gain": "nan"},
    ]


def test_the_field_layers_numbers_the_rows():
    @dataclass(frozen=True)
    class Chosen(Result):
        layers: list[int]
        gain: list[float]

        def panels(self):
            return []

    assert Chosen("m", [2, 5], [0.1, 0.2]).rows() == [{"layer": 2, "gain": 0.1}, {"layer": 5, "gain": 0.2}]


def test_four_files_are_written_into_a_new_folder(tmp_path):
    paths = EXAMPLE.save(tmp_path / "new", "example")
    assert [path.name for path in paths] == ["example.json", "example.csv", "example.png", "example.pdf"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    assert [path.read_bytes()[:4] for path in paths[2:]] == [b"\x89PNG", b"%PDF"]


def test_a_notebook_shows_the_figure_and_the_table():
    html = EXAMPLE._repr_html_()
    assert 'src="data:image/png;base64,' in html
    assert ">0.5</td>" in html


@pytest.mark.parametrize(
    "given", [lambda axes: axes, lambda axes: axes.flat, lambda axes: list(axes.flat), lambda axes: iter(axes.flat)]
)
def test_a_result_is_drawn_on_axes_of_the_caller(given):
    figure, axes = plots.grid_figure(6, 6, 2, 2)
    assert EXAMPLE.plot(given(axes)) is figure
    assert [each.get_ylabel() for each in axes.flat] == ["loss (nats)", "y", "loss (nats)", "one line"]


def test_too_few_axes_are_an_error():
    _, axes = plots.grid_figure(6, 3)
    with pytest.raises(UserError, match="1 axes for 4 panels"):
        EXAMPLE.plot(axes[0][0])


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/below: Not a directory"):
        EXAMPLE.save(tmp_path / "file/below", "example")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_in_json(value):
    assert finite_or_none({"a": [(1, value)], "b": {"c": value, "d": True}, "e": "nan"}) == {
        "a": [[1, None]],
        "b": {"c": None, "d": True},
        "e": "nan",
    }


def test_the_figure_has_a_panel_for_each_entry():
    figure = EXAMPLE.plot()
    drawn = [axes.get_ylabel() for axes in figure.axes if axes.axison]
    assert drawn == ["loss (nats)", "y", "loss (nats)", "one line", "colour"]
    assert figure.get_suptitle() == "Example: small"


def test_several_lines_and_marks_have_a_legend():
    first, second, _, last = EXAMPLE.plot().axes[:4]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["half", "loss", "gain"]
    assert [text.get_text() for text in second.get_legend().get_texts()] == ["best"]
    assert last.get_legend() is None


def test_layers_are_the_x_of_lines():
    line = EXAMPLE.plot().axes[3].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 5], [0.5, 2.0])


@pytest.mark.parametrize(("first", "extent"), [(1, (0.5, 3.5, 0.5, 2.5)), (0, (-0.5, 2.5, -0.5, 1.5))])
def test_a_heat_map_is_numbered_from_its_first_row_and_column(first, extent):
    _, axes = plots.grid_figure(4, 4)
    HeatMap([[1.0, 2.0, 3.0], [4.0, 5.0, None]], "x", "y", "colour", first=first).draw(axes[0][0])
    assert tuple(axes[0][0].images[0].get_extent()) == extent


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_equal_figures_are_equal_files_whatever_the_callers_style(suffix):
    panel = EXAMPLE.panels()[0]
    with matplotlib.style.context("dark_background"):
        dark = plots.figure_bytes(draw_panels([panel]), suffix)
    assert dark == plots.figure_bytes(draw_panels([panel]), suffix)


def test_legends_name_strategies_and_no_ids_of_runs():
    lines = {name: [1.0] for name in ("lns-seed1-0a1b2c3d", "lns-seed1-ffffffff", "pre_ln-seed2-01234567", "Llama-2")}
    figure = draw_panels([Lines("loss (nats)", lines)])
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["LNS, seed 1", "LNS, seed 1 (2)", "Pre-LN, seed 2", "Llama-2"]
    assert plots.run_labels(["llama (copy)", "llama"]) == {"llama (copy)": "llama (copy)", "llama": "llama"}


def test_every_strategy_has_its_own_label_and_colour():
    assert set(strategies.STRATEGIES) <= set(plots.STRATEGY_STYLES)
    for column in zip(*plots.STRATEGY_STYLES.values(), strict=True):
        assert len(set(column)) == len(column)


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((0.05, 20), ["0.1", "1", "10"]),
        ((0.8, 6), ["1", "2", "5"]),
        ((0.95, 1.45), ["1", "1.1", "1.2", "1.3", "1.4"]),
        ((300, 2e4), ["500", "1,000", "2,000", "5,000", "10,000", "20,000"]),
        ((1e-6, 1e-4), [f"$\\mathdefault{{10^{{{power}}}}}$" for power in (-6, -5, -4)]),
    ],
)
def test_logarithmic_axes_have_few_plain_labels(limits, labels):
    _, axes = plots.grid_figure(3, 3)
    axis = axes[0][0].yaxis
    plots.log_axis(axis)
    axes[0][0].set_ylim(*limits)
    ticks = [tick for tick in axis.get_majorticklocs() if limits[0] <= tick <= limits[1] * 1.001]
    assert axis.get_major_formatter().format_ticks(ticks) == labels
