"""The report: REPRODUCTION.md, an HTML page, a CSV file, and the figures that both show."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cod_lightning.page import Table, html_page, render
from cod_lightning.paper import tables
from cod_lightning.paper.claims import SCALES, STUCK, UNTRAINED, Column, Experiment, Run, by_target, columns
from cod_lightning.paper.figures import along_axes, difference_figure, loss_over_size, seed_count
from cod_lightning.paper.layer_figures import draw
from cod_lightning.paper.statistics import NOISE, ONE_SEED, OPPOSITE, SAME
from cod_lightning.paper.verdict import DIRECTIONS, Targets, Test, summarize, tests_of, verdict
from cod_lightning.plots import png

MARKDOWN, FIGURES = "REPRODUCTION.md", "experiments/results/figures"
HTML, CSV = "experiments/results/reproduction.html", "experiments/results/reproduction.csv"
"""Paths of the files, from the top of a checkout."""
HEADINGS = {SAME: "as in the paper", OPPOSITE: "opposite", NOISE: NOISE, ONE_SEED: "one seed"}


@dataclass(frozen=True)
class Report:
    """Contents of the files; `figures` by file name."""

    markdown: str
    html: str
    csv: str
    figures: Mapping[str, bytes]


@dataclass
class Picture:
    """A figure in the text."""

    name: str
    alt: str


@dataclass
class ScaleSection:
    """The runs of a target at one scale."""

    scale: str
    settings: list[str]
    tables: list[Table] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


@dataclass
class Section:
    """One table or figure of the paper, or one family of experiments beyond it."""

    target: str
    findings: list[str]
    pictures: list[Picture]
    published: list[Table]
    notes: list[str]
    scales: list[ScaleSection]


def build_report(experiments: Sequence[Experiment], hardware: str = "") -> Report:
    """Build the report on all runs.

    Args:
        experiments: at scale=paper, run or not, and at every other scale that was run.
        hardware: device that the hours are estimated for, such as "H100".
    """
    targets = by_target(experiments)
    summaries = summarize(targets)
    images: dict[str, bytes] = {}
    significant_tests = {summary.scale: summary.significant_tests for summary in summaries}
    markdown = render(
        Path(__file__).with_name("report.md.j2"),
        verdict=verdict(targets, summaries),
        top=top_figure(targets, images),
        summaries=summaries,
        overview=overview(targets),
        sections=[
            section(target, scales, significant_tests, images)
            for target, scales in targets.items()
            if has_enough_runs(scales)
        ],
        not_run=tables.not_run_table(targets, hardware),
        missing_hours=tables.missing_hours(targets),
        hardware=hardware,
        environments=environments(experiments),
        figures=FIGURES,
        **{"stuck": STUCK, "untrained": UNTRAINED, "good_rate": tables.GOOD_RATE, "join": tables.join},
    )
    return Report(markdown, html_page("Reproduction", markdown, images), comparisons_csv(targets), images)


def has_enough_runs(scales: Mapping[str, Sequence[Experiment]]) -> bool:
    """Whether a target has runs at some scale; one that varies a setting needs runs at two of its values."""
    counts = [sum(any(row.runs for row in e.rows) for e in experiments) for experiments in scales.values()]
    return max(counts) >= (2 if "axis" in scales["paper"][0].paper else 1)


def overview(targets: Targets) -> Table | None:
    """Directions by target and scale."""
    rows = []
    for target, scales in targets.items():
        for scale, experiments in scales.items():
            tests = [test for column in columns(experiments) for test in tests_of(target, column) if test.direction]
            if tests:
                seeds = seed_count(row for e in experiments for row in e.rows)
                cells = ["; ".join(labels_of(tests, direction)) for direction in DIRECTIONS]
                rows.append([target, scale, seeds, *cells])
    used = [index for index in range(3 + len(DIRECTIONS)) if index < 3 or any(row[index] for row in rows)]
    head = ["target", "scale", "seeds", *(HEADINGS[direction] for direction in DIRECTIONS)]
    shown = [[row[index] for index in used] for row in rows]
    return Table([head[index] for index in used], shown, range(len(used))) if rows else None


def labels_of(tests: Sequence[Test], direction: str) -> list[str]:
    """Labels of tests with a direction; with their columns if the label has another direction in other columns."""
    labels = []
    for label in dict.fromkeys(test.label for test in tests if test.direction == direction):
        own = [test for test in tests if test.label == label]
        here = [test.column for test in own if test.direction == direction]
        labels.append(label if len(here) == len(own) else f"{label} ({', '.join(here)})")
    return labels


# Sections ------------------------------------------------------------------------------------------------------------


def section(
    target: str,
    scales: Mapping[str, Sequence[Experiment]],
    significant_tests: Mapping[str, set[tuple[str, ...]]],
    images: dict[str, bytes],
) -> Section:
    """Everything about one target; adds its figures to `images`."""
    grouped = {scale: columns(experiments) for scale, experiments in scales.items()}
    paper = scales["paper"]
    findings = by_text((e.heading, e.paper["finding"]) for e in paper if "finding" in e.paper)
    notes = by_text((e.heading, f"{row.label}: {row.note}") for e in paper for row in e.rows if row.note)
    parts = []
    for scale, scale_columns in grouped.items():
        scale_columns = [column for column in scale_columns if any(row.runs for row in column.rows)]
        if scale_columns:
            parts.append(scale_section(scale, scale_columns, significant_tests.get(scale, set())))
    return Section(
        target,
        [f"**Published ({headings}).** {text}" for text, headings in findings.items()],
        list(add_pictures(target, grouped, images)),
        tables.published_tables(grouped["paper"]),
        [f"{text} ({headings})" for text, headings in notes.items()],
        parts,
    )


def scale_section(scale: str, scale_columns: Sequence[Column], significant_tests: set[tuple[str, ...]]) -> ScaleSection:
    part = ScaleSection(scale, [f"{column.heading}: {describe(column)}" for column in scale_columns])
    for column in scale_columns:
        prefix = f"{column.heading}: " * (len(scale_columns) > 1)
        if column.comparisons:
            part.tables.append(prefixed(tables.comparison_table(column, significant_tests), prefix))
            part.lines += [prefix + line for line in tables.summary_lines(column)]
        part.tables += [prefixed(table, prefix) for table in tables.figure_tables(column, significant_tests)]
    if scale_columns[0].first.paper.get("axis") == "lr" and (best := tables.tuned_strategies_table(scale_columns)):
        part.tables.append(best)
    part.tables = merge(part.tables)
    return part


def prefixed(table: Table, prefix: str) -> Table:
    return Table(table.head, [[prefix + first, *rest] for first, *rest in table.rows], table.text_columns)


def merge(all_tables: Sequence[Table]) -> list[Table]:
    """Merge tables of the same head, whichever column of the paper is listed with ours."""
    merged: dict[tuple[str, ...], Table] = {}
    for table in all_tables:
        published = table.head[-1].endswith(": published, direction")
        head = (*table.head[:-1], "published, direction") if published and len(all_tables) > 1 else tuple(table.head)
        rows = merged[head].rows if head in merged else []
        merged[head] = Table(head, [*rows, *table.rows], table.text_columns)
    return list(merged.values())


def by_text(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Distinct texts, with the headings that they belong to."""
    headings: dict[str, list[str]] = {}
    for heading, text in pairs:
        headings.setdefault(text, []).append(heading)
    return {text: tables.join(dict.fromkeys(belonging)) for text, belonging in headings.items()}


def describe(column: Column) -> str:
    """Setting of a column, and the command that reproduces it."""
    first = column.first
    name = first.name if len(column.experiments) == 1 else first.name.split("_")[0]
    seeds = max(column.seeds, default=1)
    words = [name, *[f"scale={first.scale}"] * (first.scale != "paper"), *[f"seeds={seeds}"] * (seeds > 1)]
    return f"{first.setting}. `python -m cod_lightning reproduce {' '.join(words)}`"


def add_pictures(target: str, grouped: Mapping[str, Sequence[Column]], images: dict[str, bytes]) -> Iterable[Picture]:
    """Draw the figures of a target."""
    first = grouped["paper"][0].first
    slug = first.name.split("_")[0]
    if target == "Figure 1":
        figure, alt = loss_over_size(grouped), "loss over parameters"
    elif axis := first.paper.get("axis"):
        panels = [(f"scale={scale}", axis, group) for scale, group in grouped.items()]
        figure, alt = along_axes(panels, []), "differences to the baseline"
    else:
        figure, alt = difference_figure(grouped), "differences to the baseline, published and ours"
    drawn = [(f"{slug}.png", f"{target}: {alt}", figure)]
    for scale, group in grouped.items():
        for column in group:
            name = slug if len(group) == 1 else column.first.name
            drawn.append((f"{name}_{scale}.png", f"{target} at scale={scale}, {column.heading}", draw(column)))
    for name, alt, figure in drawn:
        if figure is not None:
            images[name] = png(figure)
            yield Picture(name, alt)


def top_figure(targets: Targets, images: dict[str, bytes]) -> Picture | None:
    """Loss differences over length and depth, with the paper's Tables 1 and 6 as marks."""
    panels = [
        (f"{target}, scale={scale}", targets[target]["paper"][0].paper["axis"], columns(group))
        for target in ("Length", "Depth")
        if target in targets and has_enough_runs(targets[target])
        for scale, group in targets[target].items()
    ]
    published = [e for target in ("Table 1", "Table 6") for e in targets.get(target, {}).get("paper", ())]
    figure = along_axes(panels, columns(published))
    if figure is None:
        return None
    images["length_and_depth.png"] = png(figure)
    return Picture("length_and_depth.png", "Loss less that of Pre-LN, by length and by depth; hollow: the paper")


# Environments and CSV ------------------------------------------------------------------------------------------------


def environments(experiments: Sequence[Experiment]) -> Table | None:
    """Hardware, versions, commit and dates of the runs."""
    runs = {
        (SCALES.index(e.scale), row.run_id, run.seed): run
        for e in experiments
        for row in e.rows
        for run in row.runs
        if "hardware" in run.record
    }
    groups: dict[tuple[str, ...], list[Run]] = {}
    for (scale, *_), run in sorted(runs.items(), key=lambda item: item[0]):
        groups.setdefault((SCALES[scale], *environment(run.record)), []).append(run)
    rows = []
    for key, group in sorted(groups.items()):
        days = sorted({run.record["date"][:10] for run in group})
        hours = sum(run.record.get("wall_seconds", 0.0) for run in group) / 3600
        rows.append([*key, str(len(group)), " to ".join(dict.fromkeys((days[0], days[-1]))), f"{hours:.1f}"])
    head = ["scale", "hardware", "versions", "commit", "data", "runs", "dates", "hours in all"]
    return Table(head, rows, (0, 1, 2, 3, 4, 6)) if rows else None


def environment(record: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Hardware, versions, commit and fingerprint of the data."""
    hardware = record["hardware"]
    gpus = ", ".join(sorted(hardware["gpus"]))
    where = gpus or f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s) a run"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit, changes = (record["git_commit"] or "unknown").partition("+")[::2]
    data = str(record.get("data_fingerprint") or "unknown")[:12]
    return where, versions, commit[:12] + (f"+{changes}" if changes else ""), data


FIELDS = (
    *("target", "experiment", "column", "row", "label", "metric", "scale"),
    *("published", "undone", "published_difference", "published_trained"),
    *("n", "mean", "sd", "did_not_train", "failed", "pairs", "difference", "margin_95", "beyond_noise", "p_value"),
    "direction",
)


def comparisons_csv(targets: Targets) -> str:
    """One line for each row of each experiment, metric and scale."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for target, scales in targets.items():
        for scale, experiments in scales.items():
            for c in (comparison for column in columns(experiments) for comparison in column.comparisons):
                sample, ours = c.sample, c.difference
                for p in c.published:
                    where = (target, p.experiment.name, p.experiment.heading, c.row.name, c.row.label, c.metric.name)
                    values = [p.value, p.unbiased, p.difference, p.trained]
                    values += [sample.n, sample.mean, sample.sd] if sample else [0, None, None]
                    values += [c.untrained, len(c.failures)]
                    values += [ours.n, ours.mean, ours.margin, ours.beyond_noise, ours.p_value] if ours else [None] * 5
                    writer.writerow([*where, scale, *map(csv_value, values), p.direction or ""])
    return file.getvalue()


def csv_value(value: float | bool | None) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:.6g}"
