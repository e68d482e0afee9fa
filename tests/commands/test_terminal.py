import io
from pathlib import Path

import pytest
from rich.console import Console

from cod_lightning.commands.sweeps import sweep_table
from cod_lightning.commands.terminal import WIDTH, result_table, run_summary


def printed(table):
    console = Console(width=WIDTH, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("protocol", ["paper", "strict"])
def test_tables_show_the_released_perplexity_only_under_the_paper_protocol(protocol):
    config = {"protocol": protocol, "experiment": "x", "norm": {"name": "lns"}, "paper": {}, "row": None}
    record = {
        **{"val_loss": 4.0, "ppl": 54.6, "ppl_paper_protocol": 33.3, "steps": 1, "tokens": 8, "parameters": 9},
        **{"tokens_per_second": 1.0, "wall_seconds": 1.0, "seed": 1, "history": {}, "config": config},
    }
    for table in (run_summary(record, Path("run")), sweep_table([("a", record), ("b", None)])):
        assert ("ppl_paper_protocol" in printed(table)) == (protocol == "paper")
        assert "54.60" in printed(table)


def test_a_table_shows_as_many_rows_and_columns_as_it_has_room_for():
    rows = [{"layer": layer} | {f"on_{other}": layer / 7 for other in range(1, 40)} for layer in range(1, 9)]
    text = printed(result_table("causal", rows, 3))
    assert "3 of 8 rows, 13 of 40 columns; the file has all" in text
    assert "on_12" in text
    assert "on_13" not in text
    assert "0.4286" in text
    assert "…" not in text
    small = printed(result_table("removal", [{"layer": 1, "loss": 2.5}, {"layer": 2}], 3))
    assert "2.5" in small
    assert "the file has all" not in small
