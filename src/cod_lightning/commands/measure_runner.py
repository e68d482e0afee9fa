"""Studies carried out: a run or a model opened with rows to measure on, measured, written, shown and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cod_lightning.commands.terminal import result_table, show
from cod_lightning.data.corpora import open_corpus
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.images import ImageDataModule
from cod_lightning.data.pack import packed
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, Images, ModelAdapter, load_pretrained
from cod_lightning.measure.compare import NEEDED, comparison_page
from cod_lightning.measure.options import options_of
from cod_lightning.measure.pruning import Export, prune
from cod_lightning.measure.registry import MAX_FULL_JACOBIAN, MEASURES, measures_of, options_for
from cod_lightning.measure.result import save
from cod_lightning.nn.huggingface import export, quiet_transformers
from cod_lightning.train.run import Sections, load_run, load_vision_run
from cod_lightning.train.strategy import accelerator


@dataclass(frozen=True)
class Subject:
    """What a study is carried out on."""

    model: ModelAdapter
    """In evaluation mode, where it is to be run."""
    batches: Sequence[Batch]
    """Held-out rows, so many at a time as are run at once."""
    pad_id: int | None
    export: Export | None
    """Writes a model of this kind, with its tokenizer, for stock `transformers`; None: there is no such model."""


def study_options(study: str) -> dict[str, Any]:
    """The options that a study takes, with their types.

    Raises:
        UserError: there is no such study.
    """
    if study == "prune":
        return options_of(prune)
    return options_for(NEEDED if study == "compare" else measures_of(study))


def open_run(run: Sections, folder: Path, checkpoint: Path, rows: int) -> Subject:
    """A trained run, on rows of the data of `run`.

    Raises:
        UserError: as `load_run`, or data that cannot be had.
    """
    if run.task == "vision":
        return open_vision_run(run, folder, checkpoint, rows)
    decoder, tokenizer = load_run(run, folder, checkpoint)
    data = TokenDataModule(run.data, run.seed)
    data.prepare_data()
    data.setup("fit")
    batches = data.probe_batch(min(rows, data.val_count)).split(run.data.micro_batch_size)
    model = ModelAdapter(decoder.to(accelerator(run.trainer)).eval(), folder.name)
    return Subject(model, list(batches), data.pad_id, partial(export, tokenizer=tokenizer, max_length=run.data.seq_len))


def open_vision_run(run: Sections, folder: Path, checkpoint: Path, rows: int) -> Subject:
    """`open_run` of a run of images."""
    vit = load_vision_run(run, checkpoint)
    data = ImageDataModule(run.images, run.data, run.seed)
    data.setup("fit")
    parts = [part.split(run.data.micro_batch_size) for part in data.probe_batch(min(rows, data.val_count))]
    model = ModelAdapter(vit.to(accelerator(run.trainer)).eval(), folder.name)
    return Subject(model, [Images(*part) for part in zip(*parts, strict=True)], None, None)


def open_model(name: str, run: Sections, rows: int) -> Subject:
    """A causal language model of `transformers`, on rows of the text of `run` in its own tokens.

    Raises:
        UserError: as `load_pretrained`, or text that cannot be had.
    """
    model, tokenizer = load_pretrained(name, device=accelerator(run.trainer))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def write(model: Any, folder: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    documents = open_corpus(run.data).val()
    tokens = packed(documents, encode, tokenizer.eos_token_id, rows, run.data.seq_len)
    return Subject(model, list(tokens.split(run.data.micro_batch_size)), None, write)


def run_study(study: str, subject: Subject, options: Mapping[str, Any], folder: Path) -> None:
    """Carry out the measures of a study, or `only` some, with those of the options that they have; each is written, and
    shown.

    Raises:
        UserError: as the measures, or the folder cannot be written to.
    """
    names = measures_of(study, subject.model.hidden, options.get("widest", MAX_FULL_JACOBIAN), options.get("only", ()))
    reasons = {name: MEASURES[name].not_for_images for name in names if subject.export is None}
    refused = {name: reason for name, reason in reasons.items() if reason}
    if len(refused) == len(names):
        raise UserError(f"{subject.model.name} is a model of images: {'; '.join(refused.values())}")
    for name in names:
        if name in refused:
            print(f"{name}: left out, {refused[name]}")
        else:
            report(subject, name, measured(name, subject, options, folder))


def run_prune(subject: Subject, options: Mapping[str, Any], folder: Path) -> None:
    """Write a pruned model into a new folder, and what became of its loss beside it; show that.

    Raises:
        UserError: as `prune`.
    """
    if subject.export is None:
        raise UserError(f"{subject.model.name} is a model of images: stock transformers has none to write it as")
    result = with_progress("prune", prune, options_of(prune), subject, options, folder=folder, export=subject.export)
    save(result, folder, "prune")
    report(subject, "prune", result)


def compare(subjects: Mapping[str, Callable[[], Subject]], options: Mapping[str, Any], folder: Path) -> Path:
    """Measure every model on the same kind of rows, then lay them over each other on one page, which is returned.

    Args:
        subjects: open a model, by the name that it is shown under; one is open at a time.
        options: of the measures.
        folder: the page goes there, as HTML and PNG, and what was measured into a folder for each model inside it.
    """
    found = {}
    for name, opened in subjects.items():
        subject = opened()
        if subject.export is None:
            raise UserError(f"{name} is a model of images: measure compare takes models of text")
        for result in NEEDED:
            measured(result, subject, options, folder / name)
        found[name] = {result: json.loads((folder / name / f"{result}.json").read_text()) for result in NEEDED}
    image, page = comparison_page(found)
    (folder / "compare.png").write_bytes(image)
    (folder / "compare.html").write_text(page)
    return folder / "compare.html"


def measured(name: str, subject: Subject, options: Mapping[str, Any], folder: Path) -> Any:
    """Carry out one measure, and write its result."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose a folder for what is measured")
    result = with_progress(name, MEASURES[name], MEASURES[name].options, subject, options)
    save(result, folder, name)
    return result


def with_progress(
    name: str,
    measure: Callable[..., Any],
    known: Collection[str],
    subject: Subject,
    options: Mapping[str, Any],
    **others: Any,
) -> Any:
    """The result of a measure, called with those of `options` that are `known` to it, under a progress bar."""
    own = {option: value for option, value in options.items() if option in known}
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"{subject.model.name}: {name}", total=None)

        def told(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total or None)

        return measure(subject.model, subject.batches, subject.pad_id, told, **own, **others)


def report(subject: Subject, name: str, result: Any) -> None:
    """Print a result's table, and where the theory disagrees with itself."""
    show(result_table(f"{subject.model.name}: {name}", result.rows(), 4 * subject.model.depth))
    for remark in getattr(result, "disagreements", ()):
        print(f"- {remark}")
