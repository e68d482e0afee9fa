"""The record of a run in one JSON file: configuration, environment, results."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cod_lightning
from cod_lightning.errors import UserError
from cod_lightning.files import write_atomic
from cod_lightning.measure.result import finite_or_none
from cod_lightning.typed_json import from_json, read_json

RECORD = "record.json"
FAILURE = "failed.json"
"""Replaces the record of a run that diverged."""
PACKAGES = ("torch", "lightning", "torchmetrics", "litdata", "tokenizers", "triton", "numpy", "pillow")


def environment() -> dict[str, Any]:
    """Versions, commit and hardware of this process."""
    return {
        "versions": {
            "cod_lightning": cod_lightning.__version__,
            "python": platform.python_version(),
            **{name: installed for name in PACKAGES if (installed := package_version(name))},
        },
        "git_commit": git_commit(),
        "hardware": hardware(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of this package's checkout, with "+changes" if files differ; None outside of a checkout."""
    folder = Path(cod_lightning.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Names and numbers of CPU cores, threads and GPUs."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # not Linux: keep the architecture
    import torch  # takes seconds, and readers of records do not need it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def write_failure(folder: Path, config: Mapping[str, Any], reason: str) -> None:
    """Write `failed.json` into a run folder: configuration, environment and reason."""
    write_json(folder / FAILURE, {"failure": reason, "seed": config["seed"], **environment(), "config": config})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON with null for numbers that are not finite."""
    write_atomic(path, json.dumps(finite_or_none(values), indent=1, allow_nan=False) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, None if there is no record.

    Raises:
        UserError: the file is unreadable or not a run record.
    """
    path = folder / RECORD
    return read_record_file(path) if path.exists() else None


def read_record_file(path: Path) -> dict[str, Any]:
    """The content of a `record.json` or `failed.json`.

    Raises:
        UserError: the file is unreadable or not a run record.
    """
    record = read_json(path, dict[str, Any], "remove it")
    try:
        check_record(record)
    except ValueError as error:
        raise UserError(f"{path}: not a run record ({error}); remove it") from error
    return record


@dataclass(frozen=True)
class NormName:
    name: str


@dataclass(frozen=True)
class RecordedConfig:
    norm: NormName
    experiment: str
    paper: dict[str, Any]


@dataclass(frozen=True)
class Hardware:
    cpu: str
    cores: int
    threads: int
    gpus: list[str]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The fields of every record that commands read."""

    seed: int
    config: RecordedConfig
    versions: dict[str, Any]
    hardware: Hardware
    date: str
    git_commit: str | None = None


@dataclass(frozen=True, kw_only=True)
class FailedRun(Recorded):
    failure: str


@dataclass(frozen=True, kw_only=True)
class FinishedRun(Recorded):
    """The metrics with a default depend on the task."""

    steps: int
    tokens: int
    tokens_per_second: float
    wall_seconds: float
    parameters: int
    val_loss: float
    ppl: float = 0.0
    ppl_paper_protocol: float = 0.0
    accuracy: float = 0.0
    history: dict[str, dict[str, list[Any]]]


REQUIRED_SERIES = {"train": "loss", "val": "val_loss", "layers": "variance"}
"""The column of each series that tables and figures use."""


def check_record(record: dict[str, Any]) -> None:
    """Check the fields of a parsed `record.json` or `failed.json`.

    Raises:
        ValueError: names the first field that is missing or of another type.
    """
    if "failure" in record:
        from_json(FailedRun, record, ignore_unknown=True)
        return
    run = from_json(FinishedRun, record, ignore_unknown=True)
    for name, value in vars(run).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {record[name]}")
    for kind, name in REQUIRED_SERIES.items():
        series = run.history.get(kind, {"step": [0], name: [0.0]})
        for column in ("step", name):
            if not is_series(series.get(column)):
                raise ValueError(f"history.{kind}.{column} is missing, empty, or not a list of numbers")
        if len(series[name]) != len(series["step"]):
            raise ValueError(f"history.{kind}.{name} has {len(series[name])} entries for {len(series['step'])} steps")


def is_series(value: Any) -> bool:
    """Whether a value is a non-empty list of numbers, or of lists of equal length; None replaces NaN and infinity."""
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(is_series(part) and len(part) == len(value[0]) for part in value)
    return all(number is None or type(number) in (int, float) for number in value)
