import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cod_lightning.data import chunks, stream
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepared_folder
from cod_lightning.data.stream import TokenDataset, open_set
from cod_lightning.errors import UserError

CHUNK = "chunk-0-3.bin"


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy of a prepared set, to be damaged."""
    return shutil.copytree(prepared_folder(packed), tmp_path / "set")


@pytest.fixture
def train(folder, stored) -> torch.Tensor:
    """The training sequences."""
    return torch.from_numpy(stored(folder, "train").astype(np.int64))


@pytest.mark.parametrize("prefix", ["", "local:"])
def test_sequences_are_read_by_index_in_any_order(folder, train, tmp_path, prefix):
    source = prefix + str(folder)
    manifest, tokenizer = open_set(source)
    assert tokenizer.json == (folder / "tokenizer.json").read_text()
    dataset = TokenDataset(source, manifest, "train", tmp_path / "cache")
    assert len(dataset) == len(train) > 1000
    chosen = np.random.default_rng(0).permutation(len(dataset))
    for part in np.array_split(chosen, 7):
        read = dataset.read(part)
        assert read.dtype == torch.int64
        assert torch.equal(read, train[part])
    assert torch.equal(dataset[5], train[5])
    assert torch.equal(torch.stack(dataset.__getitems__([9, 900, 9])), train[[9, 900, 9]])
    assert dataset.read(np.array([], np.int64)).shape == (0, 32)


def test_the_number_of_mapped_chunks_is_bounded(folder, train, monkeypatch):
    monkeypatch.setattr(stream, "OPEN_CHUNKS", 3)
    dataset = TokenDataset(str(folder), read_manifest(folder), "train")
    assert torch.equal(dataset.read(np.arange(len(dataset))), train)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line}
    assert len(mapped) == 3


def test_an_index_outside_is_refused(folder):
    dataset = TokenDataset(str(folder), read_manifest(folder), "val")
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]


def test_a_copy_in_another_process_opens_its_own_files(folder):
    dataset = TokenDataset(str(folder), read_manifest(folder), "train")
    unread = pickle.dumps(dataset)
    first = dataset[0]
    assert pickle.dumps(dataset) == unread
    assert torch.equal(pickle.loads(unread)[0], first)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"), [(Path.unlink, f"{CHUNK}: missing"), (cut, f"{CHUNK}: 4,106 bytes instead of 4,108")]
)
def test_missing_and_cut_chunks_are_named_when_the_set_is_opened(folder, damage, message):
    damage(folder / "train" / CHUNK)
    with pytest.raises(UserError, match=message):
        open_set(str(folder))


@pytest.mark.parametrize("prefix", ["", "local:"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, f"{CHUNK} cannot be read"), (cut, f"{CHUNK} is damaged: 4,106 bytes"), (alter, "its SHA-256")],
)
def test_damaged_chunks_are_named_when_they_are_read(folder, tmp_path, monkeypatch, prefix, damage, message):
    monkeypatch.setattr(chunks, "PAUSE", 0)
    source = prefix + str(folder)
    manifest, _ = open_set(source)
    damage(folder / "train" / CHUNK)
    dataset = TokenDataset(source, manifest, "train", tmp_path / "cache")
    assert torch.equal(dataset[0], dataset[0])
    with pytest.raises(UserError, match=message) as error:
        dataset[3 * 64]
    assert CHUNK in str(error.value)


def test_a_chunk_evicted_by_another_process_is_read_from_memory(folder, train, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "write_atomic", lambda path, content: None)
    dataset = TokenDataset(f"local:{folder}", read_manifest(folder), "train", tmp_path / "cache")
    assert torch.equal(dataset[5], train[5])


def test_partial_files_of_killed_downloads_are_removed(folder, tmp_path):
    dataset = TokenDataset(f"local:{folder}", read_manifest(folder), "train", tmp_path / "cache")
    dataset.folder.mkdir(parents=True)
    for name in (".chunk-0-0.bin.a.partial", ".chunk-0-1.bin.b.partial"):
        (dataset.folder / name).touch()
    dataset[0]
    assert [path.name for path in dataset.folder.glob(".*")] == [".chunk-0-1.bin.b.partial"]  # another lock guards it


@pytest.mark.parametrize("prefix", ["", "local:"])
def test_an_altered_tokenizer_is_refused_when_the_set_is_opened(folder, prefix):
    alter(folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: its SHA-256 differs from the manifest"):
        open_set(prefix + str(folder))


@pytest.mark.parametrize("prefix", ["", "local:"])
def test_a_folder_without_a_set_is_refused(tmp_path, prefix):
    with pytest.raises(UserError, match=r"is not a prepared set \(.*manifest.json"):
        open_set(f"{prefix}{tmp_path}")


def test_a_local_set_without_litdatas_index_is_refused(folder):
    (folder / "val" / "index.json").unlink()
    with pytest.raises(UserError, match=r"index.json: missing"):
        open_set(str(folder))
