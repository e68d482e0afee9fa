"""The memory of this machine, and what of it is free."""

from __future__ import annotations

import os
from pathlib import Path

from cod_lightning.errors import UserError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the limit of a container."""


def host_memory() -> int:
    """Bytes of this machine's memory, up to the limit of a container."""
    limits = [Path(path).read_text().strip() for path in LIMITS if os.access(path, os.R_OK)]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def free_memory() -> int:
    """Bytes that a process can take: those that Linux calls available, elsewhere all, up to a container's limit."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return min(1024 * int(fields["MemAvailable"].split()[0]), host_memory())
    except (OSError, KeyError):
        return host_memory()


def require_memory(parameters: int, name: str, dtype: str = "float32", itemsize: int = 4) -> None:
    """Check that the weights of a model fit into the free memory, before any is allocated.

    Args:
        parameters: their number.
        name: what is too large, at the start of the error.
        dtype: its name.
        itemsize: bytes of one.

    Raises:
        UserError: they do not fit.
    """
    if (needed := parameters * itemsize) > (free := free_memory()):
        raise UserError(
            f"{name}: out of memory: {parameters:,} parameters in {dtype} take {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free: use a machine with more memory, or a smaller model"
        )
