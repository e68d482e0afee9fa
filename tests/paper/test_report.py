"""The report on runs: verdict, tables, figures, HTML and CSV."""

import csv
import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from paper_builders import (
    LOSSES,
    PUBLISHED,
    diverged,
    rate_columns,
    row,
    rows_at,
    run,
    runs_of,
    table,
    tables_of,
    with_published,
    without_runs,
)

from cod_lightning.page import Table, html_page
from cod_lightning.paper.claims import Column, Run, by_target
from cod_lightning.paper.figures import (
    difference_figure,
    differences_over_settings,
    fit_sizes,
    our_points,
    short_number,
)
from cod_lightning.paper.layer_figures import at_common_steps, draw, sd_of
from cod_lightning.paper.pretrained_models import PretrainedModel, pretrained_model_lines
from cod_lightning.paper.report import FIGURES, build_report
from cod_lightning.paper.tables import (
    changes_per_doubling,
    comparison_table,
    not_run_table,
    summary_lines,
    tuned_strategies_table,
)
from cod_lightning.paper.tuning import excess, tuned_rows
from cod_lightning.paper.verdict import claim_results, summarize, verdict

pytestmark = pytest.mark.usefixtures("without_images")  # the fixtures of the module have images


@pytest.fixture(scope="module")
def report(experiments):
    return build_report(experiments, hardware="H100")


def verdict_on(*experiments):
    targets = by_target(experiments)
    return verdict(targets, summarize(targets))


def published_and(*experiments):
    """Experiments at scale=toy, and the same at scale=paper, which were not run."""
    return [*map(without_runs, experiments), *experiments]


# Verdict -------------------------------------------------------------------------------------------------------------


def test_the_report_opens_with_the_headline_and_its_interval(report):
    assert report.markdown.startswith(
        "# Reproduction\n\n"
        "**At scale=toy** (setting of toy, 3 seeds), LNS minus Pre-LN in validation loss is -0.367±0.143 nats "
        "(95% interval). The paper's Table 1, corrected: -0.037. post_ln minus LNS: -0.067±0.517 (perhaps noise).\n"
    )


def test_the_verdict_lists_opposite_unsettled_and_untried_findings(experiments):
    untried = table(*rows_at("paper"), name="table9", target="Table 9", scale="paper")
    text = verdict_on(*experiments, untried)
    assert "- Table rows: opposite 1 (0); open 1.\n" in text
    assert "Not run: Table 9; scale=paper, mini, small." in text


def test_a_row_that_is_opposite_at_one_size_and_unclear_at_another_holds_at_none():
    rows = rows_at("toy")
    small, large = (
        table(*with_published(rows, (post_ln, 26.07, 26.73, 25.76, 27.0)), column=column, name=f"table1_{column}")
        for column, post_ln in (("130M", 27.2), ("250M", 26.75))
    )
    (summary,) = summarize(by_target(published_and(small, large)))
    assert [claim.statement for claim in summary.by_direction["opposite"]] == ["post_ln loses to pre_ln"]


def test_the_headline_says_when_many_comparisons_make_it_insignificant():
    baseline = row("pre_ln", 20.0, *(run(seed, 5.0) for seed in (1, 2, 3)))
    lns = row("lns", 19.0, run(1, 4.9), run(2, 4.87), run(3, 4.92))
    others = [row(f"row {n}", 21.0, *(run(seed, 4.9 + seed / 20) for seed in (1, 2, 3))) for n in range(9)]
    assert "-0.103±0.063 nats (95% interval). The paper" in verdict_on(*published_and(table(baseline, lns)))
    headline = "-0.103±0.063 nats (95% interval); p=0.019 fails Holm's correction (10 comparisons). The paper"
    assert headline in verdict_on(*published_and(table(baseline, lns, *others)))


def test_the_verdict_has_at_most_150_words():
    names = ["pre_ln", "lns", *(f"a strategy with quite a long name {number}" for number in range(40))]
    rows = [row(name, 20.0 + i, *runs_of([5.0 + i, 5.1 + i, 5.2 + i])) for i, name in enumerate(names)]
    many = [table(*rows, target=f"Table {n}", name=f"table{n}") for n in (1, 2)]
    others = [table(row("pre_ln", 1.0), target=f"Table {n}", name=f"table{n}") for n in range(3, 30)]
    text = verdict_on(*map(without_runs, others), *published_and(*many))
    assert 50 < len(text.split()) <= 150
    assert "Not run: Tables 3, 4, 5" in text


def test_the_final_loss_of_a_figure_is_not_about_layers():
    rows = [row(name, None, *(run(seed, loss) for seed in (1, 2, 3))) for name, loss in (("pre_ln", 5.0), ("lns", 4.5))]
    (summary,) = summarize(by_target(published_and(table(*rows, target="Figure 6", name="figure6"))))
    assert {claim.about_layers for claims in summary.by_direction.values() for claim in claims} == {False}
    assert [claim.statement for claim in summary.by_direction["same"]] == ["LNS: lower final loss"]


def test_the_verdict_names_a_claim_about_layers_of_every_direction():
    cheap, costly = ({"loss": 2.0, "losses": [2.5, 2.5, 2.1 + x, 2.1 + x]} for x in (0.0, 0.2))
    angles = {"distances": [[0.1, 0.1, 0.3, 0.3]]}
    rows = [
        row(name, None, *(run(seed, 5.0, removal=removal, angular=angles) for seed in (1, 2, 3)))
        for name, removal in (("pre_ln", cheap), ("post_ln", costly))
    ]
    text = verdict_on(*published_and(table(*rows, target="Figure 2", name="figure2")))
    assert (
        "- Layers: hold 2 (2), e.g. Pre-LN: removing deep blocks costs less (+0.4±0 nats) †; "
        "opposite 2 (2), e.g. Pre-LN: deep blocks rotate the stream less (-0.2±0 angle / pi) †.\n"
    ) in text


def test_the_committed_verdict_has_at_most_150_words():
    text = (Path(__file__).parents[2] / "REPRODUCTION.md").read_text()
    verdict = text.removeprefix("# Reproduction\n").partition("\n![")[0]
    assert 50 < len(verdict.split()) <= 150


def test_the_verdict_details_the_scale_whose_headline_has_an_interval(experiments):
    small = table(*(replace(r, runs=r.runs[:1]) for r in rows_at("small", run_at="small")), scale="small")
    text = verdict_on(*experiments, small)
    assert (
        "**At scale=small** (setting of small, 1 seed), LNS minus Pre-LN in validation loss is -0.400 nats, "
        "without an interval." in text
    )
    assert "Other claims, scale=toy (brackets, †: pass Holm's correction):" in text


def test_the_larger_of_two_scales_with_an_interval_ranks_first(experiments):
    small = table(*rows_at("small", run_at="small"), scale="small")
    assert max(summarize(by_target([*experiments, small])), key=lambda summary: summary.rank).scale == "small"


def test_the_claims_below_the_headline_leave_it_out(experiments):
    (summary,) = summarize(by_target(experiments))
    statements = {name: [claim.statement for claim in claims] for name, claims in summary.by_direction.items()}
    assert statements == {"same": [], "opposite": ["post_ln loses to pre_ln"], "open": ["mix_ln beats pre_ln"]}


def test_the_headline_is_that_of_the_first_table():
    tables = [
        table(row("pre_ln", 20.0, run(1, 5.0)), row("lns", 19.0, run(1, loss), run_id=target), target=target)
        for target, loss in (("Table 6", 3.0), ("Table 1", 4.0))
    ]
    (summary,) = summarize(by_target(published_and(*tables)))
    assert summary.headline.difference.mean == pytest.approx(-1.0)


def test_a_row_with_a_diverged_run_has_no_difference():
    rows = [
        row("pre_ln", 20.0, run(1, 5.0), run(2, 5.5), run(3, 5.2)),
        row("lns", 19.0, run(1, 4.6), run(2, 5.1), diverged(3), diverged(4)),
        row("post_ln", 20.1, diverged(1), diverged(2)),
        row("mix_ln", 19.5, run(1, 4.9), run(2, 5.3), run(3, 5.2)),
    ]
    markdown = build_report(published_and(table(*rows))).markdown
    assert "LNS cannot be compared with Pre-LN; lns: 2 of 4 diverged." in markdown
    at_a_glance = tables_of(markdown)["### scale=toy"]
    assert at_a_glance[1][-2:] == ["mix_ln", "lns; post_ln"]


def test_one_test_with_two_labels_is_named_once():
    baseline = row("pre_ln", 20.0, *(run(seed, 5.0) for seed in range(4)))
    pairs = [run(seed, 4.5 + seed / 1000) for seed in range(4)]
    lns, same = (row("lns", 19.0, *pairs, label=label, run_id="lns") for label in ("LNS", "After LN"))
    tables = [table(baseline, lns), table(baseline, same, target="Table 8", name="table8_130m")]
    assert "1 comparison remains significant (†): LNS." in build_report(published_and(*tables)).markdown


def test_an_interval_that_holds_zero_may_be_noise():
    rows = [row("pre_ln", 20.0, *runs_of([5.0, 5.5, 5.2])), row("lns", 19.0, *runs_of([5.2, 5.1, 5.0]))]
    assert ", which may be noise." in verdict_on(*published_and(table(*rows)))


def test_without_runs_nothing_was_tested(experiments):
    assert verdict_on(experiments[0]).startswith("No claim of the paper was tested.")


def test_the_report_states_the_number_of_comparisons_and_holms_correction(report):
    (line,) = re.findall(r"- \*\*Multiple comparisons, scale=toy.*", report.markdown)
    assert (
        "3 distinct comparisons have an interval, those without a published figure among them; 2 of these "
        "intervals exclude zero" in line
    )
    assert "0.2 would exclude zero by chance on average, and at least one with a probability of 14 %" in line
    assert line.endswith("1 comparison remains significant (†): lns.")


def test_the_same_runs_in_two_tables_are_one_comparison(experiments):
    same_runs = [replace(e, name="table7_130m", target="Table 7") for e in experiments]
    assert "scale=toy.** 3 distinct comparisons" in build_report([*experiments, *same_runs]).markdown


# Tables --------------------------------------------------------------------------------------------------------------


def test_at_a_glance_lists_the_directions(report):
    assert tables_of(report.markdown)["### scale=toy"] == [
        ["target", "seeds", "as in the paper", "opposite", "within noise"],
        ["Table 1", "3", "lns", "post_ln", "mix_ln"],
    ]


def test_a_row_names_the_columns_if_they_disagree():
    figures = {"130M": PUBLISHED.values(), "250M": (20.0, 21.39, 21.92, 20.35, 23.0)}
    sizes = [
        table(*with_published(rows_at("toy"), values), column=size, name=f"table1_{size}")
        for size, values in figures.items()
    ]
    at_a_glance = tables_of(build_report(published_and(*sizes)).markdown)["### scale=toy"]
    assert at_a_glance[1:] == [["Table 1", "3", "post_ln (250M); lns", "post_ln (130M)", "mix_ln"]]


def test_published_figures_are_listed_with_the_bias_undone(report):
    head, *rows = tables_of(report.markdown)["### Table 1: published"]
    assert head == ["row", "130M (corrected)"]
    assert ["pre_ln", "26.73 (26.85)"] in rows
    assert ["lns", "25.76 (25.88)"] in rows


def test_our_paired_differences_are_listed_beside_the_papers(report):
    head, *rows = tables_of(report.markdown)["### Table 1: ours at scale=toy"]
    assert head[3:] == ["difference to pre_ln, nats (95 %)", "130M (corrected): published, direction"]
    cells = {row[0]: row[2:] for row in rows}
    assert cells == {
        "post_ln": ["3", "**-0.433 ± 0.379**", "+0.017, opposite"],
        "mix_ln": ["3", "+0.033 ± 0.287", "-0.025, within noise"],
        "pre_ln": ["3", "baseline"],
        "lns": ["3", "**-0.367 ± 0.143** †", "-0.037, same"],
    }


def test_the_best_rows_and_omitted_seeds_are_named():
    rows = [row("pre_ln", 20.0, *runs_of([5.0, 5.1, 5.0])), row("lns", 19.0, *runs_of([4.0, 4.2, 4.1, 4.0]))]
    assert summary_lines(Column((table(*rows),))) == [
        "Beyond noise: lns (-0.933).",
        "Lowest perplexity: lns here; lns in the paper (130M).",
        "Left out of the differences for lack of a pair: seed 4 (lns).",
    ]
    assert comparison_table(Column((table(*rows),))).rows[1][3] == "**-0.933 ± 0.143** (3 pairs)"


def test_the_first_three_seeds_and_rows_equal_to_the_best_are_named():
    losses = {"pre_ln": [5.0, 5.1, 5.0, 5.1], "lns": [4.9, 5.0, 4.9, 3.9], "post_ln": [4.8, 5.1, 4.8, 4.1]}
    rows = [row(name, 20.0, *(run(seed, loss) for seed, loss in enumerate(own))) for name, own in losses.items()]
    lines = summary_lines(Column((table(*rows),)))
    assert lines[1:3] == [
        "The first three seeds alone: lns (-0.100 ± 0.000) and post_ln (-0.133 ± 0.287).",
        "Lowest perplexity: lns here (within noise of it: pre_ln and post_ln); lns in the paper (130M).",
    ]


def test_rows_that_the_printed_values_put_elsewhere_are_named():
    rows = [row("pre_ln", 26.73, *runs_of([5.0, 5.1, 5.0])), row("post_ln", 26.95, *runs_of([4.8, 4.9, 4.9]))]
    rows_with_own = {"rows": {"post_ln": {"evaluation_batches": 182}}}
    lines = summary_lines(Column((table(*rows, evaluation_batches=727, **rows_with_own),)))
    assert lines[-1] == "By the printed values, without the correction: post_ln unclear in the paper (130M)."
    assert "printed" not in str(summary_lines(Column((table(*rows, evaluation_batches=727),))))


def test_the_slope_of_a_difference_is_over_the_seeds_of_all_settings():
    columns = [Column((e,)) for e in family("Depth", "blocks", {6: 4.9, 12: 4.8, 24: 4.7, 48: 4.6})]
    head = "Change of the difference to pre_ln per doubling of the blocks (nats, 95 %; outside Holm's correction)"
    assert changes_per_doubling(columns) == [f"{head}: lns **-0.100 ± 0.000** (n = 3)."]
    assert changes_per_doubling(columns[:2]) == []
    (one_seed,) = family("Depth", "blocks", {96: 4.5}, seeds=(2,))
    assert changes_per_doubling([*columns, Column((one_seed,))]) == [f"{head}: lns **-0.100 ± 0.000** (n = 3)."]


def test_rows_that_did_not_train_or_diverged_are_marked():
    rows = [
        row("pre_ln", 20.0, run(1, 5.0), run(2, 5.1)),
        row("deep_norm", 20.1, run(1, 6.99, halfway=7.0), run(2, 6.99, halfway=7.0)),
        row("post_ln", 20.1, diverged(1)),
        row("mix_ln", 20.1, run(1, math.nan)),
    ]
    cells = {cells[0]: cells[1] for cells in comparison_table(Column((table(*rows),))).rows}
    assert cells["deep_norm"] == f"{math.exp(6.99):.2f} ± 0.00 (did not train: 2 of 2)"
    assert cells["post_ln"] == "(failed: the loss is nan at step 3)"
    assert cells["mix_ln"] == "nan (did not train: 1 of 1)"
    at_a_glance = tables_of(build_report(published_and(table(*rows))).markdown)["### scale=toy"]
    assert at_a_glance[1][2] == "deep_norm (did not train here)"


def test_scales_are_never_mixed(experiments):
    at_mini = [replace(r, run_id=f"{r.run_id}-mini", runs=(run(1, 1.0),)) for r in rows_at("mini")]
    tables = tables_of(build_report([*experiments, table(*at_mini, scale="mini")]).markdown)
    perplexity = {"mini": f"{math.e:.2f}", "toy": f"{np.exp(LOSSES['lns']).mean():.2f}"}
    for scale, other in (("mini", "toy"), ("toy", "mini")):
        text = str(tables[f"### Table 1: ours at scale={scale}"])
        assert perplexity[scale] in text
        assert perplexity[other] not in text


def test_a_section_names_its_setting_if_it_is_not_the_usual_one():
    usual = table(*rows_at("toy"), name="table1_130m")
    same = table(*rows_at("toy"), name="table6_130m", target="Table 6")
    other = replace(table(*rows_at("toy"), name="table7_130m", target="Table 7"), setting="other setting")
    markdown = build_report(published_and(usual, same, other)).markdown
    assert "- **Setting of scale=toy**, where a section names no other: setting of toy.\n" in markdown
    assert "- 130M: `python -m cod_lightning reproduce table6_130m scale=toy" in markdown
    assert "- 130M: other setting. `python -m cod_lightning reproduce table7_130m scale=toy" in markdown


def test_missing_runs_are_one_compact_table(report, experiments):
    head, *rows = tables_of(report.markdown)["## Not run"]
    assert head[1:] == ["missing at scale=toy", "hours of H100, scale=paper"]
    assert rows == [["Table 1", "admin", "50"], ["all, shared runs once", "", "50"]]
    assert "No row was run at scale=paper, mini, small." in report.markdown
    same_runs = replace(experiments[0], name="table7_130m", target="Table 7")
    markdown = build_report([*experiments, same_runs], "H100").markdown
    assert "## Table 7" not in markdown
    assert [cells[-1] for cells in tables_of(markdown)["## Not run"][1:]] == ["50", "50", "50"]


def test_only_missing_rows_take_hours():
    rows = row("pre_ln", 20.0, run(1, 5.0), gpu_hours=10.0), row("lns", 19.0, gpu_hours=4.0)
    missing = not_run_table(by_target([table(*rows, scale="paper")]), "H100").rows
    assert missing[0] == ["Table 1", "lns", "4"]
    assert missing[1][-1] == "4"


def test_sizes_with_their_own_runs_share_a_table():
    sizes = [
        table(
            row("pre_ln", {"val_loss": 3.67}, *runs_of([5.0, 5.1, 5.0]), run_id=f"pre-{size}"),
            row("lns", {"val_loss": 3.56}, *runs_of([4.0, 4.2, 4.1]), run_id=f"lns-{size}"),
            **{"name": f"figure1_{size}m", "target": "Figure 1", "column": f"{size}M", "size": size},
        )
        for size in (60, 150)
    ]
    markdown = build_report(published_and(*sizes)).markdown
    rows = tables_of(markdown)["### Figure 1: ours at scale=toy"]
    assert rows[0][-1] == "published, direction"
    assert rows[2] == ["60M: lns", "4.100 ± 0.100", "3", "**-0.933 ± 0.143** †", "-0.110, same"]
    assert "- 150M: Beyond noise: lns (-0.933)." in markdown


def test_several_metrics_are_one_table_of_a_size():
    published = {"mmlu": 24.93, "boolq": 38.35}
    scored = Run(1, {**run(1, 2.0).record, "mmlu": 25.0}, {})
    rows = [row("pre_ln", published, scored), row("lns", {"mmlu": 27.08, "boolq": 58.17}, scored)]
    tables = tables_of(build_report([table(*rows, scale="paper", target="Table 2", column="250M")]).markdown)
    assert tables["### Table 2: published"][1:] == [["pre_ln", "24.93", "38.35"], ["lns", "27.08", "58.17"]]
    assert tables["### Table 2: ours at scale=paper"][2][:3] == ["lns", "25.00", "1"]


def test_an_accuracy_of_ours_is_compared_with_the_published_average():
    rows = [
        row("pre_ln", {"average": 36.93}, *(Run(seed, {"accuracy": 20.0 + seed}, {}) for seed in (1, 2, 3))),
        row("lns", {"average": 43.14}, *(Run(seed, {"accuracy": 30.0 + seed}, {}) for seed in (1, 2, 3))),
    ]
    scored = table(*rows, metric="accuracy", target="Table 2")
    ours = comparison_table(Column((scored,)))
    assert ours.head[1:4] == ["accuracy, mean ± sd", "n", "difference to pre_ln, points (95 %)"]
    assert ours.rows[1] == ["lns", "32.00 ± 1.00", "3", "**+10.00 ± 0.00**", "+6.21, same"]
    assert Column((scored,)).headline.name == "accuracy"
    assert "accuracy: Highest accuracy: lns here; lns in the paper (130M)." in summary_lines(Column((scored,)))
    assert [claim.statement for claim in claim_results(Column((scored,)))] == ["lns beats pre_ln"]


def test_environments_name_hardware_versions_commit_and_data(report):
    assert tables_of(report.markdown)["## Environments"][1] == [
        *("toy", "abacus, 2 cores, 1 thread per run", "python 3.11, torch 2.13", "0123456789ab+changes"),
        *("feedfeedfeed", "12", "2026-11-24", "6.0"),
    ]


def test_the_csv_holds_every_row(report):
    rows = list(csv.DictReader(io.StringIO(report.csv)))
    assert len(rows) == 10
    (lns,) = (r for r in rows if (r["scale"], r["row"]) == ("toy", "lns"))
    assert (lns["published"], lns["unbiased"], lns["n"], lns["direction"]) == ("25.76", "25.8754", "3", "same")
    assert float(lns["difference"]) == pytest.approx(-11 / 30, abs=1e-6)
    assert float(lns["margin_95"]) == pytest.approx(0.143422, abs=1e-5)
    assert float(lns["sd"]) == pytest.approx(np.std(np.exp(LOSSES["lns"]), ddof=1), rel=1e-5)
    assert float(lns["p_value"]) == pytest.approx(0.00813, abs=1e-4)
    (missing,) = (r for r in rows if (r["scale"], r["row"]) == ("paper", "lns"))
    assert (missing["n"], missing["mean"], missing["direction"]) == ("0", "", "")


# Experiments beyond the paper ----------------------------------------------------------------------------------------


def family(target, axis, losses, seeds=(1, 2, 3), **options):
    """Pre-LN at loss 5 and LNS at given losses for each value of a setting, at scale=small."""
    return [
        table(
            row("pre_ln", None, *(run(seed, 5.0) for seed in seeds), run_id=f"{target}{value}p"),
            row("lns", None, *(run(seed, loss + 0.01 * seed) for seed in seeds), run_id=f"{target}{value}l"),
            **{"target": target, "name": f"{target.lower()}_{value}", "column": f"x {value}", "scale": "small"},
            **{"axis": axis, "metric": "val_loss", "axes": {axis: value}, **options},
        )
        for value, loss in losses.items()
    ]


def test_settings_under_which_no_row_trained_have_no_figure():
    stuck = [
        replace(e, rows=(e.rows[0], replace(e.rows[1], runs=(run(1, 6.99, halfway=7.0),))))
        for e in family("Depth", "blocks", {6: 4.9, 24: 4.6})
    ]
    assert differences_over_settings([("", "blocks", [Column((e,)) for e in stuck])], []) is None


def test_length_and_depth_come_first_once_two_settings_were_run(experiments):
    length, depth = (
        family("Length", "tokens", {5e5: 4.5, 4e6: 4.8}),
        family("Depth", "blocks", {6: 4.9, 24: 4.6}),
    )
    axes = {"tokens": 2.6e9, "blocks": 12}
    published = [replace(experiments[0], axes=axes), *map(without_runs, [*length, *depth])]
    built = build_report([*published, *length, *depth])
    assert "length_and_depth.png" in built.figures
    assert built.markdown.index("length_and_depth.png") < built.markdown.index("## At a glance")
    rows = tables_of(built.markdown)["### Depth: ours at scale=small"]
    assert ["x 24: lns", "4.620 ± 0.010", "3", "**-0.380 ± 0.025** †"] in rows
    assert "- Depth: x 6 -0.08±0.02, x 24 -0.38±0.02 ‡." in built.markdown
    assert "scale=small.** 6 distinct comparisons" in built.markdown
    with_one_setting = build_report([*published, length[0], depth[0]])
    assert "length_and_depth.png" not in with_one_setting.figures
    assert "## Depth" not in with_one_setting.markdown


@pytest.mark.parametrize(
    ("seeds", "line"),
    [
        ({12: (1, 2, 3), 24: (1, 2, 3), 48: (1, 2, 3)}, "- Depth: x 12 -0.28±0.02, x 48 -0.48±0.02.\n"),
        ({12: (1, 2, 3), 24: (1, 2, 3), 48: (1,)}, "- Depth: x 12 -0.28±0.02, x 24 -0.38±0.02.\n"),
        ({6: (1,), 12: (1,), 24: (1,), 48: (1,)}, "- Depth: x 12 -0.29 (no interval), x 48 -0.49 (no interval).\n"),
    ],
)
def test_the_verdict_lists_the_ends_of_a_setting_that_have_an_interval(seeds, line):
    losses = {6: 4.9, 12: 4.7, 24: 4.6, 48: 4.5}
    depth = [e for n, loss in losses.items() for e in family("Depth", "blocks", {n: loss}, seeds.get(n, (1, 2, 3)))]
    usual = replace(depth[0], target="Table 1", name="table1", axes={}, paper={})
    text = verdict_on(*map(without_runs, [usual, *depth]), usual, *depth).replace(" ‡", "")
    assert line in text


def test_without_a_headline_the_verdict_lists_every_end_of_a_setting():
    depth = family("Depth", "blocks", {12: 4.7, 24: 4.6})
    assert "- Depth: x 12 -0.28±0.02, x 24 -0.38±0.02 ‡.\n" in verdict_on(*map(without_runs, depth), *depth)


def test_the_verdict_does_not_list_rates():
    rates = family("Learning rate", "lr", {0.003: 4.7, 0.006: 4.6})
    assert "elsewhere" not in verdict_on(*map(without_runs, rates), *rates)


def test_every_strategy_is_compared_at_its_own_best_rate():
    slow = {"pre_ln": [5.1, 5.2, 5.3], "lns": [5.0, 5.1, 5.2]}
    middle = {"pre_ln": [5.06, 5.16, 5.26], "lns": [4.8, 4.9, 5.0]}
    fast = {"pre_ln": [5.6, 5.7, 5.8], "lns": [4.82, 4.92, 5.02]}
    columns = rate_columns({"1 x": slow, "2 x": middle, "4 x": fast})
    lns, pre_ln = tuned_strategies_table(tuned_rows(columns)).rows
    assert pre_ln == ["pre_ln", "2 x", "5.160 ± 0.100", "3", "", "1 x, 2 x (2 of 3)"]
    assert lns == ["lns", "2 x", "4.900 ± 0.100", "3", "**-0.260 ± 0.000**", "2 x, 4 x (2 of 3)"]


def test_the_league_is_a_figure_and_a_table_of_own_best_rates(monkeypatch):
    monkeypatch.setattr("cod_lightning.paper.figures.MAX_LINES", 0)
    monkeypatch.setattr("cod_lightning.paper.figures.MIN_TUNED", 1)
    league = family("League", "lr", {1e-3: 4.8, 2e-3: 4.7})
    built = build_report([*map(without_runs, league), *league])
    assert [name for name in built.figures if name.startswith("league")] == ["league_best.png"]
    assert "- Own best rates: 1 comparison with an interval. If no difference were real, 0.05 " in built.markdown


def test_a_single_strategy_at_its_own_best_rate_is_no_figure():
    league = family("League", "lr", {1e-3: 4.8, 2e-3: 4.7})
    assert list(build_report([*map(without_runs, league), *league]).figures) == ["league.png"]


def test_a_rate_at_which_a_run_diverges_is_not_the_best():
    slow = {"pre_ln": [5.0] * 2, "lns": [4.9] * 2}
    middle = {"pre_ln": [math.nan] * 2, "lns": [math.inf] * 2}
    fast = {"pre_ln": [math.inf] * 2, "lns": [math.inf] * 2}
    columns = rate_columns({"1 x": slow, "2 x": middle, "4 x": fast})
    assert [(best.row.name, best.rate) for best in tuned_rows(columns)] == [("lns", "1 x"), ("pre_ln", "1 x")]
    assert [best.difference for best in tuned_rows(columns[1:])] == [None, None]


def test_a_strategy_that_was_run_at_one_rate_has_no_best_one():
    rows = row("pre_ln", None, run(1, 5.0)), row("lns", None, run(1, 4.9)), row("post_ln", None, run(1, 4.0))
    slow, fast = Column((table(*rows, column="1 x"),)), Column((table(*rows[:2], column="2 x"),))
    assert [best.row.name for best in tuned_rows([slow, fast])] == ["lns", "pre_ln"]


def test_a_rate_at_which_some_runs_fail_is_not_the_best():
    """The faster rate has one seed left, which alone would have the lowest mean."""
    rates = {"1 x": [4.9, 4.8], "2 x": [None, 4.82], "4 x": [None]}
    columns = rate_columns({rate: {"pre_ln": [5.0], "lns": losses} for rate, losses in rates.items()})
    best = tuned_rows(columns)[0]
    assert (best.row.name, best.rate, best.rates, best.good) == ("lns", "1 x", ("1 x", "2 x", "4 x"), ("1 x",))
    assert best.edge == "no lower one run"
    assert excess({1: 4.7, 2: math.inf}, best={1: 4.9}) == math.inf
    assert tuned_strategies_table(tuned_rows(columns[1:])).rows[1][2] == "diverged"


def test_rates_are_compared_on_the_seeds_that_all_have():
    columns = rate_columns({"1 x": {"pre_ln": [5.0], "lns": [4.9, 4.0]}, "2 x": {"pre_ln": [5.0], "lns": [4.8]}})
    assert tuned_rows(columns)[0].rate == "2 x"


def test_a_rate_of_fewer_seeds_than_others_does_not_choose_the_best():
    rates = {"0.5 x": [4.7], "1 x": [4.8, 5.0, 5.0], "2 x": [4.9, 4.9, 4.8]}
    columns = rate_columns({rate: {"pre_ln": losses, "lns": losses} for rate, losses in rates.items()})
    best = tuned_rows(columns)[0]
    assert (best.rate, best.edge) == ("2 x", "no higher one run")
    assert (best.rates, best.compared) == (("0.5 x", "1 x", "2 x"), ("1 x", "2 x"))
    assert best.good == ("0.5 x", "2 x")  # of the first seed, -0.2 nats; over three seeds 1 x is 0.067 above


def test_a_best_rate_beside_rates_of_fewer_seeds_is_no_end_of_the_range():
    rates = {"1 x": [4.9] * 3, "2 x": [4.8] * 3, "4 x": [4.84]}
    columns = rate_columns({rate: {"pre_ln": losses, "lns": losses} for rate, losses in rates.items()})
    for order, side in ((columns, "higher"), (columns[::-1], "lower")):
        best = tuned_rows(order)[0]
        assert (best.rate, best.edge) == ("2 x", f"{side} ones: fewer seeds")
        assert set(best.good) == {"2 x", "4 x"}


def test_rows_of_fewer_seeds_are_not_the_best():
    rows = [
        row(name, 20.0, *(run(seed, loss) for seed in (1, 2, 3))) for name, loss in (("pre_ln", 5.0), ("admin", 5.5))
    ]
    rows.append(row("post_ln", 19.0, run(1, 4.0)))
    rows.append(row("lns", 20.0, *(run(seed, loss) for seed, loss in enumerate((4.9, 4.9, 5.2, 4.0), 1))))
    column = Column((table(*rows),))
    assert summary_lines(column)[1] == (
        "Lowest perplexity: pre_ln here (within noise of it: lns; fewer seeds: post_ln); post_ln in the paper (130M)."
    )
    with_mix_ln = [*rows, row("mix_ln", 20.0, *(run(seed, 4.95) for seed in (1, 2, 3)))]
    best = summarize(by_target(published_and(table(*with_mix_ln))))[-1].best
    assert best is not None
    assert (best[0], best[1].n) == ("mix_ln", 3)


def test_the_baseline_is_not_named_as_the_lowest_row_again():
    rows = [row(name, 20.0, *(run(seed, loss) for seed in (1, 2, 3))) for name, loss in (("pre_ln", 5.0), ("lns", 5.5))]
    assert "minus LNS" not in verdict_on(*published_and(table(*rows)))


def test_a_change_with_a_setting_is_from_the_usual_value_on_the_seeds_of_both():
    usual = family("Depth", "blocks", {24: 4.6}, seeds=(1, 2, 3, 4))[0]
    six = family("Depth", "blocks", {6: 4.9})[0]
    lone = family("Depth", "blocks", {48: 4.5}, seeds=(3,))[0]
    headline = replace(usual, target="Table 1", axes={}, paper={}, rows=tuple(with_published(usual.rows, (20.0, 19.0))))
    every = [six, usual, lone]
    (summary,) = summarize(by_target([*map(without_runs, [headline, *every]), headline, *every]))
    changes = summary.changes["Depth"]
    assert [(each.usual, each.other, each.change.n) for each in changes] == [
        ("x 24", "x 6", 3),
        ("x 24", "x 48", 1),
    ]
    assert changes[0].change.mean == pytest.approx(0.3)
    assert summary.shown_changes == {"Depth": [changes[0]]}
    assert changes[0].key in summary.unique


def test_an_opposite_claim_among_the_significant_ones_is_marked():
    costly = run(1, 5.0, removal={"loss": 2.0, "losses": [2.1, 2.1, 2.5, 2.5]})
    runs = [replace(costly, seed=seed) for seed in (1, 2, 3)]
    figure = table(row("pre_ln", None, *runs), target="Figure 2", name="figure2")
    (summary,) = summarize(by_target([without_runs(figure), figure]))
    assert summary.significant_labels == ["Pre-LN: removing deep blocks costs less, opposite"]


def test_a_row_that_trained_at_one_published_size_only_is_open():
    rows = rows_at("toy")
    columns = ("130M", 27.2), ("250M", 1400.0)
    sizes = [
        table(*with_published(rows, (post_ln, 26.07, 26.73, 25.76, 27.0)), column=column, name=f"table1_{column}")
        for column, post_ln in columns
    ]
    (summary,) = summarize(by_target(published_and(*sizes)))
    assert [claim.label for claim in summary.by_direction["open"]] == ["post_ln", "mix_ln"]


# Figures and HTML ----------------------------------------------------------------------------------------------------


def figure_experiments(*targets):
    """One experiment for each target, run and measured at scale=toy."""
    theory = {
        **{"lns": False, "c": 1.0, "gains": [1.0, 2.0, 3.0], "growth": {"power": 2.0, "power_r2": 0.9}},
        **{"fitted_constants": [1.0, 0.5], "fitted_log_bound": [0.0, 0.5, 1.0], "shape_log_bound": [0.0, 9.0, 20.0]},
        **{name: [1.0, 2.0, 3.0] for name in ("variances", "lemma", "lemma_fitted", "recursion")},
    }
    angles = [[0.3, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, None], [0.4, 0.3, None, None], [0.5] + 3 * [None]]
    measures = {
        "angular": {"distances": angles},
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
            runs = [run(seed, 5.0 - seed, **measures) for seed in (1, 2, 3) if scale == "toy"]
            yield row(name, {"val_loss": loss} if target == "Figure 1" else None, *runs)

    return [
        table(*rows(target, scale), target=target, name=slug(target), scale=scale, **paper.get(target, {}))
        for target in targets
        for scale in ("paper", "toy")
    ]


def slug(target):
    return target.lower().replace(" ", "")


FIGURE_TARGETS = ("Figure 1", "Figure 4", "Figure 5", "Figure 6", "Figure 7", "Figure 9", "Theory")
"""Targets that cover every figure function."""


@pytest.fixture(scope="module")
def all_figures():
    return build_report(figure_experiments(*FIGURE_TARGETS))


def test_every_figure_is_drawn_900_pixels_wide(all_figures):
    assert set(all_figures.figures) == {"figure1.png", *(f"{slug(target)}_toy.png" for target in FIGURE_TARGETS[1:])}
    for name, image in all_figures.figures.items():
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(image[16:20], "big") == 900, name
        assert f"]({FIGURES}/{name})" in all_figures.markdown


def test_figures_have_tables_of_their_numbers(all_figures):
    first_rows = {
        heading: rows[1][1:] for heading, rows in tables_of(all_figures.markdown).items() if "ours at" in heading
    }
    assert first_rows["### Figure 7: ours at scale=toy"] == ["0.1 ± 0", "0 ± 0", "0.045 ± 0", "0.153 ± 0", "3"]
    assert first_rows["### Figure 4: ours at scale=toy"] == ["24 ± 0", "24 ± 0", "1.14 ± 0", "3"]
    assert first_rows["### Figure 5: ours at scale=toy"] == ["0.2 ± 0", "0.1 ± 0", "1 ± 0", "3"]
    assert first_rows["### Figure 9: ours at scale=toy"] == ["9 ± 0", "14 ± 0", "3"]
    assert first_rows["### Theory: ours at scale=toy"] == [
        "2 ± 0",
        "0.9 ± 0",
        "0.585 ± 0",
        "1 ± 0",
        "1 ± 0",
        "3 ± 0",
        "3",
    ]


def test_the_papers_findings_are_compared(all_figures):
    lines = [line.strip("| ").split(" | ") for line in all_figures.markdown.splitlines() if line.startswith("| ")]
    findings = {cells[0]: cells[1:] for cells in lines}
    assert findings["LNS: less final variance than Pre-LN"] == ["+0 ± 0", "log ratio", "3", "within noise"]
    assert findings["Pre-LN: Jacobians approach I with depth"] == ["**+0.693 ± 0** †", "log ratio", "3", "same"]
    assert findings["Pre-LN: the variance grows with depth"][0].startswith("**+0.134 ± 0**")
    glance = {row[0]: row[2:] for row in tables_of(all_figures.markdown)["### scale=toy"]}
    assert glance["Figure 5"][0] == "Pre-LN: Jacobians approach I with depth"


@pytest.mark.parametrize("target", ["Figure 6", "Figure 7"])
def test_axes_of_losses_have_their_unit(target):
    figure = draw(Column((figure_experiments(target)[1],)))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert any("loss" in label for label in labels)
    assert all("(nats)" in label for label in labels if "loss" in label)


def test_the_linear_part_of_a_logarithmic_axis_is_marked():
    axes = draw(Column((figure_experiments("Figure 7")[1],))).axes[2]
    (band,) = axes.patches
    linear = axes.yaxis.get_transform().linthresh
    assert (band.get_y(), band.get_height()) == (-linear, 2 * linear)
    assert axes.get_ylabel().endswith("grey: linear axis")


@pytest.mark.parametrize("target", ["Figure 4", "Figure 7", "Figure 9"])
def test_panels_of_means_state_their_number_of_seeds(target):
    figure = draw(Column((figure_experiments(target)[1],)))
    titles = [axes.get_title().replace("\N{NO-BREAK SPACE}", " ") for axes in figure.axes]
    assert [title for title in titles if title] == ["pre_ln (n = 3)", "lns (n = 3)"]


def test_a_map_of_one_run_names_its_seed():
    assert draw(Column((figure_experiments("Figure 5")[1],))).get_suptitle() == "seed 1"


def test_the_bar_of_a_difference_is_its_interval(experiments):
    point = our_points(Column((experiments[1],)))["lns"]
    assert (point.value, point.margin) == (pytest.approx(-11 / 30), pytest.approx(0.143422, abs=1e-5))


def test_a_band_has_the_standard_deviation_of_n_minus_1():
    assert sd_of(np.array([[1.0, 2.0], [3.0, 2.0]])) == pytest.approx([math.sqrt(2), 0.0])
    assert sd_of(np.array([[1.0, 2.0]])).tolist() == [0.0, 0.0]


def test_curves_of_the_training_loss_are_minus_the_baseline_of_the_same_seed():
    rows = row("pre_ln", None, run(1, 5.0), run(2, 6.0)), row("lns", None, run(3, 1.0), run(2, 4.0), run(1, 4.0))
    bottom = draw(Column((table(*rows, target="Figure 6"),))).axes[1]
    assert bottom.lines[0].get_ydata().tolist() == [0, 0, 0, -1.5]


def test_lines_of_the_removed_layers_are_medians():
    runs = [run(seed, 5.0, removal={"loss": 2.0, "losses": [2.0 + cost]}) for seed, cost in enumerate((0.1, 0.2, 0.9))]
    lines = draw(Column((table(row("pre_ln", None, *runs), target="Figure 7"),))).axes[0].collections[0]
    assert [y for _, y in lines.get_segments()[0]] == pytest.approx([0.2, 0.2])


def test_rows_that_were_not_run_and_single_seeds_are_marked():
    rows = [row("pre_ln", 20.0, run(1, 5.0)), row("lns", 19.0, run(1, 4.9)), row("mix_ln", 19.5)]
    ours = table(*rows)
    figure = difference_figure({"paper": [Column((without_runs(ours),))], "toy": [Column((ours,))]})
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == ["not run"]
    assert figure.get_supxlabel().endswith("(x: fewer than 3 seeds; horizontal axes differ)")


@pytest.mark.parametrize(
    ("number", "label"), [(0.4**0.5, "0.632"), (24, "24"), (3e-3, "0.003"), (134e6, "134M"), (1.3e9, "1.3B")]
)
def test_ticks_have_three_digits(number, label):
    assert short_number(number) == label


def test_two_settings_are_not_joined_by_a_line():
    lines = {}
    for settings in ((6, 24), (6, 12, 24)):
        depth = family("Depth", "blocks", dict.fromkeys(settings, 4.6))
        (axes,) = differences_over_settings([("", "blocks", [Column((e,)) for e in depth])], []).axes
        lines[len(settings)] = [
            line for line in axes.lines if line.get_marker() == "None" and len(line.get_xdata()) > 2
        ]
    assert [len(found) for found in lines.values()] == [0, 1]


def test_a_figure_that_was_not_measured_is_not_drawn():
    rows = [row("pre_ln", None, run(1, 5.0))]
    built = build_report([table(*rows, target="Figure 7", name="figure7", scale=scale) for scale in ("paper", "toy")])
    assert built.figures == {}


def test_a_pretrained_model_is_measured_without_a_run():
    measured = Run(0, {}, {"removal": {"loss": 2.0, "losses": [3.0, 2.5, 2.1, 2.3]}})
    rows = [row("pre_ln", None, measured, label="LLaMA2-13B")]
    experiments = [table(*rows, target="Figure 2", name="figure2_llama2_13b", scale="paper")]
    built = build_report(experiments, formats=("png", "pdf"))
    assert built.figures == {"figure2_paper.png": b"png", "figure2_paper.pdf": b"pdf"}
    assert "| LLaMA2-13B | not measured | not measured | 0.2 | 0.444 | 1 |" in built.markdown
    assert "## Environments" not in built.markdown


def test_the_page_needs_no_other_file(all_figures):
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', all_figures.html)
    assert all_figures.html.count("data:image/png;base64,") == len(all_figures.figures)
    assert "<script" not in all_figures.html
    assert "url(" not in all_figures.html


def test_the_page_renders_tables_and_emphasis_but_not_inside_code():
    page = html_page("", f"*A title* of `a/*.yaml`, **bold**, 2 * 3\n\n{Table(['a', 'b'], [['x', '1|2']])}", {})
    assert "<em>A title</em> of <code>a/*.yaml</code>, <strong>bold</strong>, 2 * 3" in page
    assert "<td>x</td>" in page
    assert '<td style="text-align:right">1|2</td>' in page


def test_the_page_escapes_html():
    built = build_report([table(row("pre_ln", 20.0, run(1, 5.0), label="<b>Pre & LN"), scale="paper")])
    assert "&lt;b&gt;Pre &amp; LN" in built.html
    assert "<b>Pre" not in built.html


def test_a_fit_of_loss_over_size():
    sizes = [60e6, 150e6, 300e6, 1e9, 7e9]
    equation, curve = fit_sizes(sizes, [2.0 + 40 * n**-0.2 for n in sizes])
    assert curve(np.array(sizes)) == pytest.approx([2.0 + 40 * n**-0.2 for n in sizes], abs=1e-6)
    assert equation == "2.00 + 40 N^-0.200"


def test_a_fit_of_two_sizes_is_a_line_and_of_one_nothing():
    equation, curve = fit_sizes([1e6, 1e8], [5.0, 3.0])
    assert equation == "11.00 -1.000 log10 N"
    assert curve(np.array([1e7])) == pytest.approx([4.0])
    assert fit_sizes([1e6], [5.0]) is None


def test_a_fit_of_rising_losses_is_their_mean():
    _, curve = fit_sizes([1e6, 2e6, 4e6, 8e6], [3.0, 3.1, 3.3, 3.2])
    assert curve(np.array([1e6, 8e6])) == pytest.approx([3.15, 3.15])


def test_a_fit_stays_above_zero():
    sizes = np.array([1e6, 1e7, 1e8, 1e9])
    equation, curve = fit_sizes(sizes, 9 - np.log10(sizes))
    assert equation.startswith("0.00 + ")
    assert curve(np.array([1e15])) > 0


# Pretrained models ----------------------------------------------------------------------------------------------------


REAL = PretrainedModel(
    "real",
    "results/reports/real/report.html",
    {
        "variance": {"residual": {"variance": [1.0] * 4}},
        "angular": {"distances": [[0.3, 0.2, 0.1, 0.1]]},
        "removal": {"loss": 2.0, "losses": [2.5, 2.01, 2.6, 2.7], "tokens": 9, "error": None},
        "jacobian": {
            **{"layers": [1, 2, 3, 4], "distance": [3.0, 0.2, 0.1, 0.4], "largest_singular_value": [1.0] * 4},
            **{"errors": dict.fromkeys(("distance", "largest_singular_value"), [0.0] * 4), "tokens": 9},
        },
    },
    6.9,
)


def test_a_model_that_has_not_learned_the_text_is_not_compared():
    (line,) = pretrained_model_lines("Figure 2", [replace(REAL, uniform_loss=2.9)])
    assert line.endswith("It has not learned this text, and says nothing about the finding.")


def test_a_pretrained_model_agrees_or_disagrees_with_a_figure():
    assert pretrained_model_lines("Figure 2", [REAL]) == [
        "**real** (loss 2 nats, 6.9 for a uniform guess; `results/reports/real/report.html`). Opposite to the paper "
        "(removing deep blocks costs less): median increase of the loss in nats 0.255 in the shallower half, 0.65 in "
        "the deeper half. As in the paper (deep blocks rotate the stream less): median angular distance to the next "
        "layer 0.25 in the shallower half, 0.1 in the deeper half. 1 of 4 blocks cost less than 1% of the loss when "
        "removed alone (0 early, 1 middle, 0 late); the cheapest adds 0.01 nats (block 2)."
    ]
    assert pretrained_model_lines("Figure 7", [REAL]) == []


@pytest.mark.parametrize(("error", "direction"), [(0.01, "Opposite to the paper"), (0.1, "Within two standard errors")])
def test_a_difference_within_its_errors_has_no_sign(error, direction):
    jacobian = REAL.results["jacobian"] | {"errors": dict.fromkeys(("distance", "largest_singular_value"), [error] * 4)}
    (line,) = pretrained_model_lines("Figure 5", [replace(REAL, results=REAL.results | {"jacobian": jacobian})])
    numbers = (
        f"median distance of the Jacobian from I 0.2 ± {error} in the shallower half, 0.25 ± {error} in the deeper"
    )
    assert f"{direction} (Jacobians approach I with depth): {numbers}" in line


def test_pretrained_models_stand_behind_our_runs():
    markdown = build_report(figure_experiments("Figure 5"), models=[REAL]).markdown
    after = markdown.index("### Figure 5: pretrained models")
    assert (
        markdown.index("### Figure 5: ours at scale=toy") < after < markdown.index("Opposite to the paper (Jacobians")
    )


def test_runs_that_recorded_at_other_steps_are_drawn_at_common_ones():
    often = np.array([0, 2, 4, 6, 8]), np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    rarely = np.array([0, 4, 8]), np.array([10.0, 12.0, 14.0])
    steps, values = at_common_steps([often, rarely])
    assert steps.tolist() == [0, 4, 8]
    assert values.tolist() == [[0, 2, 4], [10, 12, 14]]
