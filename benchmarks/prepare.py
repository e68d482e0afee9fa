"""How fast text becomes prepared rows, against the tokenizer alone, and how fast rows are read back.

    python benchmarks/prepare.py [--characters 8000000] [--workers 1 2] [--save]

`raw` is `encode_batch` of the same documents on as many threads, and nothing else: the most that preparation can reach.
It and `prepare` are measured in turns in one run, and the best of `--repeats` is taken, as other load only slows down.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
from _results import save
from rich.console import Console
from rich.table import Table

from cod_lightning.data.config import DataConfig
from cod_lightning.data.documentation import docs
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepare
from cod_lightning.data.tokenizers import DocumentTokenizer, train_bpe


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def write_corpus(folder: Path, documents: list[str]) -> None:
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")


def write_tokenizer(folder: Path, tokenizer: DocumentTokenizer) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.json, "utf-8")


def raw_seconds(tokenizer: DocumentTokenizer, documents: list[str], threads: int) -> float:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    return seconds(lambda: tokenizer.backend.encode_batch(documents, add_special_tokens=False))


def loader_rates(config: DataConfig) -> dict[str, float]:
    """Tokens per second of the training loader, read in this process and by one worker, without its start."""
    from cod_lightning.data.datamodule import TokenDataModule

    rates = {}
    for workers in (0, 1):
        data = TokenDataModule(dataclasses.replace(config, loader_workers=workers), seed=1)
        data.setup()
        batches = iter(data.train_dataloader())
        first = next(batches)
        count = 0

        def read(batches=batches) -> None:
            nonlocal count
            count = sum(1 for _ in batches)

        spent = seconds(read)
        rates[f"loader, {workers} workers"] = count * first.numel() / spent
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--characters", type=int, default=8_000_000, help="text to prepare, of the docs corpus")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_prepare.csv")
    arguments = parser.parse_args()

    measured: list[tuple[str, float, str]] = []
    gathered: list[str] = []
    spent = seconds(lambda: gathered.extend(docs(max(arguments.workers))))
    measured.append(("docs corpus", spent, "s"))
    measured.append(("docs corpus, size", sum(map(len, gathered)) / 1e6, "M characters"))
    start = time.perf_counter()
    tokenizer = train_bpe(gathered, arguments.vocab_size)
    measured.append((f"bpe of {arguments.vocab_size}", time.perf_counter() - start, "s"))

    documents, size = [], 0
    for document in gathered[:: max(1, sum(map(len, gathered)) // arguments.characters)]:
        documents.append(document)
        size += len(document)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder, documents)
        write_tokenizer(folder / "tokenizer", tokenizer)
        settings = DataConfig(source="files", files=str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer"))
        for workers in arguments.workers:
            raw, prepared = [], []
            for repeat in range(arguments.repeats):
                config = dataclasses.replace(settings, root=str(folder / f"{workers}-{repeat}"), workers=workers)
                raw.append(raw_seconds(tokenizer, documents, workers))
                prepared.append(seconds(lambda config=config: prepare(config, progress=False)))
            manifest = read_manifest(prepare(config))
            tokens = manifest.train.tokens + manifest.val.tokens
            measured.append((f"raw encode_batch, {workers} threads", tokens / min(raw), "tokens/s"))
            measured.append((f"prepare, {workers} workers", tokens / min(prepared), "tokens/s"))
            measured.append((f"prepare / raw, {workers}", min(raw) / min(prepared), ""))
        measured += [(name, rate, "tokens/s") for name, rate in loader_rates(config).items()]

    table = Table("measure", "value", "unit")
    for name, value, unit in measured:
        table.add_row(name, f"{value:,.2f}" if value < 1000 else f"{value:,.0f}", unit)
    Console().print(table)
    if arguments.save:
        rows = [{"measure": name, "value": f"{value:.4g}", "unit": unit} for name, value, unit in measured]
        save("prepare", rows, tokenizers=tokenizers.__version__, characters=size)


if __name__ == "__main__":  # workers import this file
    main()
