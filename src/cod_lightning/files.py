"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by one with this content; a reader sees the old file or the new one, never a part.

    The temporary file is created exclusively beside it under an unpredictable name, so no link is followed.

    Raises:
        OSError: the folder cannot be written to; nothing is left behind.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    """The permissions that new files of this process do not get; the system has no call that only reads it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
