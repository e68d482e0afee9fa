"""The record of a run: what was asked for, where it ran and what came out, as one JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cod_lightning
from cod_lightning.config.schema import FIGURES
from cod_lightning.errors import DAMAGED, UserError
from cod_lightning.files import write_atomic

RECORD = "record.json"
FAILURE = "failed.json"
"""Instead of a record, where the loss left the finite numbers."""
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
    """The commit of the checkout this package runs from, "+changes" appended where files differ; None outside one."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """Names and counts of the processors at hand."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass  # not Linux: the architecture is all there is
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `record.json` into a run folder."""
    write(folder / RECORD, record)


def write_failure(folder: Path, config: Mapping[str, Any], reason: str) -> None:
    """Write `failed.json` into a run folder: the configuration, the machine, and the reason of the failure."""
    write(folder / FAILURE, {"failure": reason, "seed": config["seed"], **environment(), "config": config})


def write(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(finite(values), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, None if it has none yet.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
        check(record)
    except DAMAGED as error:
        raise UserError(f"{path}: not a readable run record ({error}); remove it and run again") from error
    return record


NUMBERS = ("seed", "steps", "tokens", "tokens_per_second", "wall_seconds", "parameters", "val_loss")
"""What every record of a finished run has, besides the figures of its task."""


def check(record: Any) -> None:
    """Compare what was read of a finished or failed run with what is written of one.

    Raises:
        ValueError: names the first field that is missing or of another type.
    """

    def has(name: str, right: Callable[[Any], bool], holder: Any = record) -> None:
        if not isinstance(holder, dict) or not right(holder.get(name)):
            raise ValueError(f"{name} is missing, or not what a run writes")

    def is_mapping(value: Any) -> bool:
        return isinstance(value, dict)

    def is_text(value: Any) -> bool:
        return isinstance(value, str)

    for name in ("config", "versions", "hardware"):
        has(name, is_mapping)
    for name in ("norm", "paper"):
        has(name, is_mapping, record["config"])
    has("name", is_text, record["config"]["norm"])
    has("experiment", is_text, record["config"])
    has("date", is_text)
    has("git_commit", lambda value: value is None or is_text(value))
    has("cpu", is_text, record["hardware"])
    has("gpus", lambda value: isinstance(value, list) and all(map(is_text, value)), record["hardware"])
    for name in ("cores", "threads"):
        has(name, is_number, record["hardware"])
    if "failure" in record:
        has("seed", is_number)
        has("failure", is_text)
        return
    for name in (*NUMBERS, *(name for name in FIGURES if name in record)):
        has(name, is_number)
    has("history", is_mapping)
    for kind, name in READ.items():
        if kind in record["history"]:
            series = record["history"][kind]
            has("step", is_series, series)
            has(name, is_series, series)
            if len(series[name]) != len(series["step"]):
                raise ValueError(f"{name} is not as long as the steps that it was taken at")


READ = {"train": "loss", "val": "val_loss", "layers": "variance"}
"""Of the series of a history those that tables and figures are made of."""


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_series(value: Any) -> bool:
    """Whether a value is a non-empty list of numbers, or of equally long lists of numbers; None is not finite."""
    if not isinstance(value, list) or not value:
        return False
    if isinstance(value[0], list):
        return all(is_series(part) and len(part) == len(value[0]) for part in value)
    return all(number is None or is_number(number) for number in value)
