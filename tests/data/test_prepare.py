import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cod_lightning.data import chunks, encode
from cod_lightning.data import prepare as preparation
from cod_lightning.data.encode import DOCUMENT, Encoded, Encoder, take_tokens
from cod_lightning.data.manifest import FORMAT, Manifest, find_damage, read_manifest
from cod_lightning.data.prepare import check_against, is_complete, prepare, prepared_folder
from cod_lightning.data.tokenizers import DocumentTokenizer
from cod_lightning.errors import UserError


class Numbers(DocumentTokenizer):
    """Documents are numbers, which are their own ids."""

    vocab_size = 1000

    def encode(self, documents):
        return [[*map(int, document.split()), self.eos_id] for document in documents]


def stored(folder: Path, split: str) -> np.ndarray:
    """The rows of a split, straight from the files."""
    manifest = read_manifest(folder)
    parts = []
    for chunk in manifest.split(split).chunks:
        content = (folder / split / chunk.name).read_bytes()
        parts.append(np.frombuffer(content[12:], manifest.dtype).reshape(chunk.rows, manifest.seq_len))
    return np.concatenate(parts)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(2, 999), max_size=40), min_size=1, max_size=30),
    batch=st.integers(1, 5),
    seq_len=st.integers(2, 9),
    chunk_tokens=st.integers(1, 60),
)
def test_packed_rows_are_the_documents_joined_by_eos(tmp_path_factory, documents, batch, seq_len, chunk_tokens):
    encoder = Encoder(Numbers("", pad_id=0, eos_id=1), "packed", seq_len)
    texts = [" ".join(map(str, document)) for document in documents]
    expected = [id for document in documents for id in (*document, 1)]
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_TOKENS", chunk_tokens)
        encoded = (encoder(texts[n : n + batch]) for n in range(0, len(texts), batch))
        split = preparation._write_split(folder, encoded, encoder)
    rows = len(expected) // seq_len
    assert (split.rows, split.tokens) == (rows, rows * seq_len)
    contents = [(folder / chunk.name).read_bytes()[12:] for chunk in split.chunks]
    assert np.frombuffer(b"".join(contents), np.uint16).tolist() == expected[: rows * seq_len]
    assert all(chunk.rows == max(1, chunk_tokens // seq_len) for chunk in split.chunks[:-1])


@given(st.lists(st.lists(st.integers(2, 999), max_size=12), min_size=1, max_size=9), st.integers(2, 8))
def test_document_rows_are_cut_before_a_last_eos_or_padded(documents, seq_len):
    encoder = Encoder(Numbers("", pad_id=0, eos_id=1), "document", seq_len)
    encoded = encoder([" ".join(map(str, document)) for document in documents])
    for row, document in zip(encoded.ids.reshape(-1, seq_len).tolist(), documents, strict=True):
        kept = document[: seq_len - 1]
        assert row == [*kept, 1] + [0] * (seq_len - 1 - len(kept))
    assert encoded.tokens == np.count_nonzero(encoded.ids)
    assert encoded.max_id == encoded.ids.max()


def test_document_rows_are_those_of_hugging_face(word_level, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = word_level(tmp_path, ["<pad>", "</s>"], {"eos_token": "</s>"})
    tokenizer = preparation.load_tokenizer(folder)
    texts = ["the quick brown fox jumps over the lazy dog", "the fox"]
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json", pad_token="<pad>", eos_token="</s>"
    )
    expected = reference(texts, max_length=6, truncation=True, padding="max_length")["input_ids"]
    assert Encoder(tokenizer, "document", 6)(texts).ids.reshape(-1, 6).tolist() == expected


def test_large_vocabularies_are_stored_in_32_bits():
    class Large(Numbers):
        vocab_size = 2**16 + 1

    assert Encoder(Large("", 0, 1), "packed", 4).dtype == np.uint32
    assert Encoder(Numbers("", 0, 1), "packed", 4).dtype == np.uint16


def test_a_set_is_described_and_read_back(packed):
    folder = prepare(packed)
    manifest = read_manifest(folder)
    assert manifest.source.documents == {"train": 540, "val": 60}
    assert len(manifest.train.chunks) > 10
    assert {chunk.rows for chunk in manifest.train.chunks[:-1]} == {2048 // 32}
    assert find_damage(folder, manifest) == []
    rows = stored(folder, "train")
    assert rows.shape == (manifest.train.rows, 32)
    assert rows.max() == manifest.train.max_id < manifest.tokenizer.vocab_size == 300
    assert (rows == manifest.tokenizer.eos_id).sum() in (539, 540)  # the tail may hold the last
    assert not (rows == manifest.tokenizer.pad_id).any()
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_document_sets_count_tokens_without_pads(documents):
    manifest = read_manifest(prepare(documents))
    assert manifest.train.rows == 540
    rows = stored(prepare(documents), "train")
    assert (rows != manifest.tokenizer.pad_id).sum() == manifest.train.tokens < rows.size


@pytest.mark.usefixtures("small_chunks")
def test_rows_do_not_depend_on_the_number_of_workers(make_config, tmp_path, packed):
    one = read_manifest(prepare(make_config(tmp_path / "one"), progress=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARACTERS", 2**14)
        three = read_manifest(prepare(make_config(tmp_path / "three", workers=3), progress=False))
    assert one == three == read_manifest(prepared_folder(packed))
    assert one.fingerprint == three.fingerprint


@pytest.mark.usefixtures("small_chunks")
def test_a_whole_set_is_kept_and_a_damaged_one_made_anew(make_config, tmp_path):
    config = make_config(tmp_path)
    folder = prepare(config, progress=False)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(config, progress=False) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    fingerprint = read_manifest(folder).fingerprint
    (folder / "train" / "chunk-0-3.bin").unlink()
    assert not is_complete(folder)
    assert read_manifest(prepare(config, progress=False)).fingerprint == fingerprint
    assert is_complete(folder)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"workers": 7, "batch_size": 4, "micro_batch_size": 1, "loader_workers": 2, "val_tokens": 1000}, True),
        ({"seq_len": 64}, False),
        ({"layout": "document"}, False),
        ({"vocab_size": 400}, False),
        ({"val_every": 11}, False),
        ({"max_documents": 10}, False),
        ({"val_tokens": 20_000_000}, False),
    ],
)
def test_the_folder_follows_from_the_settings_that_decide_the_rows(packed, changes, same):
    assert (prepared_folder(replace(packed, **changes)) == prepared_folder(packed)) is same


def test_a_touched_file_is_another_set(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    config = make_config(tmp_path, files=str(tmp_path / "a.txt"))
    before = prepared_folder(config)
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert prepared_folder(config) != before


def test_validation_is_bounded_when_there_is_more(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PREPARED_VAL_TOKENS", 100)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 500)
    one = read_manifest(prepare(make_config(tmp_path / "one", val_tokens=400), progress=False))
    assert 400 - 32 < one.val.tokens < 1500
    assert one.source.documents["val"] < 20
    assert read_manifest(prepare(make_config(tmp_path / "two", val_tokens=400, workers=2), progress=False)) == one


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({"a.txt": " \n"}, {}, "the corpus has no training documents"),
        ({"a.txt": "few"}, {}, "1 documents do not fill one train row of data.seq_len=32"),
        ({"a.txt": "words " * 99}, {}, "0 documents do not fill one val row .* a smaller data.val_every"),
        ({"a.jsonl": "{"}, {}, "a.jsonl, line 1: not JSON"),
        ({"a.txt": "words " * 99}, {"seq_len": 0, "layout": "x"}, "data.layout='x'.*\n.*data.seq_len=0"),
        ({"a.txt": "words"}, {"folder": "somewhere"}, "data.folder='somewhere' names a set"),
    ],
)
def test_nothing_is_left_when_there_is_nothing_to_prepare(make_config, tmp_path, files, changes, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    root = tmp_path / "root"
    with pytest.raises(UserError, match=message):
        prepare(make_config(root, files=str(tmp_path / "*.*"), **changes), progress=False)
    assert not [path for path in root.glob("*") if path.is_dir()]


def test_progress_is_one_line_where_there_is_no_terminal(make_config, tmp_path, capfd):
    prepare(make_config(tmp_path), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "training and" in err
    prepare(make_config(tmp_path / "quiet"), progress=False)
    assert capfd.readouterr() == ("", "")


SLOW = """
import sys
from cod_lightning.data import encode
from cod_lightning.data import chunks
from cod_lightning.data import prepare as preparation
from cod_lightning.data.config import DataConfig

chunks.CHUNK_TOKENS = 2048
encode.BATCH_CHARACTERS = 2**13

if __name__ == "__main__":
    config = DataConfig(source="files", files=sys.argv[1], root=sys.argv[2], vocab_size=300, seq_len=32, val_every=10)
    config.workers = int(sys.argv[3])
    print(preparation.prepare(config, progress=False), flush=True)
"""


def start(tmp_path, corpus, workers) -> subprocess.Popen:
    """Prepare below tmp_path / "root" in another process, which leads a process group of its own."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, script, str(corpus / "*.json.gz"), str(tmp_path / "root"), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def running(group: int) -> list[str]:
    """The living processes of a process group; those that are dead and not yet waited for do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = process.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                found.append(process.parent.name)
    return found


def test_a_root_that_cannot_be_written_is_named(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/\S+ cannot be written \(.*\)"):
        prepare(make_config(tmp_path / "file"), progress=False)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.usefixtures("small_chunks")
def test_a_killed_preparation_leaves_no_set_and_no_process(corpus, make_config, tmp_path):
    root = tmp_path / "root"
    process = start(tmp_path, corpus, workers=2)
    deadline = time.monotonic() + 300
    while not list(root.glob("*.partial-*/train/chunk-0-2.bin")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    config = make_config(root)
    folder = prepared_folder(config)
    assert not folder.exists()
    assert list(root.glob("*.partial-*"))
    while running(process.pid):
        assert time.monotonic() < deadline, running(process.pid)
        time.sleep(0.05)
    assert prepare(config, progress=False) == folder
    assert is_complete(folder)
    assert not list(root.glob("*.partial-*"))


def test_two_processes_that_ask_at_once_make_it_once(corpus, tmp_path):
    processes = [start(tmp_path, corpus, workers=1) for _ in range(2)]
    outputs = {process.communicate(timeout=300)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    assert len([path for path in (tmp_path / "root").iterdir() if path.is_dir()]) == 1


# --- the manifest -----------------------------------------------------------------------------------------------------


def test_a_manifest_survives_its_json(packed):
    manifest = read_manifest(prepared_folder(packed))
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


def test_the_fingerprint_is_of_the_content_alone(packed):
    manifest = read_manifest(prepared_folder(packed))
    renamed = replace(manifest, source=replace(manifest.source, name="other"))
    assert renamed.fingerprint == manifest.fingerprint
    assert replace(manifest, seq_len=33).fingerprint != manifest.fingerprint
    assert replace(manifest, val=manifest.train).fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: "{" + json.dumps(record), "is damaged"),
        (
            lambda record: json.dumps({**record, "format": FORMAT + 1}),
            f"has format {FORMAT + 1}, but this version reads up to",
        ),
        (lambda record: json.dumps({**record, "seq_len": 8}), "fingerprint does not match"),
        (lambda record: json.dumps({key: record[key] for key in record if key != "val"}), "is damaged"),
        (lambda record: "[]", "is damaged"),
    ],
    ids=range(5),
)
def test_a_bad_manifest_is_refused(packed, tmp_path, change, message):
    record = json.loads((prepared_folder(packed) / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(change(record))
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a prepared set"):
        read_manifest(tmp_path)


def test_other_settings_are_named_with_both_values(packed, tmp_path):
    folder = prepared_folder(packed)
    manifest = read_manifest(folder)
    check_against(packed, manifest, "here")
    with pytest.raises(UserError) as error:
        check_against(replace(packed, layout="document", seq_len=64, vocab_size=400), manifest, "here")
    for part in ("'document', but the set has 'packed'", "64, but the set has 32", "400, but the set has 300"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"data.tokenizer='t5-base', but the set has 'bpe'"):
        check_against(replace(packed, tokenizer="t5-base"), manifest, "here")


def test_a_tokenizer_folder_is_compared_by_content(make_config, word_level, tmp_path):
    config = make_config(tmp_path / "root", tokenizer=word_level(tmp_path / "a", ["<pad>", "</s>"]))
    manifest = read_manifest(prepare(config, progress=False))
    check_against(replace(config, tokenizer=word_level(tmp_path / "b", ["<pad>", "</s>"])), manifest, "here")
    with pytest.raises(UserError, match=r"data.tokenizer="):
        check_against(replace(config, tokenizer=word_level(tmp_path / "c", ["<eos>"])), manifest, "here")


def test_encoded_batches_stop_at_the_bound():
    batches = [Encoded(np.zeros(5), np.array([(9, 5, 5, 0, b"")], DOCUMENT))] * 10
    assert len(list(take_tokens(batches, 11))) == 3
