"""Commands of this package in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def run_command(arguments: Sequence[str], label: str, jobs: int) -> int:
    """Run a command of this package in a child process and return its exit status.

    Args:
        arguments: the command and its arguments.
        label: printed before the command, or before each line of its output if `jobs` > 1.
        jobs: number of commands that run at the same time; they share the CPU cores.
    """
    command = [sys.executable, "-m", "cod_lightning", *arguments]
    if jobs == 1:
        print(f"--- {label}", file=sys.stderr, flush=True)
        return subprocess.run(command).returncode
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    process = subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": threads} | os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(f"[{label}] {line}", end="", file=sys.stderr, flush=True)
    return process.wait()


def run_labels(runs: Sequence[Sequence[str]]) -> list[str]:
    """For each run of a sweep, the overrides that vary, such as "norm=lns seed=1"."""
    shared = set.intersection(*map(set, runs))
    return [" ".join(override for override in overrides if override not in shared) or "the run" for overrides in runs]
