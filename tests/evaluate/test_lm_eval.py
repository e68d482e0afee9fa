"""Downstream tasks: without lm-evaluation-harness, and with it where it is installed."""

import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
import yaml

from cod_lightning.cli import main
from cod_lightning.errors import UserError
from cod_lightning.evaluate import PAPER_TASKS, lm_eval
from cod_lightning.evaluate.lm_eval import numeric_metrics, run_tasks, save_scores, score_tasks, task_manager
from cod_lightning.train.load import load_run
from cod_lightning.typed_json import read_json
from tiny_models import tiny_decoder

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")


def test_a_missing_harness_is_an_error(monkeypatch):
    for module in ("lm_eval", "lm_eval.models.huggingface"):  # another test may have imported the second
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'cod_lightning\[eval\]'"):
        task_manager(("piqa",))


def test_a_decoder_without_export_is_an_error():
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=r"this model has no export:\nbranch_norm=True"):
        score_tasks(tiny_decoder("sandwich_ln"), None, ("piqa",), None, max_length=8)


def test_metrics_without_a_filter_lose_the_suffix():
    results = {"alias": "x", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1}
    assert numeric_metrics(results) == {"acc": 0.5, "exact_match,strict": 1.0}


def test_scores_are_merged_with_those_of_other_tasks(tmp_path):
    save_scores(tmp_path, {"piqa": {"acc": 0.5}}, step=5)
    save_scores(tmp_path, {"boolq": {"acc": 0.6}}, step=9)
    expected = {"piqa": {"acc": 0.5, "step": 5}, "boolq": {"acc": 0.6, "step": 9}}
    assert json.loads((tmp_path / "tasks.json").read_text()) == expected


def test_scores_of_the_best_checkpoint_have_a_file_of_their_own(tmp_path):
    save_scores(tmp_path, {"piqa": {"acc": 0.5}})
    save_scores(tmp_path, {"piqa": {"acc": 0.6}}, "best")
    scores = {name: json.loads((tmp_path / name).read_text()) for name in ("tasks.json", "tasks_best.json")}
    assert scores == {"tasks.json": {"piqa": {"acc": 0.5}}, "tasks_best.json": {"piqa": {"acc": 0.6}}}


def test_a_damaged_file_of_scores_is_an_error(tmp_path):
    (tmp_path / "tasks.json").write_text("[1")
    with pytest.raises(UserError, match=r"tasks\.json: .*; remove the file and evaluate again"):
        save_scores(tmp_path, {"piqa": {"acc": 0.5}})


def test_scores_of_two_processes_at_once_are_all_kept(tmp_path, monkeypatch):
    def read_slowly(*arguments):
        scores = read_json(*arguments)
        time.sleep(0.02)
        return scores

    monkeypatch.setattr(lm_eval, "read_json", read_slowly)
    save_scores(tmp_path, {"piqa": {"acc": 0.5}})
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda task: save_scores(tmp_path, {task: {"acc": 0.6}}), "abcd"))
    assert json.loads((tmp_path / "tasks.json").read_text()).keys() == {"piqa", *"abcd"}


def failing(error, cause=None):
    """An evaluation that fails on the task `bad`."""

    def evaluate(tasks):
        if "bad" in tasks:
            raise error from cause
        return {"results": {task: {"folder": os.getcwd()} for task in tasks}}

    return evaluate


@pytest.fixture
def own_task(tmp_path):
    """`own_task(data_files)` writes the YAML of a task into a folder and returns its path."""

    def write(data_files):
        path = tmp_path / "tasks" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        text = yaml.safe_dump({"task": "mine", "dataset_kwargs": {"data_files": data_files}})
        path.write_text(text + "process_docs: !function utils.process\n")
        return path

    return write


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("tst"), "KeyError: 'tst'"),
        (TypeError("'NoneType' object is not callable"), "TypeError: 'NoneType'"),
        (ValueError("Got invalid output_type 'choise', must be in\n"), "ValueError: Got invalid output_type 'choise'"),
        (FileNotFoundError("Unable to find 'nope.jsonl'"), "FileNotFoundError: Unable to find 'nope.jsonl'"),
    ],
)
def test_a_bad_task_of_a_user_is_named_with_its_file(own_task, error, reason):
    path = own_task("rows.jsonl")
    with pytest.raises(UserError) as failure:
        run_tasks(failing(error), ["piqa", "bad"], {"piqa": None, "bad": path})
    assert str(failure.value).startswith(f"tasks=bad: {path}: {reason}")
    assert "check its output_type, splits, metrics" in str(failure.value)


def test_the_cause_of_a_failed_task_is_named(own_task):
    evaluate = failing(RuntimeError("An error occurred"), cause=ValueError("JSON parse error"))
    with pytest.raises(UserError, match="ValueError: JSON parse error"):
        run_tasks(evaluate, ["bad"], {"bad": own_task("rows.jsonl")})


@pytest.mark.parametrize("data_files", ["rows.jsonl", {"test": ["rows.jsonl"]}, {"test": "r*.jsonl"}])
@pytest.mark.parametrize(
    ("where", "expected"), [("beside", "tasks"), ("here", "."), ("both", "tasks"), ("no", "tasks")]
)
def test_relative_data_files_are_sought_beside_the_task(own_task, tmp_path, monkeypatch, data_files, where, expected):
    path = own_task(data_files)
    monkeypatch.chdir(tmp_path)
    if where in ("beside", "both"):
        path.with_name("rows.jsonl").touch()
    if where in ("here", "both"):
        (tmp_path / "rows.jsonl").touch()
    results = run_tasks(failing(None), ["piqa", "mine"], {"piqa": None, "mine": path})
    assert results == {"mine": {"folder": str((tmp_path / expected).resolve())}, "piqa": {"folder": str(tmp_path)}}


@needs_harness
@pytest.mark.filterwarnings("default")
def test_bad_tasks_are_errors(tmp_path):
    with pytest.raises(UserError, match="tasks= is empty"):
        task_manager(())
    with pytest.raises(UserError, match="no such folder"):
        task_manager(("piqa",), tmp_path / "nowhere")


@needs_harness
@pytest.mark.filterwarnings("default")
def test_only_names_that_have_no_score_in_the_harness_are_errors(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: toy_choice")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [piqa, boolq]")
    with pytest.raises(UserError, match=r"unknown task 'toy_choise'; similar: toy_choice\b") as error:
        task_manager(("toy_choise", "glue", "both", *PAPER_TASKS), tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "tasks: 'glue' is a tag, which has no score: name its tasks",
        "tasks: 'both' is a group without an aggregate score: name its tasks",
    ]


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_task_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\n  doc: [")
    with pytest.raises(UserError, match=r"unknown task 'mine'[^\n]*\n.*mine\.yaml: not YAML: "):
        task_manager(("mine",), tmp_path)


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_metric_that_the_harness_does_not_have_is_named(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"task": "bad", "metric_list": [{"metric": "acc"}, {"metric": "accc"}]}))
    with pytest.raises(UserError, match=r"KeyError: None; 'accc' is not a metric of the harness; check"):
        run_tasks(failing(KeyError(None)), ["bad"], {"bad": path})


@needs_harness
@pytest.mark.filterwarnings("default")
def test_tasks_are_scored_with_the_logits_of_the_decoder(train, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _, folder = train("trainer.stats_every=0")
    decoder, tokenizer = load_run(folder)
    rng = random.Random(0)
    words = ["the", "norm", "of", "a", "deep", "block", "grows", "with", "depth"]
    rows = [{"choices": [" ".join(rng.choices(words, k=4)) for _ in range(3)], "label": i % 3} for i in range(12)]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "toy_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},  # beside the task's YAML
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "early layers",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "toy.yaml").write_text(yaml.safe_dump(task))

    @torch.no_grad()
    def likelihood(choice):
        ids = tokenizer.encode([f"early layers {choice}"])[0][:-1]
        start = len(tokenizer.encode(["early layers"])[0]) - 1
        logits = decoder(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        return float(sum(logits[i - 1, ids[i]] for i in range(start, len(ids))))

    right = sum(max(range(3), key=lambda i: likelihood(row["choices"][i])) == row["label"] for row in rows)
    assert main(["evaluate", str(folder), "--task-folder", str(tasks), "tasks=toy_choice"]) == 0
    printed = capsys.readouterr().out
    assert f"toy_choice acc {right / 12:.6g}\n" in printed
    assert "toy_choice acc_stderr" in printed
