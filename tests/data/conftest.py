"""Small corpora in the file format of C4, sets prepared from them, and tokenizers."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from cod_lightning.data import chunks
from cod_lightning.data.config import DataConfig
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepare
from cod_lightning.data.tokenizers import DocumentTokenizer

SYLLABLES = ["ka", "ro", "mi", "ten", "sul", "ver", "do", "pal", "in", "gra", "o", "lux"]


def text(seed: int, words: int) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(words)) + "."


def write_c4(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, document in enumerate(documents):
            record = {"text": document, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.com/{number}"}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="session")
def c4_corpus(tmp_path_factory) -> Path:
    """600 documents of 5 to 200 words in three files."""
    folder = tmp_path_factory.mktemp("corpus")
    for shard in range(3):
        documents = [text(1000 * shard + n, 5 + 37 * n % 196) for n in range(200)]
        write_c4(folder / f"c4-train.0000{shard}-of-00003.json.gz", documents)
    return folder


@pytest.fixture(scope="session")
def make_config(c4_corpus):
    """`make_config(root, **changes)` returns the settings of a set of `c4_corpus`, or of the folder `corpus=`."""

    def make(root: Path, **changes) -> DataConfig:
        settings: dict[str, Any] = {
            "source": "files",
            "files": str(changes.pop("corpus", c4_corpus) / "*.json.gz"),
            "root": str(root),
            "val_every": 10,
            "vocab_size": 300,
            "seq_len": 32,
            "batch_size": 8,
            "micro_batch_size": 4,
            "workers": 1,
        }
        return DataConfig(**{**settings, **changes})

    return make


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 2,048 tokens, so that a small corpus has many."""
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 2048)


@pytest.fixture(scope="session")
def packed(make_config, tmp_path_factory) -> DataConfig:
    """The settings of a packed set, prepared, with many small chunks. Read only."""
    return _prepared(make_config(tmp_path_factory.mktemp("packed")))


@pytest.fixture(scope="session")
def documents(make_config, tmp_path_factory) -> DataConfig:
    """The same text with one document per row. Read only."""
    return _prepared(make_config(tmp_path_factory.mktemp("documents"), layout="document", seq_len=64))


def _prepared(config: DataConfig) -> DataConfig:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_TOKENS", 2048)
        prepare(config)
    return config


@pytest.fixture(scope="session")
def open_tokens():
    """`open_tokens(config)` returns the data module of a prepared set after `setup`."""

    def open_module(config: DataConfig, seed: int = 1, **replica: int) -> TokenDataModule:
        data = TokenDataModule(config, seed, **replica)
        data.setup()
        return data

    return open_module


@pytest.fixture(scope="session")
def stored():
    """`stored(folder, split)` returns the sequences of a split, read directly from the files."""

    def read(folder: Path, split: str) -> np.ndarray:
        manifest = read_manifest(folder)
        contents = [(folder / split / chunk.name).read_bytes()[12:] for chunk in manifest.split(split).chunks]
        return np.frombuffer(b"".join(contents), manifest.dtype).reshape(-1, manifest.row_width)

    return read


class Numbers(DocumentTokenizer):
    """Documents are numbers, which are their own ids."""

    def encode(self, documents):
        return [[*map(int, document.split()), self.eos_id] for document in documents]


@pytest.fixture(scope="session")
def numbers():
    """`numbers(vocab_size)` is a tokenizer of numbers, with pad 0 and EOS 1."""

    def make(vocab_size: int = 1000) -> DocumentTokenizer:
        return type("Numbers", (Numbers,), {"vocab_size": vocab_size})("", pad_id=0, eos_id=1)

    return make


FOX = "the quick brown fox jumps over the lazy dog"


def write_word_level(folder: Path, specials: list[str], config: dict | None = None) -> str:
    folder.mkdir(exist_ok=True)
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator([FOX], trainers.WordLevelTrainer(special_tokens=[*specials, "<unk>"]))
    if "</s>" in specials:
        eos = ("</s>", backend.token_to_id("</s>"))
        backend.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [eos])
    backend.enable_truncation(3)
    backend.enable_padding(length=5)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def word_level():
    """Write a tokenizer folder with the files of published ones, tokenizer.json and tokenizer_config.json."""
    return write_word_level
