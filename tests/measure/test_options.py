import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.measure.options import (
    Positive,
    UpToDepth,
    bounded_type,
    options_of,
    parse_options,
    require_options,
)
from cod_lightning.settings import require_choice

Colour = Literal["red", "green"]


def example(
    model: Any,
    tokens: int = 4,
    *,
    count: int = 8,
    share: float = 0.5,
    exact: bool = False,
    name: str = "x",
    colour: Colour | None = None,
    sizes: Sequence[int] | None = (1, 2),
    depth: int | None = None,
    fit: Iterable[Tensor] | None = None,
    folder: Path = Path(),
    export: Callable[[Any], object] = print,
) -> None: ...


def test_options_are_the_keywords_that_a_word_can_give():
    assert list(options_of(example)) == ["count", "share", "exact", "name", "colour", "sizes", "depth"]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("count=32", 32),
        ("share=1e-3", 0.001),
        ("share=1", 1.0),
        ("exact=true", True),
        ("exact=False", False),
        ("name=a b=c", "a b=c"),
        ("colour=green", "green"),
        ("colour=none", None),
        ("sizes=[1, 2,4]", [1, 2, 4]),
        ("sizes=17,18,19", [17, 18, 19]),
        ("sizes=3", [3]),
        ("sizes=null", None),
        ("depth=none", None),
        ("depth=3", 3),
    ],
)
def test_words_become_values_of_their_types(word, value):
    options = parse_options([word], options_of(example), "measure example")
    assert options == {word.partition("=")[0]: value}
    assert type(next(iter(options.values()))) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cuont=3", "cuont is not an option of measure example: did you mean 'count'? known: colour, count, depth, "),
        ("count=many", "count=many: expected a whole number"),
        ("count=none", "count=none: expected a whole number"),
        ("share=half", "share=half: expected a number"),
        ("share=nan", "share=nan: expected a finite number"),
        ("exact=1", "exact=1: expected true or false"),
        ("colour=rde", "colour=rde: did you mean 'red'? known: green, red"),
        ("sizes=[1,b]", "sizes=[1,b]: expected a whole number"),
        ("sizes=", "sizes=: expected a whole number"),
    ],
)
def test_a_wrong_word_is_an_error(word, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parse_options([word], options_of(example), "measure example")


def test_all_wrong_words_are_named_together():
    with pytest.raises(UserError) as error:
        parse_options(["count=many", "depth=3", "share=half"], options_of(example), "measure example")
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["count=many", "share=half"]


def test_a_measure_without_options_says_so():
    with pytest.raises(UserError, match="x is not an option of measure variance: it has no options"):
        parse_options(["x=1"], {}, "measure variance")


def bounded(
    *,
    count: Positive = 1,
    share: Annotated[float | None, ("at_most", 1)] = None,
    layers: UpToDepth = None,
    colour: Colour = "red",
) -> None: ...


def test_bounds_do_not_change_how_a_word_is_read():
    words = ["count=0", "share=none", "layers=1,2", "colour=green"]
    options = parse_options(words, options_of(bounded), "measure bounded")
    assert options == {"count": 0, "share": None, "layers": [1, 2], "colour": "green"}


def test_an_optional_hint_keeps_its_bounds():
    """Python 3.10 makes every hint with the default None optional from outside."""

    def implicit(*, layers: UpToDepth | None = None, share: Annotated[float, ("above", 0)] | None = None): ...

    assert bounded_type(implicit, "layers") == (Sequence[int], {"to_depth": True}, True)
    assert bounded_type(implicit, "share") == (float, {"above": 0}, True)


@pytest.mark.parametrize(("name", "value"), [("count", None), ("colour", None)])
def test_none_is_no_value_of_an_option_that_needs_one(name, value):
    with pytest.raises(UserError, match=f"^{name}=None: give a value, or leave it out$"):
        require_options(bounded, {name: value}, depth=3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", True, "count=True: expected a whole number"),
        ("count", 2.5, "count=2.5: expected a whole number"),
        ("count", "2", "count='2': expected a whole number"),
        ("count", [2], "count=[2]: expected a whole number"),
        ("share", True, "share=True: expected a number"),
        ("layers", [1, True], "layers=[1, True]: expected a list, each a whole number"),
        ("layers", 2, "layers=2: expected a list, each a whole number"),
        ("exact", 1, "exact=1: expected true or false"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, expected):
    def measure(*, count: Positive = 1, share: float = 1, layers: UpToDepth = None, exact: bool = False): ...

    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        require_options(measure, {name: value}, depth=3)


def test_numbers_of_numpy_are_numbers():
    require_options(bounded, {"count": np.int64(2), "share": np.float32(0.5), "layers": np.array([1, 2])}, depth=3)
    with pytest.raises(UserError, match=r"^layers=\[4\]: expected 1 to 3"):
        require_options(bounded, {"layers": np.array([4])}, depth=3)


@pytest.mark.parametrize("layers", [[1, 3], (2,), {1, 2}, range(1, 4), None])
def test_values_inside_their_bounds_are_accepted(layers):
    require_options(bounded, {"count": 1, "share": None, "layers": layers, "colour": "green"}, depth=3)


def test_all_values_outside_their_bounds_are_named_together():
    with pytest.raises(UserError) as error:
        require_options(bounded, {"count": 0, "share": float("nan"), "layers": (1, 4), "colour": "rde"}, depth=3)
    assert str(error.value).splitlines() == [
        "count=0 must be at least 1",
        "share=nan must be a finite number",
        "layers=[1, 4]: expected 1 to 3, the number of blocks, each once",
        "colour='rde' does not exist: did you mean 'red'? known: green, red",
    ]


def test_a_choice_is_checked_when_a_measure_is_called():
    require_choice("colour", "red", Colour)
    with pytest.raises(UserError, match=r"colour='gren' does not exist: did you mean 'green'\? known: green, red"):
        require_choice("colour", "gren", Colour)
