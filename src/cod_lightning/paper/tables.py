"""Tables and sentences of claims and runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cod_lightning.paper.claims import NOISE, OPPOSITE, SAME, Claim, Column, Line, Metric, Sample
from cod_lightning.paper.document import Block, Table

NOT_RUN = "not run"


def printed(group: Sequence[Column]) -> Iterator[Block]:
    """Published figures beside ours at the paper's scale: sizes side by side, or several metrics of a size."""
    if all(len(e.metrics) == 1 for column in group for e in column.experiments):
        names = dict.fromkeys(row.name for column in group for row in column.rows)
        labels = {row.name: row.label for column in group for row in column.rows}
        head, cells = ["row"], {name: [labels[name]] for name in names}
        for column in group:
            lines = {line.row.name: line for line in column.lines}
            for index, experiment in enumerate(column.experiments):
                (metric,) = experiment.metrics
                biased = "evaluation_batches" in experiment.paper
                head += [f"{experiment.source}, published", *["N + 1 undone"] * biased, "ours"]
                for name in names:
                    line = lines.get(name)
                    claim = line.claims[index] if line else None
                    cells[name] += [
                        number(metric, claim.value if claim else None),
                        *[number(metric, claim.undone if claim else None)] * biased,
                        outcome(line) if line else "",
                    ]
        yield Table(head, list(cells.values()))
        return
    for column in group:
        metrics = column.experiments[0].metrics
        found = {metric: {line.row.name: line for line in column.lines_of(metric)} for metric in metrics}
        rows = []
        for row in column.rows:
            lines = [found[metric][row.name] for metric in metrics]
            rows.append([f"{row.label}, published", *(number(line.metric, line.claims[0].value) for line in lines)])
            if row.runs:
                rows.append([f"{row.label}, ours", *(outcome(line) for line in lines)])
        if absent := [row.label for row in column.rows if not row.runs]:
            which = "ours" if len(absent) == len(column.rows) else f"{listed(absent)}, ours"
            rows.append([which, *[NOT_RUN] * len(metrics)])
        yield Table([column.heading, *(metric.title for metric in metrics)], rows)


def compared(column: Column, published: bool = False) -> Table:
    """Ours at one scale, differences to the baseline, and beside each the paper's by size.

    Args:
        column: of ours.
        published: also the figures that the paper prints.
    """
    lines = [line for line in column.lines if line.sample or line.failures or len(column.metrics) == 1]
    several = len({line.metric for line in lines}) > 1
    beside_ours = [
        index for index in range(len(column.experiments)) if any(line.claims[index].value is not None for line in lines)
    ]
    titles = dict.fromkeys(line.metric.title for line in lines)
    units = dict.fromkeys(line.metric.unit for line in lines)
    head = [
        "row",
        *["metric"] * several,
        f"{' or '.join(titles)}, mean ± sd",
        "n",
        f"difference to {column.baseline.label}, {' or '.join(units)} (95 %)",
        *(f"{column.experiments[index].source}: published, direction" for index in beside_ours),
    ]
    rows = [
        [
            line.row.label,
            *[line.metric.title] * several,
            outcome(line),
            str(line.sample.n if line.sample else 0),
            "baseline" if line.row is column.baseline else difference(line),
            *(beside(line, line.claims[index], published) for index in beside_ours),
        ]
        for line in lines
    ]
    return Table(head, rows, words=(0, 1) if several else (0,))


def comparisons(group: Sequence[Column]) -> Iterator[Table]:
    """`compared` of the columns of one target and scale, as one table where each stands beside one published column."""
    found = [compared(column) for column in group]
    heads = {tuple(table.head[:-1]) for table in found}
    one_each = all(
        len(column.experiments) == 1 and "direction" in table.head[-1]
        for column, table in zip(group, found, strict=True)
    )
    if len(found) == 1 or len(heads) > 1 or not one_each:
        yield from found
        return
    rows = [
        [f"{column.heading}: {label}", *cells]
        for column, table in zip(group, found, strict=True)
        for label, *cells in table.rows
    ]
    yield Table([*found[0].head[:-1], "published, direction"], rows)


def number(metric: Metric, value: float | None) -> str:
    """A published figure; empty where there is none."""
    return "" if value is None else f"{value:.{metric.digits}f}"


def outcome(line: Line) -> str:
    """Ours: mean ± sd, and what did not train."""
    parts = [spread(line.sample, line.metric.digits)] if line.sample else []
    if line.untrained and line.sample:
        parts.append(f"(did not train: {line.untrained} of {line.sample.n})")
    parts += [f"(failed: {reason})" for reason in dict.fromkeys(line.failures)]
    return " ".join(parts) or NOT_RUN


def spread(sample: Sample, digits: int) -> str:
    sd = "" if sample.sd is None else f" ± {sample.sd:.{digits}f}"
    return f"{sample.mean:.{digits}f}{sd}"


def difference(line: Line) -> str:
    """Our difference with half its interval, bold beyond noise."""
    if line.difference is None:
        return ""
    margin, digits = line.difference.margin, line.metric.difference_digits
    text = f"{line.difference.mean:+.{digits}f}" + ("" if margin is None else f" ± {margin:.{digits}f}")
    return f"**{text}**" if line.difference.beyond_noise else text


def beside(line: Line, claim: Claim, published: bool) -> str:
    """The published difference, and whether ours points the same way."""
    parts = [number(line.metric, claim.value)] * published
    if claim.difference is not None:
        parts.append(
            f"{claim.difference:+.{line.metric.difference_digits}f}{'' if claim.trained else ' (did not train)'}"
        )
        parts.append(claim.direction or ("failed" if line.failures else NOT_RUN))
    return ", ".join(parts)


def conclusion(column: Column) -> str:
    """What the differences of a column say, in words."""
    metrics = dict.fromkeys(line.metric for line in column.lines if line.sample)
    found = " ".join(sentence for metric in metrics for sentence in sentences(column, metric))
    return found[:1].upper() + found[1:]


def sentences(column: Column, metric: Metric) -> Iterator[str]:
    lines, base = column.lines_of(metric), column.baseline.label
    title = "" if len(column.metrics) == 1 else f"{metric.title}: "
    digits = metric.difference_digits
    parted = [(line, line.difference) for line in lines if line.difference]
    if any(difference.margin is not None for _, difference in parted):
        beyond = [f"{line.row.label} ({change.mean:+.{digits}f})" for line, change in parted if change.beyond_noise]
        verb = "differ" if len(beyond) > 1 else "differs"
        yield f"{title}{listed(beyond or ['nothing'])} {verb} from {base} by more than noise."
        found: dict[str, list[str]] = {}
        for index, experiment in enumerate(column.experiments):
            groups = {
                kind: [line.row.label for line in lines if line.claims[index].direction == kind]
                for kind in (SAME, OPPOSITE, NOISE)
            }
            parts = [f"{kind} for {listed(labels)}" for kind, labels in groups.items() if labels]
            found.setdefault("; ".join(parts), []).append(experiment.source)
        for directions, sources in found.items():
            if directions:
                yield f"Direction beside the paper's {listed(sources)}: {directions}."
    elif parted:
        yield f"{title}one seed, so that no difference can be told from noise."
    if untrained := [line.row.label for line in lines if line.untrained]:
        yield f"Here {listed(untrained)} did not train."
    best = min if metric.lower else max
    theirs: dict[str, list[str]] = {}
    for index, experiment in enumerate(column.experiments):
        known = [(value, line.row.label) for line in lines if (value := line.claims[index].value) is not None]
        if known:
            theirs.setdefault(best(known)[1], []).append(experiment.source)
    _, ours = best((line.sample.mean, line.row.label) for line in lines if line.sample)
    printed = [f"{label} ({', '.join(sizes)})" for label, sizes in theirs.items()]
    paper = f"{listed(printed)} in the paper" if printed else "which the paper does not print"
    yield f"{'Lowest' if metric.lower else 'Highest'} {metric.title}: {ours} here, {paper}."


def listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
