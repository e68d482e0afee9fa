"""The commands of one run of `reproduce`, with a pool that records them and runs none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cod_lightning.commands.reproduce import run_task

RESULTS, FOLDER = Path("results"), Path("runs/toy/lns")
FIT = ["fit", "name=lns"]
SCORE = ["evaluate", "runs/toy/lns", "tasks=paper"]
MEASURE = ["measure", "all", "runs/toy/lns", "only=angular,variance", "rows=64"]


def task(pretrained_model=None, overrides=()):
    row = SimpleNamespace(pretrained_model=pretrained_model, tasks="paper", overrides=overrides)
    row.source_folder, row.cli_args = lambda seed: None, lambda seed: ["name=lns"]
    folder = Path("runs/toy/smollm2") if pretrained_model else FOLDER
    measures = {"variance", "angular"}
    return SimpleNamespace(row=row, seed=1, folder=folder, label="lns", measures=measures)


@pytest.fixture
def run_with(monkeypatch):
    """`run_with(task, *statuses)` returns the status of the task, the commands and the saved results."""

    def run(task, *statuses):
        commands, saved, left = [], [], iter(statuses)
        monkeypatch.setattr("cod_lightning.paper.results.save_result", lambda *arguments: saved.append(arguments))
        pool: Any = SimpleNamespace(run_command=lambda words, label: commands.append(words) or next(left))
        return run_task(task, pool, RESULTS), commands, saved

    return run


RECORD, MEASURED = (FOLDER, RESULTS), (FOLDER, RESULTS, {"variance", "angular"})


@pytest.mark.parametrize(
    ("statuses", "commands", "saved"),
    [
        ((0, 0, 0), [FIT, SCORE, MEASURE], [RECORD, MEASURED]),
        ((2,), [FIT], [RECORD]),  # a run that diverged
        ((0, 3), [FIT, SCORE], [RECORD]),
        ((0, 0, 4), [FIT, SCORE, MEASURE], [RECORD]),
    ],
)
def test_a_run_is_trained_scored_and_measured_until_a_command_fails(run_with, statuses, commands, saved):
    assert run_with(task(), *statuses) == (statuses[-1], commands, saved)


def test_a_pretrained_model_is_measured_on_the_text_of_its_row(run_with):
    row = task("smollm2", ("norm=lns", "data.seq_len=9", f"output={RESULTS.parent.resolve()}"))  # a folder that exists
    command = ["measure", "all", "smollm2", *MEASURE[3:], "data.seq_len=9", "output=runs/toy/smollm2/measure"]
    assert run_with(row, 0) == (0, [command], [(row.folder, RESULTS, row.measures)])
