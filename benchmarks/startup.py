"""From the command to the first step: `--help`, `fit` until it says its first step, and what the loop adds to a step.

    python benchmarks/startup.py [--repeats 5] [--steps 20] [--set data.root=FOLDER ...] [--save]

The first two are processes of their own, timed from their start and ended at the line that is waited for: the median of
the repeats, on the clock and of processor time. `fit` finds its data prepared. The last rows are shares of the steps of
one `fit` in this process, in processor time of all threads: `loading` is the wait for the next batch, `around the step`
all else of the loop that is not the training step itself (callbacks, progress, checkpoints).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from _results import save, show
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler

from cod_lightning import cli
from cod_lightning.train import run

COMMAND = [sys.executable, "-m", "cod_lightning"]
FIRST_STEP = b"step      1/"
LOADING, STEP = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"
CALLBACKS = ("on_train_batch_start", "on_train_batch_end")


class Spent(Profiler):
    """Seconds of processor time of every action of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.began: dict[str, float] = {}
        self.seconds: Counter[str] = Counter()

    def start(self, action_name: str) -> None:
        self.began[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        self.seconds[action_name] += time.process_time() - self.began.pop(action_name)


def until(words: Sequence[str], line: bytes) -> tuple[float, float]:
    """Seconds on the clock and of processor time from the start of a command until it prints `line` to stderr or ends.

    Raises:
        SystemExit: it ended without that line.
    """
    began = time.perf_counter()
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = []
        for found in process.stderr:
            said.append(found)
            if found.startswith(line):
                break
        seconds = time.perf_counter() - began
        process.kill()
        used = os.wait4(process.pid, 0)[2]
        process.returncode = 0
    if line and not (said and said[-1].startswith(line)):
        raise SystemExit(b"".join(said).decode())
    return seconds, used.ru_utime + used.ru_stime


def ended(words: Sequence[str]) -> tuple[float, float]:
    """As `until`, to the end of a command that succeeds."""
    began = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def shares(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Percent of the loop's processor time over `steps` steps, nothing measured or validated on the way."""
    spent, build = Spent(), run.build_trainer

    def with_profiler(*arguments: Any) -> Trainer:
        trainer = build(*arguments)
        trainer.profiler = spent
        return trainer

    run.build_trainer = with_profiler
    try:
        words = [f"trainer.max_steps={steps}", "trainer.stats_every=0", "trainer.measures.jacobian=0"]
        cli.main(["fit", *overrides, *words, f"eval.every={steps}", "name=shares"])
    finally:
        run.build_trainer = build
    around = sum(seconds for name, seconds in spent.seconds.items() if name.endswith(CALLBACKS))
    whole = spent.seconds[LOADING] + spent.seconds[STEP] + around
    return {"loading": 100 * spent.seconds[LOADING] / whole, "around the step": 100 * around / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of the fit that the shares are taken of")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides of the quickstart")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_startup.csv")
    options = parser.parse_args()
    prepare = cli.main(["prepare", *options.set])
    if prepare:
        raise SystemExit(prepare)
    rows = []
    with tempfile.TemporaryDirectory() as output:
        fit = [*options.set, f"output={output}"]
        timed: dict[str, Callable[[int], tuple[float, float]]] = {
            "--help": lambda repeat: ended(["--help"]),
            "fit to the first step": lambda repeat: until(["fit", *fit, f"name=fit{repeat}"], FIRST_STEP),
        }
        for what, measured in timed.items():
            wall, used = zip(*map(measured, range(options.repeats)), strict=True)
            rows.append(
                {
                    "what": what,
                    "unit": "s",
                    "repeats": options.repeats,
                    "wall": round(statistics.median(wall), 3),
                    "processor": round(statistics.median(used), 3),
                }
            )
        rows += [
            {"what": what, "unit": "% of the loop", "repeats": options.steps, "wall": "", "processor": round(share, 3)}
            for what, share in shares(fit, options.steps).items()
        ]
    show(rows)
    if options.save:
        save("startup", rows)


if __name__ == "__main__":
    main()
