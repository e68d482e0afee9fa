import io
from pathlib import Path

import pytest
from rich.console import Console

from cod_lightning.commands.sweeps import sweep_table
from cod_lightning.commands.terminal import (
    WIDTH,
    estimate_lines,
    format_bytes,
    format_duration,
    result_table,
    run_summary,
)
from cod_lightning.train.cost import Memory
from cod_lightning.train.estimate import Estimate


def printed(table):
    console = Console(width=WIDTH, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def run_record(protocol="strict", **values):
    config = {"protocol": protocol, "experiment": "x", "norm": {"name": "lns"}, "paper": {}, "row": None}
    record = {
        **{"val_loss": 4.0, "ppl": 54.6, "ppl_paper_protocol": 33.3, "steps": 1, "tokens": 8, "parameters": 9},
        **{"tokens_per_second": 1.0, "wall_seconds": 1.0, "seed": 1, "history": {}, "config": config},
    }
    return record | values


@pytest.mark.parametrize("protocol", ["paper", "strict"])
def test_tables_show_the_released_perplexity_only_under_the_paper_protocol(protocol):
    record = run_record(protocol)
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


def test_the_chart_of_a_run_shows_its_last_variance():
    history = {"layers": {"variance": [[1.25, 2.25], [3.25, 4.25]]}}
    text = printed(run_summary(run_record(history=history), Path("run")))
    assert "3.25" in text
    assert "1.25" not in text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(12.4, "12 s"), (90, "1 min 30 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min"), (360_000, "100 h 00 min")],
)
def test_a_duration_is_in_hours_minutes_and_seconds(seconds, expected):
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(None, ""), (0, ""), (999, "999 B"), (1500, "1.5 kB"), (80 * 10**9, "80 GB")]
)
def test_bytes_have_decimal_units(count, expected):
    assert format_bytes(count) == expected


def test_every_line_of_an_estimate_has_its_own_number():
    memory = Memory(
        weights=1000, gradients=2000, moments=3000, copies=4000, communication=5000, activations=6000, work=7000
    )
    texts = {"hardware": "h100", "precision": "bf16-true", "strategy": "ddp", "checkpointing": "none"}
    estimate = Estimate(
        **{"gpus": 4, "mfu": 0.5, "hours": 10.0, "published_tokens": 6e9, **texts},
        **{"micro_batch_size": 100, "parameters": 101, "non_embedding": 102, "positions": 103},
        **{"flops_per_token": 104, "flops": 105, "device_memory": 106, "max_micro_batch_size": 107},
        **{"token_bytes": 108, "documents": 109, "text_bytes": 110, "download_bytes": 111},
        memory=memory,
    )
    lines = {name: value for section in estimate_lines(estimate) for name, value in section.items()}
    assert lines == {
        **{"parameters": "101", "without embeddings and head": "102", "token positions": "103"},
        **{"tokens, as published": "6,000,000,000", "FLOPs per token": "104", "FLOPs": "105"},
        **{"hardware": "4 x h100, ddp", "precision": "bf16-true", "activation checkpointing": "none"},
        **{"micro-batch size": "100", "largest micro-batch size": "107"},
        **{"weights": "1 kB", "gradients": "2 kB", "Adam's moments": "3 kB", "bfloat16 copies": "4 kB"},
        **{"communication": "5 kB", "activations": "6 kB", "loss or recomputation": "7 kB"},
        **{"memory per device": "28 kB of 106 B", "prepared tokens": "108 B", "documents of C4": "109"},
        **{"text of these documents": "110 B", "compressed text": "111 B"},
        **{"MFU": "0.5", "time": "10 h 00 min", "GPU-hours": "40"},
    }
