"""Time of `--help`, time of `fit` to its first step, and overhead of the training loop.

    python benchmarks/startup.py [--repeats 5] [--steps 20] [--set data.root=FOLDER ...] [--save]

The first two rows are medians over subprocesses, in wall and processor time; the data is prepared before. The other
rows are shares of the loop of one `fit` in this process, in processor time of all threads: `loading` is the wait for
batches, `around the step` everything except loading and the training step (callbacks, progress, checkpoints).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from _results import CLI, argument_parser, report
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import Profiler

from cod_lightning import cli
from cod_lightning.train import run

LOADING, STEP = "[_TrainingEpochLoop].train_dataloader_next", "run_training_batch"
CALLBACKS = ("on_train_batch_start", "on_train_batch_end")


class ProcessorTime(Profiler):
    """Processor time of each action of the loop, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.started: dict[str, float] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def start(self, action_name: str) -> None:
        self.started[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        self.seconds[action_name] += time.process_time() - self.started.pop(action_name)


def run_cli(cli_args: Sequence[str], until: bytes = b"") -> tuple[float, float]:
    """Wall and processor seconds of a command: to its end, or to the line of stderr that starts with `until`.

    Raises:
        SystemExit: the command failed, or ended without that line.
    """
    start = time.perf_counter()
    with subprocess.Popen([*CLI, *cli_args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        output, reached = [], False
        for line in process.stderr:
            output.append(line)
            if reached := bool(until) and line.startswith(until):
                break
        seconds = time.perf_counter() - start
        if reached:
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not reached and (until or process.returncode):
        raise SystemExit(f"{' '.join(cli_args)}: exit status {process.returncode}\n{b''.join(output).decode()}")
    return seconds, usage.ru_utime + usage.ru_stime


def loop_shares(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Percent of the loop's processor time over `steps` steps without measures and validation."""
    profiler, build_trainer = ProcessorTime(), run.build_trainer

    def with_profiler(*args: Any) -> Trainer:
        trainer = build_trainer(*args)
        trainer.profiler = profiler
        return trainer

    run.build_trainer = with_profiler
    try:
        settings = [f"trainer.max_steps={steps}", "trainer.stats_every=0", "trainer.measures.jacobian=0"]
        cli.main(["fit", *overrides, *settings, f"eval.every={steps}", "name=shares"])
    finally:
        run.build_trainer = build_trainer
    loading, step = profiler.seconds[LOADING], profiler.seconds[STEP]
    callbacks = sum(seconds for name, seconds in profiler.seconds.items() if name.endswith(CALLBACKS))
    total = loading + step + callbacks
    return {"loading": 100 * loading / total, "around the step": 100 * callbacks / total}


def main() -> None:
    parser = argument_parser(__doc__, "startup")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="steps of the run for the shares of the loop")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides for the quickstart")
    args = parser.parse_args()
    if status := cli.main(["prepare", *args.set]):
        raise SystemExit(status)
    rows = []
    with tempfile.TemporaryDirectory() as output:
        fit = [*args.set, f"output={output}"]
        times = {
            "--help": [run_cli(["--help"]) for _ in range(args.repeats)],
            "fit to the first step": [
                run_cli(["fit", *fit, f"name=fit{repeat}"], until=b"step      1/") for repeat in range(args.repeats)
            ],
        }
        for what, seconds in times.items():
            wall, processor = (round(statistics.median(values), 3) for values in zip(*seconds, strict=True))
            rows.append({"what": what, "unit": "s", "repeats": args.repeats, "wall": wall, "processor": processor})
        for what, share in loop_shares(fit, args.steps).items():
            row = {"what": what, "unit": "% of the loop", "repeats": args.steps, "wall": ""}
            rows.append({**row, "processor": round(share, 3)})
    report(args, rows)


if __name__ == "__main__":
    main()
