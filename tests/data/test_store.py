"""Sets in an S3 store: a moto server behind a proxy that injects faults."""

import http.client
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from cod_lightning.data import chunks
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepared_folder
from cod_lightning.data.stream import TokenDataset, open_set
from cod_lightning.errors import UserError

CHUNK = "chunk-0-3.bin"
CHUNK_SIZE = 64
"""Sequences of a chunk."""
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "someone",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def moto(packed):
    """The port of a server whose bucket `sets` has the packed set under `packed`."""
    server = ThreadedMotoServer(port=0)
    server.start()
    port = server.get_host_and_port()[1]
    names = {name.lower(): value for name, value in ENVIRONMENT.items() if "KEY" in name}
    store = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **names)
    store.create_bucket(Bucket="sets")
    folder = prepared_folder(packed)
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload_file(str(path), "sets", f"packed/{path.relative_to(folder)}")
    store.close()
    yield port
    server.stop()


class Proxy(ThreadingHTTPServer):
    """Forwards requests to `port`, but answers those for a name in `faults` with its next fault."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = port
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.stopped = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        self.server.requests[name] += 1
        faults = self.server.faults.get(name, [])
        fault = (faults.pop(0) if len(faults) > 1 or faults[-1:] == ["once"] else faults[0]) if faults else ""
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "silent":
            self.server.stopped.wait(60)
            self.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "date", "server") and "checksum" not in key.lower():
                self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "altered":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content[: len(content) // 2] if fault in ("stall", "cut") else content)
        if fault == "stall":
            self.wfile.flush()
            self.server.stopped.wait(60)
        self.close_connection = fault in ("stall", "cut")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(moto, monkeypatch):
    """Environment variables for access to the store, and short pauses between attempts."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    server = Proxy(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(chunks, "PAUSE", 0.01)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


SOURCE = "s3://sets/packed"
UNANSWERED = ["silent", "stall"]
"""Faults that the client notices by its timeout; the others keep the real one, so that a slow machine adds no retry."""


@pytest.fixture
def local(packed) -> TokenDataset:
    folder = prepared_folder(packed)
    return TokenDataset(str(folder), read_manifest(folder), "train")


def opened(tmp_path: Path) -> TokenDataset:
    return TokenDataset(SOURCE, open_set(SOURCE)[0], "train", tmp_path / "cache")


def cached(tmp_path: Path, name: str = CHUNK) -> list[str]:
    """Return the files of a chunk in the cache."""
    return [path.name for path in (tmp_path / "cache").rglob(f"{name}*")]


def test_a_set_in_a_store_is_the_local_one(proxy, local, packed, tmp_path):
    folder = prepared_folder(packed)
    assert open_set(SOURCE + "/") == open_set(str(folder))
    dataset = opened(tmp_path)
    everything = range(len(dataset))
    assert torch.equal(torch.stack(dataset.__getitems__(everything)), torch.stack(local.__getitems__(everything)))
    assert {proxy.requests[chunk.name] for chunk in dataset.split.chunks} == {1}
    reopened = opened(tmp_path)
    assert torch.equal(reopened[3 * CHUNK_SIZE], local[3 * CHUNK_SIZE])
    assert proxy.requests[CHUNK] == 1  # from the cache


@pytest.mark.parametrize("fault", ["503", "silent", "stall", "cut", "altered"])
def test_a_transient_failure_is_retried(proxy, local, tmp_path, monkeypatch, fault):
    if fault in UNANSWERED:
        monkeypatch.setattr(chunks, "TIMEOUT", 2.0)
    proxy.faults = {CHUNK: [fault, "503", ""]}
    dataset = opened(tmp_path)
    assert torch.equal(dataset[3 * CHUNK_SIZE], local[3 * CHUNK_SIZE])
    assert proxy.requests[CHUNK] == 3
    assert cached(tmp_path) == [CHUNK]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("503", "503"),
        ("silent", "Read timeout"),
        ("stall", "[Tt]ime"),
        ("cut", "bytes"),
        ("altered", "is damaged: its SHA-256 differs from the manifest"),
    ],
)
def test_a_lasting_failure_is_named_and_leaves_no_chunk(proxy, local, tmp_path, monkeypatch, fault, reason):
    proxy.faults = {CHUNK: [fault]}
    dataset = opened(tmp_path)
    if fault in UNANSWERED:
        monkeypatch.setattr(chunks, "TIMEOUT", 0.5)
    with pytest.raises(UserError, match=rf"^{SOURCE}/train/{CHUNK} (?s:.)*{reason}(?s:.)* \(4 attempts\)$"):
        dataset[3 * CHUNK_SIZE]
    assert proxy.requests[CHUNK] == chunks.ATTEMPTS == 4
    assert cached(tmp_path) == []
    assert torch.equal(dataset[0], local[0])  # other chunks are read
    proxy.faults = {}
    assert torch.equal(dataset[3 * CHUNK_SIZE], local[3 * CHUNK_SIZE])


def test_a_missing_object_is_requested_once(proxy):
    with pytest.raises(UserError, match=r"s3://sets/none is not a prepared set .*manifest.json.*404.* \(1 attempt\)"):
        open_set("s3://sets/none")
    assert proxy.requests["manifest.json"] == 1


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_small_files_are_retried_and_named(proxy, local, tmp_path, name):
    proxy.faults = {name: ["503", "503", ""]}
    assert torch.equal(opened(tmp_path)[0], local[0])
    proxy.faults = {name: ["503"]}
    with pytest.raises(UserError, match=rf"{name} cannot be read: .*503.* \(4 attempts\)"):
        opened(tmp_path / "other")[0]


def test_a_chunk_altered_in_the_cache_is_fetched_again(proxy, local, tmp_path):
    assert torch.equal(opened(tmp_path)[3 * CHUNK_SIZE], local[3 * CHUNK_SIZE])
    (path,) = (tmp_path / "cache").rglob(CHUNK)
    path.write_bytes(path.read_bytes()[:-2])
    assert torch.equal(opened(tmp_path)[3 * CHUNK_SIZE], local[3 * CHUNK_SIZE])
    assert proxy.requests[CHUNK] == 2


def test_a_run_from_a_store_has_the_losses_of_the_local_set(proxy, packed, train, tmp_path):
    histories = []
    for folder in (str(prepared_folder(packed)), SOURCE):
        record, _ = train(
            "data.files=null", f"data.folder={folder}", f"data.root={tmp_path}", f"output={tmp_path}/{len(histories)}"
        )
        histories.append(record["history"])
    assert len(histories[0]["train"]["loss"]) == 6
    for split, key in (("train", "loss"), ("val", "val_loss")):
        assert histories[0][split][key] == histories[1][split][key]
