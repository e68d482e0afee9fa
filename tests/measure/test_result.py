import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from cod_lightning import plots
from cod_lightning.errors import UserError
from cod_lightning.measure.panels import Bars, HeatMap, Lines, draw_panels
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.result import Result, finite
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


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_committed_result_survives_loading_and_saving(path):
    saved = json.loads(path.read_text())
    result = from_json(MEASURES[path.stem].result_type, saved)
    assert finite(asdict(result)) == saved


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


def test_three_files_are_written_into_a_new_folder(tmp_path):
    paths = EXAMPLE.save(tmp_path / "new", "example")
    assert [path.name for path in paths] == ["example.json", "example.csv", "example.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    assert paths[2].read_bytes()[:4] == b"\x89PNG"


def test_a_notebook_shows_the_figure_and_the_table():
    html = EXAMPLE._repr_html_()
    assert 'src="data:image/png;base64,' in html
    assert ">0.5</td>" in html


def test_the_table_becomes_a_data_frame():
    pytest.importorskip("pandas")
    assert list(EXAMPLE.to_pandas().columns) == ["layer", "loss", "gain"]


def test_a_result_is_drawn_on_axes_of_the_caller():
    figure, axes = plots.grid_figure(6, 6, 2, 2)
    assert EXAMPLE.plot(axes.flat) is figure
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
    assert finite({"a": [(1, value)], "b": {"c": value, "d": True}, "e": "nan"}) == {
        "a": [[1, None]],
        "b": {"c": None, "d": True},
        "e": "nan",
    }


def test_the_figure_has_a_panel_for_each_entry():
    figure = EXAMPLE.plot()
    drawn = [axes.get_ylabel() for axes in figure.axes if axes.axison]
    assert drawn == ["loss (nats)", "y", "loss (nats)", "one line", "colour"]
    assert figure.get_suptitle() == "small"


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


def test_equal_figures_are_equal_files():
    panel = EXAMPLE.panels()[0]
    assert plots.png(draw_panels([panel])) == plots.png(draw_panels([panel]))
