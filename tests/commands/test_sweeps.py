"""The table at the end of a sweep."""

import pytest

from cod_lightning.commands.sweeps import bars, sweep_table


def record(loss, variance, seed=1):
    return {
        "seed": seed,
        **{"val_loss": loss, "ppl": 2.0, "wall_seconds": 60.0, "config": {"protocol": "strict"}},
        "history": {"layers": {"variance": [[0.0] * len(variance), variance]}},
    }


def rows(runs):
    """The cells of every line by the column's name."""
    columns = {str(column.header): list(column.cells) for column in sweep_table(runs).columns}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


PRE_LN = [("norm=pre_ln seed=1", record(6.0, [1.0, 8.0])), ("norm=pre_ln seed=2", record(5.0, [1.0, 10.0], seed=2))]
LNS = [("norm=lns seed=1", record(4.0, [0.5, 1.0])), ("norm=lns seed=2", record(4.2, [1.5, 3.0], seed=2))]


def test_configurations_come_first_with_mean_and_standard_deviation_over_seeds():
    lines = rows([*PRE_LN, *LNS])
    assert [line["run"] for line in lines] == [
        *("norm=lns", "norm=pre_ln"),
        *("norm=lns seed=1", "norm=lns seed=2", "norm=pre_ln seed=2", "norm=pre_ln seed=1"),
    ]
    assert lines[0]["val_loss"] == "4.1000 ± 0.1414"
    assert [line["above best"] for line in lines[:2]] == ["", "+1.4000"]
    assert lines[0]["last-layer variance"] == "2"
    assert lines[0]["wall time"] == "1 min 00 s"


def test_the_loss_above_the_best_is_paired_by_seed_in_any_order():
    third = [(f"norm={name} seed=3", record(loss, [1, 8], seed=3)) for name, loss in (("pre_ln", 5.5), ("lns", 4.1))]
    assert rows([*third, *reversed(PRE_LN), *LNS])[1]["above best"] == "+1.4000 ± 1.4905"


def test_bars_of_all_lines_have_one_scale():
    lines = rows([*PRE_LN, *LNS])
    assert [line["by layer"] for line in lines if "pre_ln" in line["run"]] == ["▁█", "▁█", "▁▇"]


def test_a_sweep_of_one_seed_has_its_runs_alone():
    lines = rows([PRE_LN[0], LNS[0]])
    assert [(line["run"], line["val_loss"]) for line in lines] == [
        ("norm=lns seed=1", "4.0000"),
        ("norm=pre_ln seed=1", "6.0000"),
    ]


def test_failed_runs_are_counted_and_come_last():
    lines = rows([("norm=admin seed=1", None), ("norm=admin seed=2", None), (PRE_LN[0][0], None), PRE_LN[1], *LNS])
    assert [(line["run"], line["val_loss"]) for line in lines[1:3]] == [
        ("norm=pre_ln", "5.0000 (1 failed)"),
        ("norm=admin", "failed"),
    ]
    assert [line["val_loss"] for line in lines[-3:]] == ["failed"] * 3


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 1.0, 9.0], "▁▅█"), ([None, 2.0], "!█"), (list(range(25)), "▁██████████")]
)
def test_bars_are_in_proportion_to_the_largest_value(values, expected):
    assert bars(values, 2.0).startswith(expected)
    assert len(bars(values, 2.0)) <= 12
