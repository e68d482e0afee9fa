"""The report: REPRODUCTION.md, an HTML page, a CSV file, and the figures that both show."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from cod_lightning.errors import plural
from cod_lightning.page import Table, html_page, render
from cod_lightning.paper import tables
from cod_lightning.paper.claims import (
    PUBLISHED_NOISE,
    SCALES,
    STUCK_DECREASE,
    UNTRAINED_GAP,
    Column,
    Comparison,
    Experiment,
    Targets,
    by_target,
    group_columns,
)
from cod_lightning.paper.figures import (
    difference_figure,
    differences_over_settings,
    loss_over_size,
    number_range,
    tuned_figure,
)
from cod_lightning.paper.findings import ClaimResult, growth_over_blocks
from cod_lightning.paper.layer_figures import draw
from cod_lightning.paper.pretrained_models import PretrainedModel, pretrained_model_lines
from cod_lightning.paper.statistics import FEW_SEEDS, LEVEL, NOISE, OPPOSITE, SAME, UNCLEAR, UNLIKE, grouped
from cod_lightning.paper.tuning import tuned_rows
from cod_lightning.paper.verdict import claim_results, summarize, verdict
from cod_lightning.plots import figure_bytes

MARKDOWN, FIGURES = "REPRODUCTION.md", "experiments/results/figures"
HTML, CSV = "experiments/results/reproduction.html", "experiments/results/reproduction.csv"
"""Paths of the files, from the top of a checkout."""
PUBLISHED = "published, direction"
"""Heading of the column with the published differences."""
HEADINGS = {SAME: "as in the paper"} | {name: name for name in (OPPOSITE, NOISE, FEW_SEEDS, UNCLEAR, UNLIKE)}
"""Headings of the overview, by direction."""


@dataclass(frozen=True)
class Report:
    """Contents of the files; `figures` by file name, in every format."""

    markdown: str
    html: str
    csv: str
    figures: Mapping[str, bytes]


@dataclass(frozen=True)
class Picture:
    """A figure in the text."""

    name: str
    """Name of its files, without suffix."""
    alt: str
    figure: Figure


def build_report(
    experiments: Sequence[Experiment],
    hardware: str = "",
    formats: Collection[str] = ("png",),
    models: Sequence[PretrainedModel] = (),
    notes: str = "",
) -> Report:
    """Build the report on all runs.

    Args:
        experiments: at scale=paper, run or not, and at every other scale that was run.
        hardware: device that the hours are estimated for, such as "H100".
        formats: of the figures: png, which the pages show, and pdf.
        models: pretrained ones, with their depth reports.
        notes: list items about the runs, as Markdown.
    """
    targets = by_target(experiments)
    summaries = summarize(targets)
    top = length_and_depth(targets)
    significant = {summary.scale: summary.significant for summary in summaries}
    sections: list[dict[str, Any]] = [
        section(target, scales, significant) | {"models": pretrained_model_lines(target, models)}
        for target, scales in targets.items()
        if any(map(compared_columns, scales.values()))
    ]
    markdown = render(
        Path(__file__).with_name("report.md.j2"),
        verdict=verdict(targets, summaries),
        top=top,
        summaries=summaries,
        usual_settings=usual_settings(targets),
        overviews={scale: table for scale in SCALES if (table := overview(targets, scale)).rows},
        sections=sections,
        not_run=tables.not_run_table(targets, hardware),
        untried_scales=tables.untried_scales(targets),
        environments=environments(experiments),
        notes=notes.strip(),
        figures=FIGURES,
        stuck=STUCK_DECREASE,
        untrained=UNTRAINED_GAP,
        noise=PUBLISHED_NOISE,
    )
    pictures = [*top, *(picture for section in sections for picture in section["pictures"])]
    figures = {f"{picture.name}.{each}": figure_bytes(picture.figure, each) for picture in pictures for each in formats}
    return Report(markdown, html_page("Reproduction", markdown, figures), comparisons_csv(targets), figures)


def compared_columns(experiments: Sequence[Experiment]) -> list[Column]:
    """The columns with runs of one target and scale; one value of a varied setting alone compares nothing."""
    run = [column for column in group_columns(experiments) if column.first.has_runs]
    return run if len(run) > 1 or not (run and run[0].first.axis) else []


def usual_settings(targets: Targets) -> dict[str, str]:
    """The setting of most columns with runs, by scale."""
    settings: dict[str, Counter[str]] = {scale: Counter() for scale in SCALES}
    for scales in targets.values():
        for scale, experiments in scales.items():
            settings[scale].update(column.first.setting for column in compared_columns(experiments))
    return {scale: counts.most_common(1)[0][0] for scale, counts in settings.items() if counts}


def overview(targets: Targets, scale: str) -> Table:
    """Claims at a scale by target and direction; a direction without claims has no column."""
    rows = []
    for target, scales in targets.items():
        columns = compared_columns(scales.get(scale, ()))
        claims = [claim for column in columns for claim in claim_results(column) if claim.direction]
        compared = [c for column in columns for c in column.compare(column.headline)]
        diverged = list(dict.fromkeys(c.row.label for c in compared if c.failures))
        if claims or diverged:
            seeds = number_range([claim.difference.n for claim in claims] or [len(c.row.runs) for c in compared])
            labels = [*(labels_of(claims, name) for name in HEADINGS), diverged]
            rows.append([target, seeds, *map("; ".join, labels)])
    head = ["target", "seeds", *HEADINGS.values(), "diverged"]
    used = [index for index in range(len(head)) if any(row[index] for row in rows)]
    return Table([head[i] for i in used], [[row[i] for i in used] for row in rows], range(len(used)))


def labels_of(claims: Sequence[ClaimResult], direction: str) -> list[str]:
    """Labels of claims with a direction; with their columns if the label has another direction in other columns."""
    labels = []
    for label in dict.fromkeys(claim.label for claim in claims if claim.direction == direction):
        same_label = [claim for claim in claims if claim.label == label]
        agreeing = [claim.column for claim in same_label if claim.direction == direction]
        labels.append(label if len(agreeing) == len(same_label) else f"{label} ({', '.join(agreeing)})")
    return labels


# Sections ------------------------------------------------------------------------------------------------------------


def section(
    target: str, scales: Mapping[str, Sequence[Experiment]], significant: Mapping[str, set[tuple[str, ...]]]
) -> dict[str, Any]:
    """The contents of one table or figure of the paper, or of one family of experiments beyond it."""
    by_scale = {scale: group_columns(experiments) for scale, experiments in scales.items()}
    paper = scales["paper"]
    parts = []
    for scale, experiments in scales.items():
        if run_columns := compared_columns(experiments):
            parts.append({"scale": scale, **scale_section(run_columns, significant.get(scale, set()))})
    return {
        "target": target,
        "findings": headings_by_text((e.heading, e.paper["finding"]) for e in paper if "finding" in e.paper),
        "unknown": headings_by_text(
            (e.heading, text) for e in paper if not e.beyond_paper for text in e.paper.get("unknown", ())
        ),
        "pictures": list(pictures(target, by_scale)),
        "published": tables.published_tables(by_scale["paper"]),
        "notes": headings_by_text((e.heading, f"{row.label}: {row.note}") for e in paper for row in e.rows if row.note),
        "scales": parts,
    }


def scale_section(columns: Sequence[Column], significant: set[tuple[str, ...]]) -> dict[str, Any]:
    """Settings, tables and summary of the runs of a target at one scale."""
    all_tables, lines = [], []
    for column in columns:
        prefix = f"{column.heading}: " if len(columns) > 1 else ""
        own = [tables.comparison_table(column, significant)] if column.comparisons else []
        for table in (*own, *tables.figure_tables(column, significant)):
            all_tables.append(
                Table(table.head, [[prefix + row[0], *row[1:]] for row in table.rows], table.text_columns)
            )
        lines += [prefix + line for line in tables.summary_lines(column)]
    if columns[0].first.axis in ("blocks", "tokens"):
        lines += tables.changes_per_doubling(columns)
    if columns[0].first.axis == "blocks":
        lines += growth_over_blocks(columns)
    if columns[0].first.axis == "lr" and (tuned := tuned_rows(columns)):
        all_tables.append(tables.tuned_strategies_table(tuned))
        compared = sum(best.difference is not None and best.difference.margin is not None for best in tuned)
        lines.append(
            f"Own best rates: {plural(compared, 'comparison')} with an interval. If no difference were "
            f"real, {LEVEL * compared:.2g} would exclude zero by chance on average, and more as each rate is chosen by "
            "the losses that are compared. A row's rate has its lowest mean loss over the seeds that all its rates "
            "have, without rates of fewer than three seeds if two have three; its loss and difference use all seeds of "
            "that rate. Rates near the best are judged on the seeds that both have."
        )
    settings = {column.heading: (column.first.setting, reproduce_arguments(column)) for column in columns}
    return {"settings": settings, "tables": merge(all_tables), "lines": lines}


def merge(all_tables: Sequence[Table]) -> list[Table]:
    """Merge tables of the same head, whichever column of the paper is listed with ours."""
    merged: dict[tuple[str, ...], Table] = {}
    heads = [tuple(table.head) for table in all_tables]
    if len(heads) > 1:
        heads = [(*h[:-1], PUBLISHED) if h[-1].endswith(f": {PUBLISHED}") else h for h in heads]
    for table, own in zip(all_tables, heads, strict=True):
        head = (*own, PUBLISHED) if (*own, PUBLISHED) in heads else own  # some columns have no published figures
        rows = merged[head].rows if head in merged else []
        padded = [[*row, *[""] * (len(head) - len(row))] for row in table.rows]
        merged[head] = Table(head, [*rows, *padded], table.text_columns)
    return [table for table in merged.values() if table.rows]


def headings_by_text(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Distinct texts, with the headings that they belong to."""
    headings = grouped((text, heading) for heading, text in pairs)
    return {text: tables.join_words(dict.fromkeys(names)) for text, names in headings.items()}


def reproduce_arguments(column: Column) -> str:
    """Arguments of the command that reproduces a column."""
    first = column.first
    name = first.name if len(column.experiments) == 1 else first.name.split("_")[0]
    scale = "" if first.scale == "paper" else f" scale={first.scale}"
    seeds = max((run.seed for row in column.rows for run in row.runs), default=1)
    return f"{name}{scale}" + (f" seeds={seeds}" if seeds > 1 else "")


def pictures(target: str, by_scale: Mapping[str, Sequence[Column]]) -> Iterator[Picture]:
    """The figures of a target: one of all scales, and one of the layers or curves of each column that was run."""
    first = by_scale["paper"][0].first
    slug = first.name.split("_")[0]
    if target == "Figure 1":
        figure, alt = loss_over_size(by_scale), "loss over parameters"
    elif first.axis:
        panels = [(f"scale={scale}", first.axis, group) for scale, group in by_scale.items()]
        figure, alt = differences_over_settings(panels, []), "differences to the baseline"
    else:
        figure, alt = difference_figure(by_scale), "differences to the baseline, published and ours"
    if figure is not None:
        yield Picture(slug, f"{target}: {alt}", figure)
    if first.axis == "lr":
        tuned = {scale: tuned_rows(group) for scale, group in by_scale.items()}
        if (figure := tuned_figure(tuned)) is not None:
            yield Picture(f"{slug}_best", f"{target}: differences of every strategy at its own best rate", figure)
    for scale, group in by_scale.items():
        for column in group:
            name = slug if len(group) == 1 else column.first.name
            if (figure := draw(column)) is not None:
                yield Picture(f"{name}_{scale}", f"{target} at scale={scale}, {column.heading}", figure)


def length_and_depth(targets: Targets) -> list[Picture]:
    """The first figure: loss differences over length and depth, with the paper's Tables 1 and 6 as marks."""
    panels = [
        (f"{target}, scale={scale}", str(targets[target]["paper"][0].axis), group_columns(group))
        for target in ("Length", "Depth")
        if target in targets
        for scale, group in targets[target].items()
        if compared_columns(group)
    ]
    published = [e for target in ("Table 1", "Table 6") for e in targets.get(target, {}).get("paper", ())]
    figure = differences_over_settings(panels, group_columns(published))
    alt = "Loss minus that of Pre-LN, by length and by depth; hollow marks: the paper"
    return [] if figure is None else [Picture("length_and_depth", alt, figure)]


# Environments and CSV ------------------------------------------------------------------------------------------------


def environments(experiments: Sequence[Experiment]) -> Table:
    """Hardware, versions, commit and dates of the runs."""
    runs = {
        (e.scale, row.run_id, run.seed): run
        for e in sorted(experiments, key=lambda e: SCALES.index(e.scale))
        for row in e.rows
        for run in row.runs
        if "hardware" in run.record
    }
    groups = grouped(((scale, *environment_cells(run.record)), run) for (scale, _, _), run in runs.items())
    rows = []
    for key, group in sorted(groups.items()):
        days = sorted({run.record["date"][:10] for run in group})
        hours = sum(run.record.get("wall_seconds", 0.0) for run in group) / 3600
        rows.append([*key, str(len(group)), " to ".join(dict.fromkeys((days[0], days[-1]))), f"{hours:.1f}"])
    head = ["scale", "hardware", "versions", "commit", "data", "runs", "dates", "hours in all"]
    return Table(head, rows, (0, 1, 2, 3, 4, 6))


def environment_cells(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Hardware, versions, commit and fingerprint of the data."""
    hardware = record["hardware"]
    threads = f"{plural(hardware['threads'], 'thread')} per run"
    cpu = f"{hardware['cpu']}, {hardware['cores']} cores, {threads}"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit, plus, changes = (record.get("git_commit") or "unknown").partition("+")
    data = str(record.get("data_fingerprint") or "unknown")[:12]
    return ", ".join(sorted(hardware["gpus"])) or cpu, versions, commit[:12] + plus + changes, data


def comparisons_csv(targets: Targets) -> str:
    """One line for each row of each experiment, metric and scale."""
    lines = [
        csv_line(target, experiment, comparison, index)
        for target, scales in targets.items()
        for experiments in scales.values()
        for column in group_columns(experiments)
        for comparison in column.comparisons
        for index, experiment in enumerate(column.experiments)
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, lines[0] if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_value(value) for name, value in line.items()} for line in lines)
    return file.getvalue()


def csv_line(target: str, experiment: Experiment, comparison: Comparison, index: int) -> dict[str, Any]:
    """Values by name; None if there is no value."""
    sample, ours, published = comparison.sample, comparison.difference, comparison.published[index]
    return {
        "target": target,
        "experiment": experiment.name,
        "column": experiment.heading,
        "row": comparison.row.name,
        "label": comparison.row.label,
        "metric": comparison.metric.name,
        "scale": experiment.scale,
        "published": published.value,
        "unbiased": published.unbiased,
        "published_difference": published.difference,
        "published_trained": published.trained,
        "n": sample.n if sample else 0,
        "mean": sample and sample.mean,
        "sd": sample and sample.sd,
        "did_not_train": comparison.untrained,
        "failed": len(comparison.failures),
        "pairs": ours and ours.n,
        "difference": ours and ours.mean,
        "margin_95": ours and ours.margin,
        "beyond_noise": ours and ours.beyond_noise,
        "p_value": ours and ours.p_value,
        "direction": comparison.direction(published),
    }


def csv_value(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}"
