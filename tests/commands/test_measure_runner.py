"""Studies on a tiny model in this process; tests/test_cli.py opens runs and models."""

import json

import pytest
import torch

from cod_lightning.commands.measure_runner import Subject, run_prune, run_study
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.huggingface import export
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all


def subject(norm="lns", depth=3):
    config = DecoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=depth, num_attention_heads=2, vocab_size=37
    )
    model = build_decoder(config, build_all({"name": norm}, depth), seed=0).eval()
    tokens = torch.randint(3, 37, (4, 10), generator=torch.Generator().manual_seed(0))
    return Subject(ModelAdapter(model, norm), [tokens], None, export)


def test_options_reach_the_measures_that_have_them(tmp_path, capsys):
    run_study("removal", subject(), {"sizes": [2], "pairs": "all"}, tmp_path)
    assert json.loads((tmp_path / "run_removal.json").read_text())["sizes"] == [2]
    assert json.loads((tmp_path / "swaps.json").read_text())["pairs"] == [[1, 2], [1, 3], [2, 3]]
    assert len(list(tmp_path.iterdir())) == 3 * 5
    printed = capsys.readouterr().out
    assert "lns: linear_replacement" in printed
    assert printed.count("delta_loss") == 4


@pytest.mark.parametrize(("widest", "made"), [(16, True), (15, False)])
def test_whole_jacobians_up_to_a_width(tmp_path, widest, made):
    options = {"widest": widest, "layers": [1, 3], "probes": 2, "iterations": 1, "tokens": 1}
    run_study("jacobian", subject(), options, tmp_path)
    assert (tmp_path / "jacobian_map.json").is_file() == made
    assert json.loads((tmp_path / "gain.json").read_text())["layers"] == [1, 3]
    assert json.loads((tmp_path / "jacobian.json").read_text())["probes"] == 2


def test_the_theory_says_where_the_paper_disagrees_with_itself(tmp_path, capsys):
    run_study("theory", subject(), {}, tmp_path)
    printed = capsys.readouterr().out
    assert "- Lemma 4.1 allows L^(2 - epsilon)" in printed
    assert "Lemma 3.2" not in printed


def test_where_results_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file: choose a folder for the results"):
        run_study("variance", subject(), {}, tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        run_study("variance", subject(), {}, tmp_path / "file/below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pruned_model_has_its_figures_beside_it(tmp_path, capsys):
    pytest.importorskip("transformers")
    run_prune(subject(), {"by": "streamline", "blocks": 2}, tmp_path / "small")
    assert json.loads((tmp_path / "small/config.json").read_text())["num_hidden_layers"] == 1
    assert json.loads((tmp_path / "small/prune.json").read_text())["how"] == "streamline"
    assert "lns after" in capsys.readouterr().out
