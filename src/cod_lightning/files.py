"""Atomic writes: a file or folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cod_lightning.errors import UserError


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` to `path` with `open_atomic`.

    Raises:
        OSError: the folder is not writable; the temporary file is removed.
    """
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: Path, rename: Callable[[Path, Path], object] = os.replace) -> Generator[IO[bytes]]:
    """Yield a file that replaces `path` on success and is removed on failure; a reader sees the old or the new content.

    The temporary file is created exclusively, in the same folder under an unpredictable name: no link is followed. It
    is on the disk before it gets its name.

    Args:
        path: the file.
        rename: gives the temporary file its name; `replace_path` also replaces a folder.

    Raises:
        OSError: the folder is not writable.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        rename(Path(temporary), path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace_path(new: Path, path: Path) -> None:
    """Rename `new` to `path`, replacing a file or folder; atomic if both are files."""
    if path.is_dir() or (new.is_dir() and path.exists()):
        old = path.with_name(f".{path.name}.old.partial")
        remove(old)
        path.rename(old)
        new.rename(path)
        remove(old)
    else:
        os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
