"""Throughput of data preparation beside the tokenizer alone, and throughput of the training loader.

    python benchmarks/prepare.py [--characters 8000000] [--workers 1 2] [--save]

`raw` is `encode_batch` of the same documents on as many threads: the upper bound of preparation. It and `prepare` take
turns in one run. The best of `--repeats` counts, because other load only slows a run down.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import tokenizers
from _results import argument_parser, elapsed, save, show

from cod_lightning.data.config import DataConfig
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.documentation import docs
from cod_lightning.data.manifest import read_manifest
from cod_lightning.data.prepare import prepare
from cod_lightning.data.tokenizers import DocumentTokenizer, train_bpe


def raw_seconds(tokenizer: DocumentTokenizer, documents: list[str], threads: int) -> float:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    return elapsed(lambda: tokenizer.backend.encode_batch(documents, add_special_tokens=False))


def loader_rate(config: DataConfig, workers: int) -> float:
    """Tokens per second of the training loader after its first batch."""
    data = TokenDataModule(dataclasses.replace(config, loader_workers=workers), seed=1)
    data.setup()
    batches = iter(data.train_dataloader())
    next(batches)
    sizes: list[int] = []
    seconds = elapsed(lambda: sizes.extend(batch.numel() for batch in batches))
    return sum(sizes) / seconds


def main() -> None:
    parser = argument_parser(__doc__, "prepare")
    parser.add_argument("--characters", type=int, default=8_000_000, help="size of the text, from the docs corpus")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    results: list[tuple[str, float, str]] = []
    corpus: list[str] = []
    trained: list[DocumentTokenizer] = []
    results.append(("docs corpus", elapsed(lambda: corpus.extend(docs(max(args.workers)))), "s"))
    characters = sum(map(len, corpus))
    results.append(("docs corpus, size", characters / 1e6, "M characters"))
    seconds = elapsed(lambda: trained.append(train_bpe(corpus, args.vocab_size)))
    results.append((f"bpe of {args.vocab_size}", seconds, "s"))

    documents, tokenizer = corpus[:: max(1, characters // args.characters)], trained[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, saved = folder / "text.jsonl", folder / "tokenizer"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), "utf-8")
        saved.mkdir()
        (saved / "tokenizer.json").write_text(tokenizer.json, "utf-8")
        settings = DataConfig(source="files", files=str(text), tokenizer=str(saved))
        for workers in args.workers:
            raw, prepared = [], []
            for repeat in range(args.repeats):
                config = dataclasses.replace(settings, root=str(folder / f"{workers}-{repeat}"), workers=workers)
                raw.append(raw_seconds(tokenizer, documents, workers))
                prepared.append(elapsed(lambda config=config: prepare(config)))
            manifest = read_manifest(prepare(config))
            tokens = manifest.train.tokens + manifest.val.tokens
            results.append((f"raw encode_batch, {workers} threads", tokens / min(raw), "tokens/s"))
            results.append((f"prepare, {workers} workers", tokens / min(prepared), "tokens/s"))
            results.append((f"prepare / raw, {workers}", min(raw) / min(prepared), ""))
        results += [(f"loader, {workers} workers", loader_rate(config, workers), "tokens/s") for workers in (0, 1)]

    rows = [{"measure": name, "value": f"{value:.4g}", "unit": unit} for name, value, unit in results]
    show([{**row, "value": f"{float(row['value']):,.10g}"} for row in rows])
    if args.save:
        save("prepare", rows, tokenizers=tokenizers.__version__, characters=sum(map(len, documents)))


if __name__ == "__main__":  # workers import this file
    main()
