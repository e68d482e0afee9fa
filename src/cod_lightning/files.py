"""Atomic writes: a file or folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cod_lightning.errors import UserError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path`, replacing an existing file; a reader sees the old file or the new one, never a part.

    The temporary file is created exclusively, in the same folder under an unpredictable name: no link is followed.

    Raises:
        OSError: the folder is not writable; the temporary file is removed.
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


def check_new_folder(folder: Path) -> None:
    """Check that creating `folder` overwrites nothing.

    Raises:
        UserError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder: choose another output")


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yield a temporary folder that is renamed to `folder` on success and removed on failure.

    Raises:
        UserError: `folder` exists and is not an empty folder, or it is not writable.
    """
    check_new_folder(folder)
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.replace(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    """The umask of this process; the system has no call that only reads it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
