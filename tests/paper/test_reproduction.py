import csv
import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from cod_lightning.paper.claims import (
    NOISE,
    ONE_SEED,
    OPPOSITE,
    SAME,
    Column,
    Experiment,
    Metric,
    Row,
    Run,
    Sample,
    by_target,
    columns,
    seed_counts,
)
from cod_lightning.paper.document import Table, Text, page
from cod_lightning.paper.figures import fit_sizes
from cod_lightning.paper.findings import verdicts
from cod_lightning.paper.report import FIGURES, report
from cod_lightning.paper.tables import compared, conclusion

LAYERS = 4


def run(seed, loss, halfway=9.0):
    """A run that ended at a loss, with layers recorded at four steps."""
    steps = [0, 50, 100, 200]
    return Run(
        seed,
        {
            "val_loss": loss,
            "ppl": math.exp(loss),
            "parameters": 1000,
            "wall_seconds": 1800.0,
            "versions": {"python": "3.11", "torch": "2.13"},
            "git_commit": "0123456789abcdef+changes",
            "hardware": {"cpu": "abacus", "cores": 2, "threads": 1, "gpus": []},
            "date": "2026-11-24T10:00:00+00:00",
            "history": {
                "val": {"step": [100, 200], "val_loss": [halfway, loss]},
                "train": {"step": steps, "loss": [9.0, 8.0, 7.0, loss]},
                "layers": {
                    "step": steps,
                    "variance": [[0.1 * step + layer + 1 for layer in range(LAYERS)] for step in steps],
                },
            },
        },
        {},
    )


def failed(seed):
    known = run(seed, 0.0).record
    kept = {name: known[name] for name in ("versions", "git_commit", "hardware", "date")}
    return Run(seed, {"failure": "the loss is nan at step 3", **kept}, {})


def row(name, published, *runs, label=None, computes=None, **rest):
    figures = published if isinstance(published, dict) else {} if published is None else {"ppl": published}
    return Row(name, label or name, figures, None, computes or name, tuple(runs), **{"gpu_hours": None, **rest})


def table(*rows, name="table1_130m", scale="toy", column="130M", size=134, target="Table 1", **paper):
    return Experiment(name, scale, target, column, size, f"{name}.", f"setting of {scale}", paper, rows)


PUBLISHED = {"post_ln": 26.95, "mix_ln": 26.07, "pre_ln": 26.73, "lns": 25.76, "admin": 1358.11}
LOSSES = {
    "post_ln": [5.1, 5.0, 5.1],  # lower than the baseline, published higher
    "mix_ln": [5.4, 5.7, 5.5],  # sometimes lower, sometimes higher
    "pre_ln": [5.5, 5.6, 5.4],
    "lns": [5.1, 5.3, 5.0],  # lower than the baseline for every seed, as published
}


def rows_at(scale):
    return [
        row(
            name,
            value,
            *(run(seed, loss) for seed, loss in enumerate(LOSSES.get(name, []), 1) if scale == "toy"),
            computes=f"{name}-{scale}",
            gpu_hours=10.0 if scale == "paper" else None,
        )
        for name, value in PUBLISHED.items()
    ]


@pytest.fixture(scope="module")
def experiments():
    """A table of one size, run at toy scale alone."""
    return [table(*rows_at(scale), scale=scale, evaluation_batches=727, tokens=2.2e9) for scale in ("paper", "toy")]


@pytest.fixture(scope="module")
def made(experiments):
    return report(experiments, hardware="H100")


def line(column, name):
    return next(line for line in column.lines if line.row.name == name)


@pytest.mark.parametrize(
    ("value", "batches", "whole"), [(26.73, 727, 26.85), (20.35, 91, 21.04), (19.58, 91, 20.23), (15.71, 182, 15.95)]
)
def test_the_bias_of_the_released_evaluation_is_undone(value, batches, whole):
    assert Metric("ppl").undone(value, batches) == pytest.approx(whole, abs=0.006)
    assert Metric("val_loss").undone(math.log(value), batches) == pytest.approx(math.log(whole), abs=0.0004)


def test_accuracies_have_no_such_bias_and_are_per_cent():
    rows = [row("none", {"accuracy": 67.91}), row("lns", {"accuracy": 68.75}, Run(1, {"accuracy": 50.0}, {}))]
    found = line(Column((table(*rows, evaluation_batches=727),)), "lns")
    assert found.sample == Sample(1, 50.0, None)
    assert found.claims[0].undone is None
    assert found.claims[0].difference == pytest.approx(0.84)


def test_mean_standard_deviation_and_paired_interval(experiments):
    found = line(Column((experiments[1],)), "lns")
    perplexities = [math.exp(loss) for loss in LOSSES["lns"]]
    assert found.sample.n == 3
    assert found.sample.mean == pytest.approx(np.mean(perplexities))
    assert found.sample.sd == pytest.approx(np.std(perplexities, ddof=1))
    # differences -0.4, -0.3, -0.4: mean -11/30, standard deviation 0.1 / sqrt(3), t of two degrees of freedom 4.303
    assert found.difference.mean == pytest.approx(-11 / 30)
    assert found.difference.margin == pytest.approx(4.303 * (0.1 / math.sqrt(3)) / math.sqrt(3))
    assert found.difference.beyond_noise


def test_pairs_are_of_the_same_seed():
    rows = [row("pre_ln", 20.0, run(1, 5.0), run(3, 7.0)), row("lns", 19.0, run(2, 1.0), run(3, 6.0))]
    found = line(Column((table(*rows),)), "lns")
    assert (found.difference.n, found.difference.mean) == (1, pytest.approx(-1.0))


def test_directions(experiments):
    column = Column((experiments[1],))
    directions = {line.row.name: line.claims[0].direction for line in column.lines}
    assert directions == {"post_ln": OPPOSITE, "mix_ln": NOISE, "pre_ln": None, "lns": SAME, "admin": None}


def test_one_seed_tells_no_direction():
    rows = [row("pre_ln", 20.0, run(1, 5.0)), row("lns", 19.0, run(1, 4.0))]
    column = Column((table(*rows),))
    assert line(column, "lns").claims[0].direction == ONE_SEED
    assert conclusion(column).startswith("One seed, so that no difference can be told from noise.")


def test_the_closing_paragraph(experiments):
    assert conclusion(Column((experiments[1],))) == (
        "Post_ln (-0.433) and lns (-0.367) differ from pre_ln by more than noise. Direction beside the paper's 130M: "
        "same for lns; opposite for post_ln; within noise for mix_ln. Lowest perplexity: post_ln here, lns (130M) in "
        "the paper."
    )


def test_what_did_not_train_and_what_failed_is_told():
    rows = [
        row("pre_ln", 20.0, run(1, 5.0)),
        row("deep_norm", 1358.0, run(1, 6.99, halfway=7.0)),
        row("post_ln", 20.1, failed(1)),
        row("mix_ln", 20.1, run(1, math.nan)),
    ]
    column = Column((table(*rows),))
    cells = {cells[0]: cells for cells in compared(column).rows}
    assert cells["deep_norm"][1] == f"{math.exp(6.99):.2f} (did not train: 1 of 1)"
    assert cells["post_ln"][1] == "(failed: the loss is nan at step 3)"
    assert cells["mix_ln"][1] == "nan (did not train: 1 of 1)"
    assert not line(column, "deep_norm").claims[0].trained
    assert "deep_norm and mix_ln did not train" in conclusion(column)
    everything = report([table(*(replace(r, runs=()) for r in rows), scale="paper"), table(*rows)])
    assert "(failed: the loss is nan at step 3)" in everything.markdown


def test_what_did_not_train_says_so_where_it_agrees():
    rows = [
        row("pre_ln", 20.0, run(1, 5.0), run(2, 5.1)),
        row("deep_norm", 20.1, run(1, 6.99, halfway=7.0), run(2, 6.99, halfway=7.0)),
    ]
    published = table(*(replace(r, runs=()) for r in rows), scale="paper")
    (found,) = tables_of(report([published, table(*rows)]).markdown)["## At a glance"][2:]
    assert found == ["| Table 1", "toy", "2", "deep_norm (did not train here) |"]


def test_sizes_that_are_the_same_runs_are_one_column():
    small, large = (
        table(*(replace(r, published={"ppl": value}) for r, value in zip(rows_at("toy"), figures, strict=True)), **rest)
        for figures, rest in (
            (PUBLISHED.values(), {"column": "130M"}),
            ((1409.79, 21.39, 21.92, 20.35, 23.0), {"column": "250M", "name": "table1_250m"}),
        )
    )
    (column,) = columns([small, large])
    assert column.heading == "130M, 250M"
    assert [claim.direction for claim in line(column, "post_ln").claims] == [OPPOSITE, OPPOSITE]
    other = replace(large, rows=(replace(large.rows[0], computes="another shape"), *large.rows[1:]))
    assert len(columns([small, other])) == 2


def test_sizes_of_their_own_are_one_table_with_a_paragraph_each():
    sizes = [
        table(
            row("pre_ln", {"val_loss": 3.67}, run(1, 5.0), run(2, 5.1), computes=f"pre-{size}"),
            row("lns", {"val_loss": 3.56}, run(1, 4.0), run(2, 4.2), computes=f"lns-{size}"),
            **{"name": f"figure1_{size}m", "target": "Figure 1", "column": f"{size}M", "size": size},
        )
        for size in (60, 150)
    ]
    published = [replace(e, scale="paper", rows=tuple(replace(r, runs=()) for r in e.rows)) for e in sizes]
    made = report([*published, *sizes]).markdown
    rows = tables_of(made)["### Figure 1: ours at scale=toy"]
    assert rows[0][-1] == "published, direction |"
    assert rows[3] == ["| 60M: lns", "4.100 ± 0.141", "2", "-0.950 ± 0.635".join(("**", "**")), "-0.110, same |"]
    assert "- 150M: Lns (-0.950) differs from pre_ln by more than noise." in made


def test_the_baseline_is_pre_ln_or_else_the_first_row():
    assert Column((table(row("lns", 1.0), row("pre_ln", 2.0)),)).baseline.name == "pre_ln"
    assert Column((table(row("scaled_init", 1.0), row("lns", 2.0)),)).baseline.name == "scaled_init"


def test_rows_of_more_and_fewer_seeds_are_counted_apart():
    rows = [row("pre_ln", 20.0, run(1, 5.0), run(2, 5.1)), row("lns", 19.0, run(1, 4.0)), row("admin", 21.0)]
    assert seed_counts(rows) == "1 to 2"
    assert seed_counts(rows[:1]) == "2"
    assert seed_counts(rows[2:]) == "0"


def test_targets_are_in_the_papers_order():
    made = [table(target=target, name=target) for target in ("Theory", "Figure 10", "Table 10", "Figure 2", "Table 2")]
    assert list(by_target(made)) == ["Table 2", "Table 10", "Figure 2", "Figure 10", "Theory"]


# The document --------------------------------------------------------------------------------------------------------


def tables_of(markdown):
    """Head and rows of the first table below every heading."""
    found, heading = {}, ""
    for block in markdown.split("\n\n"):
        heading = block if block.startswith("#") else heading
        if block.startswith("| "):
            found.setdefault(heading, [[cell.strip() for cell in line.split(" | ")] for line in block.splitlines()])
    return found


def test_published_figures_stand_beside_cells_that_say_not_run(made):
    head, _, *rows = tables_of(made.markdown)["### Table 1: published perplexity, and ours at scale=paper"]
    assert head == ["| row", "130M, published", "N + 1 undone", "ours |"]
    assert ["| pre_ln", "26.73", "26.85", "not run |"] in rows
    assert ["| lns", "25.76", "25.88", "not run |"] in rows
    assert all(row[-1] == "not run |" for row in rows)


def test_scales_are_never_mixed(experiments):
    run_at_mini = table(
        *(replace(r, computes=f"{r.computes}-mini", runs=(run(1, 1.0),)) for r in rows_at("mini")), scale="mini"
    )
    found = tables_of(report([*experiments, run_at_mini]).markdown)
    perplexity = {"paper": "not run", "mini": f"{math.e:.2f}", "toy": f"{np.exp(LOSSES['lns']).mean():.2f}"}
    for scale, heading in (("mini", "### Table 1: ours at scale=mini"), ("toy", "### Table 1: ours at scale=toy")):
        text = " ".join(cell for row in found[heading] for cell in row)
        assert perplexity[scale] in text
        assert not any(other in text for name, other in perplexity.items() if name not in (scale, "paper"))


def test_what_agrees_with_the_paper_stands_at_the_top(made):
    head, _, found = tables_of(made.markdown)["## At a glance"]
    assert head == ["| target", "scale", "seeds", "as in the paper", "opposite", "within noise |"]
    assert found == ["| Table 1", "toy", "3", "lns", "post_ln", "mix_ln |"]
    first, second = made.markdown.split("\n\n")[3:5]
    assert first.startswith("**lns against pre_ln** (Table 1, scale=toy, n = 3): -0.367 ± 0.143 nats; in the paper")
    assert first.endswith(" -0.037.")
    assert second.startswith(
        "Of 3 comparisons at scale=toy, 1 point as in the paper, 1 the opposite way and 1 lie within noise. Nothing "
        "has been compared at scale=paper, scale=mini and scale=small."
    )


def test_of_a_row_the_columns_are_named_where_not_all_agree():
    sizes = [
        table(*(replace(r, published={"ppl": value}) for r, value in zip(rows_at("toy"), figures, strict=True)), **rest)
        for figures, rest in (
            (PUBLISHED.values(), {"column": "130M"}),
            ((20.0, 21.39, 21.92, 20.35, 23.0), {"column": "250M", "name": "table1_250m"}),
        )
    ]
    papers = [replace(e, scale="paper", rows=tuple(replace(r, runs=()) for r in e.rows)) for e in sizes]
    (found,) = tables_of(report([*papers, *sizes]).markdown)["## At a glance"][2:]
    assert found == ["| Table 1", "toy", "3", "post_ln (250M); lns", "post_ln (130M)", "mix_ln |"]


def test_marks_and_rows_of_the_comparison(made):
    head, _, *rows = tables_of(made.markdown)["### Table 1: ours at scale=toy"]
    assert head[3:] == ["difference to pre_ln, nats (95 %)", "130M: published, direction |"]
    cells = {row[0].removeprefix("| "): row for row in rows}
    assert cells["lns"][2:] == ["3", "**-0.367 ± 0.143**", "-0.037, same |"]
    assert cells["mix_ln"][3:] == ["+0.033 ± 0.287", "-0.025, within noise |"]
    assert cells["pre_ln"][3] == "baseline"
    assert cells["admin"][1:] == ["not run", "0", "", "+3.933 (did not train), not run |"]


def test_what_it_would_take_is_told(made):
    rows = tables_of(made.markdown)["## What was not run"]
    assert rows[0] == ["| experiment", "rows not run", "hours of H100 |"]
    assert rows[2] == ["| table1_130m", "5 of 5", "50 |"]
    assert "Not run: scale=paper, scale=mini and scale=small." in made.markdown
    assert made.markdown.count("`python -m cod_lightning reproduce table1_130m`") == 1


def test_a_row_of_two_tables_is_counted_once(experiments):
    again = replace(experiments[0], name="table7_130m", target="Table 7")
    assert "trained once: 50 hours of H100 in all" in report([*experiments, again], "H100").markdown


def test_where_and_when_is_told(made):
    (row,) = tables_of(made.markdown)["## Where the runs were made"][2:]
    assert row == [
        "| toy",
        "abacus, 2 cores, 1 thread(s) a run",
        "python 3.11, torch 2.13",
        "0123456789ab+changes",
        "12",
        "2026-11-24",
        "6.0 |",
    ]


def test_the_csv_holds_every_row(made):
    rows = list(csv.DictReader(io.StringIO(made.csv)))
    assert len(rows) == 10
    (found,) = (r for r in rows if (r["scale"], r["row"]) == ("toy", "lns"))
    assert (found["published"], found["undone"], found["n"], found["direction"]) == ("25.76", "25.8754", "3", "same")
    assert float(found["difference"]) == pytest.approx(-11 / 30, abs=1e-6)
    (missing,) = (r for r in rows if (r["scale"], r["row"]) == ("paper", "lns"))
    assert (missing["n"], missing["mean"], missing["direction"]) == ("0", "", "")


def test_several_metrics_are_one_table_of_a_size():
    published = {"mmlu": 24.93, "boolq": 38.35}
    rows = [
        row("pre_ln", published),
        row("lns", {"mmlu": 27.08, "boolq": 58.17}, Run(1, {**run(1, 2.0).record, "mmlu": 25.0}, {})),
    ]
    made = tables_of(report([table(*rows, scale="paper", target="Table 2", column="250M")]).markdown)
    assert made["### Table 2: published figures, and ours at scale=paper"][2:] == [
        ["| pre_ln, published", "24.93", "38.35 |"],
        ["| lns, published", "27.08", "58.17 |"],
        ["| lns, ours", "25.00", "not run |"],
        ["| pre_ln, ours", "not run", "not run |"],
    ]


def test_a_figure_that_the_paper_does_not_print_has_none_beside_it():
    rows = [
        row("pre_ln", {"average": 36.93}, *(Run(seed, {"accuracy": 20.0 + seed}, {}) for seed in (1, 2))),
        row("lns", {"average": 43.14}, *(Run(seed, {"accuracy": 30.0 + seed}, {}) for seed in (1, 2))),
    ]
    scored = [table(*rows, metric="accuracy", target="Table 2", scale=scale) for scale in ("toy", "paper")]
    made = report([scored[0], replace(scored[1], rows=tuple(replace(r, runs=()) for r in rows))])
    head, _, *cells = tables_of(made.markdown)["### Table 2: ours at scale=toy"]
    assert head == ["| row", "accuracy, mean ± sd", "n", "difference to pre_ln, points (95 %) |"]
    assert cells[1] == ["| lns", "31.50 ± 0.71", "2", "+10.00 ± 0.00".join(("**", "** |"))]
    assert not re.search(r"toy.*43\.14|43\.14.*toy", made.markdown)
    assert "Highest accuracy: lns here, which the paper does not print." in made.markdown
    assert all(found.direction is None for line in Column((scored[0],)).lines for found in line.claims)


def figure_experiments(*targets):
    """One experiment for each, run and measured at toy scale."""
    theory = {
        **{"lns": False, "c": 1.0, "gains": [1.0, 2.0, 3.0], "growth": {"power": 2.0, "power_r2": 0.9}},
        **{"fitted_constants": [1.0, 0.5], "fitted_log_bound": [0.0, 0.5, 1.0], "shape_log_bound": [0.0, 9.0, 20.0]},
        **{name: [1.0, 2.0, 3.0] for name in ("variances", "lemma", "lemma_fitted", "recursion")},
    }
    measures = {
        "angular": {
            "distances": [[0.3, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, None], [0.4, 0.3, None, None], [0.5] + 3 * [None]]
        },
        "removal": {"loss": 2.0, "losses": [3.0, 2.5, 2.1, 1.99]},
        "jacobian": {"distance": [3.0, 0.2, 0.1, 0.1]},
        "jacobian_map": {"layers": [1, 2, 3, 4], "matrices": [np.eye(3).tolist()] * 4},
        "theory": theory,
    }
    paper = {
        "Figure 6": {"published_curves": {"pre_ln": [[0, 3.4], [10, 3.0]], "lns": [[0, 3.5], [10, 2.9]]}},
        "Figure 9": {"fractions": [0.25, 0.5]},
    }

    def rows(target, scale):
        for name, loss in (("pre_ln", 3.67), ("lns", 3.56)):
            runs = [replace(run(seed, 5.0 - seed), measures=measures) for seed in (1, 2) if scale == "toy"]
            yield row(name, {"val_loss": loss} if target == "Figure 1" else None, *runs)

    return [
        table(*rows(target, scale), target=target, name=slug(target), scale=scale, **paper.get(target, {}))
        for target in targets
        for scale in ("paper", "toy")
    ]


def slug(target):
    return target.lower().replace(" ", "")


FIGURE_TARGETS = ("Figure 1", "Figure 4", "Figure 5", "Figure 6", "Figure 7", "Figure 9", "Theory")
"""Every drawing once."""


@pytest.fixture(scope="module")
def all_figures():
    return report(figure_experiments(*FIGURE_TARGETS))


def test_every_figure_is_drawn(all_figures):
    expected = {"figure1.png", *(f"{slug(target)}_toy.png" for target in FIGURE_TARGETS[1:])}
    assert set(all_figures.figures) == expected
    for name, image in all_figures.figures.items():
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(image[16:20], "big") == 900, name
        assert f"]({FIGURES}/{name})" in all_figures.markdown


def test_figures_are_numbers_too(all_figures):
    found = {heading: rows[2][1:] for heading, rows in tables_of(all_figures.markdown).items() if "ours at" in heading}
    assert found["### Figure 7: ours at scale=toy"] == ["0.1 ± 0", "0.045 ± 0", "2 |"]
    assert found["### Figure 4: ours at scale=toy"] == ["24 ± 0", "24 ± 0", "1.14 ± 0", "2 |"]
    assert found["### Figure 5: ours at scale=toy"] == ["0.2 ± 0", "0.1 ± 0", "1 ± 0", "2 |"]
    assert found["### Figure 9: ours at scale=toy"] == ["9 ± 0", "14 ± 0", "2 |"]
    assert found["### Theory: ours at scale=toy"] == ["2 ± 0", "0.9 ± 0", "1 ± 0", "3 ± 0", "2 |"]


def test_what_the_paper_finds_in_a_figure_is_compared(all_figures):
    found = {target: found for found, target in findings_of(all_figures.markdown)}
    assert found["Figure 4"] == [["| LNS: less variance at the end than Pre-LN", "+0 ± 0", "2", "within noise |"]]
    assert found["Figure 5"] == [["| Pre-LN: Jacobians come nearer to I with depth", "**+0.693 ± 0**", "2", "same |"]]
    assert found["Figure 9"][0][1:] == ["**+0.134 ± 0**", "2", "same |"]
    assert [row[-1] for row in found["Figure 7"]] == ["within noise |", "within noise |"]
    glance = {row[0]: row[3:] for row in tables_of(all_figures.markdown)["## At a glance"][2:]}
    assert glance["| Figure 5"] == ["Pre-LN: Jacobians come nearer to I with depth", "|"]


def findings_of(markdown):
    """Rows of the tables of findings, and their figures."""
    target = ""
    for block in markdown.split("\n\n"):
        target = block[4:].partition(":")[0] if block.startswith("### ") else target
        if block.startswith("| the paper's finding"):
            yield [[cell.strip() for cell in line.split(" | ")] for line in block.splitlines()[2:]], target


@pytest.mark.parametrize(
    ("losses", "directions"),
    [([3.0, 2.5, 2.1, 2.1], [SAME, OPPOSITE]), ([2.1, 2.1, 2.5, 3.0], [OPPOSITE, SAME])],
)
def test_halves_of_the_layers_are_compared(losses, directions):
    runs = [replace(run(seed, 5.0), measures={"removal": {"loss": 2.0, "losses": losses}}) for seed in (1, 2)]
    column = Column((table(row("pre_ln", None, *runs), row("post_ln", None, *runs), target="Figure 2"),))
    cost_of_pre, turn, cost_of_post, _ = verdicts("Figure 2", column)
    assert [cost_of_pre.direction, cost_of_post.direction] == directions
    assert (turn.difference, turn.direction) == (None, None)
    assert verdicts("Figure 2", Column((table(row("lns", None, *runs), target="Figure 2"),))) == []


def test_layers_matter_more_evenly_where_the_costliest_has_less_of_the_cost():
    """Of 1.0 + 0.1 + 0.1 + 0.0 the first block has 1 / 1.2, of four times 0.5 a quarter."""
    uneven, even = (
        [replace(run(seed, 5.0), measures={"removal": {"loss": 2.0, "losses": losses}}) for seed in (1, 2)]
        for losses in ([3.0, 2.1, 2.1, 2.0], [2.5] * 4)
    )
    for lns, pre_ln, expected in ((even, uneven, SAME), (uneven, even, OPPOSITE)):
        column = Column((table(row("pre_ln", None, *pre_ln), row("lns", None, *lns), target="Figure 7"),))
        verdict = verdicts("Figure 7", column)[0]
        assert verdict.direction == expected
        assert abs(verdict.difference.mean) == pytest.approx(math.log(4 / 1.2))


def test_what_was_run_but_not_measured_says_so():
    rows = [row("pre_ln", None, run(1, 5.0))]
    made = report([table(*rows, target="Figure 7", name="figure7", scale=scale) for scale in ("paper", "toy")])
    assert "130M: not measured yet." in made.markdown
    assert made.figures == {}


def test_a_public_model_is_measured_and_not_trained():
    measured = Run(0, {}, {"removal": {"loss": 2.0, "losses": [3.0, 2.5, 2.1, 2.3]}})
    rows = [row("pre_ln", None, measured, label="LLaMA2-13B")]
    made = report([table(*rows, target="Figure 2", name="figure2_llama2_13b", scale="paper")])
    assert set(made.figures) == {"figure2_paper.png"}
    assert "| LLaMA2-13B | not measured | 0.2 | 1 |" in made.markdown
    assert "Where the runs were made" not in made.markdown


def test_rows_of_different_names_that_are_the_same_runs_carry_all_names():
    made = [
        table(row("pre_ln", None, run(1, 5.0), label=label), target="Figure 2", name=label, column=label)
        for label in ("Qwen3-8B", "LLaMA2-13B")
    ]
    (column,) = columns(made)
    assert [row.label for row in column.rows] == ["Qwen3-8B, LLaMA2-13B"]


def test_the_page_needs_no_other_file(all_figures):
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', all_figures.html)
    assert all_figures.html.count("data:image/png;base64,") == len(all_figures.figures)
    assert "<script" not in all_figures.html
    assert "url(" not in all_figures.html


def test_marks_are_set_in_html_but_not_inside_code():
    made = page("", [Text("*A title* of `a/*.yaml` and `*`, **bold**, 2 * 3 * 4"), Table(["a", "b"], [["x", "1"]])], {})
    assert "<i>A title</i> of <code>a/*.yaml</code> and <code>*</code>, <b>bold</b>, 2 * 3 * 4" in made
    assert '<td class="text">x</td><td>1</td>' in made


def test_the_page_escapes_what_it_is_given():
    made = report([table(row("pre_ln", 20.0, label="<b>Pre & LN"), scale="paper")])
    assert "&lt;b&gt;Pre &amp; LN" in made.html
    assert "<b>Pre" not in made.html


def test_the_same_records_give_the_same_bytes(experiments, all_figures):
    made = report([*experiments, *figure_experiments("Figure 1", "Figure 7")])
    assert report([*experiments, *figure_experiments("Figure 1", "Figure 7")]) == made
    assert made.figures["figure7_toy.png"] == all_figures.figures["figure7_toy.png"]


def test_a_fit_of_loss_over_size():
    sizes = [60e6, 150e6, 300e6, 1e9, 7e9]
    equation, curve = fit_sizes(sizes, [2.0 + 40 * n**-0.2 for n in sizes])
    assert curve(np.array(sizes)) == pytest.approx([2.0 + 40 * n**-0.2 for n in sizes], abs=1e-6)
    assert equation == "2.00 + 40 N^-0.200"
    equation, curve = fit_sizes([1e6, 1e8], [5.0, 3.0])
    assert equation == "11.00 -1.000 log10 N"
    assert curve(np.array([1e7])) == pytest.approx([4.0])
    assert fit_sizes([1e6], [5.0]) is None


def test_a_fit_does_not_go_below_zero():
    sizes = np.array([1e6, 1e7, 1e8, 1e9])
    equation, curve = fit_sizes(sizes, 9 - np.log10(sizes))
    assert equation.startswith("0.00 + ")
    assert curve(np.array([1e15])) > 0


def test_what_stands_in_for_a_public_model_says_so():
    paper = {"rows": {"pre_ln": {"subject": "meta-llama/Llama-2-13b-hf"}}}
    made = {scale: table(row("pre_ln", None, label="LLaMA2-13B"), scale=scale, **paper) for scale in ("paper", "toy")}
    assert Column((made["paper"],)).rows[0].label == "LLaMA2-13B"
    assert Column((made["toy"],)).rows[0].label == "stand-in for LLaMA2-13B"
