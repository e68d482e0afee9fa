"""Tables of published figures, of comparisons with the baseline, and of missing runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from cod_lightning.page import Table
from cod_lightning.paper.claims import SCALES, Column, Comparison, Experiment, Metric, Published, ReportRow
from cod_lightning.paper.findings import FindingResult, finding_results, quantities_of, quantity_rows
from cod_lightning.paper.statistics import Difference, Sample

NOT_RUN = "not run"
GOOD_RATE = 0.05
"""A learning rate is good for a strategy if its loss is within so many nats of the strategy's lowest."""


def published_tables(columns: Sequence[Column]) -> list[Table]:
    """Published figures: one table if each column has one metric, else one for each column with a metric per column."""
    experiments = [experiment for column in columns for experiment in column.experiments if experiment.metrics]
    if all(len(experiment.metrics) == 1 for experiment in experiments):
        labels = {row.name: row.label for column in columns for row in column.rows}
        cells = {name: [label] for name, label in labels.items()}
        for column in columns:
            for index, experiment in enumerate(column.experiments):
                for metric in experiment.metrics:
                    by_name = {c.row.name: c.published[index] for c in column.compare(metric)}
                    for name in labels:
                        cells[name].append(format_published(metric, by_name.get(name)))
        head = [f"{e.heading}{' (N + 1 undone)' * ('evaluation_batches' in e.paper)}" for e in experiments]
        rows = [row for row in cells.values() if any(row[1:])]
        return [Table(["row", *head], rows)] if rows else []
    tables = []
    for column in columns:
        by_metric = [column.compare(metric) for metric in column.metrics]
        rows = [
            [row.label, *(format_published(cs[i].metric, cs[i].published[0]) for cs in by_metric)]
            for i, row in enumerate(column.rows)
        ]
        tables.append(Table([column.heading, *(metric.title for metric in column.metrics)], rows))
    return tables


def format_published(metric: Metric, published: Published | None) -> str:
    if published is None or published.value is None:
        return ""
    undone = "" if published.unbiased is None else f" ({published.unbiased:.{metric.digits}f})"
    return f"{published.value:.{metric.digits}f}{undone}"


def comparison_table(
    column: Column, significant_tests: Collection[tuple[str, ...]] = (), *, complete: bool = False
) -> Table:
    """Our figures at one scale, and their differences to the baseline compared with the paper's.

    Args:
        column: our column of results.
        significant_tests: tests that stay significant after Holm's correction; they are marked.
        complete: show rows that were not run, and the published figures.
    """
    comparisons = [c for c in column.comparisons if c.sample or c.failures or (complete and len(column.metrics) == 1)]
    several = len({c.metric for c in comparisons}) > 1
    shown = [i for i in range(len(column.experiments)) if any(c.published[i].value is not None for c in comparisons)]
    titles = " or ".join(dict.fromkeys(c.metric.title for c in comparisons))
    units = " or ".join(dict.fromkeys(c.metric.unit for c in comparisons))
    head = [
        "row",
        *["metric"] * several,
        f"{titles}, mean ± sd",
        "n",
        f"difference to {column.baseline.label}, {units} (95 %)",
        *(f"{column.experiments[i].heading}: published, direction" for i in shown),
    ]
    rows = [
        [
            c.row.label,
            *[c.metric.title] * several,
            format_outcome(c),
            str(c.sample.n if c.sample else 0),
            "baseline" if c.row is column.baseline else format_comparison(c, significant_tests),
            *(format_direction(c, c.published[i], complete) for i in shown),
        ]
        for c in comparisons
    ]
    return Table(head, rows, text_columns=(0, 1) if several else (0,))


def format_outcome(comparison: Comparison) -> str:
    """Mean ± sd, and runs that did not train or diverged."""
    sample, digits = comparison.sample, comparison.metric.digits
    parts = [format_sample(sample, digits)] if sample else []
    if sample and comparison.untrained:
        parts.append(f"(did not train: {comparison.untrained} of {sample.n})")
    parts += [f"(failed: {reason})" for reason in dict.fromkeys(comparison.failures)]
    return " ".join(parts) or NOT_RUN


def format_sample(sample: Sample, digits: int) -> str:
    return f"{sample.mean:.{digits}f}" + ("" if sample.sd is None else f" ± {sample.sd:.{digits}f}")


def format_difference(difference: Difference, digits: int, marked: bool = False) -> str:
    """Mean ± half of the interval: bold if the interval excludes zero, with a dagger after Holm's correction."""
    margin = "" if difference.margin is None else f" ± {difference.margin:.{digits}f}"
    text = f"{difference.mean:+.{digits}f}{margin}"
    return f"**{text}**{' †' * marked}" if difference.beyond_noise else text


def format_comparison(comparison: Comparison, significant_tests: Collection[tuple[str, ...]]) -> str:
    ours = comparison.difference
    if ours is None:
        return ""
    text = format_difference(ours, comparison.metric.difference_digits, comparison.test in significant_tests)
    return f"{text} ({ours.n} pairs)" if comparison.unpaired else text


def format_direction(comparison: Comparison, published: Published, with_value: bool) -> str:
    """The published difference, and whether ours has its sign."""
    parts = [format_published(comparison.metric, published)] if with_value else []
    if published.difference is not None:
        trained = "" if published.trained else " (did not train)"
        parts.append(f"{published.difference:+.{comparison.metric.difference_digits}f}{trained}")
        parts.append(published.direction or ("failed" if comparison.failures else NOT_RUN))
    return ", ".join(parts)


def summary_lines(column: Column) -> list[str]:
    """Differences beyond noise, the best row here and in the paper, and seeds that differences leave out."""
    lines = []
    for metric in dict.fromkeys(c.metric for c in column.comparisons if c.sample):
        comparisons = column.compare(metric)
        name = "" if len(column.metrics) == 1 else f"{metric.title}: "
        differing = [
            f"{c.row.label} ({c.difference.mean:+.{metric.difference_digits}f})"
            for c in comparisons
            if c.difference and c.difference.beyond_noise
        ]
        if any(c.difference and c.difference.margin is not None for c in comparisons):
            lines.append(f"{name}Beyond noise: {join(differing) or 'no row'}.")
        best = min if metric.lower_is_better else max
        parts = [f"{best((c.sample.mean, c.row.label) for c in comparisons if c.sample)[1]} here"]
        winners: dict[str, list[str]] = {}
        for index, experiment in enumerate(column.experiments):
            values = [(v, c.row.label) for c in comparisons if (v := c.published[index].value) is not None]
            if values:
                winners.setdefault(best(values)[1], []).append(experiment.heading)
        parts += [f"{label} in the paper ({', '.join(headings)})" for label, headings in winners.items()]
        lines.append(f"{name}{'Lowest' if metric.lower_is_better else 'Highest'} {metric.title}: {'; '.join(parts)}.")
        left_out = [f"{c.row.label}, seed {', '.join(map(str, c.unpaired))}" for c in comparisons if c.unpaired]
        if left_out:
            lines.append(f"{name}Left out of the differences for lack of a pair: {'; '.join(left_out)}.")
    return lines


def findings_table(results: Iterable[FindingResult], significant_tests: Collection[tuple[str, ...]]) -> Table:
    rows = []
    for result in results:
        if (ours := result.difference) is not None:
            margin = "" if ours.margin is None else f" ± {ours.margin:.2g}"
            text = f"{ours.mean:+.3g}{margin}"
            text = f"**{text}**{' †' * (result.test in significant_tests)}" if ours.beyond_noise else text
            rows.append([result.statement, text, str(ours.n), result.direction or ""])
    return Table(["the paper's finding", "ours, positive if it holds (95 %)", "n", "direction"], rows, (0, 3))


def figure_tables(column: Column, significant_tests: Collection[tuple[str, ...]]) -> list[Table]:
    """Quantities of a figure and the paper's findings about it."""
    quantities = Table(["row", *quantities_of(column), "n"], quantity_rows(column))
    return [table for table in (quantities, findings_table(finding_results(column), significant_tests)) if table.rows]


def tuned_strategies_table(columns: Sequence[Column]) -> Table | None:
    """Every strategy at its own best learning rate, compared with the baseline at its own best."""
    losses: dict[str, dict[str, dict[int, float]]] = {}
    labels = {row.name: row.label for column in columns for row in column.rows}
    for column in columns:
        for row in column.rows:
            if values := Metric("val_loss").by_seed(row):
                losses.setdefault(row.name, {})[column.heading] = values
    best = {name: min(rates, key=lambda rate: mean(rates[rate])) for name, rates in losses.items()}
    base = losses.get("pre_ln", {}).get(best.get("pre_ln", ""), {})
    rows = []
    for name, rates in losses.items():
        values = rates[best[name]]
        pairs = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
        good = [rate for rate in rates if mean(rates[rate]) - mean(values) <= GOOD_RATE]
        compared = format_difference(Difference.of(pairs), 3) if pairs and name != "pre_ln" else ""
        loss = format_sample(Sample.of(list(values.values())), 3)
        rows.append([labels[name], best[name], loss, str(len(values)), compared, f"{', '.join(good)} of {len(rates)}"])
    head = ["row", "best rate", "loss, mean ± sd", "n", "difference to Pre-LN at its best, nats (95 %)"]
    return Table([*head, f"within {GOOD_RATE} nats of its best"], rows, (0, 1, 5)) if rows else None


def mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values)


def not_run_table(targets: Mapping[str, Mapping[str, Sequence[Experiment]]], hardware: str) -> Table | None:
    """Rows without runs by target and scale, and the hours that those of scale=paper would take."""
    rows = []
    for target, scales in targets.items():
        missing = {s: [r for e in scales.get(s, ()) for r in e.rows if not r.runs] for s in SCALES}
        totals = {s: sum(len(e.rows) for e in scales.get(s, ())) for s in SCALES}
        cells = [missing_cell(missing[s], totals[s]) for s in SCALES]
        if any(cells):
            hours = {row.run_id: row.gpu_hours for row in missing["paper"] if row.gpu_hours is not None}
            rows.append([target, *cells, f"{sum(hours.values()):,.0f}" if hours else ""])
    head = ["target", *(f"scale={scale}" for scale in SCALES), f"hours of {hardware or 'a GPU'}, scale=paper"]
    return Table(head, rows, range(len(head) - 1)) if rows else None


def missing_hours(targets: Mapping[str, Mapping[str, Sequence[Experiment]]]) -> float:
    """Hours of all missing runs at scale=paper; rows with the same runs count once."""
    rows = (row for scales in targets.values() for e in scales["paper"] for row in e.rows if not row.runs)
    return sum({row.run_id: row.gpu_hours or 0.0 for row in rows}.values())


def missing_cell(missing: Sequence[ReportRow], total: int) -> str:
    """Labels of missing rows, or their number if many or all are missing."""
    if len(missing) == total:
        return "all"
    return join(dict.fromkeys(row.label for row in missing)) if len(missing) < 4 else f"{len(missing)} of {total} rows"


def join(words: Iterable[str]) -> str:
    """Words as a list in a sentence."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last
