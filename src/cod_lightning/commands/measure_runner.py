"""The work of `measure`: open a model with held-out sequences, measure it, save the results and show them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from cod_lightning.commands.terminal import progress_bar, result_table, show
from cod_lightning.config.schema import Config
from cod_lightning.data.config import patterns
from cod_lightning.data.corpora import Corpus
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.images import ImageDataModule
from cod_lightning.data.pack import pack_sequences
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import token_mask
from cod_lightning.measure.depth_report import COMPARED, REPORTED
from cod_lightning.measure.open_model import check_layout
from cod_lightning.measure.options import options_of
from cod_lightning.measure.pruning import Export, prune
from cod_lightning.measure.registry import MEASURES, measures_of, options_for
from cod_lightning.measure.result import Result
from cod_lightning.nn.huggingface import export
from cod_lightning.nn.pretrained import load_checkpoint, require_embeddings, require_length, save_pretrained
from cod_lightning.train.devices import accelerator, set_threads
from cod_lightning.train.load import load_decoder, load_vit, require_own_classes, require_own_tokenizer

PAGES = {"report": REPORTED, "compare": COMPARED}
"""Studies that write a page, and the measures on it."""


@dataclass(frozen=True)
class Subject:
    """A model with data to measure it on."""

    model: ModelAdapter
    """In evaluation mode, on its device."""
    batches: Sequence[Batch]
    """Held-out sequences or images, in micro-batches."""
    pad_id: int | None
    export: Export | None
    """Writes a model of this kind and its tokenizer for `transformers`; None for models of images."""
    text: str = ""
    """Source of the sequences."""
    config: str = ""
    """Definition of the model besides its weights, and of the text."""

    @cached_property
    def tokens(self) -> int:
        """Number of measured tokens."""
        return sum(int(token_mask(self.model, batch, self.pad_id).sum()) for batch in self.batches)

    def require_next_token(self, command: str) -> None:
        if self.model.reads_images:
            raise UserError(f"{self.model.name} is a model of images: measure {command} supports models of text only")
        if reason := self.model.why_no_loss:
            raise UserError(f"{self.model.name}: {reason}: measure {command} needs it")


def study_options(study: str, only: Sequence[str] = ()) -> dict[str, Any]:
    """Names and types of the options of a study, or of `only` some of its measures.

    Raises:
        UserError: the study does not exist, or does not have a measure of `only`.
    """
    if study == "prune":
        return options_of(prune)
    return options_for(PAGES[study] if study in PAGES else measures_of(study, only=only))


def open_run(config: Config, folder: Path, checkpoint: Path, rows: int) -> Subject:
    """Open a trained run with `rows` sequences or images of its held-out data.

    Raises:
        UserError: the checkpoint or the data cannot be read, or the data has another tokenizer.
    """
    set_threads(config.trainer)
    if config.task == "vision":
        return open_vision_run(config, folder, checkpoint, rows)
    decoder, tokenizer = load_decoder(config, folder, checkpoint)
    data = TokenDataModule(config.data, config.seed)
    data.prepare_data()
    data.setup("fit")
    require_own_tokenizer(folder, data)
    tokens = data.probe_batch(min(rows, data.val_count))
    return Subject(
        ModelAdapter(decoder.to(accelerator(config.trainer)).eval(), folder.name, tokenizer.decode),
        list(tokens.split(config.data.micro_batch_size)),
        data.tokenizer.pad_id,
        partial(export, tokenizer=tokenizer, max_length=config.max_length),
        config.data.folder or corpus_name(config),
        repr(config),
    )


def open_vision_run(config: Config, folder: Path, checkpoint: Path, rows: int) -> Subject:
    """`open_run` for a Vision Transformer."""
    vit = load_vit(config, checkpoint)
    data = ImageDataModule(config.images, config.data, config.seed)
    data.setup("fit")
    require_own_classes(checkpoint, data)
    batches = data.probe_batch(min(rows, data.val_count)).split(config.data.micro_batch_size)
    return Subject(ModelAdapter(vit.to(accelerator(config.trainer)).eval(), folder.name), batches, None, None)


def open_model(name: str, config: Config, corpus: Corpus, rows: int) -> Subject:
    """Open a causal language model of `transformers` with `rows` sequences of the held-out text of a corpus.

    Each sequence begins with the tokenizer's BOS if the tokenizer puts it before a text.

    Raises:
        UserError: the model or the text cannot be read, or the model does not run as its layout says.
    """
    device = accelerator(config.trainer)
    set_threads(config.trainer)
    checkpoint = load_checkpoint(name, check=lambda found: require_length(found, name, config.data.seq_len))
    tokenizer = checkpoint.tokenizer()
    if checkpoint.source.gguf is not None:
        print(f"{name}: quantized weights are dequantized to float32", file=sys.stderr)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    special = tokenizer("")["input_ids"]
    bos_id = special[0] if special[:1] == [tokenizer.bos_token_id] else None

    def write(model: Any, folder: Path) -> None:
        if checkpoint.dropped:
            print(f"{name}: generation settings dropped as invalid: {', '.join(checkpoint.dropped)}", file=sys.stderr)
        save_pretrained(model.to(checkpoint.dtype), folder, tokenizer)

    seq_len, eos_id = config.data.seq_len, tokenizer.eos_token_id
    tokens = pack_sequences(corpus.val(), encode, seq_len=seq_len, max_sequences=rows, eos_id=eos_id, bos_id=bos_id)
    require_embeddings(checkpoint.model, tokenizer, tokens, name)
    model = ModelAdapter(checkpoint.model.to(device), Path(name).name, tokenizer.decode)
    check_layout(model)
    batches = list(tokens.split(config.data.micro_batch_size))
    return Subject(model, batches, None, write, corpus_name(config), repr(config) + repr(checkpoint.model.config))


def corpus_name(config: Config) -> str:
    """The corpus of the held-out text, such as "files: texts/*.txt"."""
    files = patterns(config.data.val_files or config.data.files)
    return ": ".join([config.data.source, *([", ".join(files)] if files else [])])


def run_study(study: str, subject: Subject, options: Mapping[str, Any], folder: Path) -> None:
    """Take, save and show the measures of a study, or `only` some of them.

    Each measure gets those of `options` that it has.

    Raises:
        UserError: a measure fails, no measure applies to the model, an option belongs to none of those that do, or the
            folder cannot be written to.
    """
    names = measures_of(study, subject.model.hidden, options.get("only", ()))
    skipped = {name: reason for name in names if (reason := MEASURES[name].why_not(subject.model, subject.tokens))}
    if len(skipped) == len(names):
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        images = " is a model of images" if subject.model.reads_images else ""
        raise UserError(f"{subject.model.name}{images}: {reasons}")
    measured = [name for name in names if name not in skipped]
    for name in measured:
        MEASURES[name].check_options(subject.model, options)
    read = {"only"}.union(*(MEASURES[name].options for name in measured))
    errors = []
    for option in options.keys() - read:
        reasons = [f"{name}: {reason}" for name, reason in skipped.items() if option in MEASURES[name].options]
        why = "; ".join(reasons) or "its measure is taken of this model only if only= names it"
        errors.append(f"{option}={options[option]} has no effect on {subject.model.name}, remove it: {why}")
    if errors:
        raise UserError("\n".join(sorted(errors)))
    for name in names:
        if name in skipped:
            print(f"{name}: left out, {skipped[name]}")
            continue
        result = with_progress(name, MEASURES[name], subject, MEASURES[name].own(options))
        save_and_show(subject, name, result, folder)


def run_prune(subject: Subject, options: Mapping[str, Any], folder: Path) -> None:
    """Write a pruned model into a new folder, with its loss before and after, and show the losses.

    Raises:
        UserError: see `prune`.
    """
    subject.require_next_token("prune")
    result = with_progress("prune", prune, subject, options, folder=folder, export=subject.export)
    save_and_show(subject, "prune", result, folder)


def with_progress(
    name: str,
    measure: Callable[..., Any],
    subject: Subject,
    options: Mapping[str, Any],
    batches: Sequence[Batch] | None = None,
    **others: Any,
) -> Any:
    """Call a measure with a progress bar, on all of the subject's batches or on `batches`."""
    batches = subject.batches if batches is None else batches
    with progress_bar(f"{subject.model.name}: {name}") as update:
        return measure(subject.model, batches, subject.pad_id, update, **options, **others)


def save_and_show(subject: Subject, name: str, result: Result, folder: Path) -> None:
    """Write the files of a result, and print its table."""
    result.save(folder, name)
    show(result_table(f"{subject.model.name}: {name}", result.rows(), 4 * subject.model.depth))
