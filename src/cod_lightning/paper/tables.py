"""Tables of published figures, of comparisons with the baseline, and of missing runs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from cod_lightning.errors import plural
from cod_lightning.page import Table
from cod_lightning.paper.claims import SCALES, Column, Comparison, Experiment, Metric, Published, ReportRow, Targets
from cod_lightning.paper.findings import finding_results, quantities_of, quantity_rows
from cod_lightning.paper.statistics import FEW_SEEDS, MIN_SEEDS, Difference, Sample, grouped, with_enough_seeds
from cod_lightning.paper.tuning import GOOD_RATE_MARGIN, Tuned

SETTINGS = {"blocks": "blocks", "tokens": "steps"}
"""What a doubling is of, by axis."""
Keys = Collection[tuple[str, ...]]
"""Tests that stay significant after Holm's correction; tables mark them."""


# Published figures ---------------------------------------------------------------------------------------------------


def published_tables(columns: Sequence[Column]) -> list[Table]:
    """Published figures: one table if each experiment has one metric, else one for each with a column per metric."""
    experiments = [e for column in columns for e in column.experiments if e.metrics]
    if any(len(experiment.metrics) > 1 for experiment in experiments):
        tables = [published_table(e.heading, [(m.title, e, m) for m in e.metrics]) for e in experiments]
    else:
        cells = []
        for experiment in experiments:
            cells.append((published_heading(experiment), experiment, experiment.metrics[0]))
        tables = [published_table("row", cells)]
    return [table for table in tables if table.rows]


def published_heading(experiment: Experiment) -> str:
    return experiment.heading + " (corrected)" * (experiment.paper.get("evaluation_batches") is not None)


def published_table(corner: str, columns: Sequence[tuple[str, Experiment, Metric]]) -> Table:
    """One column for each (heading, experiment, metric); rows without a published figure are left out."""
    labels, cells = dict[str, str](), dict[tuple[str, str], str]()
    for heading, experiment, metric in columns:
        for row, published in zip(experiment.rows, experiment.published(metric), strict=True):
            labels.setdefault(row.name, row.label)
            cells[row.name, heading] = format_published(metric, published)
    headings = [heading for heading, _, _ in columns]
    rows = [[label, *(cells.get((name, heading), "") for heading in headings)] for name, label in labels.items()]
    return Table([corner, *headings], [row for row in rows if any(row[1:])])


def format_published(metric: Metric, published: Published) -> str:
    if published.value is None:
        return ""
    corrected = "" if published.unbiased is None else f" ({published.unbiased:{metric.value_format}})"
    return f"{published.value:{metric.value_format}}{corrected}"


# Comparisons ---------------------------------------------------------------------------------------------------------


def comparison_table(column: Column, significant: Keys = (), *, complete: bool = False) -> Table:
    """Our figures at one scale, and their differences to the baseline compared with the paper's.

    Args:
        column: our column of results.
        significant: tests to mark.
        complete: show rows that were not run, and the published figures.
    """
    comparisons = [c for c in column.comparisons if c.sample or c.failures or (complete and len(column.metrics) == 1)]
    metrics = list(dict.fromkeys(c.metric for c in comparisons))
    several = len(metrics) > 1
    shown = [i for i in range(len(column.experiments)) if any(c.published[i].value is not None for c in comparisons)]
    titles = " or ".join(metric.title for metric in metrics)
    units = " or ".join(dict.fromkeys(metric.unit for metric in metrics))
    head = [
        "row",
        *["metric"] * several,
        f"{titles}, mean ± sd",
        "n",
        f"difference to {column.baseline.label}, {units} (95 %)",
        *(f"{published_heading(column.experiments[i])}: published, direction" for i in shown),
    ]
    rows = [
        [
            c.row.label,
            *[c.metric.title] * several,
            format_outcome(c),
            str(c.sample.n if c.sample else 0),
            "baseline" if c.row is column.baseline else format_comparison(c, significant),
            *(format_direction(c, c.published[i], complete) for i in shown),
        ]
        for c in comparisons
    ]
    return Table(head, rows, text_columns=(0, 1) if several else (0,))


def format_outcome(comparison: Comparison) -> str:
    """Mean ± sd, and runs that did not train or diverged."""
    sample, form = comparison.sample, comparison.metric.value_format
    parts = [sample.format(form, form)] if sample else []
    if sample and comparison.untrained:
        parts.append(f"(did not train: {comparison.untrained} of {sample.n})")
    parts += [f"(failed: {reason})" for reason in dict.fromkeys(comparison.failures)]
    return " ".join(parts) or "not run"


def format_difference(difference: Difference, mean: str, spread: str, marked: bool = False) -> str:
    """Mean ± half of the interval: bold if the interval excludes zero, with a dagger after Holm's correction."""
    text = difference.format(mean, spread)
    return f"**{text}**{' †' * marked}" if difference.beyond_noise else text


def format_comparison(comparison: Comparison, significant: Keys) -> str:
    ours, form = comparison.difference, comparison.metric.difference_format
    if ours is None:
        return ""
    text = format_difference(ours, f"+{form}", form, comparison.key in significant)
    return f"{text} ({plural(ours.n, 'pair')})" if comparison.unpaired else text


def format_direction(comparison: Comparison, published: Published, with_value: bool) -> str:
    """The published difference, and whether ours has its sign."""
    parts = [format_published(comparison.metric, published)] if with_value else []
    if published.difference is not None:
        trained = "" if published.trained else " (did not train)"
        parts.append(f"{published.difference:+{comparison.metric.difference_format}}{trained}")
        parts.append(comparison.direction(published) or comparison.absence)
    return ", ".join(parts)


def summary_lines(column: Column) -> list[str]:
    """Differences beyond noise, the best row here and in the paper, and seeds that differences leave out."""
    lines = []
    for metric in dict.fromkeys(c.metric for c in column.comparisons if c.sample):
        comparisons, form = column.compare(metric), metric.difference_format
        prefix = "" if len(column.metrics) == 1 else f"{metric.title}: "
        differences = [(c.row.label, c.difference) for c in comparisons if c.difference]
        if any(difference.margin is not None for _, difference in differences):
            beyond = [f"{label} ({d.mean:+{form}})" for label, d in differences if d.beyond_noise]
            lines.append(f"{prefix}Beyond noise: {join_words(beyond) or 'no row'}.")
        early = [f"{c.row.label} ({c.early.format(f'+{form}', form)})" for c in comparisons if c.early]
        if early:
            lines.append(f"{prefix}The first three seeds alone: {join_words(early)}.")
        lines.append(f"{prefix}{best_rows(column, metric)}")
        if printed := directions_as_printed(column, comparisons):
            lines.append(f"{prefix}By the printed values, without the correction: {join_words(printed)}.")
        counts = {run.record["val_images"] for c in comparisons for run in c.row.runs if "val_images" in run.record}
        lines += [f"{prefix}{n} validation images, of which each is {100 / n:.2g} points." for n in sorted(counts)]
        if unpaired := grouped((c.unpaired, c.row.label) for c in comparisons if c.unpaired):
            groups = "; ".join(
                f"seed{'s' * (len(seeds) > 1)} {join_words(map(str, seeds))} ({', '.join(labels)})"
                for seeds, labels in unpaired.items()
            )
            lines.append(f"{prefix}Left out of the differences for lack of a pair: {groups}.")
    return lines


def directions_as_printed(column: Column, comparisons: Sequence[Comparison]) -> list[str]:
    """Rows that have another direction if the published values are not corrected."""
    changed = []
    for c in comparisons:
        for experiment, published in zip(column.experiments, c.published, strict=True):
            printed = c.direction(replace(published, difference=published.printed_difference))
            if printed != c.direction(published):
                changed.append(f"{c.row.label} {printed} ({experiment.heading})")
    return changed


def changes_per_doubling(columns: Sequence[Column]) -> list[str]:
    """Slope of every row's difference to the baseline over log2 of the varied setting.

    The line of a row goes through its settings with three seeds, on the seeds of all of them; it needs three settings.
    """
    axis, metric = columns[0].first.axis, columns[0].headline
    if axis is None or metric is None:
        return []
    form, lines = metric.difference_format, dict[str, list[tuple[float, ReportRow, ReportRow]]]()
    for column in columns:
        for c in column.compare(metric):
            if c.difference and c.difference.margin is not None:
                lines.setdefault(c.row.label, []).append((np.log2(column.first.axes[axis]), c.row, column.baseline))
    parts = []
    for label, points in lines.items():
        seeds = metric.common_seeds(*(row for _, *both in points for row in both))
        if len(points) > 2 and len(seeds) >= MIN_SEEDS:  # a line through two points has no error
            values = [metric.differences(row, base, seeds) for _, row, base in points]
            slopes = Difference.of(np.polyfit([x for x, *_ in points], values, 1)[0].tolist())
            parts.append(f"{label} {format_difference(slopes, f'+{form}', form)} (n = {slopes.n})")
    base, unit = columns[0].baseline.label, f"{metric.unit}, 95 %; outside Holm's correction"
    head = f"Change of the difference to {base} per doubling of the {SETTINGS[axis]} ({unit})"
    return [f"{head}: {'; '.join(parts)}."] if parts else []


def best_rows(column: Column, metric: Metric) -> str:
    """The best row here, on the seeds that the rows have in common, and in each of the paper's columns."""
    best, word = (min, "Lowest") if metric.lower_is_better else (max, "Highest")
    comparisons = column.compare(metric)
    finite = [c.row for c in comparisons if c.sample and math.isfinite(c.sample.mean) and not c.failures]
    rows = with_enough_seeds(finite, lambda row: len(metric.by_seed(row)))
    left_out = [row.label for row in finite if row not in rows]
    parts = []
    if rows:
        seeds = metric.common_seeds(*rows)

        def mean(row: ReportRow) -> float:
            values = metric.by_seed(row)
            return fmean(values[seed] for seed in seeds or values)

        first = best(rows, key=mean)
        equal = [row.label for row in rows if row is not first and is_within_noise(metric, row, first)]
        notes = [FEW_SEEDS] if len(metric.by_seed(first)) < MIN_SEEDS else []
        notes += [f"within noise of it: {join_words(equal)}"] if equal else []
        notes += [f"fewer seeds: {join_words(left_out)}"] if left_out else []
        parts.append(f"{first.label} here" + (f" ({'; '.join(notes)})" if notes else ""))
    headings: dict[str, list[str]] = {}
    for index, experiment in enumerate(column.experiments):
        values = [(v, c.row.label) for c in comparisons if (v := c.published[index].value) is not None]
        if values:
            headings.setdefault(best(values)[1], []).append(experiment.heading)
    parts += [f"{label} in the paper ({', '.join(names)})" for label, names in headings.items()]
    return f"{word} {metric.title}: {'; '.join(parts)}."


def is_within_noise(metric: Metric, row: ReportRow, other: ReportRow) -> bool:
    """Whether the interval of the difference of two rows, over the seeds of both, contains zero."""
    difference = metric.paired_difference(row, other)
    return difference is not None and difference.margin is not None and not difference.beyond_noise


def figure_tables(column: Column, significant: Keys = ()) -> list[Table]:
    """Quantities of a figure, and the paper's findings about it."""
    quantities = Table(["mean ± sd", *quantities_of(column), "n"], quantity_rows(column))
    rows = []
    for result in finding_results(column):
        difference = format_difference(result.difference, "+.3g", ".3g", result.key in significant)
        rows.append([result.statement, difference, result.unit, str(result.difference.n), str(result.direction)])
    head = ["the paper's finding", "ours, positive if it holds (95 %)", "unit", "n", "direction"]
    return [table for table in (quantities, Table(head, rows, (0, 2, 4))) if table.rows]


def tuned_strategies_table(tuned: Sequence[Tuned]) -> Table:
    """Every strategy at its own best learning rate, compared with the baseline at its own best."""
    rows = []
    for best in tuned:
        losses = list(best.losses.values())
        loss = Sample.of(losses).format(".3f", ".3f") if all(map(math.isfinite, losses)) else "diverged"
        difference = format_difference(best.difference, "+.3f", ".3f") if best.difference else ""
        good = f"{', '.join(best.good)} ({len(best.good)} of {len(best.rates)})"
        rate = f"{best.rate} ({best.edge})" if best.edge else best.rate
        rows.append([best.row.label, rate, loss, str(len(best.losses)), difference, good])
    head = ["row", "best rate", "loss, mean ± sd", "n", "difference to Pre-LN at its best, nats (95 %)"]
    return Table([*head, f"rates within {GOOD_RATE_MARGIN} nats of its best"], rows, (0, 1, 5))


# Missing runs --------------------------------------------------------------------------------------------------------


def untried_scales(targets: Targets) -> list[str]:
    """Scales without any run."""
    tried = {e.scale for scales in targets.values() for group in scales.values() for e in group if e.has_runs}
    return [scale for scale in SCALES if scale not in tried]


def not_run_table(targets: Targets, hardware: str) -> Table:
    """Rows without runs by target and tried scale, and the hours of those of scale=paper; equal runs count once."""
    rows, all_hours = [], dict[str, float]()
    tried = [scale for scale in SCALES if scale not in untried_scales(targets)]
    for target, scales in targets.items():
        cells = [missing_cell(scales.get(scale, ())) for scale in tried]
        missing = [row for e in scales["paper"] for row in e.rows if not row.runs]
        hours = {row.run_id: row.gpu_hours for row in missing if row.gpu_hours is not None}
        all_hours |= hours
        if hours or any(cells):
            rows.append([target, *cells, f"{sum(hours.values()):,.0f}" if hours else ""])
    if all_hours:
        rows.append(["all, shared runs once", *[""] * len(tried), f"{sum(all_hours.values()):,.0f}"])
    head = ["target", *(f"missing at scale={scale}" for scale in tried), f"hours of {hardware or 'a GPU'}, scale=paper"]
    return Table(head, rows, range(len(head) - 1))


def missing_cell(experiments: Sequence[Experiment]) -> str:
    """Labels of the rows without runs, or their number if many or all are missing."""
    rows = [(e, row) for e in experiments for row in e.rows]
    missing = [(e, row) for e, row in rows if not row.runs]
    if len(missing) == len(rows):
        return "all"
    labels = dict.fromkeys(f"{e.heading}: {row.label}" if e.axis else row.label for e, row in missing)
    return join_words(labels) if len(missing) < 4 else f"{len(missing)} of {len(rows)} rows"


def join_words(words: Iterable[str]) -> str:
    """Words as a list in a sentence."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last
