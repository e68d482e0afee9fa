"""Preparing a set: its sequences, its folder, errors, and interruptions."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from cod_lightning.data import encode
from cod_lightning.data import prepare as preparation
from cod_lightning.data.config import DataConfig
from cod_lightning.data.corpora import Corpus, open_corpus
from cod_lightning.data.manifest import find_damage, read_manifest
from cod_lightning.data.prepare import check_against, is_complete, prepare, prepared_folder, tokenizer_for
from cod_lightning.data.tokenizers import train_bpe
from cod_lightning.errors import UserError


def test_the_manifest_describes_the_stored_sequences(packed, stored):
    folder = prepared_folder(packed)
    manifest, sequences = read_manifest(folder), stored(folder, "train")
    assert find_damage(folder, manifest) == []
    assert manifest.source.documents == {"train": 540, "val": 60}
    assert sequences.shape == (manifest.train.rows, 32)
    assert sequences.max() == manifest.train.max_id < manifest.tokenizer.vocab_size == 300
    assert {chunk.rows for chunk in manifest.train.chunks[:-1]} == {2048 // 32}


def test_packed_sequences_have_an_eos_per_document_and_no_pad(packed, stored):
    manifest, sequences = read_manifest(prepared_folder(packed)), stored(prepared_folder(packed), "train")
    assert (sequences == manifest.tokenizer.eos_id).sum() in (539, 540)  # the dropped tail may contain the last
    assert not (sequences == manifest.tokenizer.pad_id).any()


def test_document_sets_count_tokens_without_pads(documents, stored):
    manifest, sequences = read_manifest(prepared_folder(documents)), stored(prepared_folder(documents), "train")
    assert manifest.train.rows == 540
    assert (sequences != manifest.tokenizer.pad_id).sum() == manifest.train.tokens < sequences.size


def test_only_the_set_remains(packed):
    folder = prepared_folder(packed)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


@pytest.mark.usefixtures("small_chunks")
def test_sequences_do_not_depend_on_the_number_of_workers(make_config, tmp_path, packed):
    one_worker = read_manifest(prepare(make_config(tmp_path / "one")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_CHARACTERS", 2**14)
        three_workers = read_manifest(prepare(make_config(tmp_path / "three", workers=3)))
    assert one_worker == three_workers == read_manifest(prepared_folder(packed))
    assert one_worker.fingerprint == three_workers.fingerprint


@pytest.mark.usefixtures("small_chunks")
def test_only_a_damaged_set_is_prepared_again(make_config, tmp_path):
    config = make_config(tmp_path)
    folder = prepare(config)
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare(config) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    fingerprint = read_manifest(folder).fingerprint
    for damage in ((folder / "train" / "chunk-0-3.bin").unlink, lambda: (folder / "tokenizer.json").write_text("{}")):
        damage()
        assert not is_complete(folder)
        assert read_manifest(prepare(config)).fingerprint == fingerprint
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
def test_the_folder_depends_only_on_settings_that_change_the_sequences(packed, changes, same):
    assert (prepared_folder(replace(packed, **changes)) == prepared_folder(packed)) is same


def test_another_time_or_size_of_a_file_leads_to_another_set(make_config, tmp_path):
    path = tmp_path / "a.txt"
    folders = set()
    for content, ns in (("some text", 1), ("some text", 2), ("other text", 2)):
        path.write_text(content)
        os.utime(path, ns=(ns, ns))
        folders.add(prepared_folder(make_config(tmp_path, files=str(path))))
    assert len(folders) == 3


def test_another_tokenizer_file_leads_to_another_set(make_config, tmp_path):
    folders = set()
    for content in ("GGUF", "GGUF of more"):
        (tmp_path / "model.gguf").write_text(content)
        folders.add(prepared_folder(make_config(tmp_path, tokenizer=str(tmp_path / "model.gguf"))))
    assert len(folders) == 2


def test_validation_is_bounded_when_there_is_more(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "PREPARED_VAL_TOKENS", 100)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 500)
    manifest = read_manifest(prepare(make_config(tmp_path, val_tokens=400)))
    assert 400 - 32 < manifest.val.tokens < 1500
    assert manifest.source.documents["val"] < 20


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({"a.txt": " \n"}, {}, "the corpus has no training documents"),
        ({"a.txt": "few"}, {}, "1 documents do not fill one train sequence of data.seq_len=32"),
        ({"a.txt": "words " * 99}, {}, "1 documents do not fill one val sequence .* a smaller data.val_every"),
        ({"a.jsonl": "{"}, {}, "a.jsonl, line 1: not JSON"),
        ({"a.txt": "words " * 99}, {"seq_len": 0, "layout": "x"}, "data.layout='x'.*\n.*data.seq_len=0"),
        ({"a.txt": "words"}, {"folder": "somewhere"}, "data.folder='somewhere' names a set"),
    ],
)
def test_a_failed_preparation_leaves_nothing(make_config, tmp_path, files, changes, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    root = tmp_path / "root"
    with pytest.raises(UserError, match=message):
        prepare(make_config(root, files=str(tmp_path / "*.*"), **changes))
    assert not list(root.glob("*"))


@pytest.mark.parametrize("files", [1, 40])
def test_few_text_files_have_a_training_and_a_validation_set(make_config, tmp_path, files):
    for number in range(files):
        (tmp_path / f"{number:02}.txt").write_text(" ".join(f"word{n} of {number}" for n in range(2000 // files)))
    changes = {"files": str(tmp_path / "*.txt"), "val_every": 50, "vocab_size": 258}
    manifest = read_manifest(prepare(make_config(tmp_path / "sets", **changes)))
    assert manifest.val.tokens == pytest.approx(manifest.train.tokens / 49, rel=0.2)


def test_the_tokenizer_is_trained_on_the_training_text():
    corpus = Corpus(train=lambda: iter(["the fox " * 9]), val=lambda: iter(["ein Hund " * 9]))
    assert tokenizer_for(DataConfig(vocab_size=300), corpus) == train_bpe(corpus.train(), 300)
    assert tokenizer_for(DataConfig(vocab_size=300), corpus) != train_bpe(corpus.val(), 300)


def test_progress_is_one_line_where_there_is_no_terminal(make_config, tmp_path, capfd):
    prepare(make_config(tmp_path))
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "training and" in err


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
    print(preparation.prepare(config), flush=True)
"""


def start(tmp_path, c4_corpus, workers) -> subprocess.Popen:
    """Prepare below tmp_path / "root" in another process, which leads a process group of its own."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command = [sys.executable, script, str(c4_corpus / "*.json.gz"), str(tmp_path / "root"), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_an_unguarded_script_is_refused_in_its_workers(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UserError, match=r'if __name__ == "__main__": or set data\.workers=1'):
        prepare(make_config(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written_is_named(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.root=\S+/file cannot be written: .* \(Not a directory\)"):
        prepare(make_config(tmp_path / "file"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.usefixtures("small_chunks")
def test_a_killed_preparation_leaves_no_set_and_no_process(c4_corpus, make_config, running, wait_for, tmp_path):
    root = tmp_path / "root"
    process = start(tmp_path, c4_corpus, workers=2)
    wait_for(lambda: list(root.glob(".*.partial/train/chunk-0-2.bin")), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    config = make_config(root)
    folder = prepared_folder(config)
    assert not folder.exists()
    assert list(root.glob(".*.partial"))
    wait_for(lambda: not running(process.pid))
    assert prepare(config) == folder
    assert is_complete(folder)
    assert not list(root.glob(".*.partial"))


def test_two_processes_at_once_prepare_the_set_once(c4_corpus, tmp_path):
    processes = [start(tmp_path, c4_corpus, workers=1) for _ in range(2)]
    outputs = {process.communicate(timeout=300)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    assert len([path for path in (tmp_path / "root").iterdir() if path.is_dir()]) == 1


# --- data.sha256 ------------------------------------------------------------------------------------------------------

OTHER = "0" * 64


def test_the_sha256_of_a_text_is_that_of_the_hashes_of_its_documents(packed):
    corpus = open_corpus(packed)
    hashes = [hashlib.sha256(text.encode()).digest() for split in (corpus.train(), corpus.val()) for text in split]
    assert read_manifest(prepared_folder(packed)).source.sha256 == hashlib.sha256(b"".join(hashes)).hexdigest()


def test_a_text_with_the_given_sha256_is_prepared(make_config, packed, tmp_path):
    sha256 = read_manifest(prepared_folder(packed)).source.sha256
    assert is_complete(prepare(make_config(tmp_path, sha256=sha256)))


def test_the_sha256_says_where_the_validation_files_begin(make_config, tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"{name} word " * 99)
    hashes = set()
    for train, val in (("a", "[bc]"), ("[ab]", "c")):
        config = make_config(tmp_path, files=f"{tmp_path}/{train}.txt", val_files=f"{tmp_path}/{val}.txt")
        hashes.add(read_manifest(prepare(config)).source.sha256)
    assert len(hashes) == 2


def test_another_text_is_refused_and_nothing_is_left(make_config, tmp_path):
    with pytest.raises(UserError, match=r"data\.sha256=0{16}\.\.\., but the text has .*data\.sha256=null"):
        prepare(make_config(tmp_path, sha256=OTHER))
    assert not list(tmp_path.iterdir())


def test_an_existing_set_of_another_text_is_refused(packed):
    with pytest.raises(UserError, match=r"data\.sha256=0{16}\.\.\., but .*files-\w+ has"):
        prepare(replace(packed, sha256=OTHER))


def test_a_set_given_as_folder_must_have_the_sha256(packed):
    with pytest.raises(UserError, match=r"data\.sha256=0{16}\.\.\., but here has"):
        check_against(replace(packed, sha256=OTHER), read_manifest(prepared_folder(packed)), "here")


# --- settings that differ ---------------------------------------------------------------------------------------------


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


def test_other_special_tokens_of_a_tokenizer_lead_to_another_set(make_config, word_level, tmp_path):
    config = make_config(tmp_path, tokenizer=word_level(tmp_path / "a", ["<pad>", "<x>", "</s>"]))
    folders = []
    for specials in ({}, {"eos_token": "</s>"}, {"eos_token": "<x>"}, {"pad_token": "<x>"}):
        (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(specials))
        folders.append(prepared_folder(config))
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_a_set_with_other_special_tokens_is_refused(make_config, word_level, tmp_path):
    config = make_config(tmp_path, tokenizer=word_level(tmp_path / "a", ["<pad>", "<x>", "</s>"]))
    manifest = read_manifest(prepare(config))
    check_against(config, manifest, "here")
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"eos_token": "<x>"}')
    with pytest.raises(UserError, match=r"has pad 0 and EOS 1, but the set has 0 and 2"):
        check_against(config, manifest, "here")


def test_a_tokenizer_folder_is_compared_by_content(make_config, word_level, tmp_path):
    config = make_config(tmp_path / "root", tokenizer=word_level(tmp_path / "a", ["<pad>", "</s>"]))
    manifest = read_manifest(prepare(config))
    check_against(replace(config, tokenizer=word_level(tmp_path / "b", ["<pad>", "</s>"])), manifest, "here")
    with pytest.raises(UserError, match=r"data.tokenizer="):
        check_against(replace(config, tokenizer=word_level(tmp_path / "c", ["<eos>"])), manifest, "here")
