"""`measure`: measure the layers of a model, report on its depth, compare models, or prune one."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.models import is_run, load_run_config, require_model, require_paths
from cod_lightning.commands.options import add_checkpoint, add_trust_code, nonempty_path, require_positive
from cod_lightning.commands.overrides import TEXT_CHOICES, check_no_ignored_overrides, is_model
from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder, check_writable
from cod_lightning.measure.options import parse_options

if TYPE_CHECKING:
    from cod_lightning.commands.measure_runner import Subject

HELP = (
    "Measure the layers of a run, or of a language model of transformers; report shows on one page how much of "
    "its depth a model uses, or several side by side; prune writes a smaller model."
)
EPILOG = """\
Writes JSON, CSV, PNG and PDF for every measure. Words of the form option=value are options of the study's
measures; all other key=value words are overrides, which choose the text and its rows:
  measure variance runs/quickstart/lns-seed1-...
  measure angular meta-llama/Llama-2-7b-hf tokens=262144 rows=2048 data=files 'data.files=texts/*.json.gz'
  measure jacobian runs/quickstart/lns-seed1-... probes=32 layers=1,12,24
  measure all runs/quickstart/lns-seed1-... only=angular,swaps
  measure report smollm2 rows=16 data=files data.files=text.txt data.seq_len=256
  measure report runs/quickstart/pre_ln-seed1-... runs/quickstart/lns-seed1-...

prune writes a model that stock transformers loads, without some blocks or weights, and its loss before and after:
  measure prune RUN layers=17,18,19 --output FOLDER
  measure prune RUN by=influence blocks=4 --output FOLDER         (or by=streamline, by=removal)
  measure prune RUN by=streamline blocks=4 replace=layer --output FOLDER      (one trained block for five)
                                             (or replace=ffn, a block without attention; replace=linear, a linear map)
  measure prune RUN sparsity=0.5 allocation=owl method=wanda --output FOLDER
                                                 (or allocation=alpha_pruning, arithmetic, uniform; method=magnitude)
  measure prune RUN sparsity=0.5 calibration=sequential --output FOLDER       (Wanda block by block, as released)
"""


ROWS = 32
"""Default of --rows."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "study", help="variance, jacobian, angular, removal, influence, theory, all, report, compare, or prune"
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="model|key=value",
        help="run folder, model folder, .gguf file, glassllm, smollm2, minilm or hub name",
    )
    add_checkpoint(parser)
    add_trust_code(parser)
    parser.add_argument("--rows", type=int, help=f"held-out rows to measure on (default: {ROWS})")
    parser.add_argument("--output", type=nonempty_path, help="folder (default: measure, inside the run folder or here)")


def run(
    study: str, words: Sequence[str], checkpoint: str, trust_code: bool, rows: int | None, output: Path | None
) -> None:
    models = [word for word in words if is_model(word)]
    require_paths(models, checkpoint, trust_code)
    import_torchmetrics()
    from cod_lightning.commands.measure_runner import PAGES, run_prune, run_study

    options, overrides = split_options([word for word in words if not is_model(word)], study)
    for name, flag in (("rows", rows), ("output", output)):
        if flag is not None and name in options:
            raise UserError(f"--{name}={flag} and {name}={options[name]} are both given: keep one")
    rows = options.pop("rows", rows)
    require_positive("rows", rows)
    if options.get("output") == "":
        raise UserError("output= is empty: name a path")
    output = Path(options.pop("output")) if "output" in options else output
    opener_of = partial(subject_opener, overrides=overrides, checkpoint=checkpoint, rows=rows, trust_code=trust_code)
    suffix = "" if checkpoint == "last" else f"_{checkpoint}"
    if study in PAGES:
        write_page(study, models, opener_of, options, output, suffix)
        return
    if len(models) != 1:
        raise UserError(f"measure {study} takes one model, not {len(models)}; measure report takes several")
    if study == "prune":
        if output is None:
            raise UserError("measure prune writes a model: name its new folder, as in --output FOLDER")
        check_new_folder(output, "--output=")
        run_prune(opener_of(models[0])(), options, output)
    else:
        model = Path(models[0])
        output = output or (model / f"measure{suffix}" if is_run(model) else Path("measure") / name_of(model))
        check_writable(output, "--output=")
        run_study(study, opener_of(models[0])(), options, output)
    print(output)


def split_options(words: Sequence[str], study: str) -> tuple[dict[str, Any], list[str]]:
    """The options of a study among `key=value` words, and the overrides of the configuration.

    Raises:
        UserError: names every word that is neither, and every value of another type.
    """
    from cod_lightning.commands.measure_runner import PAGES, study_options
    from cod_lightning.config.groups import fields_and_groups

    command, only = f"measure {study}", ()
    extra: dict[str, Any] = {"rows": int, "output": str}
    if study not in (*PAGES, "prune"):
        extra["only"] = Sequence[str]
        if chosen := [word for word in words if word.startswith("only=")]:
            only, command = parse_options(chosen, extra, command)["only"], f"{command} {chosen[0]}"
    types = {**study_options(study, only), **extra}
    others = fields_and_groups() - types.keys()
    own = [word for word in words if (key := word.partition("=")[0]).isidentifier() and key not in others]
    return parse_options(own, types, command), [word for word in words if word not in own]


def name_of(model: Path) -> str:
    """The name of a model's folder or file, also of . and .."""
    return Path(os.path.abspath(model)).name


def subject_opener(
    model: str, overrides: Sequence[str], checkpoint: str, rows: int | None, trust_code: bool = False
) -> Callable[[], Subject]:
    """A function that opens a run or a model of `transformers`, with held-out rows of the text that `overrides` choose.

    It prints a warning if there are fewer than `rows`, unless that is None, the default of `ROWS`.

    Raises:
        UserError: the configuration, the model or the text is missing; the function: one of them cannot be read.
    """
    from cod_lightning.commands.measure_runner import open_model, open_run

    open_model_or_run: Callable[[], Subject]
    if is_run(model):
        folder = Path(model)
        config = load_run_config(folder, overrides, trust_code, "measure")
        from cod_lightning.train.load import checkpoint_of

        open_model_or_run = partial(open_run, config, folder, checkpoint_of(folder, checkpoint), rows or ROWS)
    else:
        from cod_lightning.config.compose import compose
        from cod_lightning.data.corpora import open_corpus
        from cod_lightning.nn.model_files import find_source, require_tokenizer

        check_no_ignored_overrides(overrides, "measure of a pretrained model", TEXT_CHOICES)
        config = compose(overrides, trains=False)
        require_model(model, "Give a run folder, a folder with config.json, weights and tokenizer, or a .gguf file.")
        require_tokenizer(find_source(model))
        open_model_or_run = partial(open_model, model, config, open_corpus(config.data), rows or ROWS)

    warn = cache(partial(print, file=sys.stderr))  # once, though a report opens a model twice

    def open_subject() -> Subject:
        subject = open_model_or_run()
        available = sum(map(len, subject.batches))
        if rows is not None and available < rows:
            warn(f"warning: rows={rows}, but {model} has {available} held-out rows: all are measured")
        return subject

    return open_subject


def write_page(
    study: str,
    models: Sequence[str],
    opener_of: Callable[[str], Callable[[], Subject]],
    options: dict[str, Any],
    output: Path | None,
    suffix: str,
) -> None:
    """Measure one or several models, and write a page that shows how much of their depth they use.

    `opener_of` is `subject_opener` of a model alone: all models are found before the first is measured. `suffix` ends
    the name of the page's folder, if that is not `output`.
    """
    least = 2 if study == "compare" else 1
    if len(models) < least:
        raise UserError(f"measure {study} takes at least {('one model', 'two models')[least - 1]}, not {len(models)}")
    names = [name_of(Path(model)) for model in models]
    if len(set(names)) < len(names):
        raise UserError(f"two models have the name {max(names, key=names.count)}: rename a folder")
    from cod_lightning.commands.measure_report import run_report
    from cod_lightning.commands.measure_runner import PAGES

    folder = output or Path("measure") / ("-".join([study, *names]) + suffix)
    check_writable(folder, "--output=")
    subjects = {name: opener_of(model) for name, model in zip(names, models, strict=True)}
    print(run_report(subjects, options, folder, PAGES[study], study))
