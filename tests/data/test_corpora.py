import gzip
import json
import subprocess
import sys
import types
from dataclasses import replace
from email.message import Message

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_lightning.data import corpora, hub
from cod_lightning.data.config import DataConfig
from cod_lightning.data.corpora import find_files, hold_out, open_corpus, read_file
from cod_lightning.errors import UserError


def test_files_are_read_in_order_in_every_format(tmp_path):
    (tmp_path / "a.txt").write_text("first\nwith lines", "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": " "}\n{"text": "third"}\n')
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'{"text": "fourth", "url": "x"}\n'))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("fünfter".encode()))
    config = DataConfig(source="files", files=[str(tmp_path / "*"), str(tmp_path / "a.txt")], val_every=100)
    corpus = open_corpus(config)
    expected = ["first\nwith lines", "second", "third", "fourth", "fünfter"]
    assert list(corpus.train()) == expected
    assert list(corpus.train()) == expected  # can be read again
    assert list(corpus.val()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "a"}\n', 'x.jsonl, line 2: no string in the field "text"'),
        ("x.json", b'[{"text": "a"}]', 'x.json, line 1: no string in the field "text"'),
        ("x.jsonl", b'{"text": 3}', 'line 1: no string in the field "text"'),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: not valid Unicode"),
        ("x.json.gz", b"not gzip", "x.json.gz cannot be read"),
        ("x.json.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-20], "x.json.gz cannot be read"),
        ("x.txt", b"\xff\xfe\x00", "x.txt is not UTF-8"),
    ],
    ids=range(8),
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_file(tmp_path / name))
    assert message in str(error.value)


def test_globs_must_match_readable_kinds(tmp_path):
    with pytest.raises(UserError, match=r"data.files: no file matches"):
        find_files("data.files", str(tmp_path / "*.txt"))
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.parquet is not one of"):
        find_files("data.val_files", str(tmp_path / "*"))


def test_validation_files_replace_held_out_documents(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in range(9)))
    (tmp_path / "val.jsonl").write_text('{"text": "v"}\n')
    config = DataConfig(source="files", files=str(tmp_path / "train.jsonl"), val_every=3)
    held_out = open_corpus(replace(config, max_documents=4))
    assert list(held_out.train()) == ["t0", "t1", "t3", "t4"]
    assert list(held_out.val()) == ["t2", "t5", "t8"]  # not fewer for fewer training documents
    given_files = open_corpus(replace(config, val_files=str(tmp_path / "val.jsonl")))
    assert len(list(given_files.train())) == 9
    assert list(given_files.val()) == ["v"]


@given(st.integers(0, 60), st.integers(2, 9))
def test_held_out_documents_are_all_the_others(count, every):
    corpus = hold_out(lambda: map(str, range(count)), every)
    train, val = list(corpus.train()), list(corpus.val())
    assert sorted(train + val, key=int) == [str(n) for n in range(count)]
    assert len(val) == count // every


def test_c4_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cod_lightning\[hf\]'.*data=files"):
        open_corpus(DataConfig(source="c4"))


def test_c4_offline_fails_immediately(monkeypatch):
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*data=files"):
        open_corpus(DataConfig(source="c4"))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="does not answer"):
        open_corpus(DataConfig(source="c4"))


def test_c4_streams_its_own_validation_split(monkeypatch):
    def load_dataset(path, name, *, split, streaming):
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        return [{"text": f"{split} {n}"} for n in range(5)] + [{"text": "  "}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    monkeypatch.setattr(corpora, "require_hub", lambda what, instead: None)
    corpus = open_corpus(DataConfig(source="c4", max_documents=3))
    assert list(corpus.train()) == ["train 0", "train 1", "train 2"]
    assert len(list(corpus.val())) == 5


def test_a_hub_that_answers_with_any_status_is_reachable(monkeypatch):
    def refuse(request, timeout):
        raise hub.urllib.error.HTTPError(request.full_url, 403, "no", Message(), None)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.urllib.request, "urlopen", refuse)
    hub.require_hub("data.source=c4", "")


def test_preparing_modules_do_not_import_torch():
    names = ["config", "corpora", "documentation", "hub", "manifest", "prepare", "tokenizers"]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module("cod_lightning.data." + name)
assert not {{"torch", "litdata", "lightning", "transformers"}} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
