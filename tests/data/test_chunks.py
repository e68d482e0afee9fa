"""Chunks: their sequences, litdata's format, and the size of a cache. Stores are in test_store."""

import os
import shutil
from types import SimpleNamespace

import litdata
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from litdata.streaming import downloader
from litdata.streaming.item_loader import TokensLoader

from cod_lightning.data import chunks
from cod_lightning.data.chunks import ChunkWriter, Store, evict_chunks, is_remote
from cod_lightning.data.encode import Encoder
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepared_folder
from cod_lightning.data.stream import TokenDataset, open_set
from cod_lightning.errors import UserError


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(2, 999), max_size=40), min_size=1, max_size=30),
    batch=st.integers(1, 5),
    seq_len=st.integers(2, 9),
    chunk_tokens=st.integers(1, 60),
)
def test_packed_sequences_are_the_documents_joined_by_eos(
    numbers, tmp_path_factory, documents, batch, seq_len, chunk_tokens
):
    encoder = Encoder(numbers(), "packed", seq_len)
    texts = [" ".join(map(str, document)) for document in documents]
    expected = [id for document in documents for id in (*document, 1)]
    folder = tmp_path_factory.mktemp("sequences")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_TOKENS", chunk_tokens)
        writer = ChunkWriter(folder, seq_len)
        for n in range(0, len(texts), batch):
            writer.write(encoder(texts[n : n + batch]))
        split = writer.close()
    sequences = len(expected) // seq_len
    assert (split.rows, split.tokens) == (sequences, sequences * seq_len)
    contents = [(folder / chunk.name).read_bytes()[12:] for chunk in split.chunks]
    assert np.frombuffer(b"".join(contents), np.uint16).tolist() == expected[: sequences * seq_len]
    assert all(chunk.rows == max(1, chunk_tokens // seq_len) for chunk in split.chunks[:-1])


def test_litdata_reads_the_same_sequences(packed):
    folder = prepared_folder(packed)
    dataset = TokenDataset(str(folder), read_manifest(folder), "val")
    theirs = litdata.StreamingDataset(str(folder / "val"), item_loader=TokensLoader(block_size=32))
    assert len(theirs) == len(dataset)
    assert np.array_equal(np.stack(list(theirs)), dataset.read(np.arange(len(dataset))))


def test_every_rank_writes_the_same_names(numbers, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_OPTIMIZER_GLOBAL_RANK", "3")
    writer = ChunkWriter(tmp_path, 2)
    writer.write(Encoder(numbers(), "packed", 2)(["2 3 4"]))
    split = writer.close()
    assert [chunk.name for chunk in split.chunks] == ["chunk-0-0.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chunk-0-0.bin", "index.json"]


def test_a_full_cache_evicts_the_oldest_chunks(tmp_path, monkeypatch):
    for age, name in enumerate(("new", "old", "older")):
        (tmp_path / f"{name}.bin").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}.bin", (1000 - age, 1000 - age))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    evict_chunks(tmp_path, 100)  # of 400 bytes
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_chunk_that_another_process_evicts_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "gone.bin").symlink_to(tmp_path / "nothing")  # listed, and missing when its size is read
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    evict_chunks(tmp_path, 100)


@pytest.mark.parametrize(("scheme", "package"), [("gs", "google-cloud-storage"), ("azure", "azure-storage-blob")])
def test_a_store_without_its_client_names_the_package(scheme, package, monkeypatch):
    for name in ("GOOGLE", "AZURE"):
        monkeypatch.setattr(downloader, f"_{name}_STORAGE_AVAILABLE", False)
    with pytest.raises(
        UserError, match=rf"^{scheme}://sets/a needs a package to be downloaded: pip install {package}$"
    ):
        open_set(f"{scheme}://sets/a")


def test_an_error_of_a_store_without_a_message_is_named_by_its_type(tmp_path, monkeypatch):
    def time_out(*arguments):
        raise TimeoutError

    monkeypatch.setattr(chunks, "PAUSE", 0)
    store = Store(f"local:{tmp_path}")
    monkeypatch.setattr(store.downloader, "download_file", time_out)
    with pytest.raises(UserError, match=r"/a\.json cannot be read: TimeoutError \(4 attempts\)$"):
        store.read("a.json")


@pytest.mark.parametrize(
    ("source", "remote"),
    [("s3://bucket/set", True), ("local:/a/b", True), ("/a/b", False), ("data/set", False), ("C:\\data", False)],
)
def test_urls_and_folders_are_distinguished(source, remote):
    assert is_remote(source) is remote
