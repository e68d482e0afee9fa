"""Code that a saved run names is imported only if the user says so, and never from the run folder."""

import sys

import pytest

from cod_lightning.cli import main
from cod_lightning.config.compose import compose
from cod_lightning.config.saved import CONFIG, load_config, save_config
from cod_lightning.errors import UserError

CODE = """
from pathlib import Path
from cod_lightning.nn.strategies import block
Path(__file__).with_name("imported").touch()
def f(layer, depth):
    return block()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(norm)` writes a run folder that names a strategy, with a module `norms` beside the run folder and in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "norms_of_a_run", None)
    monkeypatch.delitem(sys.modules, "norms_of_a_run")
    folder = tmp_path / "a_run"

    def make(norm, **options):
        config = compose(["norm=lns"])
        config.norm = {"name": norm, **options}
        save_config(config, folder)
        for path in (tmp_path, folder):
            (path / "norms_of_a_run.py").write_text(CODE)
        return folder

    return make


def imported(tmp_path):
    return list(tmp_path.rglob("imported"))


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "a_run", "x"],
        ["evaluate", "a_run"],
        ["export", "a_run"],
        ["measure", "variance", "a_run"],
        ["measure", "prune", "a_run", "blocks=1", "--output", "pruned"],
    ],
)
@pytest.mark.parametrize("norm", [{"norm": "norms_of_a_run:f"}, {"norm": "gpas", "base": "norms_of_a_run:f"}])
def test_a_command_does_not_import_the_code_of_a_run(words, norm, run, tmp_path, capsys):
    run(**norm)
    assert main(words) == 2
    assert not imported(tmp_path)
    assert "norm='norms_of_a_run:f' would import code: pass --trust-code" in capsys.readouterr().err


def test_init_from_does_not_import_the_code_of_a_run(run, tmp_path, capsys):
    run("norms_of_a_run:f")
    assert main(["fit", "norm=lns", "init_from=a_run", "output=out", "trainer.accelerator=cpu"]) == 2
    assert not imported(tmp_path)
    assert "norms_of_a_run:f" in capsys.readouterr().err


def test_fit_does_not_import_the_code_of_an_earlier_run(run, tmp_path, capsys):
    run("norms_of_a_run:f")
    assert main(["fit", "norm=lns", "output=.", "name=a_run"]) == 2
    assert not imported(tmp_path)
    assert "holds a run of another configuration" in capsys.readouterr().err


def test_trusted_code_is_imported(run, tmp_path):
    assert load_config(run("norms_of_a_run:f"), trust_code=True).norm["name"] == "norms_of_a_run:f"
    assert imported(tmp_path) == [tmp_path / "imported"]


def test_code_that_the_command_line_names_is_imported(run, tmp_path):
    run("lns")
    assert compose(["norm=norms_of_a_run:f"]).norm["name"] == "norms_of_a_run:f"
    assert imported(tmp_path) == [tmp_path / "imported"]


@pytest.mark.parametrize(("folder", "module"), [("a_run", "norms_of_a_run"), (".", "a_run.norms_of_a_run")])
def test_trusted_code_is_not_imported_from_the_run_folder(folder, module, run, tmp_path, monkeypatch):
    run(f"{module}:f")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend("")
    with pytest.raises(UserError, match="is in the run folder"):
        load_config(tmp_path / "a_run", trust_code=True)
    assert not imported(tmp_path)
    assert (tmp_path / "a_run" / CONFIG).is_file()
