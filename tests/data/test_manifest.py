"""The manifest: its fingerprint, and files that are damaged or newer."""

import json
from dataclasses import replace

import pytest

from cod_lightning.data.manifest import FORMAT, Manifest, read_manifest
from cod_lightning.data.prepare import prepared_folder
from cod_lightning.errors import UserError


@pytest.fixture
def manifest(packed) -> Manifest:
    return read_manifest(prepared_folder(packed))


def test_a_manifest_survives_its_json(manifest):
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda manifest: {"source": replace(manifest.source, name="other")}, True),
        (lambda manifest: {"seq_len": 33}, False),
        (lambda manifest: {"val": manifest.train}, False),
        (lambda manifest: {"layout": "document"}, False),
        (lambda manifest: {"dtype": "uint32"}, False),
        (lambda manifest: {"tokenizer": replace(manifest.tokenizer, name="other", requested=None)}, True),
        (lambda manifest: {"tokenizer": replace(manifest.tokenizer, sha256="other")}, False),
        (lambda manifest: {"tokenizer": replace(manifest.tokenizer, pad_id=9)}, False),
        (lambda manifest: {"tokenizer": replace(manifest.tokenizer, eos_id=9)}, False),
    ],
    ids=["name", "length", "rows", "layout", "dtype", "name of the tokenizer", "tokenizer", "pad", "EOS"],
)
def test_the_fingerprint_covers_the_content_alone(manifest, change, same):
    assert (replace(manifest, **change(manifest)).fingerprint == manifest.fingerprint) is same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: "{" + json.dumps(record), "here is damaged"),
        (lambda record: json.dumps({**record, "format": FORMAT + 1}), f"has format {FORMAT + 1}, but this version"),
        (lambda record: json.dumps({**record, "seq_len": 8}), "fingerprint does not match"),
        (lambda record: json.dumps({**record, "new": 8}), r"here is damaged \(new is unknown\)"),
        (lambda record: json.dumps({key: record[key] for key in record if key != "val"}), "val is missing"),
        (lambda record: json.dumps({key: record[key] for key in record if key != "sha256"}), "fingerprint does not"),
        (lambda record: "[]", "here is damaged"),
    ],
    ids=["syntax", "newer", "altered", "unknown field", "missing field", "no SHA-256", "list"],
)
def test_a_bad_manifest_is_refused(manifest, change, message):
    with pytest.raises(UserError, match=message):
        Manifest.from_json(change(json.loads(manifest.to_json())), "here")
