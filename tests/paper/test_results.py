"""The results folder, and the commands that read and write it: `report`, and the end of `reproduce`."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from cod_lightning.cli import main
from cod_lightning.commands.processes import CommandPool
from cod_lightning.commands.reproduce import check_corpus
from cod_lightning.config.compose import choices
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepare
from cod_lightning.errors import UserError
from cod_lightning.evaluate import PAPER_TASKS
from cod_lightning.evaluate.lm_eval import save_scores
from cod_lightning.paper import experiments
from cod_lightning.paper.claims import SCALES, Column
from cod_lightning.paper.experiments import experiment_rows, remaining_tasks, with_results
from cod_lightning.paper.pretrained_models import load_pretrained_models
from cod_lightning.paper.results import load_measures, load_runs, load_task_scores, save_result


@pytest.fixture(scope="module")
def toys():
    """The rows of Table 7 at scale=toy, by name."""
    return {row.name: row for row in experiment_rows(["table7_130m"], "toy")}


def add_result(results, row, seed, name="record.json", scale=None, **values):
    """Write the results of a run of a row into the results folder; return its folder."""
    config = row.config_for(seed)
    folder = results / config.name
    folder.mkdir(parents=True)
    record = {
        **{"seed": seed, "config": asdict(config) | ({"scale": scale} if scale else {}), "git_commit": None},
        **{"date": "2026-11-24T10:00:00+00:00", "data_fingerprint": "feed" * 16, "versions": {"torch": "2.13"}},
        "hardware": {"cpu": "abacus", "cores": 2, "threads": 1, "gpus": []},
        **dict.fromkeys(("steps", "tokens", "tokens_per_second", "parameters", "wall_seconds"), 0),
    }
    (folder / name).write_text(json.dumps(record | values))
    return folder


def losses(loss):
    return {"val_loss": loss, "ppl": math.exp(loss), "history": {}}


@pytest.fixture
def results(tmp_path, toys):
    for seed in (1, 2, 3):
        add_result(tmp_path / "results", toys["pre_ln"], seed, **losses(5.0))
        add_result(tmp_path / "results", toys["lns"], seed, **losses(4.5 + 0.01 * seed))
    add_result(tmp_path / "results", toys["admin"], 1, "failed.json", failure="the loss is nan at step 3")
    return tmp_path / "results"


STATISTICS = {key: [1.0, 1.0] for key in ("variance", "variance_error", "mean", "rms", "kurtosis", "maximum")}
JACOBIAN = ("frobenius", "distance", "mean_diagonal", "diagonal_share", "largest_singular_value")
EMPTY = {
    "variance": dict.fromkeys(("residual", "attention", "ffn"), STATISTICS),
    "removal": {"loss": 1.0, "losses": [1.5, 1.25]},
    "angular": {"distances": [[0.1, 0.2], [0.2, None]], "normalise": "raw", "token": "all"},
    "jacobian": {key: [1.0, 1.0] for key in JACOBIAN} | {"layers": [1, 2], "probes": 4, "errors": {}},
}
"""Fields of the results of a model with two blocks."""


def test_every_scale_is_known():
    assert set(SCALES) == set(choices("scale"))


def test_results_find_their_rows_and_their_measures(results, toys):
    removal = {"model": "lns", "tokens": 9, "loss": 1.0, "losses": [1.5, 1.25], "error": [0.1, 0.2]}
    (results / toys["lns"].config_for(2).name / "removal.json").write_text(json.dumps(removal))
    (experiment,) = with_results(toys.values(), load_runs(results))
    table = (experiment.target, experiment.column, experiment.scale, experiment.size)
    assert table == ("Table 7", "130M", "toy", 134_105_856)
    rows = {row.name: row for row in experiment.rows}
    assert [(run.seed, run.measures) for run in rows["lns"].runs] == [(1, {}), (2, {"removal": removal}), (3, {})]
    assert [run.failure for run in rows["admin"].runs] == ["the loss is nan at step 3"]
    assert rows["group_ln"].runs == ()
    assert rows["lns"].published == {"ppl": 25.76}
    assert {c.row.name for c in Column((experiment,)).comparisons if c.sample} == {"pre_ln", "lns"}


@pytest.mark.parametrize(
    ("change", "mixed", "reason"),
    [
        ({"data_fingerprint": "beef" * 16}, "two corpora", "has data beefbeefbeefbeef"),
        ({"scale": "small"}, "two scales", "is a run at scale=small"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_with_their_records(results, toys, change, mixed, reason):
    other = add_result(results, toys["group_ln"], 1, **losses(5.0), **change)
    with pytest.raises(UserError, match=f"Table 7, scale=toy mixes {mixed}") as error:
        with_results(toys.values(), load_runs(results))
    assert f"{other / 'record.json'} {reason}" in str(error.value)


def test_a_published_figure_is_compared_with_the_same_metric_only(tmp_path):
    (tasks,) = with_results(experiment_rows(["table2_250m"], "toy"), load_runs(tmp_path))
    assert (tasks.rows[-1].published["boolq"], tasks.rows[-1].published["average"]) == (58.17, 43.14)
    assert "accuracy" not in tasks.rows[-1].published
    (images,) = with_results(experiment_rows(["table5_vit_s"], "toy"), load_runs(tmp_path))
    assert images.rows[0].published == {"accuracy": 67.91}


def test_a_saved_result_is_one_line_and_matrices_have_four_digits(tmp_path):
    loss = 5.567581105229306
    common = {"model": "m", "tokens": 9}
    measures = {
        "removal": {**common, "loss": loss, "losses": [loss + 1e-7, 2.0], "error": [1e-7, 0.1]},
        "jacobian_map": {**common, "layers": [1], "matrices": [[[loss, 1]]]},
    }
    (tmp_path / "toy/run/measure").mkdir(parents=True)
    for name, measure in measures.items():
        (tmp_path / f"toy/run/measure/{name}.json").write_text(json.dumps(measure, indent=1))
    save_result(tmp_path / "toy/run", tmp_path / "results", measures)
    folder = tmp_path / "results/toy/run"
    measures["jacobian_map"]["matrices"] = [[[5.568, 1]]]
    assert load_measures(folder) == measures
    assert all(path.read_text().count("\n") == 1 and ", " not in path.read_text() for path in folder.iterdir())
    assert len(list(folder.iterdir())) == 2


def test_only_missing_measures_of_a_recorded_run_remain(results, toys):
    removal = {"model": "m", "tokens": 9, "loss": 1.0, "losses": [1.5]}
    (results / toys["lns"].config_for(1).name / "removal.json").write_text(json.dumps(removal))
    tasks = remaining_tasks(experiment_rows(["figure7"], "toy"), [1], load_runs(results))
    measures = {task.folder.name: task.measures for task in tasks}
    assert measures == {
        toys["pre_ln"].config_for(1).folder.name: {"angular", "removal"},
        toys["lns"].config_for(1).folder.name: {"angular"},
    }


def test_a_measure_that_does_not_apply_to_the_model_does_not_remain(tmp_path):
    words = ["model.num_hidden_layers=2", "trainer.measures={}"]
    tasks = remaining_tasks(experiment_rows(["theory"], "toy", words), [1], {})
    assert {name for task in tasks for name in task.measures} == {"jacobian", "variance"}
    words = ["paper.rows.lns.set={norm:value_residual}", "paper.measures=[theory,gain,variance]"]
    (row,) = [row for row in experiment_rows(["theory"], "toy", words) if row.name == "lns"]
    assert row.measures == {"variance"}
    (folder := tmp_path / "runs/toy/lns/measure").mkdir(parents=True)
    (folder / "variance.json").write_text("{}")
    save_result(folder.parent, tmp_path / "results", ("theory", "variance"))  # of a pretrained model, by its layout
    assert [path.name for path in (tmp_path / "results/toy/lns").iterdir()] == ["variance.json"]


def test_an_unfinished_run_leaves_no_result(tmp_path):
    save_result(tmp_path / "toy/run", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_hours_are_estimated_for_runs_at_the_papers_scale_only(toys):
    assert experiments.row_gpu_hours(toys["lns"]) is None
    (public,) = experiment_rows(["figure5"], "paper")
    assert experiments.row_gpu_hours(public) is None
    assert 0.5 < experiments.row_gpu_hours(experiment_rows(["table7_130m"], "paper")[0]) < 5
    words = ["images.source=folder", "images.folder=photos", "images.classes=null"]
    assert {experiments.row_gpu_hours(row) for row in experiment_rows(["table5_vit_s"], "paper", words)} == {None}


def test_report_writes_every_file_and_the_same_again(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "reproducible_experiments", lambda: ["table7_130m"])
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
    markdown = (tmp_path / "first/REPRODUCTION.md").read_text()
    assert "| LNS | 91.84 ± 0.92 | 3 | **-0.480 ± 0.025** † | -0.037, same |" in markdown
    assert "| Admin | (failed: the loss is nan at step 3) | 0 |  | +0.043, failed |" in markdown
    assert "| Table 7 | Group-LN, Sandwich-LN and Mix-LN |" in markdown
    assert "| toy | abacus, 2 cores, 1 thread per run | torch 2.13 | unknown | feedfeedfeed | 7 |" in markdown
    assert "hours of one H100 at 40 % of its peak" in markdown
    assert str(tmp_path / "second/REPRODUCTION.md") in capsys.readouterr().out


def test_a_run_in_a_folder_of_any_name_is_in_the_report_at_its_scale(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "reproducible_experiments", lambda: ["table7_130m"])
    for name in ("pre_ln", "lns"):  # as `fit experiments=table7_130m scale=toy row=NAME` names it
        folder = add_result(tmp_path / "runs", toys[name], 1, **losses(5.0))
        (tmp_path / "runs/table7_130m").mkdir(exist_ok=True)
        folder.rename(tmp_path / "runs/table7_130m" / folder.name)
    assert main(["report", "--results", "runs"]) == 0
    assert "**At scale=toy** (" in Path("REPRODUCTION.md").read_text()


def test_the_notes_of_a_results_folder_are_in_its_report_alone(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "reproducible_experiments", lambda: ["table7_130m"])
    for name in ("pre_ln", "lns"):
        add_result(tmp_path / "mine", toys[name], 1, **losses(5.0))
    main(["report", "--results", "mine"])
    assert "seeds were added" not in Path("REPRODUCTION.md").read_text()
    Path("mine/notes.md").write_text("- **Ours.** Two seeds were added.\n")
    main(["report", "--results", "mine"])
    assert "\n- **Ours.** Two seeds were added.\n- **Claims" in Path("REPRODUCTION.md").read_text()
    Path("mine/notes.md").write_bytes(b"\xff")
    assert main(["report", "--results", "mine"]) == 2
    assert "mine/notes.md: 'utf-8' codec can't decode" in capsys.readouterr().err


def test_a_run_that_was_moved_aside_does_not_replace_the_new_one(toys, tmp_path):
    old = add_result(tmp_path, toys["lns"], 1, **losses(5.0))
    old.rename(f"{old}.previous-1")
    add_result(tmp_path, toys["lns"], 1, **losses(4.0))
    (run,) = load_runs(tmp_path).values()
    assert run.record["val_loss"] == 4.0


@pytest.mark.parametrize(("scores", "scored"), [(None, False), ({}, False), (("piqa",), False), (PAPER_TASKS, True)])
def test_a_run_that_was_not_scored_remains_to_be_scored(scores, scored, tmp_path):
    row = next(row for row in experiment_rows(["table2_250m"], "paper") if row.name == "lns")
    for each in (row, row.source):
        add_result(tmp_path, each, 1, **losses(3.0))
    if scores is not None:
        save_scores(tmp_path / row.config_for(1).name, {task: {"acc": 0.5} for task in scores})
    remaining = [task.config.id for task in remaining_tasks([row], [1], load_runs(tmp_path))]
    assert (row.config_for(1).id not in remaining) == scored


def test_scores_of_different_steps_have_no_average(tmp_path):
    for task in PAPER_TASKS:
        save_scores(tmp_path, {task: {"acc": 0.5}}, step=3)
    assert load_task_scores(tmp_path / "tasks.json")["average"] == 50
    save_scores(tmp_path, {"piqa": {"acc": 0.5}}, step=9)
    assert "average" not in load_task_scores(tmp_path / "tasks.json")


def test_a_run_with_scores_of_other_tasks_is_scored(tmp_path):
    (row, *_) = experiment_rows(["table7_130m"], "paper", ["paper.tasks='piqa,boolq'", "paper.measures=[]"])
    folder = add_result(tmp_path, row, 1, **losses(3.0))
    assert len(remaining_tasks([row], [1], load_runs(tmp_path))) == 1
    save_scores(folder, {"piqa": {"acc": 0.5}, "boolq": {"exact_match": 0.5}})
    assert remaining_tasks([row], [1], load_runs(tmp_path)) == []


def test_a_table_of_two_corpora_names_both(tmp_path):
    words = ["data.source=files", "data.files=[texts/a.txt,b*.jsonl.gz]"]
    (first, *_) = with_results(experiment_rows(["table7_130m"], "toy", words), load_runs(tmp_path))
    assert "; a and b*, sequences of" in first.setting


def test_no_run_starts_from_one_that_diverged(tmp_path):
    rows = experiment_rows(["table2_250m"], "toy")
    row = next(row for row in rows if row.name == "lns")
    add_result(tmp_path, row.source, 1, "failed.json", failure="the loss is nan at step 3")
    assert remaining_tasks([row], [1], load_runs(tmp_path)) == []
    assert len(remaining_tasks([row], [2], load_runs(tmp_path))) == 2


def test_a_run_to_start_from_that_was_interrupted_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = next(row for row in experiment_rows(["table2_250m"], "toy") if row.name == "lns")
    add_result(tmp_path / "results", row.source, 1, **losses(3.0))  # trained on another machine
    (row.source.config_for(1).folder / "checkpoints").mkdir(parents=True)
    tasks = remaining_tasks([row], [1], load_runs(tmp_path / "results"))
    assert [task.folder for task in tasks] == [row.source.config_for(1).folder, row.config_for(1).folder]


def test_no_run_starts_from_one_that_fails_in_the_same_command(tmp_path, monkeypatch, capsys):
    started = []

    def run_command(self, words, label):
        (name,) = (word.removeprefix("name=") for word in words if word.startswith("name="))
        started.append(name)
        if "lns" in name:
            return 1
        (folder := Path("runs", name)).mkdir(parents=True)
        (folder / "record.json").write_text("{}")
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CommandPool, "run_command", run_command)
    monkeypatch.setattr("cod_lightning.paper.results.save_result", lambda *_: None)
    words = ["reproduce", "table2_250m", "row=lns,pre_ln", "scale=toy", "--results", "results"]
    assert main(words) == 1
    assert len(started) == 3
    error = capsys.readouterr().err
    assert "4 of 4 runs remaining" in error
    assert re.search(r"lns-\S+ is left out: it starts from runs/toy/lns-\S+, which is not trained", error)


def test_a_scale_at_which_every_run_diverged_is_in_the_report(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "reproducible_experiments", lambda: ["table7_130m"])  # all take 20 s
    for name in ("pre_ln", "lns"):
        add_result(tmp_path / "results", toys[name], 1, "failed.json", failure="the loss is nan at step 3")
    assert main(["report", "--results", "results"]) == 0
    text = Path("REPRODUCTION.md").read_text()
    assert "LNS cannot be compared with Pre-LN; Pre-LN: 1 of 1 diverged; LNS: 1 of 1 diverged." in text
    assert re.search(r"^\| Table 7 \|.*\| Pre-LN; LNS \|$", text, re.MULTILINE)


def test_reproduce_prints_a_table_and_does_not_repeat_diverged_runs(toy, tmp_path, capfd):
    own = [word for word in toy if "." in word.partition("=")[0] and not word.startswith("trainer.max_steps")]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = ["reproduce", "table7_130m", "row=pre_ln", "scale=toy", *own, "data.source=files"]
    words += [f"model.{name}={value}" for name, value in shape.items()] + ["trainer.max_steps=40", "optim.lr=1e18"]
    words += ["optim.warmup_ratio=0.5", f"output={tmp_path}", "--results", str(tmp_path / "results")]
    assert main(words) == 2
    printed = " ".join(capfd.readouterr().out.split())
    assert "Table 7, scale=toy: 130M" in printed
    assert "26.73" in printed
    assert re.search("failed: the (loss|gradient)", printed)
    (diverged,) = (tmp_path / "results").rglob("failed.json")
    assert json.loads(diverged.read_text())["failure"].startswith(("the loss is ", "the gradient is "))
    assert main(words) == 0
    assert capfd.readouterr().err == "0 of 1 runs remaining\n"


def test_reproduce_trains_no_run_on_another_text_than_that_of_the_records(toy, tmp_path, capfd):
    own = ["data.source=files", *(word for word in toy if word.startswith("data.")), f"output={tmp_path}/runs"]
    rows = {row.name: row for row in experiment_rows(["table7_130m"], "toy", own)}
    lns = add_result(tmp_path / "results", rows["lns"], 1, **losses(5.0))
    words = ["reproduce", "table7_130m", "row=pre_ln", "scale=toy", *own, "--results", str(tmp_path / "results")]
    assert main(words) == 2
    assert f"would read another text than {lns / 'record.json'} (data feedfeedfeedfeed...)" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
    record = json.loads((lns / "record.json").read_text())
    same = {"data_fingerprint": read_manifest(prepare(rows["lns"].config.data)).fingerprint}
    (lns / "record.json").write_text(json.dumps(record | same))
    tasks = remaining_tasks([rows["pre_ln"]], [1], load_runs(tmp_path / "results"))
    assert len(tasks) == 1
    check_corpus(tasks, with_results(rows.values(), load_runs(tmp_path / "results")))


def test_fields_of_images_and_of_text_are_settings_of_the_rows_that_read_them():
    words = ["images.size=16", "data.seq_len=64", "data.batch_size=64"]
    rows = {row.experiment: row for row in experiment_rows(["table5_vit_s", "table7_130m"], "toy", words)}
    images, text = rows["table5_vit_s"], rows["table7_130m"]
    assert images.config.images.size == 16
    assert text.config.data.seq_len == 64
    assert {images.config.data.batch_size, text.config.data.batch_size} == {64}
    assert "images.size=16" not in text.overrides
    assert "data.seq_len=64" not in images.overrides


def test_a_setting_is_one_of_the_rows_that_read_it_and_of_those_that_they_start_from():
    words = ["optim.lisa_interval=3", "data.layout=packed", "model.init_std=0.1"]
    (_, _, _, tuned, _) = experiment_rows(["table2_250m"], "toy", words)
    assert set(words) & set(tuned.overrides) == {words[0]}
    assert set(words) & set(tuned.source.overrides) == set(words[1:])
    assert not any(word.startswith("init_from=") for word in tuned.overrides)
    assert (tuned.config.optim.lisa_interval, tuned.source.config.data.layout) == (3, "packed")
    rows = {row.name: row for row in experiment_rows(["table3_olmo_1b"], "toy", ["model.init_std=0.1"])}
    assert [name for name, row in rows.items() if row.config.model.init_std == 0.1] == [
        name for name, row in rows.items() if row.config.model.init == "normal"
    ]


def test_depth_reports_on_pretrained_models_are_read(tmp_path):
    for name in ("variance", "removal", "angular", "jacobian"):
        path = tmp_path / "reports" / "both" / "smollm2" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(EMPTY[name] | {"model": "smollm2", "tokens": 9}))
    models = {"smollm2": {"uniform_loss": 10.8}, "lns-seed1-0a1b2c3d": {"uniform_loss": 7.6}}
    headline = tmp_path / "reports" / "both" / "report.json"
    headline.write_text(json.dumps({"models": models}))
    (model,) = load_pretrained_models(tmp_path)
    assert (model.name, model.uniform_loss) == ("smollm2", 10.8)
    assert model.page == f"{tmp_path}/reports/both/report.html"
    assert model.results["removal"]["losses"] == [1.5, 1.25]
    path.unlink()
    with pytest.raises(UserError, match=r"smollm2: jacobian\.json is missing"):
        load_pretrained_models(tmp_path)
    for damaged in ("[]", "{}"):
        headline.write_text(damaged)
        with pytest.raises(UserError, match=r"report\.json"):
            load_pretrained_models(tmp_path)


def test_the_average_is_that_of_the_tasks_of_the_paper(tmp_path):
    save_scores(tmp_path, {task: {"acc": 0.5} for task in PAPER_TASKS} | {"sciq": {"acc": 0.9}})
    scores = load_task_scores(tmp_path / "tasks.json")
    assert (scores["average"], scores["sciq"]) == (50, 90)
