"""A run killed at random moments, and started again by the same command, against one that was left alone.

    python benchmarks/soak.py [--kills 50] [--steps 3000] [--seed 0] [--save] [overrides ...]

Each life ends by SIGKILL: at a random moment after its first step, while a checkpoint is being written, or in a
validation, in turn. In the end every loss, validation figure and layer statistic must equal those of the run that was
left alone, to the bit, and every step must have been made once. Exits with 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _results import save, show

WORDS = [
    *("model=tiny", "data.vocab_size=300", "data.seq_len=32", "data.batch_size=8", "data.micro_batch_size=8"),
    *("data.max_documents=300", "data.val_tokens=20000", "eval.every=25", "eval.paper_batch=8", "trainer.threads=1"),
    *("trainer.log_every=1", "trainer.stats_every=10", "trainer.checkpoint_every=10", "logger=none"),
    *("trainer.measures.jacobian=0", "trainer.accelerator=cpu"),
]
KINDS = ("any moment", "checkpoint", "validation")
PATIENCE = 300.0
"""Seconds until a process must have come to its first step, or to its end."""


def command(folder: Path, steps: int, name: str, overrides: list[str]) -> list[str]:
    where = [f"output={folder}", f"data.root={folder / 'data'}", f"trainer.max_steps={steps}", f"name={name}"]
    return [sys.executable, "-m", "cod_lightning", "fit", *WORDS, *where, *overrides]


def last_step(log: Path) -> int:
    return max((int(step) for step in re.findall(r"^step +(\d+)/", log.read_text(), re.MULTILINE)), default=0)


def one_life(words: list[str], folder: Path, kind: str, draw: random.Random) -> tuple[str, int, bool]:
    """Start, and kill where `kind` says; returns where it was killed, at which step, and whether a file was cut."""
    log, checkpoints = folder / "log", folder / "killed" / "checkpoints"
    with open(log, "w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    began, wait = time.monotonic(), draw.uniform(0.1, 1.5)
    first = None
    while process.poll() is None and time.monotonic() - began < PATIENCE:
        step = last_step(log)
        if first is None and step:
            first = time.monotonic()
        if first is not None and time.monotonic() - first > wait:
            writing = any(checkpoints.glob(".*.partial"))
            validating = step % 25 == 0 and f"step {step:>6}/" in log.read_text() and "val_loss" not in last_line(log)
            if kind == "any moment" or (kind == "checkpoint" and writing) or (kind == "validation" and validating):
                break
        time.sleep(0.0005)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    if ended and process.returncode != 0:
        raise SystemExit(f"the run failed by itself:\n{log.read_text()}")
    return "ended" if ended else kind, last_step(log), any(checkpoints.glob(".*.partial"))


def last_line(log: Path) -> str:
    lines = log.read_text().splitlines()
    return lines[-1] if lines else ""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--steps", type=int, default=3000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--save", action="store_true")
    options.add_argument("overrides", nargs="*")
    arguments = options.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        subprocess.run(command(folder, arguments.steps, "alone", arguments.overrides), check=True, capture_output=True)
        words, lives = command(folder, arguments.steps, "killed", arguments.overrides), []
        for number in range(arguments.kills):
            kind, step, cut = one_life(words, folder, KINDS[number % len(KINDS)], draw)
            if kind == "ended":
                print(f"the run ended after {number} kills: more --steps are needed for more", file=sys.stderr)
                break
            lives.append((kind, step, cut))
        subprocess.run(words, check=True, capture_output=True)
        alone, killed = (json.loads((folder / name / "record.json").read_text()) for name in ("alone", "killed"))
    series = {
        f"{kind}.{name}": values == killed["history"][kind][name]
        for kind, columns in alone["history"].items()
        for name, values in columns.items()
        if name != "tokens_per_second"
    }
    rows = [
        {
            "killed": kind,
            "kills": sum(life[0] == kind for life in lives),
            "with a file half written": sum(life[0] == kind and life[2] for life in lives),
            "steps": arguments.steps,
            "seed": arguments.seed,
            "equal to the bit": all(series.values()),
        }
        for kind in KINDS
    ]
    show(rows)
    if arguments.save:
        save("soak", rows)
    if different := [name for name, equal in series.items() if not equal]:
        raise SystemExit(f"these differ from the run that was left alone: {', '.join(different)}")


if __name__ == "__main__":
    main()
