"""The rows of the paper's experiments, the runs they need, and the runs that remain to be done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from cod_lightning.config.compose import compose, compose_node, leave_out, parse
from cod_lightning.config.groups import choices
from cod_lightning.config.paper_block import AXES
from cod_lightning.config.schema import Config, init_from_run
from cod_lightning.data.config import patterns
from cod_lightning.errors import UserError, nearest
from cod_lightning.evaluate import SCORES_FILE
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.strategies import build_all
from cod_lightning.paper.claims import Experiment, ReportRow, Run
from cod_lightning.paper.results import record_path
from cod_lightning.paper.statistics import grouped
from cod_lightning.train.record import RECORD


@dataclass(frozen=True)
class Row:
    """A row of an experiment at one scale."""

    experiment: str
    name: str
    overrides: tuple[str, ...]
    """Command-line overrides that select the row; the seed is not among them."""
    config: Config
    source: Row | None = None
    """The row of another experiment whose run of the same seed gives the initial weights."""

    @property
    def entry(self) -> dict[str, Any]:
        """The row's entry in the experiment's file: `label`, `published`, `note`."""
        return self.config.paper["rows"][self.name]

    @property
    def pretrained_model(self) -> str | None:
        """The pretrained model to measure at scale=paper; at other scales a trained run stands in for it."""
        return self.entry.get("subject") if self.config.scale == "paper" else None

    @property
    def measures(self) -> set[str]:
        """Names of the experiment's measures that may apply to the model; those of a pretrained model are not known."""
        names = set(self.config.paper.get("measures", ()))
        if self.pretrained_model is not None:
            return names
        depth, images = self.config.model.num_hidden_layers, self.config.task == "vision"
        specs = build_all(self.config.norm, depth)
        return {name for name in names if not MEASURES[name].why_never(depth, images, specs)}

    @property
    def tasks(self) -> str | None:
        """Tasks of lm-evaluation-harness to score at scale=paper; smaller models are at chance."""
        return self.config.paper.get("tasks") if self.config.scale == "paper" else None

    def config_for(self, seed: int) -> Config:
        """The configuration of the run of a seed; its folder does not depend on the experiment."""
        config = replace(self.config, seed=seed)
        if source := self.source_folder(seed):
            config = init_from_run(config, source)
        return replace(config, name=f"{config.scale}/{config.label}")

    def source_folder(self, seed: int) -> Path | None:
        """Folder of the run whose weights the run of a seed starts from."""
        return None if self.source is None else self.source.config_for(seed).folder

    def run_id(self, seed: int) -> str:
        """Key of `load_runs`; a pretrained model has the same for all seeds."""
        if self.pretrained_model is not None:
            return f"{self.config.scale}/{Path(self.pretrained_model).name}"
        return self.config_for(seed).id

    def cli_args(self, seed: int) -> tuple[str, ...]:
        """Arguments of `fit` that train the run of a seed."""
        init = (f"init_from={source}",) if (source := self.source_folder(seed)) else ()
        return (*self.overrides, *init, f"seed={seed}", f"name={self.config_for(seed).name}")


def find_experiments(names: Sequence[str]) -> list[str]:
    """Experiments by name or by prefix: `table1` is every experiment of Table 1.

    Raises:
        UserError: no experiment matches a name.
    """
    known = choices("experiments")
    matches: list[str] = []
    for name in names:
        matching = [other for other in known if other == name or other.startswith(f"{name}_")]
        if not matching:
            prefixes = {other.rpartition("_")[0] for other in known if "_" in other}
            raise UserError(f"{name!r} is not an experiment: {nearest(name, [*known, *prefixes])}")
        matches += [other for other in matching if other not in matches]
    return matches


def reproducible_experiments() -> list[str]:
    """Every experiment that compares rows, in its file or in a recipe that the file names."""
    return [name for name in choices("experiments") if compose_node([f"experiments={name}"])[0].paper.get("rows")]


def experiment_rows(experiments: Sequence[str], scale: str, overrides: Sequence[str] = ()) -> list[Row]:
    """Every row of some experiments at a scale; a row leaves out what has an effect in other rows only.

    Args:
        experiments: names.
        scale: of the rows.
        overrides: of the command line.

    Raises:
        UserError: as `compose`; an experiment without rows, or whose rows have none to start from; an override of
            something that the rows choose, or that no row reads.
    """
    for override in parse(overrides):
        if override.key_or_group in ("experiments", "norm", "row", "seed", "name", "init_from"):
            raise UserError(f"{override.input_line}: the rows of an experiment choose {override.key_or_group}")
    blocks = paper_blocks(experiments, scale, overrides)
    trained = "init_from=TRAINED"  # for `leave_out`; each seed has its own
    words_of = {
        (name, row): [
            *(f"experiments={name}", f"scale={scale}", *overrides, f"row={row}"),
            *([trained] if block.get("start") else ()),
        ]
        for name, block in blocks.items()
        for row in block["rows"]
        if name in experiments or any(row in b["rows"] for b in blocks.values() if b.get("start") == name)
    }
    rows: dict[tuple[str, str], Row] = {}
    for (name, row), words in zip(words_of, leave_out(list(words_of.values())), strict=True):
        start = blocks[name].get("start")
        if start and (start, row) not in rows:
            raise UserError(f"{name}: paper.start={start} has no row {row!r}: {nearest(row, blocks[start]['rows'])}")
        words = [word for word in words if word != trained]
        rows[name, row] = Row(name, row, tuple(words), compose(words), rows.get((start, row)))
    return [rows[name, row] for name in experiments for row in blocks[name]["rows"]]


def paper_blocks(
    experiments: Iterable[str], scale: str, overrides: Sequence[str], followed: Sequence[str] = ()
) -> dict[str, Any]:
    """`paper` of experiments by name, each after `paper` of the one that it starts from.

    Args:
        experiments: names.
        scale: of the rows.
        overrides: of the command line.
        followed: experiments that start from these, to find a cycle.

    Raises:
        UserError: as `experiment_rows`.
    """
    blocks: dict[str, Any] = {}
    for name in experiments:
        node, _, errors = compose_node([f"experiments={name}", f"scale={scale}", *overrides])
        if errors:
            raise UserError("\n".join(errors))
        if not node.paper.get("rows"):
            raise UserError(f"{name} has no rows to reproduce; train it with fit experiments={name}")
        if start := node.paper.get("start"):
            if start in (*followed, name):
                raise UserError(f"{name}: paper.start={start} starts from this experiment itself: name another")
            blocks |= paper_blocks([start], scale, overrides, (*followed, name))
        blocks[name] = node.paper
    return blocks


# Tasks ---------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A run to train and measure, or a pretrained model to measure."""

    row: Row
    """The first row that needs the task."""
    seed: int
    measures: set[str]
    """Names of the measures to run."""

    @property
    def run_id(self) -> str:
        return self.row.run_id(self.seed)

    @property
    def config(self) -> Config:
        """Configuration of the run; unused for a pretrained model."""
        return self.row.config_for(self.seed)

    @property
    def label(self) -> str:
        return Path(self.row.pretrained_model).name if self.row.pretrained_model else self.config.label

    @property
    def folder(self) -> Path:
        """Folder of the run, or of the pretrained model's measures."""
        config = self.config
        return Path(config.output, config.scale, self.label) if self.row.pretrained_model else config.folder


def remaining_tasks(rows: Sequence[Row], seeds: Iterable[int], runs: Mapping[str, Run]) -> list[Task]:
    """Tasks whose results are missing, without repetitions; a run follows the run it starts from.

    A run that diverged is not repeated: the same configuration would diverge again. No run starts from it.

    Args:
        rows: those to run.
        seeds: of each row.
        runs: those in the results folder, from `load_runs`.
    """
    tasks: dict[str, Task] = {}

    def add(row: Row, seed: int, needs_weights: bool = False) -> None:
        key = row.run_id(seed)
        run, source = runs.get(key), runs.get(row.source.run_id(seed)) if row.source is not None else None
        if any(each is not None and each.failure for each in (run, source)):
            return
        missing = row.measures - (run.measures.keys() if run else set())
        unscored = run is not None and row.tasks is not None and not is_scored(run, row.tasks)
        if run is None or missing or unscored or needs_weights:
            if row.source is not None:  # the results folder has no weights
                trained = row.source.config_for(seed).folder / RECORD
                add(row.source, seed, needs_weights=not trained.is_file())
            tasks.setdefault(key, Task(row, seed, set())).measures.update(missing)

    for seed in seeds:
        for row in rows:
            add(row, seed)
    return list(tasks.values())


def is_scored(run: Run, tasks: str) -> bool:
    """Whether a run has scores of tasks of lm-evaluation-harness: all of the paper's, or any others."""
    return "average" in run.record if tasks == "paper" else (run.folder / SCORES_FILE).is_file()


# Rows with their results ---------------------------------------------------------------------------------------------


def with_results(rows: Iterable[Row], runs: Mapping[str, Run]) -> list[Experiment]:
    """Rows with their published figures and all their results, grouped into experiments.

    Args:
        rows: the rows of one experiment and scale after those of another.
        runs: those in the results folder, from `load_runs`.

    Raises:
        UserError: the runs of one table have different corpora or scales.
    """
    rows, seeds = list(rows), sorted({run.seed for run in runs.values()})
    sizes = {row.experiment: row.config.num_parameters() for row in rows if row.config.scale == "paper"}
    experiments = []
    for (name, scale), group in groupby(rows, key=lambda row: (row.experiment, row.config.scale)):
        group_rows = list(group)
        config = group_rows[0].config
        if name not in sizes:
            sizes[name] = compose([f"experiments={name}"]).num_parameters()
        experiments.append(
            Experiment(
                name=name,
                scale=scale,
                target=config.paper.get("target", name),
                column=str(config.paper.get("column", "")),
                size=sizes[name],
                setting=describe_setting(group_rows[0]),
                paper=config.paper,
                axes={name: value(config) for name, value in AXES.items()},
                rows=tuple(report_row(row, runs, seeds) for row in group_rows),
            )
        )
    for (target, scale), table in grouped(((e.target, e.scale), e) for e in experiments).items():
        check_comparable(f"{target}, scale={scale}", scale, [run for e in table for row in e.rows for run in row.runs])
    return experiments


def report_row(row: Row, runs: Mapping[str, Run], seeds: Iterable[int]) -> ReportRow:
    """A row with its published figures and its runs."""
    ids = dict.fromkeys(row.run_id(seed) for seed in seeds)
    published = row.entry.get("published") or {}
    if not isinstance(published, Mapping):
        published = {row.config.paper.get("metric", "ppl"): published}
    return ReportRow(
        name=row.name,
        label=row.entry.get("label", row.name),
        published=dict(published),
        note=row.entry.get("note"),
        run_id=row.run_id(0),
        runs=tuple(runs[run_id] for run_id in ids if run_id in runs),
        gpu_hours=row_gpu_hours(row),
    )


def row_gpu_hours(row: Row) -> float | None:
    """Estimated GPU-hours of one run at scale=paper; None if nothing is trained, or its size is not in the settings."""
    if row.config.scale != "paper" or row.pretrained_model is not None:
        return None
    from cod_lightning.train import estimate  # takes seconds of imports

    return estimate.gpu_hours(row.config)


def check_comparable(table: str, scale: str, runs: Sequence[Run]) -> None:
    """Check that the runs of a table have its scale and one corpus.

    Raises:
        UserError: names two runs of different scales or corpora.
    """
    first_of_corpus: dict[str, Run] = {}
    for run in runs:
        if (recorded := run.record.get("config", {}).get("scale", scale)) != scale:
            raise UserError(
                f"{table} mixes two scales: {record_path(run.folder)} is a run at "
                f"scale={recorded}; move it out of the results folder"
            )
        if fingerprint := run.record.get("data_fingerprint"):
            first_of_corpus.setdefault(str(fingerprint), run)
    if len(first_of_corpus) > 1:
        a, b, *_ = (f"{record_path(run.folder)} has data {data[:16]}" for data, run in first_of_corpus.items())
        raise UserError(f"{table} mixes two corpora: {a}, {b}; move the runs of one corpus out of the results folder")


# Descriptions --------------------------------------------------------------------------------------------------------


def describe_setting(row: Row) -> str:
    """Shape, data and length of a run."""
    config = row.config
    model, data = config.model, config.data
    size = f"{config.num_parameters() / 1e6:,.1f}M parameters"
    shape = f"{model.num_hidden_layers} blocks of width {model.hidden_size}, {size}"
    if config.task == "vision":
        inputs = f"{config.images.source} images of {config.images.size} pixels"
    else:
        corpus = " and ".join(Path(glob).name.split(".")[0] for glob in patterns(data.files)) or data.source
        inputs = f"{corpus}, sequences of {data.seq_len} tokens"
    if row.pretrained_model is not None:
        return f"{row.pretrained_model}, {shape}; {inputs}"
    if "tasks" in config.paper and row.tasks is None:
        inputs += ", scored by accuracy on held-out answers instead of the paper's tasks"
    tokens = data.batch_size * config.sequence_length
    return (
        f"{shape}; {inputs}, protocol={config.protocol}; {config.trainer.max_steps:,} steps of {tokens:,} tokens, "
        f"{format_tokens(config.training_tokens)} tokens in total; lr {config.optim.lr:g}, embeddings of standard "
        f"deviation {model.embedding_std:.3g}"
    )


def format_tokens(tokens: float) -> str:
    return f"{tokens / 1e9:.2f}B" if tokens >= 1e8 else f"{tokens / 1e6:.2f}M"
