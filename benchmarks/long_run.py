"""Memory, throughput and TensorBoard files over a long run with all its statistics: constant if nothing leaks.

    python benchmarks/long_run.py [--steps 2000] [--parts 10] [--save] [overrides ...]

Runs the quickstart by the command line. Reports for each part of the run: resident memory at its end, peak memory,
median throughput, and growth of the TensorBoard files. The last lines compare the second half with the first.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from _results import STEP_LINE, argument_parser, report, start_cli


def resident_mib(process: subprocess.Popen) -> float:
    """Resident memory of a process, 0 after its end."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0.0
    match = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(match[1]) / 1024 if match else 0.0


def main() -> None:
    parser = argument_parser(__doc__, "long_run")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--parts", type=int, default=10)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    rows, last, peak, written = [], 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        settings = [f"trainer.max_steps={args.steps}", f"output={folder}", "name=run", "trainer.log_every=1"]
        process = start_cli(["fit", *settings, *args.overrides], log)
        while process.poll() is None:
            time.sleep(0.2)
            memory = resident_mib(process)
            peak = max(peak, memory)
            rates = {int(step): rate for step, rate in STEP_LINE.findall(log.read_text()) if rate}
            step = max(rates, default=0)
            if step < args.steps * (len(rows) + 1) / args.parts or step == last or not memory:
                continue
            new = [float(rate.replace(",", "")) for number, rate in rates.items() if number > last]
            size = sum(path.stat().st_size for path in Path(folder, "run").glob("events.*"))
            rows.append(
                {
                    "steps": f"{last + 1} to {step}",
                    "MiB at the end": round(memory, 1),
                    "largest MiB": round(peak, 1),
                    "tokens/s, median": round(statistics.median(new)),
                    "TensorBoard, KiB more": round((size - written) / 1024, 1),
                }
            )
            print(rows[-1], flush=True)
            last, peak, written = step, 0.0, size
        if process.returncode:
            raise SystemExit(log.read_text())
    report(args, rows)
    half = len(rows) // 2
    for column in ("largest MiB", "tokens/s, median", "TensorBoard, KiB more"):
        first, second = (statistics.mean(row[column] for row in part) for part in (rows[1:half], rows[half:]))
        print(f"{column}: second half over first half (without the first part) {second / first:.3f}")


if __name__ == "__main__":
    main()
