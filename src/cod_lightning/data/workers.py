"""Worker processes of a preparation."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from cod_lightning import signals
from cod_lightning.errors import UserError

T = TypeVar("T")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def require_main_guard() -> None:
    """Check that this process is not a worker that imports the script of its parent again, and runs it once more.

    Raises:
        UserError: it is; the parent would wait for it, and it for a lock of the parent.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "a worker process imports the script that started it: put what the script runs under "
            'if __name__ == "__main__": or set data.workers=1'
        )


@contextmanager
def worker_pool(
    workers: int, start: Callable[..., object] | None = None, *arguments: Any
) -> Generator[ProcessPoolExecutor]:
    """Yield an executor whose processes end with this one, however it ends; each calls `start(*arguments)` first.

    Raises:
        UserError: a process died.
    """
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (start, arguments))
    try:
        yield executor
    except BrokenExecutor as error:
        raise UserError(
            "a worker died: see its error above; if there is none, it was killed, probably out of memory: lower "
            "data.workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(start: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    signals.ignore()
    # Workers of an executor survive a killed parent and wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if start is not None:
        start(*arguments)


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Start a function in another thread: a signal cannot interrupt the main thread while it computes in a library."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # also a panic of a Rust library
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()  # daemon: the process ends without it
    return future
