"""Memory, step time and TensorBoard's files over a long run with all its statistics: none of them may grow.

    python benchmarks/long_run.py [--steps 2000] [--parts 10] [--save] [overrides ...]

The quickstart, by the command line. For each part of the run: resident memory at its end and the largest within it,
the median time of a step, and the bytes that TensorBoard's files have gained. The last line compares the second half
with the first.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _results import save, show

LINE = re.compile(r"^step +(\d+)/.* ([\d,]+) tokens/s", re.MULTILINE)


def resident(process: subprocess.Popen) -> float:
    """Memory of a process in MiB, 0 where it has ended."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--parts", type=int, default=10)
    options.add_argument("--save", action="store_true")
    options.add_argument("overrides", nargs="*")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place), Path(place, "log")
        words = [f"trainer.max_steps={arguments.steps}", f"output={folder}", "name=run", "trainer.log_every=1"]
        with open(log, "w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "cod_lightning", "fit", *words, *arguments.overrides], stdout=out, stderr=out
            )
        rows, reached, largest, written = [], 0, 0.0, 0
        while process.poll() is None:
            time.sleep(0.2)
            memory = resident(process)
            largest = max(largest, memory)
            lines = LINE.findall(log.read_text())
            step = int(lines[-1][0]) if lines else 0
            if step < arguments.steps * (len(rows) + 1) / arguments.parts or step == reached or not memory:
                continue
            rates = [float(rate.replace(",", "")) for number, rate in lines if reached < int(number) <= step]
            size = sum(path.stat().st_size for path in (folder / "run" / "tensorboard").glob("*"))
            rows.append(
                {
                    "steps": f"{reached + 1} to {step}",
                    "MiB at the end": round(memory, 1),
                    "largest MiB": round(largest, 1),
                    "tokens/s, median": round(statistics.median(rates)),
                    "TensorBoard, KiB more": round((size - written) / 1024, 1),
                }
            )
            print(rows[-1], flush=True)
            reached, largest, written = step, 0.0, size
        if process.returncode:
            raise SystemExit(log.read_text())
    show(rows)
    half = len(rows) // 2
    first, second = rows[1:half], rows[half:]
    for name in ("largest MiB", "tokens/s, median", "TensorBoard, KiB more"):
        ratio = statistics.mean(row[name] for row in second) / statistics.mean(row[name] for row in first)
        print(f"{name}: second half over first half (without the first part) {ratio:.3f}")
    if arguments.save:
        save("long_run", rows)


if __name__ == "__main__":
    main()
