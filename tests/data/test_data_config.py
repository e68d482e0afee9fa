import dataclasses

import pytest

from cod_lightning.data.config import DataConfig, data_errors, patterns


def test_the_defaults_are_valid():
    assert data_errors(DataConfig()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": "dcos"}, ["data.source='dcos' does not exist: did you mean 'docs'?"]),
        ({"layout": "pack"}, ["data.layout='pack' does not exist: did you mean 'packed'?"]),
        ({"source": "files"}, ["data.files is empty"]),
        ({"source": "files", "files": 3}, ["data.files=3 must be a glob"]),
        ({"source": "files", "files": ["a", 3]}, ["data.files=['a', 3] must be a glob"]),
        ({"files": "a*.txt"}, ["data.source=docs does not read data.files"]),
        ({"seq_len": 1, "batch_size": 0}, ["data.seq_len=1", "data.batch_size=0"]),
        ({"vocab_size": 257}, ["data.vocab_size=257 must be at least 258"]),
        ({"max_documents": 0}, ["data.max_documents=0"]),
        ({"tokenizer": ""}, ["data.tokenizer is empty"]),
        ({"folder": ""}, ["data.folder is empty"]),
        ({"text_field": ""}, ["data.text_field is empty"]),
        ({"encoding": "utf-9"}, ["data.encoding='utf-9' is not an encoding: use utf-8, latin-1"]),
        ({"encoding": "base64"}, ["data.encoding='base64' is not an encoding"]),
        ({"encoding": "utf-8\0"}, ["data.encoding='utf-8\\x00' is not an encoding"]),
        ({"sha256": "ABC"}, ["data.sha256='ABC' must be 64 hexadecimal digits"]),
        (
            {"val_tokens": 100, "val_every": 1},
            ["data.val_every=1", "data.val_tokens=100 must be at least data.seq_len=128"],
        ),
    ],
)
def test_every_bad_field_is_named(changes, expected):
    errors = data_errors(DataConfig(**changes))
    assert len(errors) == len(expected)
    for line, start in zip(errors, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("encoding", "codec"), [("UTF-8", "utf-8"), ("utf8", "utf-8"), ("U8", "utf-8"), ("utf-16", "utf-16"), ("L1", "L1")]
)
def test_spellings_of_utf_8_are_one_encoding(encoding, codec):
    assert DataConfig(encoding=encoding).codec == codec


def test_a_given_tokenizer_ignores_the_vocabulary_size():
    assert data_errors(DataConfig(tokenizer="t5-base", vocab_size=0)) == []


def test_patterns_are_a_list():
    assert (patterns(None), patterns("a"), patterns(("a", "b"))) == ([], ["a"], ["a", "b"])


def test_fields_that_do_not_change_the_result_are_marked_as_runtime():
    runtime = {field.name for field in dataclasses.fields(DataConfig) if field.metadata.get("runtime")}
    assert runtime == {"repeat", "micro_batch_size", "root", "workers", "loader_workers"}
