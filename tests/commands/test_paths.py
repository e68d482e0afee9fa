"""Paths, names and text of users are taken as they are, whatever characters they hold."""

import io
import re
import sys
from pathlib import Path

import pytest

from cod_lightning.cli import main
from cod_lightning.commands.measure import is_model, name_of
from cod_lightning.commands.models import require_path
from cod_lightning.commands.terminal import show
from cod_lightning.errors import UserError
from command_words import last_of_each


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])


def write(path, text="word " * 400):
    """Write a file, and the folders above it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# Paths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["lr=1e-3/run", "sweeps/lr=1e-3/missing", "a=b", "plain"])
def test_a_path_with_an_equals_sign_can_be_a_model(word):
    write("lr=1e-3/run/config.yaml")
    write("a=b/config.yaml")
    assert is_model(word)


@pytest.mark.parametrize("word", ["rows=4", "data.files=a/b", "probes=32"])
def test_key_value_words_are_not_models(word):
    assert not is_model(word)


@pytest.mark.parametrize("name", ["runs/nope", "./nope", "/nope/nope", "~/nope", "a/b/c", "runs/lr=1/x"])
def test_a_missing_path_of_a_model_is_an_error_that_says_so(name):
    write("runs/x")
    with pytest.raises(UserError, match="does not exist: name the folder of a run or of a model"):
        require_path(name)


def test_a_relative_folder_has_the_name_of_its_place():
    here = Path.cwd()
    assert [name_of(Path(path)) for path in (".", "..", "a/../b", "c")] == [here.name, here.parent.name, "b", "c"]


def test_a_file_is_not_a_model():
    write("record.json")
    with pytest.raises(UserError, match=r"record\.json is a file: name the folder"):
        require_path("record.json")


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-2-7b-hf"])
def test_a_name_on_the_hub_is_not_a_missing_path(name):
    require_path(name)


@pytest.mark.parametrize("words", [["variance", "runs/nope"], ["compare", "runs", "runs/nope"]])
def test_measure_checks_the_folders_before_it_loads_a_model(words, capsys):
    write("runs/config.json", "{}")
    assert main(["measure", *words]) == 2
    assert capsys.readouterr().err.startswith("error: runs/nope does not exist")


# Printed text -------------------------------------------------------------------------------------------------------

MARKUP = ["[/x/a.txt]", "a[/b]", "mk[/x]", "[bold]a", ":smile:", "[red"]


@pytest.mark.parametrize("text", MARKUP)
def test_printed_text_is_not_read_as_markup(text, capsys):
    from rich.table import Table

    table = Table(text, title=text)
    table.add_row(text)
    show(table)
    assert capsys.readouterr().out.count(text) == 3


def test_a_folder_name_is_not_read_as_markup_while_it_is_prepared(toy, capsys):
    assert main(last_of_each(["prepare", *toy, "data.root='mk[/x]'"])) == 0
    assert capsys.readouterr().out.startswith("mk[/x]/")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_character_that_the_terminal_lacks_does_not_end_a_command(encoding, stream, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, stream, terminal)
    assert main(["fit", "--cfg", "description='█ \udcff'"]) == 2
    print("█ \udcff", file=terminal, flush=True)
    assert terminal.buffer.getvalue().endswith(b"?\n")


# Strategies of the user ---------------------------------------------------------------------------------------------

RETURNS = (
    "from cod_lightning.nn.strategies import BlockSpec, SublayerSpec, block\ndef gentler(layer, depth):\n    return "
)


@pytest.mark.parametrize("word", ["norm=paths_a:gentler", "norm=lns,paths_b:gentler", "norm.base=paths_c:gentler"])
def test_a_strategy_in_the_working_folder_is_imported(word, capsys):
    strategy = re.findall(r"\w+:gentler", word)[0]
    write(f"{strategy.partition(':')[0]}.py", f"{RETURNS}block(gain=0.5)\n")
    assert main(["fit", "-m", "--cfg", *(["norm=gpas"] if "base" in word else []), word]) == 0
    assert strategy in capsys.readouterr().out


def test_the_working_folder_is_not_searched_without_a_strategy_of_the_user(tmp_path):
    assert main(["fit", "--cfg", "norm=lns"]) == 0
    assert str(tmp_path) not in sys.path
