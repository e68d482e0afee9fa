"""The commands that set runs beside the paper: what `reproduce` prints at its end, and `report`."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest

from cod_lightning.cli import main
from cod_lightning.config.compose import choices
from cod_lightning.paper import experiments
from cod_lightning.paper.claims import SCALES, Column
from cod_lightning.paper.experiments import claims, rows


def run(*words):
    command = [sys.executable, "-m", "cod_lightning", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def toys():
    """The rows of Table 7 at toy scale, by name."""
    return {row.name: row for row in rows(["table7_130m"], "toy")}


def keep(results, row, seed, name="record.json", **values):
    """What a run of a row leaves among the results; returns its folder there."""
    config = row.run(seed)
    folder = results / config.name
    folder.mkdir(parents=True)
    known = {
        **{"seed": seed, "config": asdict(config), "git_commit": None, "date": "2026-11-24T10:00:00+00:00"},
        **{"hardware": {"cpu": "abacus", "cores": 2, "threads": 1, "gpus": []}, "versions": {"torch": "2.13"}},
        **dict.fromkeys(("steps", "tokens", "tokens_per_second", "parameters", "wall_seconds"), 0),
    }
    (folder / name).write_text(json.dumps(known | values))
    return folder


@pytest.fixture
def results(tmp_path, toys):
    for seed in (1, 2):
        for name, loss in (("pre_ln", 5.0), ("lns", 4.5)):
            loss += 0.01 * seed * (name == "lns")
            keep(tmp_path / "results", toys[name], seed, val_loss=loss, ppl=math.exp(loss), history={})
    keep(tmp_path / "results", toys["admin"], 1, "failed.json", failure="the loss is nan at step 3")
    return tmp_path / "results"


def test_every_scale_is_known():
    assert set(SCALES) == set(choices("scale"))


def test_results_find_their_rows_and_their_measures(results, toys):
    folder = results / toys["lns"].run(2).name
    removal = {"model": "lns", "tokens": 9, "loss": 1.0, "losses": [1.5, 1.25]}
    (folder / "removal.json").write_text(json.dumps(removal))
    (found,) = claims(toys.values(), results)
    assert (found.target, found.column, found.scale, found.size) == ("Table 7", "130M", "toy", 134_105_856)
    by_name = {row.name: row for row in found.rows}
    assert [(run.seed, run.measures) for run in by_name["lns"].runs] == [(1, {}), (2, {"removal": removal})]
    assert [run.failure for run in by_name["admin"].runs] == ["the loss is nan at step 3"]
    assert by_name["group_ln"].runs == ()
    assert by_name["lns"].published == {"ppl": 25.76}
    assert {line.row.name for line in Column((found,)).lines if line.sample} == {"pre_ln", "lns"}


def test_a_published_figure_is_compared_with_the_same_metric_alone(tmp_path):
    for scale in SCALES:
        (found,) = claims(rows(["table2_250m"], scale), tmp_path)
        assert (found.rows[-1].published["boolq"], found.rows[-1].published["average"]) == (58.17, 43.14)
        assert "accuracy" not in found.rows[-1].published
    (images,) = claims(rows(["table5_vit_s"], "toy"), tmp_path)
    assert images.rows[0].published == {"accuracy": 67.91}


def test_what_is_kept_is_one_line_and_maps_have_four_digits(tmp_path):
    loss = 5.567581105229306
    of = {"model": "m", "tokens": 9}
    measures = {
        "removal": {**of, "loss": loss, "losses": [loss + 1e-7, 2.0]},
        "jacobian_map": {**of, "layers": [1], "matrices": [[[loss, 1]]]},
    }
    (tmp_path / "toy/run/measure").mkdir(parents=True)
    for name, found in measures.items():
        (tmp_path / f"toy/run/measure/{name}.json").write_text(json.dumps(found, indent=1))
    experiments.keep(tmp_path / "toy/run", tmp_path / "results", measures)
    kept = tmp_path / "results/toy/run"
    assert experiments.measured(kept) == {
        **measures,
        "jacobian_map": {**of, "layers": [1], "matrices": [[[5.568, 1]]]},
    }
    assert all(path.read_text().count("\n") == 1 and ", " not in path.read_text() for path in kept.iterdir())
    assert len(list(kept.iterdir())) == 2


def test_hours_are_estimated_of_what_is_trained_at_the_papers_scale(toys):
    assert toys["lns"].config.scale == "toy"
    assert experiments.gpu_hours(toys["lns"]) is None
    (public,) = rows(["figure5"], "paper")
    assert experiments.gpu_hours(public) is None
    assert 0.5 < experiments.gpu_hours(next(rows(["table7_130m"], "paper"))) < 5


def test_report_writes_every_file_and_the_same_again(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "with_rows", lambda: ["table7_130m"])
    contents = []
    for output in (tmp_path / "first", tmp_path / "second"):
        assert main(["report", "--results", str(results), "--output", str(output)]) == 0
        contents.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    assert {str(path) for path in contents[0]} == {
        "REPRODUCTION.md",
        "experiments/results/reproduction.html",
        "experiments/results/reproduction.csv",
        "experiments/results/figures/table7.png",
    }
    made = (tmp_path / "first/REPRODUCTION.md").read_text()
    assert "| LNS | 91.38 ± 0.65 | 2 | **-0.485 ± 0.064** | -0.037, same |" in made
    assert "| Admin | (failed: the loss is nan at step 3) | 0 |  | +0.043, failed |" in made
    assert "| Group-LN | not run | 0 |  | +0.047, not run |" in made
    assert "| toy | abacus, 2 cores, 1 thread(s) a run | torch 2.13 | unknown | 5 | 2026-11-24 |" in made
    assert "hours of one H100 at 40 % of its peak" in made
    assert str(tmp_path / "second/REPRODUCTION.md") in capsys.readouterr().out


def test_results_that_are_not_there_are_refused(tmp_path):
    process = run("report", "--results", tmp_path / "nowhere", "--output", tmp_path)
    assert process.returncode == 2
    assert process.stderr == f"error: --results={tmp_path / 'nowhere'} is not a folder\n"
    assert not list(tmp_path.iterdir())


def test_reproduce_ends_with_a_table_and_keeps_what_diverged(toy, tmp_path):
    own = [word for word in toy if "." in word.partition("=")[0] and not word.startswith("trainer.max_steps")]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ["reproduce", "table7_130m", "row=pre_ln", "scale=toy", *own, "data.source=files"]
    words += [f"model.{name}={value}" for name, value in shape.items()] + ["trainer.max_steps=40", "optim.lr=1e18"]
    words += ["optim.warmup_ratio=0.5", f"output={tmp_path}", "--results", tmp_path / "results"]
    process = run(*words)
    assert process.returncode == 2, process.stderr
    assert "Table 7, scale=toy: 130M" in process.stdout
    assert "26.73" in process.stdout
    (diverged, *_) = (tmp_path / "results").rglob("failed.json")
    assert json.loads(diverged.read_text())["failure"].startswith("the loss is ")
    assert "failed: the loss" in " ".join(process.stdout.split())
    again = run(*words)
    assert "0 to carry out, of 1 asked for" in again.stderr
    assert again.returncode == 0
