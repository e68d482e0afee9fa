"""Signals that ask a process to stop, and child processes that end with their parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

from cod_lightning.errors import Stopped

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Signals that a scheduler, a terminal or a person sends to stop a process; all are handled alike."""
PARENT = "COD_LIGHTNING_PARENT"
"""The environment variable that holds the process id of the command that started this one."""


def raise_stopped(number: int, frame: Any) -> None:
    """Raise `Stopped`; a handler of signals. Later ones are ignored, so that they do not interrupt the cleanup."""
    install(lambda number, frame: None)
    if "LOCAL_RANK" not in os.environ:
        end_with_parent(0)  # a parent signals its end once for each of its threads
    raise Stopped(f"interrupted by {signal.Signals(number).name}")


def install(handler: Callable[[int, Any], Any] | signal.Handlers, numbers: Iterable[int] = STOP_SIGNALS) -> None:
    """Let `handler` handle signals; those that are ignored from the start stay so (nohup), except SIGTERM.

    Only the main thread can install handlers: in another one this does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def ignore() -> None:
    """Ignore what a terminal or a scheduler sends to all processes: the parent decides when this worker ends.

    SIGTERM keeps its effect, by which pools end their workers.
    """
    for number in (signal.SIGINT, *STOP_SIGNALS):
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


def ignore_once() -> None:
    """As `ignore`, and ignore one SIGTERM too, which Slurm sends to all processes; the second one ends this process."""
    ignore()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def ignore_until_exit() -> None:
    """Ignore stop signals while the interpreter ends, so that a second one does not change the exit status."""
    install(signal.SIG_IGN)


@contextmanager
def raise_on_stop_signals() -> Generator[None]:
    """Raise `Stopped` on a stop signal, and end with the command that started this process, while the block runs.

    A run of a sweep ignores Ctrl-C, which the terminal sends to it too: the sweep stops it by SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    parent = os.environ.get(PARENT)
    install(raise_stopped)
    if parent == str(os.getppid()):
        if "LOCAL_RANK" in os.environ:
            end_with_parent(signal.SIGKILL)  # a rank may wait for a lost one where no handler runs
        else:
            end_with_parent(signal.SIGTERM)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT)
        if parent is not None:
            os.environ[PARENT] = parent
        for number, handler in handlers.items():
            if handler is not None:  # one that Python did not install
                signal.signal(number, handler)


def end_with_parent(number: int) -> None:
    """Ask Linux to send this process a signal when its parent ends, 0 for none; does nothing on other systems."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))
