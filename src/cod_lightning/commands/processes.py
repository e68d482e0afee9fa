"""Commands of this package in child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cod_lightning.data.workers import available_cores
from cod_lightning.errors import TRY_AGAIN, Stopped


class CommandPool(ThreadPoolExecutor):
    """Threads that run commands of this package in child processes.

    An exception in the block, such as `Stopped` by a signal, stops the children: each saves a checkpoint and ends. The
    pool waits for them; another Ctrl-C kills them. They also stop if this process is killed.

    Args:
        jobs: number of commands that run at the same time; they share the CPU cores.
    """

    def __init__(self, jobs: int):
        super().__init__(jobs)
        self.jobs = jobs
        self.children: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        if exc_type is not None:
            with self.lock:
                self.stopped = True
                for child in self.children:
                    child.terminate()
        try:
            super().__exit__(exc_type, exc_val, exc_tb)
        except KeyboardInterrupt:
            with self.lock:
                for child in self.children:
                    child.kill()
            raise
        if exc_type is KeyboardInterrupt:
            raise Stopped("interrupted by SIGINT") from exc_val

    def run_command(self, arguments: Sequence[str], label: str) -> int:
        """Run a command of this package in a child process and return its exit status; 128 + N if signal N killed it.

        Args:
            arguments: the command and its arguments.
            label: printed before the command, or before each line of its output if several run at the same time.
        """
        command = [sys.executable, "-m", "cod_lightning", *arguments]
        options: dict[str, Any] = {}
        if self.jobs == 1:
            print(f"--- {label}", file=sys.stderr, flush=True)
        else:
            threads = str(max(available_cores() // self.jobs, 1))
            environment = {"OMP_NUM_THREADS": threads} | os.environ
            options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
        with self.lock:
            if self.stopped:
                return TRY_AGAIN
            child = subprocess.Popen(command, text=True, **options)
            self.children.add(child)
        with child:  # waits, and closes the pipe
            for line in child.stdout or ():
                print(f"[{label}] {line}", end="", file=sys.stderr, flush=True)
        with self.lock:
            self.children.remove(child)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode


def sweep_labels(runs: Sequence[Sequence[str]]) -> list[str]:
    """For each run of a sweep, the overrides that vary, such as "norm=lns seed=1"."""
    shared = set.intersection(*map(set, runs))
    return [" ".join(override for override in overrides if override not in shared) or "the run" for overrides in runs]
