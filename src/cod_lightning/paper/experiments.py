"""The paper's experiments as runs: which there are, at which scale, and the results that are kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from cod_lightning.config.compose import choices, compose, config_folder, parse, with_row
from cod_lightning.config.saved import from_dict
from cod_lightning.config.schema import Config, init_from_run
from cod_lightning.errors import DAMAGED, UserError, nearest
from cod_lightning.evaluate.lm_eval import SCORES_FILE
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.config import num_vit_parameters
from cod_lightning.paper.claims import Experiment, Run
from cod_lightning.paper.claims import Row as ReportedRow
from cod_lightning.train.estimate import estimate
from cod_lightning.train.record import FAILURE, RECORD, check, is_number
from cod_lightning.typed_json import from_json

MEASURED = "measure"
"""Where inside its folder the measures of a run are written."""
DIGITS = {"jacobian_map": 4}
"""Significant digits that are kept of a measure, where not all: matrices, of which the report draws colours and takes
norms, and which would take most of the room of all results. Rises of the loss are small differences: they need all."""
RESULTS = Path("experiments/results")
"""Where results are kept, from the top of a checkout: {scale}/{label of the run}/record.json, and what was measured."""


@dataclass(frozen=True)
class Row:
    """A row of an experiment at one scale."""

    experiment: str
    name: str
    words: tuple[str, ...]
    """What the command line says to get it, but for the seed."""
    config: Config
    source: Row | None = None
    """Where its runs start from: those of the same row and seed of another experiment."""

    @property
    def claim(self) -> dict[str, Any]:
        """What the experiment's file says of it: `label`, `published`, `note`."""
        return self.config.paper["rows"][self.name]

    @property
    def subject(self) -> str | None:
        """The public model that is measured in the place of a run; at the smaller scales a run stands in for it."""
        return self.claim.get("subject") if self.config.scale == "paper" else None

    @property
    def tasks(self) -> str | None:
        """What its runs are scored on by lm-evaluation-harness, at the paper's scale; others have too little to say."""
        return self.config.paper.get("tasks") if self.config.scale == "paper" else None

    def run(self, seed: int) -> Config:
        """The configuration of one of its runs, kept under its label whatever experiment asked for it first."""
        config = replace(self.config, seed=seed)
        if self.source is not None:
            config = init_from_run(config, self.source.run(seed).folder)
        return replace(config, name=f"{config.scale}/{config.label}")

    def told(self, seed: int) -> tuple[str, ...]:
        """What the command line says to get that run."""
        start = () if self.source is None else (f"init_from={self.source.run(seed).folder}",)
        return (*self.words, *start, f"seed={seed}", f"name={self.run(seed).name}")


def named(names: Sequence[str]) -> list[str]:
    """Experiments by name, or all whose name begins with `name_`; `table1` is all of Table 1.

    Raises:
        UserError: there is none of that name.
    """
    known = choices("experiments")
    found: list[str] = []
    for name in names:
        matching = [other for other in known if other == name or other.startswith(f"{name}_")]
        if not matching:
            starts = {other.rpartition("_")[0] for other in known if "_" in other}
            raise UserError(f"{name!r} is no experiment: {nearest(name, [*known, *starts])}")
        found += [other for other in matching if other not in found]
    return found


def rows(experiments: Iterable[str], scale: str, overrides: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of some experiments.

    Raises:
        UserError: as `compose`; an experiment without rows; overrides that choose what the rows choose.
    """
    for override in parse(overrides):
        if override.key_or_group in ("norm", "row", "seed", "name"):
            raise UserError(f"{override.input_line}: every row of an experiment has its own {override.key_or_group}")
    for name in experiments:
        words = (f"experiments={name}", f"scale={scale}", *overrides)
        base = compose(words)
        if not base.paper.get("rows"):
            raise UserError(f"{name} has no rows to reproduce: train it with fit experiments={name}")
        start = base.paper.get("start")
        sources = {row.name: row for row in rows([start], scale, overrides)} if start else {}
        for row in base.paper["rows"]:
            yield Row(name, row, (*words, f"row={row}"), with_row(base, row, overrides), sources.get(row))


@dataclass
class Task:
    """What is left to do for one run, or for a public model that is measured."""

    row: Row
    """The first that asked for it."""
    config: Config
    """Of the run; of no effect for a public model."""
    words: tuple[str, ...]
    """What the command line says to train it."""
    measures: set[str]
    """What is to be measured of it, by the names of `measure.registry.MEASURES`."""

    @property
    def label(self) -> str:
        return Path(self.row.subject).name if self.row.subject else self.config.label

    @property
    def folder(self) -> Path:
        """Where it is carried out."""
        config = self.config
        return Path(config.output, config.scale, self.label) if self.row.subject else config.folder


def outstanding(asked: Sequence[Row], seeds: Iterable[int], results: Path) -> list[Task]:
    """What is not among the results yet, whatever rows ask for it; what a run starts from stands before it.

    Raises:
        UserError: as `kept`.
    """
    found = kept(results)
    tasks: dict[str, Task] = {}

    def add(row: Row, seed: int, again: bool = False) -> None:
        config = row.run(seed)
        key = row.subject or config.id
        folder = found.get(key) if row.subject is None else results / config.scale / Path(row.subject).name
        if folder is not None and (folder / FAILURE).is_file():
            return  # the same configuration would diverge again
        wanted = row.config.paper.get("measures", ())
        missing = {name for name in wanted if folder is None or not (folder / f"{name}.json").is_file()}
        if folder is None or missing or again:
            if row.source is not None:
                # Its weights are needed, which the results do not keep.
                add(row.source, seed, again=not (row.source.run(seed).folder / "checkpoints").is_dir())
            tasks.setdefault(key, Task(row, config, row.told(seed), set())).measures.update(missing)

    for seed in seeds:
        for row in asked:
            add(row, seed)
    return list(tasks.values())


def kept(results: Path) -> dict[str, Path]:
    """The folders of all results below a folder, by the id of the run; of runs that diverged too.

    Raises:
        UserError: a record cannot be read.
    """
    paths = [path for name in (FAILURE, RECORD) for path in sorted(results.glob(f"*/*/{name}"))]
    return {from_dict(config_of(path), path).id: path.parent for path in paths}


def outcome(folder: Path) -> Path:
    """The file that says how a run ended."""
    return folder / (RECORD if (folder / RECORD).exists() else FAILURE)


def config_of(record: Path) -> dict[str, Any]:
    """What a run was asked for.

    Raises:
        UserError: the file is no record of a run.
    """
    found = read(record)
    try:
        check(found)
    except ValueError as error:
        raise UserError(f"{record}: not a run record ({error}); remove it") from error
    return found["config"]


def keep(folder: Path, results: Path, measures: Collection[str] = ()) -> None:
    """Copy how a run ended and what was measured into the results, in one line each; nothing of one that did not end.

    Args:
        folder: of the run, or of a public model, below one that is called like the scale.
        results: its folder there is called the same.
        measures: by name.
    """
    target = results / folder.parent.name / folder.name
    ended = outcome(folder)
    if not ended.is_file() and not measures:
        return
    target.mkdir(parents=True, exist_ok=True)
    if ended.is_file():
        copy(ended, target)
    if (folder / SCORES_FILE).is_file():
        copy(folder / SCORES_FILE, target)
    for name in measures:
        copy(folder / MEASURED / f"{name}.json", target, DIGITS.get(name))


def copy(file: Path, folder: Path, digits: int | None = None) -> None:
    """Write a JSON file into a folder in one line, whole or not at all, with so many significant digits if given."""

    def rounded(value: Any) -> Any:
        if isinstance(value, list):
            return [rounded(item) for item in value]
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return float(f"{value:.{digits}g}") if isinstance(value, float) else value

    found = json.loads(file.read_text())
    partial = folder / f".{file.name}.partial"
    partial.write_text(json.dumps(found if digits is None else rounded(found), separators=(",", ":")) + "\n")
    partial.replace(folder / file.name)


# For the report ------------------------------------------------------------------------------------------------------


def with_rows() -> list[str]:
    """Every experiment that has rows to reproduce."""
    files = {name: config_folder() / "experiments" / f"{name}.yaml" for name in choices("experiments")}
    return [name for name, path in files.items() if yaml.safe_load(path.read_text()).get("paper", {}).get("rows")]


def claims(asked: Iterable[Row], results: Path) -> list[Experiment]:
    """What the paper prints of some rows, beside all results that are kept of them.

    Raises:
        UserError: a result cannot be read.
    """
    found = {run: (folder, read(outcome(folder))) for run, folder in kept(results).items()}
    asked = list(asked)  # an experiment is composed for each, which takes a while
    seeds = sorted({record["seed"] for _, record in found.values()})

    def runs(row: Row) -> Iterator[Run]:
        if row.subject is not None:
            if measures := measured(results / row.config.scale / Path(row.subject).name):
                yield Run(0, {}, measures)
            return
        for seed in seeds:
            if (done := found.get(row.run(seed).id)) is not None:
                folder, record = done
                yield Run(seed, record | accuracies(folder / SCORES_FILE), measured(folder))

    sizes = {row.experiment: num_parameters(row.config) for row in asked if row.config.scale == "paper"}
    for row in asked:
        if row.experiment not in sizes:
            sizes[row.experiment] = num_parameters(compose([f"experiments={row.experiment}"]))
    groups = groupby(asked, key=lambda row: (row.experiment, row.config.scale))
    return [experiment(list(group), sizes[name], runs) for (name, _), group in groups]


def experiment(asked: Sequence[Row], size: int, runs: Callable[[Row], Iterable[Run]]) -> Experiment:
    """The rows of one experiment at one scale as the report takes them."""
    name, config = asked[0].experiment, asked[0].config
    return Experiment(
        name=name,
        scale=config.scale,
        target=config.paper.get("target", name),
        column=str(config.paper.get("column", "")),
        size=size,
        title=config.description,
        setting=setting(asked[0]),
        paper=config.paper,
        rows=tuple(reported(row, tuple(runs(row))) for row in asked),
    )


def reported(row: Row, runs: tuple[Run, ...]) -> ReportedRow:
    return ReportedRow(
        name=row.name,
        label=row.claim.get("label", row.name),
        published=published(row),
        note=row.claim.get("note"),
        computes=row.subject or row.run(0).id,
        runs=runs,
        gpu_hours=gpu_hours(row),
    )


def published(row: Row) -> dict[str, float]:
    """What the paper prints of a row, by the key of the record that holds the same figure of a run.

    What a run has besides, such as the accuracy of answers where the paper prints that of tasks, has none beside it.
    """
    figures = row.claim.get("published")
    if figures is None:
        return {}
    return dict(figures) if isinstance(figures, Mapping) else {row.config.paper.get("metric", "ppl"): figures}


def accuracies(scores: Path) -> dict[str, float]:
    """Percentages by task, and their mean as `average`; empty where a run was scored on nothing."""
    if not scores.is_file():
        return {}
    tasks = read(scores)
    if not all(isinstance(part, dict) and is_number(part.get("acc", 0.0)) for part in tasks.values()):
        raise UserError(f"{scores}: not scores by task and figure; remove it")
    found = {task: 100.0 * figures["acc"] for task, figures in tasks.items() if "acc" in figures}
    return found | {"average": fmean(found.values())} if found else {}


def measured(folder: Path) -> dict[str, Any]:
    """What was measured, by name.

    Raises:
        UserError: a file holds something else than the measure of its name gives.
    """
    found = {}
    for path in sorted(path for path in folder.glob("*.json") if path.stem in MEASURES):
        try:
            result: Any = from_json(MEASURES[path.stem].result_type, read(path))
            found[path.stem] = asdict(result)
        except ValueError as error:
            wrong = f"not what the measure {path.stem} gives ({str(error)[:80]})"
            raise UserError(f"{path}: {wrong}; remove it and measure again") from error
    return found


def gpu_hours(row: Row) -> float | None:
    """Of one run at the paper's scale; None where nothing is trained."""
    config = row.config
    if config.scale != "paper" or row.subject is not None:
        return None
    images = config.images if config.task == "vision" else None
    return estimate(config.model, config.norm, config.data, config.trainer, images).gpu_hours


def setting(row: Row) -> str:
    """Shape, data and length of a run, in words."""
    config = row.config
    model, data, steps = config.model, config.data, config.trainer.max_steps
    parameters = f"{num_parameters(config) / 1e6:,.1f}M parameters"
    shape = f"{model.num_hidden_layers} blocks of width {model.hidden_size}, {parameters}"
    if row.subject is not None:
        return f"{row.subject}, {shape}; {data.source}, rows of {data.seq_len} tokens"
    if config.task == "vision":
        text = f"{config.images.source} images of {config.images.size} pixels"
    else:
        text = f"{data.source}, rows of {data.seq_len} tokens"
    positions = data.batch_size * row_length(config)
    if "tasks" in config.paper and row.tasks is None:
        text += ", scored by its accuracy on held-out answers, not by the paper's tasks"
    return (
        f"{shape}; {text}, protocol={config.protocol}; {steps:,} steps of {positions:,} token positions, "
        f"{amount(steps * positions)} in all"
    )


def num_parameters(config: Config) -> int:
    """Of the model under Pre-LN; strategies with learnable scales or more norms add theirs."""
    if config.task == "vision":
        images = config.images
        return num_vit_parameters(config.model, images.size, images.patch_size, images.known_classes or 0)
    return config.model.num_parameters(config.data.vocab_size)


def row_length(config: Config) -> int:
    """Tokens of a row, or of an image."""
    return config.images.patches if config.task == "vision" else config.data.seq_len


def amount(tokens: float) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 1e8 else f"{tokens / 1e6:.2f}M"


def read(path: Path) -> dict[str, Any]:
    """A JSON file of the results.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no result; remove it")
    return found
