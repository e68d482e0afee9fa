"""Claims and runs as one document: REPRODUCTION.md, a page of HTML, CSV, and the figures that both show."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cod_lightning.paper import figures
from cod_lightning.paper.claims import (
    BASELINE,
    NOISE,
    ONE_SEED,
    OPPOSITE,
    SAME,
    SCALES,
    STUCK,
    UNTRAINED,
    Column,
    Experiment,
    Run,
    by_target,
    columns,
    seed_counts,
)
from cod_lightning.paper.document import Block, Heading, Image, Items, Table, Text, markdown, page
from cod_lightning.paper.findings import quantities, shown, verdicts
from cod_lightning.paper.tables import NOT_RUN, comparisons, conclusion, listed, printed

MARKDOWN, FIGURES = "REPRODUCTION.md", "experiments/results/figures"
HTML, CSV = "experiments/results/reproduction.html", "experiments/results/reproduction.csv"
"""Where the files lie, from the top of a checkout."""

ByScale = Mapping[str, Sequence[Experiment]]
"""The experiments of one target; those of the paper's scale are always there."""


@dataclass(frozen=True)
class Report:
    """Files by what they hold; `figures` by name."""

    markdown: str
    html: str
    csv: str
    figures: Mapping[str, bytes]


def report(experiments: Sequence[Experiment], hardware: str = "") -> Report:
    """Everything that the experiments' files claim and their runs show.

    Args:
        experiments: at the paper's scale, run or not, and at every other scale that was run.
        hardware: what the estimated hours are meant for, such as "H100".
    """
    images: dict[str, bytes] = {}
    targets = by_target(experiments)
    sections = [block for target, scales in targets.items() for block in section(target, scales, images)]
    blocks = [
        Heading(1, "Reproduction"),
        *introduction(),
        *overview(targets),
        *how_to_read(),
        *sections,
        *not_run(experiments, hardware),
        *environments(experiments),
    ]
    return Report(markdown(blocks, FIGURES), page("Reproduction", blocks, images), table_csv(targets), images)


def introduction() -> list[Block]:
    return [
        Text(
            "What *The Curse of Depth in Large Language Models* (arXiv 2502.05795v5) prints, and what was measured "
            "here. `python -m cod_lightning report` writes this file from `experiments/*.yaml` and the run records "
            "below `experiments/results/`; what was not run says so, and `python -m cod_lightning reproduce NAME "
            "scale=SCALE seeds=3` runs it."
        )
    ]


def how_to_read() -> list[Block]:
    return [
        Heading(2, "How to read this"),
        Items(
            [
                "**Scales.** `paper` is the published shape, data and number of steps. `mini` and `toy` keep what is "
                "compared and shrink the rest; their perplexities are those of other models on other text and stand "
                "in tables of their own. Only signs and orders can be compared across scales, and these with care: a "
                "run at toy scale sees less than a thousandth of the paper's tokens and shows how training begins, not "
                "where it ends.",
                "**Published.** The released evaluation divides the sum of N batch means by N + 1, and is low by an "
                "amount that depends on the number of GPUs. `N + 1 undone` is the loss times (N + 1) / N.",
                "**Ours.** Summed loss over summed tokens of the validation set; mean ± standard deviation over n "
                "seeds.",
                "**Differences.** To the row in the same column that is called the baseline, between runs of the same "
                "seed: the logarithm of the ratio of perplexities, which is a difference of losses in nats. ± is half "
                "of the 95 % interval of Student's t for their mean; **bold** where it leaves zero out, which is what "
                "counts as more than noise here. There is no correction for the number of rows.",
                f"**Direction.** `{SAME}` or `{OPPOSITE}` sign as the published difference, `{NOISE}` where our "
                f"interval holds zero, `{ONE_SEED}` where there is no interval. The paper prints one run of each and "
                "no error bars, so that the noise of its differences is not known. Of a figure, what the paper says of "
                "it is a number of ours that is above zero where it holds: a difference, or of variances, distances "
                "from I and losses the logarithm of a ratio. Deep blocks are those of the deeper half: under one "
                "strategy their median beside that of the others, which no single layer sways; between two, their "
                "means.",
                f"**Did not train.** Ours: the loss is not finite at the end, or fell by less than {STUCK} nats in the "
                f"second half of the run. Published: more than {UNTRAINED:g} nat above the best of its column.",
            ]
        ),
    ]


def overview(targets: Mapping[str, ByScale]) -> list[Block]:
    """Where ours agrees with the paper and where not, by table or figure and scale."""
    rows, counts = [], dict[str, Counter[str]]()
    for target, scales in targets.items():
        for scale, experiments in scales.items():
            found = agreements(target, columns(experiments))
            if found:
                seeds = seed_counts(row for experiment in experiments for row in experiment.rows)
                texts = {kind: "; ".join(named(found, kind)) for kind in KINDS}
                rows.append([target, scale, seeds, *texts.values()])
                counts.setdefault(scale, Counter()).update(kind for kind, _, _ in found)
    if not rows:
        return [Text("Nothing has been run yet.")]
    told = [kind for index, kind in enumerate(KINDS, start=3) if any(row[index] for row in rows)]
    head = ["target", "scale", "seeds", *(HEADINGS[kind] for kind in told)]
    shown = [[*row[:3], *(row[3 + KINDS.index(kind)] for kind in told)] for row in rows]
    absent = [scale for scale in SCALES if scale not in counts]
    sentences = [
        f"Of {sum(found.values())} comparisons at scale={scale}, "
        f"{listed(f'{found[kind]} {SUMMED[kind]}' for kind in KINDS if found[kind])}."
        for scale, found in counts.items()
    ]
    if absent:
        sentences.append(f"Nothing has been compared at {listed(f'scale={scale}' for scale in absent)}.")
    return [
        Heading(2, "At a glance"),
        *[Text(sentence) for sentence in central(targets)],
        Text(" ".join(sentences) + " A run counts in every table that has it."),
        Table(head, shown, words=(0, 1, *range(3, len(head)))),
    ]


KINDS = (SAME, OPPOSITE, NOISE, ONE_SEED)
HEADINGS = {SAME: "as in the paper", OPPOSITE: "opposite", NOISE: NOISE, ONE_SEED: "one seed, not told from noise"}
SUMMED = {
    SAME: "point as in the paper",
    OPPOSITE: "the opposite way",
    NOISE: "lie within noise",
    ONE_SEED: "have one seed",
}


def agreements(target: str, group: Sequence[Column]) -> list[tuple[str, str, str]]:
    """Direction, row or finding, and column of the paper, of all that was compared; of a table in one metric."""
    found = [
        (claim.direction, line.row.label + " (did not train here)" * bool(line.untrained), claim.experiment.source)
        for column in group
        if (metric := figures.headline(column)) is not None
        for line in column.lines_of(metric)
        for claim in line.claims
        if claim.direction
    ]
    return found + [
        (verdict.direction, verdict.statement, column.heading)
        for column in group
        for verdict in verdicts(target, column)
        if verdict.direction
    ]


def named(found: Sequence[tuple[str, str, str]], kind: str) -> list[str]:
    """What has a direction, with the columns where only some of those compared have it."""
    sources: dict[str, list[str]] = {}
    for direction, label, source in found:
        if direction == kind:
            sources.setdefault(label, []).append(source)
    whole = Counter(label for _, label, _ in found)
    return [label if len(own) == whole[label] else f"{label} ({', '.join(own)})" for label, own in sources.items()]


def central(targets: Mapping[str, ByScale]) -> Iterator[str]:
    """What the paper is about: LNS against Pre-LN, of the first table that has both, at each scale that was run."""
    for target, scales in targets.items():
        done = False
        for scale, experiments in scales.items():
            for column in columns(experiments):
                metric = figures.headline(column)
                if metric is None or not metric.lower or column.baseline.name != BASELINE:
                    continue
                line = next((line for line in column.lines_of(metric) if line.row.name == "lns"), None)
                if line is None or line.difference is None:
                    continue
                done = True
                printed = [claim.difference for claim in line.claims if claim.difference is not None]
                ends = (min(printed), max(printed)) if printed else ()
                span = " to ".join(dict.fromkeys(f"{value:+.3f}" for value in ends))
                margin = line.difference.margin
                ours = f"{line.difference.mean:+.3f}" + ("" if margin is None else f" ± {margin:.3f}")
                yield (
                    f"**{line.row.label} against {column.baseline.label}** ({target}, scale={scale}, n = "
                    f"{line.difference.n}): {ours} nats; in the paper, at its scale, {span or 'no figure'}."
                )
        if done:
            return


# One table or figure of the paper ------------------------------------------------------------------------------------


def section(target: str, scales: ByScale, images: dict[str, bytes]) -> Iterator[Block]:
    """What the paper has and what was run of one target; adds the figures to `images`."""
    grouped = {scale: columns(experiments) for scale, experiments in scales.items()}
    yield Heading(2, target)
    for (finding,), sources in annotated(
        (e.source, [e.paper["finding"]]) for e in scales["paper"] if "finding" in e.paper
    ):
        yield Text(f"**Published ({listed(sources)}).** {finding}")
    for name, alt, figure in drawn(target, grouped):
        images[name] = figures.png(figure)
        yield Image(name, alt)
    yield from published(target, grouped["paper"])
    absent = []
    for scale in SCALES:
        if not any(row.runs for column in grouped.get(scale, []) for row in column.rows):
            absent.append(f"scale={scale}")
            continue
        yield Heading(3, f"{target}: ours at scale={scale}")
        yield Items([f"{column.heading}: {described(column)}" for column in grouped[scale]])
        if any(column.lines for column in grouped[scale]):
            yield from comparisons(grouped[scale])
            yield from conclusions(grouped[scale])
        for column in grouped[scale]:
            if (found := quantities(target, column)) is not None:
                yield found
                if (compared := shown(target, column)) is not None:
                    yield compared
            elif not column.lines:
                yield Text(f"{column.heading}: not measured yet.")
    if absent:
        yield Text(f"{NOT_RUN.capitalize()}: {listed(absent)}.")


def published(target: str, group: Sequence[Column]) -> Iterator[Block]:
    """The paper's figures, beside ours at its scale, with what must be known of them and of the runs."""
    titles = list(dict.fromkeys(metric.title for column in group for metric in column.metrics))
    if titles:
        yield Heading(3, f"{target}: published {titles[0] if len(titles) == 1 else 'figures'}, and ours at scale=paper")
        yield from printed(group)
    yield Items([f"{column.experiments[0].title} {described(column)}" for column in group])
    notes = annotated(
        (e.source, [row.label, row.note]) for c in group for e in c.experiments for row in e.rows if row.note
    )
    if notes := list(notes):
        yield Items([f"{label} ({listed(sources)}): {note}" for (label, note), sources in notes])


def annotated(found: Iterable[tuple[str, Sequence[str]]]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Texts, each once, and the columns of the paper that they belong to."""
    sources: dict[tuple[str, ...], list[str]] = {}
    for source, texts in found:
        sources.setdefault(tuple(texts), []).append(source)
    yield from sources.items()


def conclusions(group: Sequence[Column]) -> Iterator[Block]:
    """A closing paragraph, or one for each column."""
    if len(group) == 1:
        yield Text(conclusion(group[0]))
    else:
        yield Items([f"{column.heading}: {conclusion(column)}" for column in group])


def drawn(target: str, grouped: Mapping[str, Sequence[Column]]) -> Iterator[tuple[str, str, Any]]:
    """File names, descriptions and figures of a target."""
    slug = common_name([experiment for column in grouped["paper"] for experiment in column.experiments])
    if target == "Figure 1":
        yield f"{slug}.png", f"{target}: loss over parameters", figures.sizes(grouped)
    elif (figure := figures.differences(grouped)) is not None:
        yield f"{slug}.png", f"{target}: differences to the baseline, published and ours", figure
    for scale, group in grouped.items():
        for column in group:
            draw = figures.DRAWN.get(target) if target.startswith(("Table", "Figure")) else figures.theory
            if draw and any(row.runs for row in column.rows) and (figure := draw(column)) is not None:
                which = slug if len(group) == 1 else column.experiments[0].name
                yield f"{which}_{scale}.png", f"{target} at scale={scale}, {column.heading}", figure


def reproduce(experiments: Sequence[Experiment], scale: str, seeds: int) -> str:
    """The command that carries out experiments of one target."""
    words = [experiments[0].name if len(experiments) == 1 else common_name(experiments)]
    words += [f"scale={scale}"] * (scale != "paper") + [f"seeds={seeds}"] * (seeds > 1)
    return f"python -m cod_lightning reproduce {' '.join(words)}"


def common_name(experiments: Sequence[Experiment]) -> str:
    """What the names of the experiments of one target begin with, such as `table1`."""
    return experiments[0].name.split("_")[0]


def described(column: Column) -> str:
    """What a column is: shape, data, length and command."""
    first = column.experiments[0]
    tokens = first.paper.get("tokens") if first.scale == "paper" else None
    counted = f"; {tokens / 1e9:g}B tokens by the paper's count" if tokens else ""
    command = reproduce(column.experiments, first.scale, max(column.seeds, default=1))
    return f"{first.setting[:1].upper()}{first.setting[1:]}{counted}. `{command}`"


# The rest ------------------------------------------------------------------------------------------------------------


def not_run(experiments: Sequence[Experiment], hardware: str) -> list[Block]:
    """What the paper's own scale would take."""
    rows, hours = [], dict[str, float]()
    for experiment in (e for scales in by_target(experiments).values() for e in scales["paper"]):
        missing = [row for row in experiment.rows if not row.runs]
        if not missing:
            continue
        known = {row.computes: row.gpu_hours for row in missing if row.gpu_hours is not None}
        hours |= known
        rows.append(
            [
                experiment.name,
                f"{len(missing)} of {len(experiment.rows)}",
                f"{sum(known.values()):,.0f}" if known else "no estimate",
            ]
        )
    if not rows:
        return []
    total = (
        f" Rows that several experiments share are trained once: {sum(hours.values()):,.0f} hours of {hardware} in all."
        if hours
        else ""
    )
    head = ["experiment", "rows not run", f"hours of {hardware}" if hours else "hours"]
    return [
        Heading(2, "What was not run"),
        Text(
            f"At scale=paper, one seed; `python -m cod_lightning reproduce NAME` runs an experiment.{total} `python -m "
            "cod_lightning estimate experiments=NAME` says how the hours of one run come about; public models are "
            "measured and not trained."
        ),
        Table(head, rows),
    ]


def environments(experiments: Sequence[Experiment]) -> list[Block]:
    """Where, with what and when the runs were made."""
    runs = {
        (e.scale, row.computes, run.seed): run
        for e in experiments
        for row in e.rows
        for run in row.runs
        if "hardware" in run.record
    }
    places: dict[tuple[str, ...], list[Run]] = {}
    for (scale, _, _), run in sorted(runs.items(), key=lambda item: (SCALES.index(item[0][0]), *item[0][1:])):
        places.setdefault((scale, *environment(run.record)), []).append(run)
    rows = [
        [scale, where, versions, commit, str(len(found)), dates(found), f"{wall(found):.1f}"]
        for (scale, where, versions, commit), found in sorted(places.items())
    ]
    head = ["scale", "hardware", "versions", "commit", "runs", "dates", "hours in all"]
    return [Heading(2, "Where the runs were made"), Table(head, rows, words=(0, 1, 2, 3, 5))] if rows else []


def environment(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Hardware, versions and commit."""
    hardware = record["hardware"]
    gpus = ", ".join(sorted(hardware["gpus"]))
    where = gpus or f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['threads']} thread(s) a run"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit, changes = (record["git_commit"] or "unknown").partition("+")[::2]
    return where, versions, commit[:12] + (f"+{changes}" if changes else "")


def dates(runs: Sequence[Run]) -> str:
    days = sorted({run.record["date"][:10] for run in runs})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def wall(runs: Sequence[Run]) -> float:
    """Hours of all runs together."""
    return sum(run.record.get("wall_seconds", 0.0) for run in runs) / 3600


FIELDS = (
    *("target", "experiment", "column", "row", "label", "metric", "scale"),
    *("published", "undone", "published_difference", "published_trained"),
    *("n", "mean", "sd", "did_not_train", "failed", "difference", "margin_95", "beyond_noise", "direction"),
)


def table_csv(targets: Mapping[str, ByScale]) -> str:
    """One line for each row of each experiment, metric and scale."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for target, scales in targets.items():
        for scale, experiments in scales.items():
            for column in columns(experiments):
                for line in column.lines:
                    sample, ours = line.sample, line.difference
                    for claim in line.claims:
                        values = [claim.value, claim.undone, claim.difference, claim.trained]
                        values += [sample.n, sample.mean, sample.sd] if sample else [0, None, None]
                        values += [line.untrained, len(line.failures)]
                        values += [ours.mean, ours.margin, ours.beyond_noise] if ours else [None, None, None]
                        writer.writerow(
                            [
                                *(target, claim.experiment.name, claim.experiment.source, line.row.name),
                                *(line.row.label, line.metric.name, scale, *map(plain, values), claim.direction or ""),
                            ]
                        )
    return file.getvalue()


def plain(value: float | bool | None) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:.6g}"
