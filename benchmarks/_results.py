"""Shared by the benchmarks: command line, timing, peak memory, subprocesses and result files."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cod_lightning.nn.config import DecoderConfig
from cod_lightning.train.estimate import GPUS
from cod_lightning.train.record import hardware

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CLI = [sys.executable, "-m", "cod_lightning"]
STEP_LINE = re.compile(r"^step +(\d+)/(?:.* ([\d,]+) tokens/s)?", re.MULTILINE)
"""Progress line of `fit`: the step, and its tokens per second."""


def argument_parser(doc: str | None, name: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with `--save`, and with `--seconds` and `--threads` if `defaults` has them.

    Args:
        doc: docstring of the benchmark, shown by --help.
        name: name of the benchmark in its result file.
        **defaults: defaults of options.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/[hardware]_[date]_{name}.csv")
    parser.set_defaults(benchmark=name)
    if "seconds" in defaults:
        parser.add_argument("--seconds", type=float, help="time budget for each variant")
    if "threads" in defaults:
        parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.set_defaults(**defaults)
    return parser


def report(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], device: str = "", **columns: Any) -> None:
    """Print rows as a table; with `--save`, also `save` them."""
    show(rows)
    if args.save:
        save(args.benchmark, rows, device, **columns)


def result_path(name: str, suffix: str, device: str = "") -> Path:
    """Such as results/xeon_2.50ghz_2cores_2026-11-21_norm.csv; `device` overrides the hardware of this machine."""
    machine = hardware()
    device = device or (machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']} {machine['cores']}cores")
    words = re.sub(r"\((R|TM)\)|\b(NVIDIA|Intel|AMD|CPU|Processor)\b|@", " ", device).lower().split()
    return Path(__file__).parent / "results" / f"{'_'.join(words)}_{datetime.date.today()}_{name}{suffix}"


def save(name: str, rows: Sequence[Mapping[str, Any]], device: str = "", **columns: Any) -> None:
    """Write table rows as CSV; each row gets the date, the machine, the versions and `columns`."""
    common = {
        "date": datetime.date.today().isoformat(),
        "machine": ", ".join([*hardware()["gpus"], hardware()["cpu"]]),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        **columns,
    }
    path = result_path(name, ".csv", device)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *common])
        writer.writeheader()
        writer.writerows({**row, **common} for row in rows)
    print(path)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=160).print(table)


def load_shape(name: str) -> DecoderConfig:
    """The model of configs/model/NAME.yaml."""
    return DecoderConfig(**yaml.safe_load((Path(__file__).parents[1] / f"configs/model/{name}.yaml").read_text()))


def known_gpu() -> str | None:
    """Key of the CUDA device in `GPUS`; None for an unknown one."""
    return next((gpu for gpu in GPUS if gpu in torch.cuda.get_device_name().lower()), None)


def mean_loss(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of one of our models over all targets."""
    loss = model(inputs, targets)
    return loss.total / loss.counts.sum()


def training_step(
    loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer, batches: Sequence[Any], autocast: bool
) -> None:
    """Forward and backward pass of each micro-batch, then the optimizer's update."""
    for batch in batches:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            value = loss(*batch)
        value.backward()
        del value  # frees the graph
    optimizer.step()
    optimizer.zero_grad()


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters and of the optimizer's state."""
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *states])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())


def start_cli(cli_args: Sequence[str], log: Path) -> subprocess.Popen:
    """Start the package's command line; its output goes to `log`."""
    with open(log, "w") as out:
        return subprocess.Popen([*CLI, *cli_args], stdout=out, stderr=out)


def reuse_freed_memory() -> None:
    """Stop glibc from returning freed memory to the system: new page faults can triple the time of an operation."""
    if platform.libc_ver()[0] == "glibc":
        libc, (trim_threshold, mmap_max) = ctypes.CDLL(None), (-1, -4)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def elapsed(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    function()
    if ON_GPU:
        torch.cuda.synchronize()
    return clock() - start


def rounds(
    variants: Mapping[str, Callable[[], object]], budget: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Milliseconds of each variant in every round.

    A round runs each variant once, in random order, so that all share the load of other programs and the caches.

    Args:
        variants: functions by name.
        budget: seconds for each variant; there are at least five rounds.
        clock: returns seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    start, rng = clock(), random.Random(0)
    while min(map(len, times.values())) < 5 or clock() - start < budget * len(variants):
        for name, function in rng.sample(list(variants.items()), len(variants)):
            times[name].append(1000 * elapsed(function, clock))
    return times


def milliseconds(
    variants: Mapping[str, Callable[[], object]],
    budget: float = 0.5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median time of each variant: Triton's `do_bench` on a GPU, `rounds` on a CPU."""
    if ON_GPU:
        from triton.testing import do_bench

        return {name: do_bench(f, rep=int(1000 * budget), return_mode="median") for name, f in variants.items()}
    return {name: statistics.median(times) for name, times in rounds(variants, budget, clock).items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak of the memory that `function` allocates, in bytes: torch's count on a GPU, the profiler's on a CPU."""
    gc.collect()  # else garbage of earlier calls may be freed, and subtracted, during this one
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # `profiler.events()` omits allocations inside operators
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
