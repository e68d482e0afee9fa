"""What can be known of the harness without it; tests/test_cli.py runs it where it is installed."""

import sys
from importlib.util import find_spec

import pytest

from cod_lightning.errors import UserError
from cod_lightning.evaluate.lm_eval import PAPER_TASKS, plain, score, task_manager
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all


def test_without_the_harness_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'cod_lightning\[eval\]'"):
        task_manager(("piqa",))


def test_a_decoder_that_is_no_llama_is_refused_before_anything_runs():
    pytest.importorskip("transformers")
    config = DecoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    decoder = build_decoder(config, build_all({"name": "sandwich_ln"}, 2), seed=0)
    with pytest.raises(UserError, match=r"cannot be exported\nbranch_norm=True"):
        score(decoder, None, ("piqa",), None, max_length=8)


def test_figures_are_named_without_an_absent_filter():
    figures = {"alias": "x", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,strict": 1}
    assert plain(figures) == {"acc": 0.5, "exact_match,strict": 1.0}


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("default")
def test_the_harness_has_the_tasks_of_the_paper(tmp_path):
    task_manager(PAPER_TASKS)
    with pytest.raises(UserError, match="tasks= is empty"):
        task_manager(())
    with pytest.raises(UserError, match="no such folder"):
        task_manager(("piqa",), tmp_path / "nowhere")
