"""Commands of this package in child processes, one after the other or several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def run_command(arguments: Sequence[str], label: str, jobs: int) -> int:
    """Run a command of this package and return its exit status.

    Args:
        arguments: of the command line.
        label: printed before the command, or before each of its lines if `jobs` is more than 1.
        jobs: number of commands at the same time; each gets its share of the CPU cores.
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


def distinct_words(runs: Sequence[Sequence[str]]) -> list[str]:
    """For each run of a sweep, the words that it does not share with all others."""
    shared = set.intersection(*(set(words) for words in runs))
    return [" ".join(word for word in words if word not in shared) or "the run" for words in runs]
