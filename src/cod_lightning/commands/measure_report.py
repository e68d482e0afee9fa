"""The work of `measure report` and `measure compare`: measure several models part by part, and write one page."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cod_lightning import __version__
from cod_lightning.commands.measure_runner import Subject, with_progress
from cod_lightning.commands.terminal import format_duration
from cod_lightning.errors import UserError
from cod_lightning.files import write_atomic
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import first_sequences
from cod_lightning.measure.depth_page import report_page
from cod_lightning.measure.depth_report import SECTIONS, headline
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.vit import Images

PACKAGES = ("kernels", "nn", "measure")
"""Packages whose code determines a result."""


def run_report(
    subjects: Mapping[str, Callable[[], Subject]],
    options: Mapping[str, Any],
    folder: Path,
    measures: Sequence[str],
    name: str = "report",
) -> Path:
    """Measure several models and put them on one page.

    Each result is kept with a fingerprint; a second call does not measure again what is there.

    Args:
        subjects: functions that open a model, by the name it is shown under; one model is open at a time.
        options: of the measures.
        folder: gets the page as HTML, its figures as PNG and PDF, `NAME.json` with the headline and the loss of a
            uniform guess, and a folder with the results of each model.
        measures: those on the page.
        name: of the page and of the command.

    Returns:
        The HTML file.

    Raises:
        UserError: a model does not predict the next token, a measure fails, or the folder cannot be written to.
    """
    for open_subject in list(subjects.values())[1:]:  # before the first is measured, which may take hours
        check_subject(open_subject(), options, measures, name)
    models, texts, uniform = {}, {}, {}
    for model, open_subject in subjects.items():
        subject = open_subject()
        check_subject(subject, options, measures, name)
        models[model] = measure_parts(subject, options, folder / model, measures)
        texts[model] = text_of(subject)
        uniform[model] = math.log(len(subject.model.head_weight))
        del subject  # the next one needs its memory
    page, figures = report_page(models, texts, uniform, name)
    for figure, content in figures.items():
        write_atomic(folder / figure, content)
    numbers = {
        model: headline(results) | {"uniform_loss": uniform[model], "text": texts[model]}
        for model, results in models.items()
    }
    write_atomic(folder / f"{name}.json", json.dumps({"models": numbers}, indent=1, allow_nan=False) + "\n")
    write_atomic(folder / f"{name}.html", page)
    return folder / f"{name}.html"


def check_subject(subject: Subject, options: Mapping[str, Any], measures: Sequence[str], command: str) -> None:
    """Check that a model can be measured.

    Raises:
        UserError: it does not predict the next token, an option is out of range, or a measure does not apply.
    """
    subject.require_next_token(command)
    for each in measures:
        MEASURES[each].check_options(subject.model, options)
        if reason := MEASURES[each].why_not(subject.model, subject.tokens):
            raise UserError(f"{subject.model.name}: {each}: {reason}")


def measure_parts(
    subject: Subject, options: Mapping[str, Any], folder: Path, measures: Sequence[str]
) -> dict[str, Any]:
    """The fields of each result by measure: those in `folder` with the same fingerprint, and new ones.

    Before it starts it prints the expected cost of each part.
    """
    chosen = {each: MEASURES[each].own(options) for each in measures}
    identity = subject_identity(subject)
    keys = {each: f"{identity} {each} {sorted(own.items())} {SECTIONS[each].sequences}" for each, own in chosen.items()}
    results = {each: stored for each in measures if (stored := stored_result(folder, each, keys[each])) is not None}
    todo = [each for each in measures if each not in results]
    print_plan(subject, measures, todo)
    for done, each in enumerate(todo, start=1):
        start = time.monotonic()
        batches = first_sequences(subject.batches, SECTIONS[each].sequences)
        others = {"removal": results["removal"]} if each == "longest_run" else {}
        result = with_progress(each, MEASURES[each].measure, subject, chosen[each], batches=batches, **others)
        path = result.save(folder, each)[0]
        write_atomic(path.with_suffix(".key"), fingerprint(keys[each], path))
        results[each] = json.loads(path.read_text())
        seconds = format_duration(time.monotonic() - start)
        print(f"{subject.model.name}: {each} done in {seconds}, {done} of {len(todo)}", file=sys.stderr, flush=True)
    return results


def stored_result(folder: Path, measure: str, key: str) -> Any:
    """The fields of an earlier result with the same fingerprint, or None."""
    path = folder / f"{measure}.json"
    try:
        same = path.with_suffix(".key").read_text() == fingerprint(key, path)
        return json.loads(path.read_text()) if same else None
    except (OSError, ValueError):
        return None


def fingerprint(key: str, path: Path) -> str:
    """A hash of what a result depends on and of the result itself, which another command may have replaced."""
    return hashlib.sha256(key.encode() + path.read_bytes()).hexdigest() + "\n"


def subject_identity(subject: Subject) -> str:
    """A hash of the model's configuration and weights, the tokens, and the code."""
    digest = hashlib.sha256(f"{__version__} {torch.__version__} {subject.config} {subject.pad_id}".encode())
    for package in PACKAGES:
        for path in sorted((Path(__file__).parents[1] / package).glob("*.py")):
            digest.update(path.read_bytes())
    for name, tensor in subject.model.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(tokens_sha256(subject).encode())
    return digest.hexdigest()


def tokens_sha256(subject: Subject) -> str:
    digest = hashlib.sha256()
    for batch in subject.batches:
        assert not isinstance(batch, Images)
        digest.update(f"{tuple(batch.shape)}".encode() + batch.cpu().long().numpy().tobytes())
    return digest.hexdigest()


def text_of(subject: Subject) -> dict[str, Any]:
    """The measured text, for the page."""
    return {
        "source": subject.text,
        "sha256": tokens_sha256(subject),
        "sequences": sum(map(len, subject.batches)),
        "tokens": subject.tokens,
    }


def print_plan(subject: Subject, measures: Sequence[str], todo: Sequence[str]) -> None:
    """Print the expected cost of each part, in forward passes over all sequences and in time."""
    total = sum(map(len, subject.batches))
    seconds = seconds_per_sequence(subject.model, subject.batches) * total if todo else 0.0
    print(f"{subject.model.name}: a forward pass over {total} sequences takes {seconds:.3g} s", file=sys.stderr)
    sum_of_passes = 0.0
    for each in measures:
        cost = "measured before"
        if each in todo:
            passes = SECTIONS[each].passes(subject.model.depth, head_share(subject.model))
            passes *= min(SECTIONS[each].sequences or total, total) / total
            sum_of_passes += passes
            cost = f"{passes:6.1f} passes  {format_duration(passes * seconds)}"
        print(f"  {each:<18} {cost}", file=sys.stderr)
    cost = f"{sum_of_passes:6.1f} passes  about {format_duration(sum_of_passes * seconds)}"
    print(f"  {'all':<18} {cost}; if stopped, the same command resumes", file=sys.stderr, flush=True)


def head_share(model: ModelAdapter) -> float:
    """The share of a forward pass that the head takes, by its parameters."""
    head = model.head_weight.numel()
    return head / (head + sum(each.numel() for block in model.blocks for each in block.parameters()))


@torch.no_grad()
def seconds_per_sequence(model: ModelAdapter, batches: Sequence[Batch]) -> float:
    """The time of a forward pass, on at most four sequences after one to warm up."""
    sample = batches[0][:4].to(model.device)
    model.logits(sample[:1])
    start = time.perf_counter()
    model.logits(sample).sum().item()
    return (time.perf_counter() - start) / len(sample)
