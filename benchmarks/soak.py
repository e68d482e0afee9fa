"""A run that is killed at random moments and restarted by the same command, against an uninterrupted run.

    python benchmarks/soak.py [--kills 50] [--steps 3000] [--seed 0] [--save] [overrides ...]

SIGKILL comes in turn at a random moment after the first step, during the write of a checkpoint, and during validation.
At the end every loss, validation result and layer statistic must equal those of the uninterrupted run bit for bit, and
every step must be recorded once; else the exit status is 1.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _results import CLI, STEP_LINE, argument_parser, report, start_cli

SETTINGS = [
    *("model=tiny", "data.vocab_size=300", "data.seq_len=32", "data.batch_size=8", "data.micro_batch_size=8"),
    *("data.max_documents=300", "data.val_tokens=20000", "eval.every=25", "eval.paper_batch=8", "trainer.threads=1"),
    *("trainer.log_every=1", "trainer.stats_every=10", "trainer.checkpoint_every=10", "logger=none"),
    *("trainer.measures.jacobian=0", "trainer.accelerator=cpu"),
]
KINDS = ("any moment", "checkpoint", "validation")
TIMEOUT = 300.0
"""Seconds that a process may run; then it is killed at any moment."""


def last_step(log: str) -> int:
    return max((int(step) for step, _ in STEP_LINE.findall(log)), default=0)


def run_and_kill(cli_args: list[str], folder: Path, kind: str, rng: random.Random) -> tuple[str, bool]:
    """Start the run and kill it at a moment of `kind`.

    Returns:
        `kind`, or "ended" if the run finished first; whether a checkpoint was partially written.

    Raises:
        SystemExit: the run failed.
    """
    log, checkpoints = folder / "log", folder / "killed" / "checkpoints"
    process = start_cli(cli_args, log)
    start, delay, first = time.monotonic(), rng.uniform(0.1, 1.5), None
    while process.poll() is None and time.monotonic() - start < TIMEOUT:
        text = log.read_text()
        step = last_step(text)
        if first is None and step:
            first = time.monotonic()
        if first is not None and time.monotonic() - first > delay:
            writing = any(checkpoints.glob(".*.partial"))
            last_line = (text.splitlines() or [""])[-1]
            validating = step % 25 == 0 and f"step {step:>6}/" in text and "val_loss" not in last_line
            if kind == "any moment" or (kind == "checkpoint" and writing) or (kind == "validation" and validating):
                break
        time.sleep(0.0005)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    if ended and process.returncode != 0:
        raise SystemExit(f"the run failed:\n{log.read_text()}")
    return "ended" if ended else kind, any(checkpoints.glob(".*.partial"))


def main() -> None:
    parser = argument_parser(__doc__, "soak")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0, help="for the moments of the kills")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills: list[tuple[str, bool]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def fit(name: str) -> list[str]:
            paths = [f"output={folder}", f"data.root={folder / 'data'}", f"name={name}"]
            words = [*SETTINGS, *paths, f"trainer.max_steps={args.steps}", *args.overrides]
            return ["fit", *{word.partition("=")[0]: word for word in words}.values()]  # the last of each name

        subprocess.run([*CLI, *fit("uninterrupted")], check=True, capture_output=True)
        for number in range(args.kills):
            kind, partial = run_and_kill(fit("killed"), folder, KINDS[number % len(KINDS)], rng)
            if kind == "ended":
                print(f"the run ended after {number} kills; increase --steps", file=sys.stderr)
                break
            kills.append((kind, partial))
        subprocess.run([*CLI, *fit("killed")], check=True, capture_output=True)
        uninterrupted, killed = (
            json.loads((folder / name / "record.json").read_text())["history"] for name in ("uninterrupted", "killed")
        )
    different = [
        f"{kind}.{name}"
        for kind, series in uninterrupted.items()
        for name, values in series.items()
        if name != "tokens_per_second" and values != killed[kind][name]
    ]
    rows = [
        {
            "killed": kind,
            "kills": sum(kind == killed_at for killed_at, _ in kills),
            "with a file half written": sum(kind == killed_at and partial for killed_at, partial in kills),
            "steps": args.steps,
            "seed": args.seed,
            "equal to the bit": not different,
        }
        for kind in KINDS
    ]
    report(args, rows)
    if different:
        raise SystemExit(f"these series differ from the uninterrupted run: {', '.join(different)}")


if __name__ == "__main__":
    main()
