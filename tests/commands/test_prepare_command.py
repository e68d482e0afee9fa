"""The words of `prepare` for shards."""

import pytest

from cod_lightning.cli import main
from cod_lightning.commands.prepare import shard_of
from cod_lightning.errors import UserError


@pytest.mark.parametrize("text", ["5/4", "4/4", "0/0", "a/b", "-1/4", "1", "1/", "", "1/4/2", "0.5/4"])
def test_a_malformed_shard_is_refused(text):
    with pytest.raises(UserError, match=rf"shard={text}: must be K/N, where N shards are numbered from 0"):
        shard_of(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "must be the number of shards") for text in ("0", "-1", "10001")),
        *((text, "expected a whole number") for text in ("a", "", "1/4")),
    ],
)
def test_a_malformed_number_of_shards_is_refused(text, message, capsys):
    assert main(["prepare", f"merge={text}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: merge={text}: {message}")


@pytest.mark.parametrize(
    ("words", "function"),
    [([], "prepare.prepare"), (["shard=0/2"], "shards.prepare_shard"), (["merge=2"], "shards.merge_shards")],
)
def test_ctrl_c_asks_to_run_the_preparation_again(words, function, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cod_lightning.data.{function}", interrupt)
    assert main(["prepare", "data=docs", *words]) == 75
    assert capsys.readouterr().err.startswith("interrupted by SIGINT")


def test_shards_are_numbered_from_zero():
    assert (shard_of("0/3"), shard_of("2/3")) == ((0, 3), (2, 3))
