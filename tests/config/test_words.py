"""Words of a command line: paths of any name, words that cannot be parsed, and names of strategies."""

from pathlib import Path

import pytest

from cod_lightning.config.compose import compose, parse, sweep
from cod_lightning.data.corpora import open_corpus
from cod_lightning.errors import UserError

NAMES = [
    "a=b",
    "a#b",
    "[2024] dump",
    "a(1)",
    "a[b",
    "~",
    "a'b",
    'a"b',
    " a ",
    "a,b",
    "1e-3",
    "true",
    "é/ü",
    "a\\",
    "a:b",
]


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("field", ["output", "data.root", "images.folder", "data.files", "init_from", "+data.folder"])
@pytest.mark.parametrize("name", NAMES)
def test_the_value_of_a_path_field_that_exists_is_that_path(field, name):
    Path(name).mkdir(parents=True)
    [override] = parse([f"{field}={name}"])
    assert override.value() == name


@pytest.mark.parametrize("name", NAMES)
def test_a_sweep_passes_an_existing_path_on(name):
    Path(name).mkdir(parents=True)
    runs = [parse(words) for words in sweep([f"data.root={name}", "seed=1,2"])]
    assert [run[0].value() for run in runs] == [name, name]


@pytest.mark.parametrize("name", ["t=1/x.txt", "[2024] dump/a.txt", "a#b.txt", "a'b.txt"])
@pytest.mark.parametrize("field", ["files", "val_files"])
def test_a_file_of_any_name_is_read_as_text(field, name):
    for path in (Path(name), Path("other.txt")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("word " * 400)
    words = ["data=files", f"data.{field}={name}"]
    config = compose(words if field == "files" else [*words, "data.files=other.txt"])
    assert getattr(config.data, field) == name
    corpus = open_corpus(config.data)
    assert "word" in next((corpus.train if field == "files" else corpus.val)())


def test_a_glob_in_a_folder_of_any_name_is_a_glob():
    Path("t=1").mkdir()
    Path("t=1/x.txt").touch()
    assert compose(["data=files", "data.files=t=1/*.txt"]).data.files == "t=1/*.txt"


def test_a_list_of_files_stays_a_list():
    Path("a").touch()
    assert compose(["data=files", "data.files=[a.txt,b.txt]"]).data.files == ["a.txt", "b.txt"]


def test_null_stays_null():
    Path("null").mkdir()
    assert compose(["data.folder=null"]).data.folder is None


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("output=a=b", """'output="a=b"'"""),
        ("init_from=epoch=0-step=6.ckpt", """'init_from="epoch=0-step=6.ckpt"'"""),
        ("name=a#b", """'name="a#b"'"""),
        ("data.root=é", """'data.root="é"'"""),
        ("data.root=~/x", """'data.root="/home/me/x"'"""),
        ("description=it's", """'description="it'"'"'s"'"""),
    ],
)
def test_a_value_that_cannot_be_parsed_is_named_with_its_quotes(word, quoted, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    with pytest.raises(UserError) as error:
        parse(["seed=1", word])
    assert str(error.value).startswith(f"{word}: ")
    assert str(error.value).endswith(f"quote it: {quoted}")


def test_all_words_that_cannot_be_parsed_are_reported():
    with pytest.raises(UserError) as error:
        parse(["output=a=b", "seed", "name=a#b"])
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == ["output=a=b", "seed", "name=a#b"]


@pytest.mark.parametrize(
    "words", [["norm=norms.gentler"], ["norm.name=norms.gentler"], ["norm=gpas", "norm.base=norms.gentler"]]
)
def test_a_dotted_strategy_gets_a_colon_as_a_suggestion(words):
    with pytest.raises(UserError, match="did you mean 'norms:gentler'"):
        compose(words)
