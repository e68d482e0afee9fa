"""Build the corpus of `scale=small` from three packages of Debian 12, whose content never changes.

    apt-get download dict-gcide=0.48.5+nmu2 anarchism=15.3-3 debian-handbook=11.20220922
    python -m cod_lightning.data.debian12 *.deb

writes corpora/debian12.jsonl.gz, 47 MB of text: Webster's dictionary of 1913 with quotations, a book on politics, and a
manual of system administration. The licences of the packages apply (GPL, GFDL).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cod_lightning.data.documentation import html_text, join_paragraphs
from cod_lightning.errors import UserError
from cod_lightning.files import write_atomic

CORPUS = Path("corpora/debian12.jsonl.gz")
"""The file that `scale=small` reads, relative to the working directory."""
PACKAGES = {
    "dict-gcide 0.48.5+nmu2": "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
    "anarchism 15.3-3": "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    "debian-handbook 11.20220922": "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
}
"""SHA-256 of each package file, in the order of the corpus."""
TEXT = re.compile(
    r"\./usr/share/(dictd/gcide\.dict\.dz|doc/anarchism/html/.*\.html|doc/debian-handbook/html/en-US/[^/]*\.html)"
)
"""The text files inside the packages."""


def read_deb(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every text file of a Debian package, sorted by name.

    A .deb is an `ar` archive: 8 bytes of magic, then members with a 60-byte header, padded to even length.
    """
    content, start = path.read_bytes(), len(b"!<arch>\n")
    while start < len(content):
        name, size = content[start : start + 16].decode().strip(), int(content[start + 48 : start + 58])
        start += 60
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(content[start : start + size])) as archive:
                for member in sorted(archive.getmembers(), key=lambda member: member.name):
                    if TEXT.fullmatch(member.name) and (file := archive.extractfile(member)):
                        yield member.name, file.read()
        start += size + size % 2


def paragraphs(name: str, content: bytes) -> Iterator[str]:
    """Yield the paragraphs of a compressed dictionary (.dz) or an HTML page, each as one line."""
    if name.endswith(".dz"):
        text = gzip.decompress(content).decode("utf-8", errors="replace")
        blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text))
    else:
        blocks = iter(html_text(content.decode("utf-8")).split("\n"))
    return filter(None, blocks)


def documents(packages: Sequence[Path]) -> Iterator[str]:
    """Yield the documents of the corpus, whatever the order of `packages`.

    Raises:
        UserError: a package is missing or has another version.
    """
    by_hash = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in packages}
    if missing := [name for name, sha256 in PACKAGES.items() if sha256 not in by_hash]:
        raise UserError(f"packages are missing: {', '.join(missing)}; run apt-get download NAME=VERSION")
    for sha256 in PACKAGES.values():
        for name, content in read_deb(by_hash[sha256]):
            yield from join_paragraphs(paragraphs(name, content))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cod_lightning.data.debian12",
        description="Write the corpus of scale=small from its Debian packages.",
        epilog=f"packages: {', '.join(PACKAGES)}",
    )
    parser.add_argument("packages", nargs="+", type=Path, help="the .deb files")
    parser.add_argument("--output", type=Path, default=CORPUS, help=f"default: {CORPUS}")
    arguments = parser.parse_args(argv)
    try:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(arguments.packages))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.output, gzip.compress(lines.encode(), mtime=0))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
