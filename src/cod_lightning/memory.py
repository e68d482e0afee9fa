"""The memory of this machine, and its free part."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cod_lightning.errors import UserError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the limit of a container."""
USAGES = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}
"""The file with a container's usage, by the name of the file with its limit."""


def host_memory() -> int:
    """Bytes of this machine's memory, up to the limit of a container."""
    limits = [Path(path).read_text().strip() for path in LIMITS if os.access(path, os.R_OK)]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def free_memory() -> int:
    """Bytes that a process can take: those that Linux calls available, elsewhere all, up to a container's limit."""
    free = host_memory() - container_usage()
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return min(1024 * int(fields["MemAvailable"].split()[0]), free)
    except (OSError, KeyError):
        return free


def container_usage() -> int:
    """Bytes that the processes of a container take, without the cached files that Linux gives up first."""
    for limit in map(Path, LIMITS):
        with suppress(OSError, KeyError, ValueError):
            if limit.read_text().strip().isdigit():
                usage = int(limit.with_name(USAGES[limit.name]).read_text())
                fields = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
                return usage - int(fields["inactive_file"])
    return 0


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
