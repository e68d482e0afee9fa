"""Published figures compared with ours: values, paired differences, directions, columns and their order."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from paper_builders import LOSSES, comparison, diverged, row, rows_at, run, runs_of, table, with_published

from cod_lightning.commands.reproduce import reproduction_tables
from cod_lightning.commands.terminal import show
from cod_lightning.paper.claims import Column, Metric, by_target, group_columns, stuck
from cod_lightning.paper.findings import (
    FINDINGS,
    deeper_share,
    finding_results,
    growth_over_blocks,
    half_medians,
    largest_share,
    log_ratio,
    quantity_rows,
)
from cod_lightning.paper.statistics import FEW_SEEDS, OPPOSITE, SAME, UNCLEAR, UNLIKE, Sample
from cod_lightning.paper.tables import format_direction


@pytest.mark.parametrize(
    ("value", "batches", "whole"), [(26.73, 727, 26.85), (20.35, 91, 21.04), (19.58, 91, 20.23), (15.71, 182, 15.95)]
)
def test_the_bias_of_the_released_evaluation_is_undone(value, batches, whole):
    assert Metric("ppl").unbiased(value, batches) == pytest.approx(whole, abs=0.006)
    assert Metric("val_loss").unbiased(math.log(value), batches) == pytest.approx(math.log(whole), abs=0.0004)


def test_a_row_may_have_its_own_number_of_batches():
    rows = [row("pre_ln", 26.73), row("mix_ln", 26.07)]
    batches = {"evaluation_batches": 727, "rows": {"mix_ln": {"evaluation_batches": 182}}}
    base, mix_ln = table(*rows, **batches).published(Metric("ppl"))
    assert (base.unbiased, mix_ln.unbiased) == (
        pytest.approx(26.73 ** (728 / 727)),
        pytest.approx(26.07 ** (183 / 182)),
    )
    assert mix_ln.difference == pytest.approx(183 / 182 * math.log(26.07) - 728 / 727 * math.log(26.73))


@pytest.mark.parametrize(
    ("published", "direction"), [(20.18, UNCLEAR), (20.22, OPPOSITE), (19.82, UNCLEAR), (19.78, SAME)]
)
def test_a_published_difference_below_a_hundredth_of_a_nat_is_unclear(published, direction):
    rows = [row("pre_ln", 20.0, *runs_of([5.0] * 3)), row("before_ln", published, *runs_of([4.9] * 3))]
    result = comparison(table(*rows), "before_ln")
    assert result.direction(result.published[0]) == direction


def test_the_growth_of_the_variance_is_fitted_over_models_of_different_depth():
    """Variances of L^2 and 3 L; only the seeds of all depths count."""

    def runs(values):
        return [
            replace(run(seed, 5.0), record={"history": {"layers": {"step": [0], "variance": [[1.0, value]]}}})
            for seed, value in enumerate(values)
        ]

    tables = [
        table(
            row("pre_ln", None, *runs([depth**2] * 3)), row("lns", None, *runs([3 * depth] * n)), axes={"blocks": depth}
        )
        for depth, n in ((6, 3), (24, 1))
    ]
    (line,) = growth_over_blocks([Column((each,)) for each in tables])
    assert line.endswith("pre_ln 2.00 ± 0.00 (n = 3); lns 1.00 (n = 1).")
    assert growth_over_blocks([Column((tables[0],))]) == []
    without_lns = replace(tables[1], rows=tables[1].rows[:1])
    (line,) = growth_over_blocks([Column((tables[0],)), Column((without_lns,))])
    assert line.endswith("pre_ln 2.00 ± 0.00 (n = 3).")


def test_a_share_of_no_cost_is_not_a_number():
    assert deeper_share([1.0, 0.2, 0.1, 0.1]) == pytest.approx(0.5)
    assert math.isnan(deeper_share([1.0, 0.1, -0.1, 0.0]))


def test_a_block_that_lowers_the_loss_when_removed_matters_too():
    assert largest_share([9.0, 1.0, -0.5, 0.5]) == pytest.approx(0.5)


def test_accuracies_have_no_such_bias_and_differ_in_points():
    rows = [
        row("none", {"accuracy": 67.91}),
        row("lns", {"accuracy": 68.75}, replace(run(1, 1.0), record={"accuracy": 50})),
    ]
    result = comparison(table(*rows, evaluation_batches=727), "lns")
    assert result.sample == Sample(1, 50.0, None)
    assert result.published[0].unbiased is None
    assert result.published[0].difference == pytest.approx(0.84)


def test_equal_differences_of_rounded_accuracies_are_not_exact():
    """One image of 256 is 0.39 points."""

    def scored(*images):
        records = [{"accuracy": 100 * count / 256, "val_images": 256.0} for count in images]
        return [replace(run(seed, 1.0), record=record) for seed, record in enumerate(records)]

    rows = [row("pre_ln", {"accuracy": 67.91}, *scored(252, 250)), row("lns", {"accuracy": 68.75}, *scored(251, 249))]
    difference = comparison(table(*rows), "lns").difference
    assert difference.mean == pytest.approx(-100 / 256)
    assert difference.sd == pytest.approx(100 / 256 / math.sqrt(6))
    assert not difference.beyond_noise


def test_values_are_means_over_seeds_and_differences_are_paired(experiments):
    result = comparison(experiments[1], "lns")
    perplexities = [math.exp(loss) for loss in LOSSES["lns"]]
    assert (result.sample.n, result.sample.mean) == (3, pytest.approx(np.mean(perplexities)))
    assert result.sample.sd == pytest.approx(np.std(perplexities, ddof=1))
    assert result.difference.mean == pytest.approx(np.mean([-0.4, -0.3, -0.4]))


def test_a_seed_that_only_one_row_has_is_left_out_and_named():
    rows = [row("pre_ln", 20.0, run(1, 5.0), run(3, 7.0)), row("lns", 19.0, run(2, 1.0), run(3, 6.0))]
    result = comparison(table(*rows), "lns")
    assert (result.difference.n, result.difference.mean) == (1, pytest.approx(-1.0))
    assert result.unpaired == (1, 2)


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_have_no_direction(n):
    rows = [row("pre_ln", 20.0, *runs_of([5.0] * n)), row("lns", 19.0, *runs_of([4.0] * n))]
    result = comparison(table(*rows), "lns")
    assert result.direction(result.published[0]) == FEW_SEEDS


@pytest.mark.parametrize(
    ("other", "untrained", "failures"),
    [
        (run(1, 6.99, halfway=7.0), 1, []),
        (run(1, math.nan), 1, []),
        (diverged(1), 0, ["the loss is nan at step 3"]),
        (run(1, 6.0, halfway=6.1), 0, []),
    ],
)
def test_a_run_that_did_not_train_or_diverged_is_counted(other, untrained, failures):
    rows = [row("pre_ln", 20.0, run(1, 5.0)), row("post_ln", 20.1, other)]
    result = comparison(table(*rows), "post_ln")
    assert (result.untrained, result.failures) == (untrained, failures)


@pytest.mark.parametrize(("halfway", "expected"), [(5.02, True), (5.1, False)])
def test_a_run_trained_if_its_loss_fell_in_its_second_half(halfway, expected):
    validations = {"step": [10, 100, 200], "val_loss": [9.0, halfway, 5.01]}
    assert stuck({"val_loss": 5.01, "history": {"val": validations}}) == expected


def test_a_baseline_that_diverged_is_compared_with_no_row():
    rows = [row("pre_ln", 20.0, run(1, 5.0), diverged(2)), row("lns", 19.0, run(1, 4.0), run(2, 4.1))]
    assert comparison(table(*rows), "lns").difference is None


@pytest.mark.parametrize(
    ("baseline", "other", "said"),
    [
        ([run(1, 5.0), diverged(2)], [run(1, 4.0), run(2, 4.1)], "-0.051, not compared"),
        ([run(1, 5.0)], [run(2, 4.0)], "-0.051, not compared"),
        ([run(1, 5.0)], [diverged(1)], "-0.051, failed"),
        ([run(1, 5.0)], [], "-0.051, not run"),
    ],
)
def test_a_row_without_a_difference_says_why(baseline, other, said):
    result = comparison(table(row("pre_ln", 20.0, *baseline), row("lns", 19.0, *other)), "lns")
    assert format_direction(result, result.published[0], with_value=False) == said


def test_the_same_runs_beside_other_baselines_are_two_tests():
    lns = row("lns", 19.0, run(1, 4.0))
    tables = [table(row("pre_ln", 20.0, run(1, 5.0), run_id=run_id), lns) for run_id in ("plain", "wide")]
    assert len({comparison(each, "lns").key for each in tables}) == 2


@pytest.mark.parametrize(
    ("published", "paper", "headline"),
    [
        ({"val_loss": 2.96, "ppl": 19.3}, {}, "ppl"),
        ({"mmlu": 24.9, "average": 36.9, "boolq": 38.4}, {}, "average"),
        ({"val_loss": 2.96, "ppl": 19.3}, {"metric": "val_loss"}, "val_loss"),
    ],
)
def test_the_headline_is_the_named_metric_or_the_average_or_the_last(published, paper, headline):
    assert Column((table(row("pre_ln", published), **paper),)).headline.name == headline


def test_two_metrics_of_the_same_runs_are_two_tests():
    rows = [row(name, {"val_loss": 3.0, "ppl": 20.0}, run(1, 5.0)) for name in ("pre_ln", "lns")]
    assert len({c.key for c in Column((table(*rows),)).comparisons}) == 4


def test_a_published_run_did_not_train_if_it_is_a_nat_above_the_best():
    rows = [row("pre_ln", 40.0), row("deep_norm", 100.0), row("lns", 20.0)]  # 1.6 nats above the best
    trained = {c.row.name: c.published[0].trained for c in Column((table(*rows),)).comparisons}
    assert trained == {"pre_ln": True, "deep_norm": False, "lns": True}


def test_experiments_with_the_same_runs_are_one_column():
    small = table(*rows_at("toy"), column="130M")
    figures = (1409.79, 21.39, 21.92, 20.35, 23.0)
    large = table(*with_published(rows_at("toy"), figures), column="250M", name="table1_250m")
    (column,) = group_columns([small, large])
    assert column.heading == "130M, 250M"
    post_ln = next(c for c in column.comparisons if c.row.name == "post_ln")
    assert [post_ln.direction(published) for published in post_ln.published] == [OPPOSITE, UNLIKE]
    for change in ({"run_id": "another shape"}, {"name": "another row"}):
        other = replace(large, rows=(replace(large.rows[0], **change), *large.rows[1:]))
        assert len(group_columns([small, other])) == 2


def test_rows_with_the_same_runs_have_all_labels():
    tables = [
        table(row("pre_ln", None, run(1, 5.0), label=label), target="Figure 2", name=label, column=label)
        for label in ("Qwen3-8B", "LLaMA2-13B")
    ]
    (column,) = group_columns(tables)
    assert [row.label for row in column.rows] == ["Qwen3-8B, LLaMA2-13B"]


def test_a_stand_in_for_a_pretrained_model_is_named_so():
    paper = {"rows": {"pre_ln": {"subject": "meta-llama/Llama-2-13b-hf"}}}
    labels = {
        scale: Column((table(row("pre_ln", None, label="LLaMA2-13B"), scale=scale, **paper),)).rows[0].label
        for scale in ("paper", "toy")
    }
    assert labels == {"paper": "LLaMA2-13B", "toy": "stand-in for LLaMA2-13B"}


def test_the_baseline_is_pre_ln_or_else_the_first_row():
    assert Column((table(row("lns", 1.0), row("pre_ln", 2.0)),)).baseline.name == "pre_ln"
    assert Column((table(row("scaled_init", 1.0), row("lns", 2.0)),)).baseline.name == "scaled_init"


def test_targets_are_in_the_papers_order():
    tables = [
        table(target=target, name=target) for target in ("Theory", "Figure 10", "Table 10", "Figure 2", "Table 2")
    ]
    assert list(by_target(tables)) == ["Table 2", "Table 10", "Figure 2", "Figure 10", "Theory"]


def test_columns_of_a_varied_setting_are_in_its_order():
    tables = [
        table(row("lns", None), target="Depth", name=f"depth_{blocks}", axis="blocks", axes={"blocks": blocks})
        for blocks in (12, 48, 6)
    ]
    assert [e.name for e in by_target(tables)["Depth"]["toy"]] == ["depth_6", "depth_12", "depth_48"]


# Findings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "directions"),
    [([3.0, 2.5, 2.1, 2.1], [SAME, OPPOSITE]), ([2.1, 2.1, 2.5, 3.0], [OPPOSITE, SAME])],
)
def test_deep_and_shallow_blocks_are_compared(losses, directions):
    runs = [run(seed, 5.0, removal={"loss": 2.0, "losses": losses}) for seed in (1, 2, 3)]
    column = Column((table(row("pre_ln", None, *runs), row("post_ln", None, *runs), target="Figure 2"),))
    results = finding_results(column)  # the angles were not measured
    assert [result.direction for result in results] == directions


def recorded(*variances):
    """Three runs with these variances of the first and last layer at 0 %, 5 %, 30 % and 100 % of the steps."""
    layers = {"step": [0, 10, 60, 200], "variance": variances}
    return [replace(run(seed, 5.0), record={"history": {"layers": layers}}) for seed in (1, 2, 3)]


def measured(**measures):
    return [run(seed, 5.0, **measures) for seed in (1, 2, 3)]


QUIET, LOUD = recorded(*[[1.0, 2.0]] * 4), recorded([1.0, 2.0], [1.0, 3.0], [1.0, 6.0], [1.0, 4.0])
EARLY = measured(
    removal={"loss": 2.0, "losses": [9.0, 3.0, 2.1, 2.1]},
    angular={"distances": [[0.4, 0.4, 0.1, 0.1]]},
    jacobian={"distance": [9.0, 0.4, 0.2, 0.1]},
)
"""The early blocks matter more; `LATE`: the late ones."""
LATE = measured(
    removal={"loss": 2.0, "losses": [2.1, 2.1, 2.5, 2.5]},
    angular={"distances": [[0.1, 0.1, 0.4, 0.4]]},
    jacobian={"distance": [9.0, 0.2, 0.2, 0.2]},
)
AS_PUBLISHED = {
    "Figure 2": {"pre_ln": EARLY, "post_ln": LATE},
    "Figure 4": {"lns": QUIET, "pre_ln": LOUD, "scaled_init": LOUD},
    "Figure 5": {"pre_ln": EARLY},
    "Figure 6": {"lns": [run(seed, 4.0) for seed in (1, 2, 3)], "pre_ln": [run(seed, 5.0) for seed in (1, 2, 3)]},
    "Figure 7": {"lns": LATE, "pre_ln": EARLY},
    "Figure 8": {"after_branch": QUIET, "pre_ln": LOUD},
    "Figure 9": {"pre_ln": LOUD},
    "Figure 10": {"language": EARLY},
    "Theory": {"lns": measured(theory={"gains": [2.0, 8.0]}), "pre_ln": measured(theory={"gains": [2.0, 4.0]})},
}
"""Runs of which everything that the paper says about a figure is true."""


@pytest.mark.parametrize("target", AS_PUBLISHED)
def test_every_finding_has_the_sign_of_its_statement(target):
    rows = [row(name, None, *runs) for name, runs in AS_PUBLISHED[target].items()]
    results = finding_results(Column((table(*rows, target=target, name=target.lower()),)))
    assert [result.statement for result in results] == [finding.statement for finding in FINDINGS[target]]
    assert {result.direction for result in results} == {SAME}


def test_the_variance_grows_from_5_to_30_percent_of_the_run():
    growth = finding_results(Column((table(row("pre_ln", None, *LOUD), target="Figure 9"),)))[1]
    assert growth.difference.mean == pytest.approx(math.log(6 / 3))


def test_a_finding_pairs_runs_of_the_same_seed():
    rows = row("lns", None, run(3, 3.5), run(2, 3.0)), row("pre_ln", None, run(1, 9.0), run(2, 6.0), run(3, 7.0))
    (lower,) = finding_results(Column((table(*rows, target="Figure 6"),)))
    assert (lower.difference.n, lower.difference.mean) == (2, pytest.approx(math.log(2)))
    assert lower.difference.sd == pytest.approx(0)


def test_a_finding_about_two_models_is_two_tests():
    runs = [run(seed, 5.0, jacobian={"distance": [0.3, 0.2, 0.1]}) for seed in (1, 2, 3)]
    tables = [table(row("pre_ln", None, *runs, run_id=run_id), target="Figure 5") for run_id in ("small", "large")]
    assert len({result.key for each in tables for result in finding_results(Column((each,)))}) == 2


@pytest.mark.parametrize(
    ("target", "cells"),
    [
        ("Figure 4", ["4 ± 0", "6 ± 0", "2 ± 0", "3"]),
        ("Embedding scale", ["2 ± 0", "4 ± 0", "2 ± 0", *["not measured"] * 4, "3"]),
    ],
)
def test_variances_are_those_at_the_end_of_the_run_beside_the_highest(target, cells):
    runs = recorded([1.0, 2.0], [1.0, 3.0], [2.0, 6.0], [2.0, 4.0])
    assert quantity_rows(Column((table(row("pre_ln", None, *runs), target=target),))) == [["pre_ln", *cells]]


def test_a_finding_about_rows_that_were_not_run_is_left_out():
    assert finding_results(Column((table(row("lns", None, run(1, 5.0)), target="Figure 2"),))) == []


def test_a_finding_about_a_row_of_which_a_run_diverged_is_left_out():
    runs = [run(seed, 5.0, removal={"loss": 2.0, "losses": [2.1, 2.1, 2.5, 3.0]}) for seed in (1, 2, 3)]
    whole, broken = row("pre_ln", None, *runs), row("post_ln", None, *runs, diverged(4))
    assert len(finding_results(Column((table(whole, row("post_ln", None, *runs), target="Figure 2"),)))) == 2
    left = finding_results(Column((table(whole, broken, target="Figure 2"),)))
    assert {result.statement.partition(":")[0] for result in left} == {"Pre-LN"}


@pytest.mark.parametrize("values", [[3.0, None, 0.5, 0.1], [3.0, math.nan, 0.5, 0.1]])
def test_a_layer_that_is_not_finite_leaves_its_half_without_a_median(values):
    shallow, deep = half_medians(values)
    assert math.isnan(shallow)
    assert deep == pytest.approx(0.3)


def test_a_reproduced_figure_is_shown_by_its_quantities_and_findings(capsys):
    measured = [run(seed, 5.0, jacobian={"distance": [0.3, 0.2, 0.1]}) for seed in (1, 2, 3)]
    figure = table(row("pre_ln", None, *measured), target="Figure 5", name="figure5")
    show(reproduction_tables([figure], ["trainer.max_steps=5"]))
    printed = capsys.readouterr().out
    assert "Figure 5, scale=toy: 130M with trainer.max_steps=5 " in printed
    assert re.findall(r"^┃ (mean ± sd|the paper's finding)", printed, re.MULTILINE) == [
        "mean ± sd",
        "the paper's finding",
    ]
    assert re.search(r"Pre-LN: Jacobians approach I with depth │ +\+0\.693 ± 0 ", printed)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_measure_that_is_not_finite_is_left_out_of_a_finding(loss):
    runs = [
        run(seed, 5.0, removal={"loss": 2.0, "losses": [2.1, second, 2.2]}) for seed, second in ((1, loss), (2, 2.5))
    ]
    column = Column((table(row("pre_ln", None, *runs), row("lns", None, *runs), target="Figure 7"),))
    assert {result.difference.n for result in finding_results(column)} == {1}
    assert all("nan" not in cell and "inf" not in cell for cells in quantity_rows(column) for cell in cells)


def test_a_ratio_with_zero_is_no_finding():
    identity = run(1, 5.0, jacobian={"distance": [0.1, 0.1, 0.0]})
    assert finding_results(Column((table(row("pre_ln", None, identity), target="Figure 5"),))) == []
    assert log_ratio("less", "a", "b", lambda run: float(run.seed)).evaluate([run(0, 5.0), run(1, 5.0)]) is None


@pytest.mark.parametrize(("lns", "pre_ln", "direction"), [("even", "uneven", SAME), ("uneven", "even", OPPOSITE)])
def test_blocks_matter_more_evenly_if_the_costliest_has_less_of_the_cost(lns, pre_ln, direction):
    """Without the first block, the second has 1 / 1.2 of 1.0 + 0.1 + 0.1, and a third of three times 0.5."""
    losses = {"uneven": [9.0, 3.0, 2.1, 2.1], "even": [2.1, 2.5, 2.5, 2.5]}
    rows = [
        row(name, None, *(run(seed, 5.0, removal={"loss": 2.0, "losses": losses[kind]}) for seed in (1, 2, 3)))
        for name, kind in (("pre_ln", pre_ln), ("lns", lns))
    ]
    result = finding_results(Column((table(*rows, target="Figure 7"),)))[0]
    assert result.direction == direction
    assert abs(result.difference.mean) == pytest.approx(math.log(3 / 1.2))


def test_an_experiment_of_ours_is_compared_without_published_figures():
    rows = row("pre_ln", None, run(1, 5.0)), row("lns", None, run(1, 4.0))
    ours, figure = table(*rows, metric="ppl", source="not in the paper"), table(*rows, metric="ppl")
    assert ([metric.name for metric in ours.metrics], figure.metrics) == (["ppl"], [])


@pytest.mark.parametrize("paper", [{}, {"source": "not in the paper"}])
def test_an_experiment_of_ours_without_a_metric_is_compared_by_its_loss(paper):
    rows = row("pre_ln", None, run(1, 5.0)), row("lns", None, run(1, 4.0))
    assert comparison(replace(table(*rows), paper=paper), "lns").difference.mean == -1.0
