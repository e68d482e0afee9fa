import csv
import json
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from cod_lightning.measure.result import Mean, figure, finite, heat_map, layer_lines, restored, save


@dataclass(frozen=True)
class Example:
    name: str
    values: list[float]

    def rows(self):
        return [{"layer": layer, "value": value} for layer, value in enumerate(self.values, start=1)]

    def plot(self):
        made, (left, right) = figure(self.name, columns=2)
        layer_lines(left, {"a": self.values, "b": self.values}, "value", log=True)
        heat_map(right, [[1.0, None], [0.5, 2.0]], "x", "y", "colour")
        return made


def test_a_result_is_saved_as_json_csv_and_figure(tmp_path):
    paths = save(Example("x", [0.5, 2.0]), tmp_path / "new", "example")
    assert json.loads(paths[0].read_text()) == {"name": "x", "values": [0.5, 2.0]}
    assert list(csv.DictReader(paths[1].read_text().splitlines())) == [
        {"layer": "1", "value": "0.5"},
        {"layer": "2", "value": "2.0"},
    ]
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)


def test_what_is_no_finite_number_is_null_in_json(tmp_path):
    path = save(Example("x", [math.nan, math.inf, 2.0, -math.inf]), tmp_path, "example")[0]
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["values"] == [None, None, 2, None]
    nested = {"a": [(1, math.nan)], "b": {"c": -math.inf, "d": True}, "e": "nan"}
    assert finite(nested) == {"a": [[1, None]], "b": {"c": None, "d": True}, "e": "nan"}


def test_a_heat_map_is_numbered_from_its_first_row_and_column():
    for options, expected in (({}, (0.5, 3.5, 0.5, 2.5)), ({"first": 0}, (-0.5, 2.5, -0.5, 1.5))):
        _, (axes,) = figure("x")
        heat_map(axes, [[1.0, 2.0, 3.0], [4.0, 5.0, None]], "x", "y", "colour", **options)
        assert tuple(axes.images[0].get_extent()) == expected


def test_mean_and_standard_error():
    values, mean = torch.randn(50, 3), Mean()
    mean.add(values[:20])
    mean.add(values[20:])
    torch.testing.assert_close(mean.mean, values.double().mean(0))
    torch.testing.assert_close(mean.error, values.double().std(0) / 50**0.5)


def test_weights_of_zero_do_not_count():
    values, mean = torch.tensor([1.0, 5.0, 3.0]), Mean()
    mean.add(values, torch.tensor([1.0, 0.0, 1.0]))
    assert float(mean.mean) == pytest.approx(2)
    assert float(mean.error) == pytest.approx(torch.tensor([1.0, 3.0]).std().item() / 2**0.5)
    assert mean.count == 2


def test_what_was_saved_is_read_again_and_nothing_else(tmp_path):
    @dataclass(frozen=True)
    class Found:
        model: str
        losses: list[float]
        pairs: list[tuple[int, int]]
        by_name: dict[str, float | None]
        token: Literal["all", "last"]

    saved = {"model": "m", "losses": [1, None, 2.5], "pairs": [[1, 2]], "by_name": {"a": None}, "token": "last"}
    found = restored(saved, Found)
    assert math.isnan(found["losses"][1])
    assert found | {"losses": saved["losses"]} == saved
    for name, wrong in {"model": 3, "losses": [True], "pairs": [[1.5]], "by_name": [], "token": "first"}.items():
        with pytest.raises(ValueError, match="is not"):
            restored(saved | {name: wrong}, Found)
        with pytest.raises(ValueError, match=f"{name} is missing"):
            restored({key: value for key, value in saved.items() if key != name}, Found)
