"""The reader of JSON files: what it accepts, and the field that an error names."""

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from cod_lightning.errors import UserError
from cod_lightning.typed_json import from_json, read_json


@dataclass(frozen=True)
class Chunk:
    name: str
    rows: int


@dataclass(frozen=True)
class Split:
    chunks: tuple[Chunk, ...]
    kind: Literal["train", "val"] = "train"
    loss: float | None = None
    curve: dict[str, list[float]] | None = None
    extra: Any = None


def test_nested_dataclasses_are_read():
    value = {"chunks": [{"name": "a", "rows": 3}], "kind": "val", "loss": 2, "curve": {"x": [1.5]}, "extra": [None]}
    assert from_json(Split, value) == Split((Chunk("a", 3),), "val", 2.0, {"x": [1.5]}, [None])


def test_fields_with_a_default_may_be_missing():
    assert from_json(Split, {"chunks": []}) == Split(())


def test_null_is_nan_for_a_number_and_none_for_an_optional_one():
    assert math.isnan(from_json(list[float], [None])[0])
    assert from_json(Split, {"chunks": [], "loss": None}).loss is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "expected an object, got []"),
        ({}, "chunks is missing"),
        ({"chunks": [], "rows": 1}, "rows is unknown"),
        ({"chunks": {}}, "chunks: expected a list"),
        ({"chunks": [{"name": "a", "rows": True}]}, "chunks[0].rows: expected an integer, got True"),
        ({"chunks": [{"name": "a", "rows": 1.0}]}, "chunks[0].rows: expected an integer, got 1.0"),
        ({"chunks": [{"name": "a"}]}, "chunks[0].rows is missing"),
        ({"chunks": [], "kind": "test"}, "kind: expected one of 'train', 'val', got 'test'"),
        ({"chunks": [], "curve": {"x": ["y"]}}, "curve.x[0]: expected a number, got 'y'"),
    ],
)
def test_an_error_names_the_field(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json(Split, value)


def test_unknown_fields_can_be_skipped():
    assert from_json(Split, {"chunks": [{"name": "a", "rows": 1, "new": 2}]}, ignore_unknown=True).chunks[0].rows == 1


def test_a_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"name": "a", "rows": 3}))
    assert read_json(tmp_path / "a.json", Chunk, "remove it") == Chunk("a", 3)


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"name": "a"}', b"[" * 100_000], ids=range(4))
def test_a_bad_file_is_one_error_that_names_it_and_the_remedy(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: .*; remove it$"):
        read_json(tmp_path / "a.json", Chunk, "remove it")


def test_a_missing_file_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"No such file .*a\.json.*; remove it"):
        read_json(tmp_path / "a.json", Chunk, "remove it")


def test_a_folder_is_one_error_that_leaves_no_file_open(tmp_path):
    (tmp_path / "a.json").mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UserError, match=r"Is a directory: '.*a\.json'; remove it$"):
        read_json(tmp_path / "a.json", Chunk, "remove it")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_integer_beyond_floats_is_an_error():
    with pytest.raises(ValueError, match="expected a number"):
        from_json(float, 10**400)
