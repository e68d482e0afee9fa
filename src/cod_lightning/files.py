"""Atomic writes, where a file or folder appears complete or not at all; locks; reading of regular files."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cod_lightning.errors import UserError, is_out_of_memory, no_permission, os_message


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
    with name_target(path):
        temporary = partial_path(path)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with name_target(path):
            rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def replace_path(new: Path, path: Path) -> None:
    """Rename `new` to `path`, replacing a file or folder; atomic if both are files."""
    if path.is_dir() or (new.is_dir() and path.exists()):
        old = partial_folder(path)
        path.rename(old / path.name)
        new.rename(path)
        remove(old)
    else:
        os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a file, link or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Checks of a destination, before anything is computed for it. `option` stands before its path in the error, such as
# `--output=`.


def check_new_folder(folder: Path, option: str = "") -> None:
    """Check that `folder` can be created and that this overwrites nothing.

    Raises:
        UserError: `folder` exists and is not an empty folder, is a link or a mount point, its parent is not writable,
            or its name is not UTF-8.
    """
    if not is_utf8(Path(os.path.abspath(folder))):
        raise UserError(f"{option}{folder}: the name or that of a folder above is not UTF-8: choose another output")
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{option}{folder} exists and is not an empty folder: choose another output")
    check_writable(folder, option, new=True)
    if folder.is_symlink() or os.path.ismount(folder):
        raise UserError(f"{option}{folder} is a link or a mount point, which is not replaced: name a new folder in it")


def check_new_file(path: Path, option: str = "") -> None:
    """Check that the file `path` can be created, with the folders above it, and that this overwrites nothing.

    Raises:
        UserError: it exists, or its parent is not writable.
    """
    if os.path.lexists(path):
        raise UserError(f"{option}{path} exists: choose a new file")
    check_writable(path, option, new=True)


def require_utf8(path: Path) -> None:
    """Raise a UserError if the name of a file to read is not UTF-8."""
    if not is_utf8(path):
        raise UserError(f"{path}: the name is not UTF-8: rename the file or its folder")


def is_utf8(path: Path) -> bool:
    """Whether the name of a path is UTF-8, as libraries in Rust require."""
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        return False
    return True


def check_writable(path: Path, option: str = "", new: bool = False) -> None:
    """Check that files can be written into a folder, or into the closest folder above it that exists.

    Writes a temporary file, because permissions do not tell: root may write everywhere, but not into /proc.

    Args:
        path: the folder.
        option: stands before it in the error.
        new: `path` itself will be created or replaced, so that only the folders above it are written to.

    Raises:
        UserError: they cannot, or `path` cannot exist.
    """
    name = f"{option}{path}"
    closest = path = Path(os.path.abspath(path))
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # an error says that it cannot exist, such as a name that is too long
        if new or not os.path.lexists(path):
            closest = next(parent for parent in path.parents if os.path.lexists(parent))
        longest = os.pathconf(closest, "PC_NAME_MAX")  # the system checks names in folders that exist only
        if any(len(os.fsencode(part)) > longest for part in path.relative_to(closest).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with tempfile.TemporaryFile(dir=closest):
            pass
    except OSError as error:
        raise UserError(
            f"{name} cannot be written: {closest} is not a writable folder ({error.strerror}): choose another place"
        ) from error


@contextmanager
def name_target(path: Path) -> Generator[None]:
    """Let the errors of a temporary file or folder name `path`, which it stands for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yield a temporary folder that is renamed to `folder` on success and removed on failure.

    Its files are on the disk before it gets its name.

    Raises:
        UserError: as `check_new_folder`, or the folder cannot be written; names no temporary file.
    """
    check_new_folder(folder)
    folder = Path(os.path.abspath(folder))
    partial = None
    try:
        with suppress(FileExistsError):  # the parent is a file, which the next line names better
            folder.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_folder(folder)
        yield partial
        finish_files(partial)
        partial.replace(folder)
    except OSError as error:
        raise UserError(os_message(error, folder).replace(str(partial or folder), str(folder))) from error
    except UserError as error:
        error.args = (str(error).replace(str(partial or folder), str(folder)),)
        raise
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def finish_files(folder: Path) -> None:
    """Give the files of a new folder the folder's permissions to read and write, and flush them to the disk.

    safetensors gives its files to their owner alone.
    """
    allowed = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            if mode | allowed != mode:
                with suppress(OSError):  # some file systems have no permissions
                    path.chmod(mode | allowed)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def partial_folder(path: Path) -> Path:
    """Create an empty folder beside `path`, exclusively and under an unpredictable name: no link is followed."""
    folder = partial_path(path)
    with name_target(path):
        folder.mkdir()
    return folder


def partial_path(path: Path) -> Path:
    """An unpredictable name beside `path`, for what becomes `path` when it is complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def locked(path: Path, wait: bool = True) -> Generator[None]:
    """Hold the lock file at `path` while the block runs, then remove it; the end of the process releases the lock.

    Args:
        path: the lock file, created if it does not exist; the last part is not followed if it is a link.
        wait: wait for another process that holds it.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
        OSError: the file cannot be created.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            lock(handle, path, wait)
            if not is_open_at(handle, path):  # the process that held it has removed it
                continue
            try:
                yield
            finally:
                with suppress(OSError):
                    path.unlink()
            return
        finally:
            os.close(handle)


def lock(handle: int, path: Path, wait: bool) -> None:
    """Lock the open file `handle` at `path`; print a warning if the file system does not support locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        sys.stderr.write(
            f"warning: {path.parent}: its file system does not support locks ({error.strerror}): do not let two "
            "processes write there at the same time\n"
        )


def is_open_at(handle: int, path: Path) -> bool:
    """Whether the open file `handle` is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def read_regular(path: Path) -> str:
    """Read a UTF-8 text file; unlike `read_text` it does not wait for a pipe or read a device.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it is not a regular file, or not UTF-8.
    """
    with open(path, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        return file.read()


@contextmanager
def translate_read_errors(path: Path) -> Generator[None]:
    """Read the downloaded file at `path` inside the `with`.

    Libraries raise many kinds of errors for damaged bytes, with messages about their own code.

    Raises:
        UserError: any other error, but for lack of memory; names the file, and says to fetch it again or to change its
            permissions.
    """
    require_utf8(path)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # libraries call a file without permission missing
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise no_permission(error, path) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path}: {damage_message(path)}") from error


def damage_message(path: Path) -> str:
    """The end of an error about a downloaded file that cannot be read."""
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
    return f"damaged or truncated ({size} on disk): fetch it again"
