"""Behaviour without lm-evaluation-harness; tests/test_cli.py runs it where it is installed."""

import json
import sys
from importlib.util import find_spec

import pytest

from cod_lightning.errors import UserError
from cod_lightning.evaluate.lm_eval import PAPER_TASKS, numeric_metrics, save_scores, score_tasks, task_manager
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")


def test_a_missing_harness_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'cod_lightning\[eval\]'"):
        task_manager(("piqa",))


def test_a_decoder_without_export_is_an_error():
    pytest.importorskip("transformers")
    config = DecoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    decoder = build_decoder(config, build_all({"name": "sandwich_ln"}, 2), seed=0)
    with pytest.raises(UserError, match=r"this model has no export:\nbranch_norm=True"):
        score_tasks(decoder, None, ("piqa",), None, max_length=8)


def test_metrics_without_a_filter_lose_the_suffix():
    results = {"alias": "x", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1}
    assert numeric_metrics(results) == {"acc": 0.5, "exact_match,strict": 1.0}


def test_scores_are_merged_with_those_of_other_tasks(tmp_path):
    save_scores(tmp_path, {"piqa": {"acc": 0.5}})
    save_scores(tmp_path, {"boolq": {"acc": 0.6}})
    assert json.loads((tmp_path / "tasks.json").read_text()) == {"piqa": {"acc": 0.5}, "boolq": {"acc": 0.6}}


def test_a_damaged_file_of_scores_is_an_error(tmp_path):
    (tmp_path / "tasks.json").write_text("[1")
    with pytest.raises(UserError, match=r"tasks\.json: .*; remove the file and evaluate again"):
        save_scores(tmp_path, {"piqa": {"acc": 0.5}})


@needs_harness
@pytest.mark.filterwarnings("default")
def test_the_harness_has_the_tasks_of_the_paper():
    task_manager(PAPER_TASKS)


@needs_harness
@pytest.mark.filterwarnings("default")
def test_bad_tasks_are_errors(tmp_path):
    with pytest.raises(UserError, match="tasks= is empty"):
        task_manager(())
    with pytest.raises(UserError, match="no such folder"):
        task_manager(("piqa",), tmp_path / "nowhere")
