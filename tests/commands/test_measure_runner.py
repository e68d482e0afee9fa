"""Studies on a tiny model in this process; tests/test_cli.py opens runs and models."""

import json
from dataclasses import replace

import pytest
import torch

from cod_lightning.commands.measure_runner import Subject, run_prune, run_study
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.registry import measures_of
from cod_lightning.nn.huggingface import export
from tiny_models import tiny_decoder

pytestmark = pytest.mark.usefixtures("without_images")


def subject(norm="lns", depth=3):
    model = tiny_decoder(norm, depth).eval()
    tokens = torch.randint(3, 37, (4, 10), generator=torch.Generator().manual_seed(0))
    return Subject(ModelAdapter(model, norm), [tokens], None, export)


def saved(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_measure_gets_the_options_that_it_has(tmp_path):
    run_study("removal", subject(), {"sizes": [2], "pairs": "all"}, tmp_path)
    assert saved(tmp_path, "run_removal")["sizes"] == [2]
    assert saved(tmp_path, "swaps")["pairs"] == [[1, 2], [1, 3], [2, 3]]


def test_every_measure_of_a_study_is_saved_and_shown(tmp_path, capsys):
    run_study("removal", subject(), {}, tmp_path)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == set(measures_of("removal"))
    printed = capsys.readouterr().out
    assert all(f"lns: {name}" in printed for name in names)


@pytest.mark.parametrize(
    ("widest", "only", "saves"), [(16, (), True), (15, (), False), (15, ("jacobian", "jacobian_map"), True)]
)
def test_whole_jacobians_of_wide_models_are_taken_by_name_only(tmp_path, monkeypatch, widest, only, saves):
    monkeypatch.setattr("cod_lightning.measure.registry.MAX_FULL_JACOBIAN", widest)
    options = {"only": only, "layers": [1, 3], "probes": 2, "iterations": 1, "tokens": 1}
    run_study("jacobian", subject(), options, tmp_path)
    assert (tmp_path / "jacobian_map.json").is_file() == saves


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [
        ("removal", {"sizes": [1, -1]}, r"sizes=\[1, -1\]: expected 1 to 3, the number of blocks"),
        ("influence", {"longest": 4}, "longest=4: expected 1 to 3"),
        ("all", {"iterations": 0}, "iterations=0 must be at least 1"),
    ],
)
def test_options_are_refused_before_anything_is_measured(tmp_path, study, options, message):
    with pytest.raises(UserError, match=message):
        run_study(study, subject(), options, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_option_of_measures_that_are_left_out_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"pairs=all has no effect on lns, remove it: swaps: it needs at"):
        run_study("removal", subject(depth=1), {"pairs": "all"}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pruned_model_has_its_losses_beside_it(tmp_path, capsys):
    pytest.importorskip("transformers")
    run_prune(subject(), {"by": "streamline", "blocks": 2}, tmp_path / "small")
    assert saved(tmp_path / "small", "config")["num_hidden_layers"] == 1
    assert saved(tmp_path / "small", "prune")["how"] == "streamline"
    assert "lns after" in capsys.readouterr().out


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertLMHeadModel(transformers.BertConfig(intermediate_size=24, **shape)).eval()
    return replace(subject(), model=ModelAdapter(model, "large"))


def test_measures_of_the_next_token_are_left_out_for_bert(bert, tmp_path, capsys):
    run_study("removal", bert, {}, tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["causal.json"]
    assert "swaps: left out, bert does not predict the next token" in capsys.readouterr().out


def test_measures_of_deeper_models_are_left_out(tmp_path, capsys):
    run_study("removal", subject(depth=1), {"only": ["swaps", "removal"]}, tmp_path)
    assert [path.name for path in tmp_path.glob("*.json")] == ["removal.json"]
    assert "swaps: left out, it needs at least 2 blocks, but the model has 1" in capsys.readouterr().out


def test_bert_cannot_be_pruned(bert, tmp_path):
    with pytest.raises(UserError, match="large: bert does not predict the next token: measure prune needs it"):
        run_prune(bert, {"layers": [1]}, tmp_path / "small")


def test_a_measure_that_needs_more_tokens_is_left_out_of_a_study(tmp_path, capsys):
    few = subject()
    few = replace(few, batches=[few.batches[0][:1]])
    run_study("removal", few, {}, tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(measures_of("removal")) - {"linear_replacement"}
    printed = capsys.readouterr().out
    assert "linear_replacement: left out, it needs more tokens than the hidden size 16, not 10" in printed
