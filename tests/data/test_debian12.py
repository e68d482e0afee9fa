"""The corpus of Debian packages, from a tiny package that the test builds."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest

from cod_lightning.data import debian12

SENTENCE = "A sentence of plain English words that extends for a while. " * 10
FILES = {
    "./usr/share/dictd/gcide.dict.dz": gzip.compress(f"{SENTENCE}\n\n{SENTENCE}\nsecond line".encode()),
    "./usr/share/doc/anarchism/html/a.html": f"<p>{SENTENCE}</p><p>Caf\u00e9 &amp; {SENTENCE}</p>".encode(),
    "./usr/share/doc/other/html/b.html": b"<p>skipped</p>",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A .deb with the members of a real one, registered as the only package."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    deb = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", archive.getvalue())):
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        deb += b"\n" * (len(content) % 2)
    path = tmp_path / "tiny.deb"
    path.write_bytes(deb)
    monkeypatch.setattr(debian12, "PACKAGES", {"tiny 1.0": hashlib.sha256(deb).hexdigest()})
    return path


def test_documents_are_the_text_of_dictionary_and_pages(package, tmp_path, capsys):
    output = tmp_path / "new" / "corpus.jsonl.gz"
    assert debian12.main([str(package), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    texts = [json.loads(line)["text"] for line in gzip.decompress(output.read_bytes()).splitlines()]
    sentence = SENTENCE.strip()
    assert texts == [f"{sentence}\n{sentence} second line", f"{sentence}\nCaf\u00e9 & {sentence}"]


def test_the_corpus_has_the_same_bytes_each_time(package, tmp_path):
    for name in ("a", "b"):
        debian12.main([str(package), "--output", str(tmp_path / name)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_version_is_refused_and_nothing_is_written(package, tmp_path, capsys):
    package.write_bytes(package.read_bytes() + b"\n")
    assert debian12.main([str(package), "--output", str(tmp_path / "corpus")]) == 2
    assert "error: packages are missing: tiny 1.0; run apt-get download" in capsys.readouterr().err
    assert not (tmp_path / "corpus").exists()


def test_a_missing_file_is_one_error(tmp_path, capsys):
    assert debian12.main([str(tmp_path / "none.deb")]) == 2
    assert "none.deb" in capsys.readouterr().err
