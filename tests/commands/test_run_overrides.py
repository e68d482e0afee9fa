"""Overrides of the commands on a finished run; tests/test_bad_input.py has those that are refused."""

import pytest

from cod_lightning.commands.overrides import READS, check_conditions, check_no_ignored_overrides
from cod_lightning.config.compose import compose
from cod_lightning.config.groups import default_values, groups
from cod_lightning.config.saved import create_run_folder, load_config
from cod_lightning.config.schema import Config
from cod_lightning.errors import UserError

USED = {
    "evaluate": [
        *("data=files", "data.root=x", "+data.val_files=a.txt", "images.folder=x", "model.norm_backend=torch"),
        *("norm.position=after_ln", "eval.paper_batch=4", "trainer=cpu", "trainer.precision=bf16-mixed"),
        *("trainer.accelerator=gpu", "trainer.devices=2", "trainer.strategy=ddp", "trainer.threads=1"),
    ],
    "evaluate tasks=": ["data.seq_len=9", "data.micro_batch_size=1", "trainer.accelerator=cpu"],
    "measure": ["data=files", "data.files=[a,b]", "images.folder=x", "trainer=cpu", "trainer.threads=1"],
}


@pytest.mark.parametrize(("command", "word"), [(command, word) for command, words in USED.items() for word in words])
def test_an_override_that_a_command_reads_is_accepted(command, word):
    check_no_ignored_overrides([word], command, groups())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "evaluate",
            ["data=files", "data.files=x", "data.max_documents=3", "data.text_field=x", "data.encoding=latin-1"],
        ),
        ("evaluate", ["data.root=x", "data.workers=2", "data.val_every=3", "data.layout=document"]),
        ("evaluate", ["data.folder=s3://bucket/set", "data.root=x"]),
        ("evaluate", ["task=vision", "data.loader_workers=2", "images.source=folder", "images.folder=x"]),
        ("evaluate", ["protocol=paper", "eval.paper_batch=4", "eval.paper_ranks=2", "trainer.auto_cuda=bf16-true"]),
        ("evaluate", ["trainer=ddp", "trainer.timeout=9"]),
        ("predict", ["data.vocab_size=300", "data=docs"]),
    ],
)
def test_an_override_is_accepted_in_the_case_in_which_it_is_read(command, words):
    check_conditions(words, command, compose(words, trains=False))


def test_a_command_that_trains_nothing_takes_any_micro_batch(tmp_path):
    words = ["data.micro_batch_size=5"]
    with pytest.raises(UserError, match="not divisible"):
        compose(words)
    assert compose(words, trains=False).data.micro_batch_size == 5
    folder = create_run_folder(compose([f"output={tmp_path}"]))
    assert load_config(folder, words).data.micro_batch_size == 5


@pytest.mark.parametrize("command", READS)
def test_the_fields_that_a_command_reads_exist(command):
    known = {*vars(Config()), *default_values()}
    assert known.issuperset(READS[command])


def test_every_override_without_effect_is_named():
    with pytest.raises(UserError) as error:
        check_no_ignored_overrides(["seed=1", "data.seq_len=3", "name=x"], "measure", groups())
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["seed=1", "name=x"]
