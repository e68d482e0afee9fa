import csv
import gzip
import json
import sys
import types
from dataclasses import replace
from email.message import Message
from pathlib import Path

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_lightning.data import corpora, hub, readers
from cod_lightning.data.config import DataConfig
from cod_lightning.data.corpora import find_files, hold_out, open_corpus, texts_of_shard
from cod_lightning.data.instructions import Example
from cod_lightning.data.prepare import prepared_folder
from cod_lightning.data.readers import read_file
from cod_lightning.errors import UserError
from command_words import run_python


def test_files_are_read_in_order_in_every_format(tmp_path):
    (tmp_path / "a.txt").write_text("first\nwith lines", "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": " "}\n{"text": "third"}\n')
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'{"text": "fourth", "url": "x"}\n'))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("fünfter".encode()))
    (tmp_path / "e.csv").write_bytes('\ufefftext,url\n"sixth, with\nlines",x\n'.encode())
    (tmp_path / "f.json").write_text('\n [\n {"text": "seventh"}, {"text": ""},\n {"text": "eighth"}]')
    (tmp_path / "g.md").write_text("# Ninth")
    with pyarrow.CompressedOutputStream(str(tmp_path / "h.jsonl.zst"), "zstd") as file:
        file.write(b'{"text": "tenth"}\n{"text": "eleventh"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": ["twelfth"]}), tmp_path / "i.parquet")
    config = DataConfig(source="files", files=[str(tmp_path / "*"), str(tmp_path / "a.txt")])
    texts = texts_of_shard(config, 0, 1)["train"]
    expected = ["first\nwith lines", "second", "third", "fourth", "fünfter", "sixth, with\nlines", "seventh", "eighth"]
    expected += ["# Ninth", "tenth", "eleventh", "twelfth"]
    assert list(texts()) == expected
    assert list(texts()) == expected  # can be read again


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.txt", "x.md.gz", "x.csv", "x.jsonl", "x.json", "x.json.gz"])
def test_files_in_other_encodings_and_with_another_field_are_read(tmp_path, name, encoding):
    contents = {".txt": "Übung", ".md": "Übung", ".csv": "n,content\n1,Übung\n", ".jsonl": '\n{"content": "Übung"}\n'}
    contents[".json"] = '[{"content": "Übung"}]'
    content = contents[readers.format_of(tmp_path / name)].encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_file(tmp_path / name, "content", encoding)) == ["Übung"]
    with pytest.raises(UserError, match=rf"{name}.* is not UTF-8: .*data\.encoding=latin-1"):
        list(read_file(tmp_path / name, "content"))


def test_every_spelling_of_utf_8_drops_a_byte_order_mark(tmp_path):
    (tmp_path / "x.txt").write_text("text", "utf-8-sig")
    (tmp_path / "x.csv").write_text("text\ntext\n", "utf-8-sig")
    (tmp_path / "x.json").write_text('[{"text": "text"}]', "utf-8-sig")
    (tmp_path / "x.jsonl").write_text('{"text": "text"}', "utf-8-sig")
    config = DataConfig(source="files", files=str(tmp_path / "x.*"), encoding="UTF8")
    assert set(corpora.texts_of_shard(config, 0, 1)["train"]()) == {"text"}
    assert prepared_folder(config) == prepared_folder(replace(config, encoding="utf-8"))


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_file_for_training_and_validation_is_refused(link, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("text")
    link(tmp_path / "link.txt", tmp_path / "b.txt")
    config = DataConfig(source="files", files=str(tmp_path / "[ab].txt"), val_files=str(tmp_path / "link.txt"))
    with pytest.raises(UserError) as error:
        prepared_folder(config)
    assert str(error.value) == (
        f"data.files and data.val_files both match {tmp_path / 'b.txt'}: exclude it from data.files"
    )


@pytest.mark.parametrize("pattern", ["*.txt", "../a/*.txt", "../a/a.txt"])
def test_a_file_with_two_names_is_read_once(tmp_path, pattern):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "link.txt").symlink_to("a.txt")
    files = corpora.find_files("data.files", [str(folder / "a.txt"), f"{folder}/../a/{pattern}"])
    assert [path.resolve() for path in files] == [folder / "a.txt"]


def test_a_field_or_an_encoding_makes_another_set_and_the_defaults_make_the_old_one(tmp_path):
    (tmp_path / "x.txt").write_text("text")
    config = DataConfig(source="files", files=str(tmp_path / "x.txt"))
    facts = {"source", "max_documents", "files", "val_every"}
    assert corpora.text_identity(config).keys() == facts
    others = [replace(config, text_field="content"), replace(config, encoding="latin-1")]
    assert len({prepared_folder(other) for other in [config, *others]}) == 3


def test_another_file_for_training_or_validation_makes_another_set(tmp_path):
    config = DataConfig(source="files", files=str(tmp_path / "a.txt"), val_files=str(tmp_path / "b.txt"))
    folders = set()
    for content in ({"a": "text", "b": "text"}, {"a": "other text"}, {"b": "other text"}):
        for name, text in content.items():
            (tmp_path / f"{name}.txt").write_text(text)
        folders.add(prepared_folder(config))
    assert len(folders) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", b'{"text": "a"}\n{"body": "a"}\n', 'x.jsonl, line 2: no string in the field "text"'),
        ("x.jsonl", b'\n[{"text": "a"}]', "x.jsonl, line 2: a list, but .jsonl has one object a line"),
        ("x.jsonl", b'{\n"text": "a"\n}', "x.jsonl, line 1: not JSON"),
        ("x.jsonl", b'{\n"text": "a"\n}', "expected one object a line"),
        ("x.jsonl", b'{"content": "a", "n": 1}', 'field "text"; it has content: name one with data.text_field='),
        ("x.json", b'[{"text": "a"}, {"body": "a"}]', 'x.json, record 2: no string in the field "text"; it has body'),
        ("x.json", b'[{"text": "a"}', "x.json: not JSON"),
        ("x.csv", b"content,n\na,1\n", 'x.csv, line 2: no string in the field "text"; it has content, n'),
        ("x.csv", b'text\n"a', "x.csv, line 1: not CSV"),
        ("x.csv", b"text\n\xff\n", "x.csv is not UTF-8"),
        ("x.parquet", b"PAR1", "x.parquet cannot be read"),
        ("x.txt.zst", b"not zstd", "x.txt.zst cannot be read"),
        ("x.jsonl", b'{"text": "\xff"}\n', "x.jsonl, line 1 is not UTF-8"),
        ("x.jsonl", b'{"text": 3}', 'line 1: no string in the field "text"'),
        ("x.jsonl", b'{"text": "\\ud800"}', "line 1: not valid Unicode"),
        ("x.json.gz", b"not gzip", "x.json.gz cannot be read"),
        ("x.json.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "x.json.gz cannot be read"),
        ("x.txt", b"\xff\xfe\x00", "x.txt is not UTF-8"),
    ],
    ids=range(19),
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_file(tmp_path / name))
    assert message in str(error.value)


def test_another_field_is_not_suggested_for_a_missing_value(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": null, "url": "x"}\n')
    with pytest.raises(UserError, match=r'x\.jsonl, line 1: no string in the field "text"$'):
        list(read_file(tmp_path / "x.jsonl"))


def test_globs_must_match_readable_kinds(tmp_path):
    with pytest.raises(UserError, match=r"data.files: no file matches"):
        find_files("data.files", str(tmp_path / "*.txt"))
    (tmp_path / "x.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"x.parquet.gz is not one of .*\.parquet"):
        find_files("data.val_files", str(tmp_path / "*"))
    with pytest.raises(UserError, match=r"is a folder: name its files, as in .*/\*\.jsonl"):
        find_files("data.files", str(tmp_path))


def test_a_column_that_a_table_does_not_have_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r'x\.parquet: no column "text"; it has id, body: .*data\.text_field='):
        list(read_file(tmp_path / "x.parquet"))


@pytest.mark.parametrize("name", ["x.parquet", "x.txt.zst"])
def test_a_file_that_needs_pyarrow_names_the_extra(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"")
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name}: \.\w+ needs pyarrow: pip install 'cod_lightning\[hf\]'"):
        list(read_file(tmp_path / name))


@pytest.mark.parametrize("pattern", ["[2024] dump/a.jsonl", "[2024] dump/*.jsonl", "[2024] dump/**/*.jsonl"])
def test_existing_folders_are_no_globs(tmp_path, monkeypatch, pattern):
    (tmp_path / "[2024] dump").mkdir()
    (tmp_path / "[2024] dump" / "a.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    assert find_files("data.files", pattern) == [Path("[2024] dump/a.jsonl")]
    assert find_files("data.files", str(tmp_path / pattern)) == [tmp_path / "[2024] dump/a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "%s"}' % (b"b" * 50), "x.jsonl, line 2"),
        ("x.json", b'[{"text": "a"},\n{"text": "%s"}]' % (b"b" * 50), "x.json"),
        ("x.csv", b"text\n%s\n" % (b"b" * 50), "x.csv, line 2"),
        ("x.txt", b"b" * 50, "x.txt"),
        ("x.txt.gz", gzip.compress(b"b" * 50, mtime=0), "x.txt.gz"),
    ],
)
def test_a_line_that_would_fill_the_memory_is_named(tmp_path, monkeypatch, name, content, place):
    monkeypatch.setattr(readers, "DOCUMENT_BYTES", 40)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{place} is longer than 40 bytes, .*one JSON object a line"):
        list(read_file(tmp_path / name))


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


def test_text_without_spaces_is_divided_at_its_border():
    text = "title\n" + 9994 * "x"
    corpus = hold_out(lambda: iter([text]), 10)
    assert [len(part) for part in (*corpus.train(), *corpus.val())] == [9000, 1000]


@given(st.integers(0, 60), st.integers(2, 9))
def test_held_out_documents_are_all_the_others(count, every):
    corpus = hold_out(lambda: map(str, range(count)), every)
    train, val = list(corpus.train()), list(corpus.val())
    assert sorted(train + val, key=int) == [str(n) for n in range(count)]
    if count >= every:
        assert val == [str(n) for n in range(every - 1, count, every)]
    else:
        assert len("".join(val)) == (max(len("".join(train + val)) // every, 1) if count else 0)


@pytest.mark.parametrize(
    ("documents", "train", "val"),
    [
        (["a b c d e f g h i j"], ["a b c d e f g h "], ["i j"]),
        (["a\nb\nc\nd\ne\nf\ng\nh\ni\nj"], ["a\nb\nc\nd\ne\nf\ng\nh\n"], ["i\nj"]),
        (["abcdefghijklmnopqrs"], ["abcdefghijklmnop"], ["qrs"]),
        (["abcdefghijklmnop", "qrs"], ["abcdefghijklmnop"], ["qrs"]),
        (["abc", "defghijklmnopqrs"], ["abc", "defghijklmnop"], ["qrs"]),
        (["abc", "defg hijklmnopqr", "s"], ["abc", "defg "], ["hijklmnopqr", "s"]),
        ([Example("ab", "c"), Example("d", "e"), Example("f", "g")], ["abc", "de"], ["fg"]),
        ([Example("abcdefg", "h"), Example("d", "e")], ["abcdefgh"], ["de"]),
        ([Example("a", "b")], ["ab"], []),
        (["a"], [], ["a"]),
        ([], [], []),
    ],
)
def test_a_short_corpus_holds_out_its_last_part(documents, train, val):
    corpus = hold_out(lambda: iter(documents), 6)
    assert list(corpus.train()) == train
    assert list(corpus.val()) == val


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


@pytest.mark.parametrize("error", [ConnectionError("reset by peer"), RuntimeError("reset by peer")])
def test_a_hub_that_fails_while_c4_streams_is_named(monkeypatch, error):
    def load_dataset(*names, **options):
        yield {"text": "a"}
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    monkeypatch.setattr(corpora, "require_hub", lambda what, instead: None)
    with pytest.raises(UserError, match=r"^data.source=c4: cannot read the hub: reset by peer; run again, or split"):
        list(open_corpus(DataConfig(source="c4")).train())


def test_a_hub_that_answers_with_any_status_is_reachable(monkeypatch):
    def refuse(request, timeout):
        raise hub.urllib.error.HTTPError(request.full_url, 403, "no", Message(), None)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub.urllib.request, "urlopen", refuse)
    hub.require_hub("data.source=c4", "")


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "", "ftp://hf-mirror.com"])
def test_an_endpoint_that_is_no_url_is_named(monkeypatch, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(UserError, match=f"HF_ENDPOINT='{endpoint}' does not begin with https://"):
        hub.require_hub("data.source=c4", "")


@pytest.mark.parametrize("endpoint", ["https://hf mirror", "http://[", "http://localhost:x"])
def test_a_malformed_endpoint_does_not_answer(monkeypatch, capfd, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "*")  # a proxy would answer
    with pytest.raises(UserError, match="does not answer"):
        hub.require_hub("data.source=c4", "")
    assert capfd.readouterr().err == ""


def test_preparing_modules_do_not_import_torch():
    names = ["config", "corpora", "documentation", "hub", "manifest", "prepare", "tokenizers"]
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module("cod_lightning.data." + name)
assert not {{"torch", "litdata", "lightning", "transformers"}} & set(sys.modules), "imported"
"""
    run_python(code)


def test_reading_csv_leaves_the_limit_of_other_readers(tmp_path):
    (tmp_path / "a.csv").write_text("text\nfirst\nsecond\n")
    before = csv.field_size_limit()
    assert list(open_corpus(DataConfig(source="files", files=str(tmp_path / "a.csv"), val_every=2)).train())
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("field", ["files", "val_files"])
def test_a_relative_glob_without_files_names_the_folder_it_is_relative_to(field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("here.txt").touch()
    config = DataConfig(source="files", **{"files": "here.txt", field: "t/*.txt"})
    with pytest.raises(UserError) as error:
        open_corpus(config)
    assert str(error.value) == f"data.{field}: no file matches 't/*.txt' in {tmp_path}, to which it is relative"


def test_an_absolute_glob_without_files_is_named_alone(tmp_path):
    with pytest.raises(UserError, match=r"no file matches '/.*\.txt'$"):
        open_corpus(DataConfig(source="files", files=f"{tmp_path}/*.txt"))
