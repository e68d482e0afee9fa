"""What the benchmarks share: clock, count of memory, and files of results named after the hardware and the day."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from cod_lightning.train.record import hardware

RESULTS = Path(__file__).parent / "results"


def path_of(name: str, suffix: str, device: str = "") -> Path:
    """Such as results/xeon_2.50ghz_2cores_2026-11-21_norm.csv; `device` where the results are not this machine's."""
    found = hardware()
    device = device or (found["gpus"][0] if found["gpus"] else f"{found['cpu']} {found['cores']}cores")
    plain = re.sub(r"\((R|TM)\)|\b(NVIDIA|Intel|AMD|CPU|Processor)\b|@", " ", device).lower()
    return RESULTS / f"{'_'.join(plain.split())}_{datetime.date.today()}_{name}{suffix}"


def save(name: str, rows: Sequence[Mapping[str, Any]], device: str = "", **more: Any) -> None:
    """Write rows as CSV, each with the day, the machine, the versions and `more`."""
    common = {
        "date": datetime.date.today().isoformat(),
        "machine": ", ".join([*hardware()["gpus"], hardware()["cpu"]]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **more,
    }
    path = path_of(name, ".csv", device)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    print(path)


def show(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print rows as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)


def keep_freed_memory() -> None:
    """Have glibc reuse what is freed: pages fetched anew cost up to three times the work, or nothing, as it happens."""
    if platform.libc_ver()[0] == "glibc":
        libc, (trim_threshold, mmap_max) = ctypes.CDLL(None), (-1, -4)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def milliseconds(
    variants: Mapping[str, Callable[[], object]],
    budget: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The median time of each variant; on a CPU they take turns in changing order, to share other load and caches.

    Args:
        variants: functions by name.
        budget: seconds for each, at least five runs.
        clock: in seconds, on a CPU.
    """
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return {name: do_bench(f, rep=int(1000 * budget), return_mode="median") for name, f in variants.items()}
    return {name: statistics.median(values) for name, values in rounds(variants, budget, clock).items()}


def rounds(
    variants: Mapping[str, Callable[[], object]],
    budget: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each variant in every round; in a round each runs once, in changing order.

    Args:
        variants: functions by name.
        budget: seconds for each, at least five runs.
        clock: in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    started, draw = clock(), random.Random(0)
    while min(map(len, times.values())) < 5 or clock() - started < budget * len(variants):
        for name, function in draw.sample(list(variants.items()), len(variants)):
            start = clock()
            function()
            times[name].append(1000 * (clock() - start))
    return times


def versions(*names: str) -> dict[str, str]:
    """Those of packages, empty where one is not installed."""
    return {name: metadata.version(name) if find_spec(name) else "" for name in names}


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` has allocated at one time, beyond those that were before."""
    gc.collect()  # what was left in cycles would else be freed, and subtracted, on the way
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    # `seen.events()` leaves out what operators allocate inside.
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
