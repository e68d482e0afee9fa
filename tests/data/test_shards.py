import gzip
import json
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cod_lightning.data import chunks, corpora, encode, shards
from cod_lightning.data import prepare as preparation
from cod_lightning.data.corpora import files_of_share
from cod_lightning.data.instructions import drawn
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import is_complete, prepare, prepared_folder
from cod_lightning.data.readers import read_file
from cod_lightning.data.shards import merge_shards, parts_folder, prepare_shard
from cod_lightning.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks, batches and blocks so small that every boundary falls inside a shard."""
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 2048)
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 3000)
    monkeypatch.setattr(shards, "READ_DOCUMENTS", 50)
    monkeypatch.setattr(shards, "READ_NUMBERS", 4000)


@pytest.fixture
def uneven(c4_corpus, tmp_path) -> Path:
    """Five files of very different sizes, one of them without a document."""
    folder = tmp_path / "uneven"
    folder.mkdir()
    records = [record for path in sorted(c4_corpus.iterdir()) for record in read_file(path)]
    for number, (start, end) in enumerate([(0, 7), (7, 7), (7, 300), (300, 310), (310, 600)]):
        lines = (json.dumps({"text": record}) + "\n" for record in records[start:end])
        (folder / f"{number}.json.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a set."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def prepare_all(config, count: int) -> Path:
    for index in reversed(range(count)):
        prepare_shard(config, index, count)
    return merge_shards(config, count)


HELD_OUT = {"val_every": 7}
OWN_FILES = {"val_files": "[023].json.gz"}
BOUNDED = {"max_documents": 173}
LIMITED = {"val_tokens": 600}


@pytest.mark.parametrize(
    ("layout", "split", "bound", "train_documents"),
    [
        ("packed", HELD_OUT, {}, 515),
        ("packed", HELD_OUT, BOUNDED, 173),
        ("packed", HELD_OUT, LIMITED, 515),
        ("packed", OWN_FILES, {}, 600),
        ("packed", OWN_FILES, BOUNDED, 173),
        ("packed", OWN_FILES, LIMITED, 600),
        ("document", HELD_OUT, LIMITED, 515),
        ("document", OWN_FILES, BOUNDED, 173),
    ],
)
def test_shards_yield_the_set_of_one_machine(
    make_config, uneven, tmp_path, monkeypatch, layout, split, bound, train_documents
):
    changes = {"corpus": uneven, "layout": layout, **split, **bound}
    if bound == LIMITED:
        monkeypatch.setattr(preparation, "PREPARED_VAL_TOKENS", 600)
    if split == OWN_FILES:
        shutil.copytree(uneven, tmp_path / "val")
        changes["val_files"] = str(tmp_path / "val" / changes["val_files"])
    config = make_config(tmp_path / "one", **changes)
    unsharded = prepare(config)
    manifest = read_manifest(unsharded)
    assert manifest.source.documents["train"] == train_documents
    assert (manifest.val.tokens < 2500) is (bound == LIMITED)
    several = prepare_all(replace(config, root=str(tmp_path / "three")), 3)
    assert several.name == unsharded.name
    assert content(several) == content(unsharded)


def test_the_set_does_not_depend_on_shards_and_workers(make_config, tmp_path):
    config = make_config(tmp_path / "one")
    unsharded = prepare(config)
    config = replace(config, root=str(tmp_path / "seven"))
    for index in range(7):
        part = prepare_shard(replace(config, workers=1 + (index == 3)), index, 7)
    assert (part / "train.documents").stat().st_size == 0
    assert content(merge_shards(config, 7)) == content(unsharded)


@pytest.mark.parametrize("changes", [{}, {"max_documents": 20}])
def test_shards_of_instructions_yield_the_set_of_one_machine(make_config, tmp_path, changes):
    records = list(drawn(count=90))
    records[3]["instruction"] *= 9  # no room for an answer
    for number in range(3):
        lines = map(json.dumps, records[30 * number : 30 * number + 30])
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    files = str(tmp_path / "*.jsonl")
    changes = {"source": "instructions", "files": files, "val_every": 7, "vocab_size": 400, "seq_len": 160, **changes}
    config = make_config(tmp_path / "one", **changes)
    unsharded = prepare(config)
    manifest = read_manifest(unsharded)
    assert 0 < manifest.train.rows < manifest.source.documents["train"]
    assert content(prepare_all(replace(config, root=str(tmp_path / "two")), 2)) == content(unsharded)


class Streamed(list):
    """A stub of a streamed data set: files of records, with the methods that the corpus calls."""

    @property
    def num_shards(self) -> int:
        return len(self)

    def shard(self, num_shards: int, index: int, contiguous: bool):
        assert contiguous
        assert index < num_shards <= len(self)
        start, stop = (place * len(self) // num_shards for place in (index, index + 1))
        return Streamed(self[start:stop])

    def __iter__(self):
        return ({"text": text} for file in super().__iter__() for text in file)


def test_c4_is_split_by_its_files(c4_corpus, make_config, tmp_path, monkeypatch):
    records = np.array([record for path in sorted(c4_corpus.iterdir()) for record in read_file(path)], object)
    splits = {
        "train": Streamed(records[:500].reshape(5, 100).tolist()),
        "validation": Streamed([records[500:].tolist()]),
    }
    load = types.SimpleNamespace(load_dataset=lambda path, name, split, streaming: splits[split], __spec__=object())
    monkeypatch.setitem(sys.modules, "datasets", load)
    monkeypatch.setattr(corpora, "require_hub", lambda *_: None)
    config = make_config(tmp_path / "one", source="c4", files=None, max_documents=333)
    unsharded = prepare(config)
    assert read_manifest(unsharded).source.documents == {"train": 333, "val": 100}
    assert content(prepare_all(replace(config, root=str(tmp_path / "three")), 3)) == content(unsharded)


def test_a_merge_of_fewer_documents_than_val_every_is_refused(make_config, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    config = make_config(tmp_path / "root", files=str(tmp_path / "*.txt"), val_every=5)
    with pytest.raises(UserError) as error:
        prepare_all(config, 2)
    assert str(error.value) == (
        "4 documents are fewer than data.val_every=5, so that none is held out for validation: prepare without "
        "shard=, or set data.val_files"
    )


def test_a_finished_shard_is_not_prepared_again(make_config, tmp_path):
    config = make_config(tmp_path)
    part = prepare_shard(config, 1, 2)
    assert [path.name for path in part.parent.iterdir() if path.is_dir()] == ["1"]
    written = (part / "part.json").stat().st_mtime_ns
    assert prepare_shard(config, 1, 2) == part
    assert (part / "part.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", [lambda ids: ids[:-1], lambda ids: ids[:100] + bytes([ids[100] ^ 1]) + ids[101:]])
def test_a_damaged_shard_is_prepared_again(make_config, tmp_path, damage):
    config = make_config(tmp_path)
    part = prepare_shard(config, 1, 2)
    before = content(part)
    (part / "train.ids").write_bytes(damage(before["train.ids"]))
    assert prepare_shard(config, 1, 2) == part
    assert content(part) == before


def test_only_the_set_remains_after_the_merge(make_config, tmp_path):
    config = make_config(tmp_path)
    folder = prepare_all(config, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder.name]
    assert prepare_shard(config, 0, 2) == merge_shards(config, 2) == folder


@pytest.mark.parametrize(
    "prepare_again", [lambda config: prepare_shard(config, 0, 2), lambda config: merge_shards(config, 2)]
)
def test_a_complete_set_of_another_text_is_refused(packed, prepare_again):
    with pytest.raises(UserError, match=r"data\.sha256=0{16}\.\.\., but .*files-\w+ has"):
        prepare_again(replace(packed, sha256="0" * 64))


def test_the_tokenizer_is_trained_once(make_config, tmp_path, monkeypatch):
    config = make_config(tmp_path)
    prepare_shard(config, 2, 3)
    monkeypatch.setattr(shards, "tokenizer_for", None)
    prepare_shard(config, 0, 3)


def test_the_tokenizer_of_a_folder_is_used(make_config, word_level, tmp_path):
    tokenizer = word_level(tmp_path / "words", ["<pad>", "</s>"])
    config = make_config(tmp_path / "one", tokenizer=tokenizer)
    unsharded = prepare(config)
    assert content(prepare_all(replace(config, root=str(tmp_path / "two")), 2)) == content(unsharded)


def test_every_missing_damaged_or_different_part_is_named(make_config, tmp_path):
    config = make_config(tmp_path)
    for index in (1, 2, 3):
        prepare_shard(config, index, 5)
    prepare_shard(replace(config, seq_len=64), 4, 5)
    parts = parts_folder(config, 5)
    with open(parts / "1" / "train.ids", "ab") as file:
        file.write(b"xx")
    for index, change in (
        (2, lambda record: record["settings"]["text"].update(val_every=11)),
        (3, lambda record: record["tokenizer"].update(sha256="another")),
    ):
        path = parts / str(index) / "part.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
    with pytest.raises(UserError) as error:
        merge_shards(config, 5)
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert lines[0] == "part 0/5 is missing: run prepare with shard=0/5"
    assert re.match(r"part 1/5 is damaged: \S+/1/train.ids: [\d,]+ bytes instead of [\d,]+; remove ", lines[1])
    assert lines[2].startswith("part 2/5 was prepared with other settings: val_every 11 instead of 10; remove ")
    assert lines[3].startswith("part 3/5 was prepared with another tokenizer than the parts before it; remove ")
    assert lines[4].startswith("part 4/5 is missing: run prepare with shard=4/5; ")
    assert lines[4].endswith('was prepared with other settings: rows ["packed", 64] instead of ["packed", 32]')
    assert not prepared_folder(config).exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_every_altered_part_is_named_by_the_merge(make_config, tmp_path):
    config = make_config(tmp_path)
    parts = [prepare_shard(config, index, 3) for index in range(3)]
    for part in parts[1:]:
        ids = bytearray((part / "train.ids").read_bytes())
        ids[100] ^= 1
        (part / "train.ids").write_bytes(ids)
    with pytest.raises(UserError) as error:
        merge_shards(config, 3)
    assert str(error.value).splitlines() == [
        f"part {part.name}/3 is damaged: {part}/train.ids: its SHA-256 differs from part.json; remove {part} and "
        "prepare its shard again"
        for part in parts[1:]
    ]
    assert not is_complete(prepared_folder(config))


def test_altered_records_of_documents_are_named_and_their_shard_is_prepared_again(make_config, tmp_path):
    config = make_config(tmp_path)
    for index in range(2):
        part = prepare_shard(config, index, 2)
    records = np.fromfile(part / "train.documents", encode.DOCUMENT_DTYPE)
    records["numbers"][0] += 10
    records.tofile(part / "train.documents")
    with pytest.raises(
        UserError, match=r"part 1/2 is damaged: \S+/1/train.documents: its SHA-256 differs from part.json;"
    ):
        merge_shards(config, 2)
    prepare_shard(config, 1, 2)
    assert is_complete(merge_shards(config, 2))


def test_blocks_are_bounded_even_with_long_documents(make_config, tmp_path):
    config = make_config(tmp_path)
    part = prepare_shard(config, 0, 1)
    blocks = list(shards._blocks(part, "train", shards._read_part(part)))
    longest = max(int(block.documents["numbers"].max()) for block in blocks)
    assert max(block.ids.size for block in blocks) < 4000 + longest
    assert sum(len(block.documents) for block in blocks) == 600
    ids = np.concatenate([block.ids for block in blocks])
    assert ids.tobytes() == (part / "train.ids").read_bytes()


@pytest.mark.parametrize("source", ["docs", "drawn_instructions"])
def test_a_source_without_files_is_refused(make_config, tmp_path, source):
    with pytest.raises(UserError, match=f"data.source={source} does not consist of files"):
        prepare_shard(make_config(tmp_path, source=source, files=None), 0, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [[10, 9, 11], [0, 0, 0], [1, 1000, 1, 1, 1], [5] * 64, []])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_the_files_in_order_and_of_similar_size(tmp_path, sizes, count):
    files = [tmp_path / f"{number:02}" for number in range(len(sizes))]
    for path, size in zip(files, sizes, strict=True):
        path.write_bytes(b"x" * size)
    shares = [files_of_share(files, index, count) for index in range(count)]
    assert [path for part in shares for path in part] == files
    for part in shares:
        total = sum(path.stat().st_size for path in part)
        assert total <= sum(sizes) / count + max(sizes, default=0)
