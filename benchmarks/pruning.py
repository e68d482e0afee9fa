"""Perplexity of a model without 1 to 8 of its blocks, by the criterion that selects them.

    python benchmarks/pruning.py smollm2 data=files data.files=corpora/debian12.jsonl.gz data.seq_len=256 [--save]

The criteria are those of `measure prune by=`, and `deepest`, the blocks before the last one. They select and are
measured on the same held-out sequences, the first `--rows`. `--other` names more models to measure on them, such as one
that was trained after pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from _results import argument_parser, report

from cod_lightning.commands.measure_report import tokens_sha256
from cod_lightning.commands.measure_runner import Subject, open_model
from cod_lightning.config.compose import compose
from cod_lightning.data.corpora import open_corpus
from cod_lightning.evaluate.perplexity import perplexity_of
from cod_lightning.measure.ablation import removal
from cod_lightning.measure.block_removal import remove_blocks
from cod_lightning.measure.layer_importance import block_influence
from cod_lightning.measure.reordering import mean_loss


def selections(subject: Subject, most: int) -> Mapping[str, Sequence[Sequence[int]]]:
    """The removed blocks, counting from 1, by criterion and number of blocks."""
    model, batches = subject.model, subject.batches
    influence = block_influence(model, batches, longest=most)
    costs = removal(model, batches).losses
    layers, lengths = range(1, model.depth + 1), range(1, most + 1)
    return {
        "influence": [sorted(layers, key=lambda layer: influence.influence[layer - 1])[:n] for n in lengths],
        "streamline": [range(first, last + 1) for first, last in influence.best],
        "removal": [sorted(layers, key=lambda layer: costs[layer - 1])[:n] for n in lengths],
        "deepest": [range(model.depth - n, model.depth) for n in lengths],
    }


def row(by: str, removed: Sequence[int], loss: float, targets: int) -> dict[str, Any]:
    return {
        "by": by,
        "blocks": len(removed),
        "removed": " ".join(map(str, removed)),
        "loss": round(loss, 4),
        "perplexity": round(perplexity_of(loss), 2),
        "targets": targets,
    }


def main() -> None:
    parser = argument_parser(__doc__, "pruning", threads=1)
    parser.add_argument("model", help="of transformers")
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides that choose the text")
    parser.add_argument("--rows", type=int, default=8, help="sequences")
    parser.add_argument("--blocks", type=int, default=8, help="largest number of removed blocks")
    parser.add_argument("--other", nargs="*", default=[], metavar="FOLDER", help="models to measure as they are")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = compose(args.words)
    corpus = open_corpus(config.data)
    subject = open_model(args.model, config, corpus, args.rows)
    rows = [row("none", [], *mean_loss(subject.model, subject.batches))]
    known: dict[tuple[int, ...], tuple[float, int]] = {}
    for by, chosen in selections(subject, args.blocks).items():
        for removed in chosen:
            key = tuple(sorted(removed))
            if key not in known:
                known[key] = mean_loss(remove_blocks(subject.model, key), subject.batches)
            rows.append(row(by, key, *known[key]))
    for folder in args.other:
        other = open_model(folder, config, corpus, args.rows)
        blocks = subject.model.depth - other.model.depth
        rows.append(row(other.model.name, [], *mean_loss(other.model, other.batches)) | {"blocks": blocks})
    report(args, rows, threads=args.threads, model=args.model, sequences=args.rows, sha256=tokens_sha256(subject))


if __name__ == "__main__":
    main()
