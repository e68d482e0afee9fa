"""The record of a run: what was asked for, where it ran and what came out, as one JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cod_lightning
from cod_lightning.errors import UserError

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
    """Write `record.json` into a run folder, whole or not at all."""
    write(folder / RECORD, record)


def write_failure(folder: Path, config: Mapping[str, Any], reason: str) -> None:
    """Write `failed.json` into a run folder: what was asked for, where it ran, and why there is no record."""
    write(folder / FAILURE, {"failure": reason, "seed": config["seed"], **environment(), "config": config})


def write(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished run, None if it has none yet.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable run record ({error}); remove it and run again") from error
