"""`verify` on the command line."""

from pathlib import Path

import pytest

from cod_lightning.cli import main


@pytest.fixture
def llama(tiny_llama, tmp_path):
    """The folder of an untrained Llama of three blocks, with a tokenizer."""
    return tiny_llama(tmp_path)


def test_a_run_is_checked_against_its_own_strategy(train, capsys):
    _, folder = train("norm=lns", "norm.position=only_ffn")
    assert main(["verify", str(folder)]) == 0
    assert "branch_scale" in capsys.readouterr().out


def test_no_tokenizer_is_needed(llama, capsys):
    for path in Path(llama).glob("*token*"):
        path.unlink()
    assert main(["verify", llama, "norm=pre_ln"]) == 0
    assert "gain" in capsys.readouterr().out


def test_a_model_without_the_strategy_fails_and_its_first_block_is_named(llama, capsys):
    assert main(["verify", llama, "norm=lns"]) == 2
    assert "layer 2, attention: gain is 1, expected 0.707107" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no strategy"),
        (["norm=lnss"], "did you mean 'lns'"),
        (["seed=1"], "'seed=1': verify reads norm=NAME"),
        (["norm=lns", "norm.positon=only_ffn"], "did you mean 'position'"),
        (["norm=post_ln"], "pre_norm=False"),
    ],
)
def test_wrong_words_are_an_error(llama, words, message, capsys):
    assert main(["verify", llama, *words]) == 2
    assert message in capsys.readouterr().err
