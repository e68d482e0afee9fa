"""Locks, temporary names, and files that would hang a reader or fill the memory."""

import errno
import fcntl
import os
import re
import stat
import zipfile
from contextlib import suppress

import pytest
import torch

from cod_lightning.commands.fit import lock_folder
from cod_lightning.config.compose import compose
from cod_lightning.config.saved import CONFIG, load_config, save_config
from cod_lightning.data.chunks import require_home
from cod_lightning.data.manifest import MANIFEST, read_manifest
from cod_lightning.errors import UserError
from cod_lightning.files import (
    check_new_file,
    check_new_folder,
    check_writable,
    locked,
    new_folder,
    partial_folder,
    replace_path,
    translate_read_errors,
    write_atomic,
)
from cod_lightning.memory import free_memory
from cod_lightning.train.checkpoint import AtomicCheckpointIO, read_checkpoint
from cod_lightning.train.record import read_record

# Locks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", ["folder", "parent"])
def test_a_linked_run_folder_has_the_lock_of_its_target(linked, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / ("runs/run" if linked == "folder" else "runs"))
    other = tmp_path / "link" if linked == "folder" else tmp_path / "link" / "run"
    with (
        lock_folder(tmp_path / "runs" / "run"),
        pytest.raises(UserError, match="is being trained by another process"),
        lock_folder(other),
    ):
        pass


def test_a_lock_file_that_is_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    path, flock, removed = tmp_path / "lock", fcntl.flock, []

    def remove_first(handle, operation):
        if not removed:
            removed.append(path.unlink())
        flock(handle, operation)

    monkeypatch.setattr("fcntl.flock", remove_first)
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass


def test_a_lock_file_is_removed_at_the_end(tmp_path):
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    with suppress(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_gives_one_warning_that_names_the_folder(number, tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "lock"):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}: its file system does not support locks ({os.strerror(number)})")


def test_a_user_without_a_home_folder_gets_an_error(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(UserError, match="HOME is not set"):
        require_home()


# Destinations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [check_writable, check_new_folder, check_new_file])
@pytest.mark.parametrize(
    ("place", "closest", "reason"),
    [
        ("/proc/x", "/proc", "No such file or directory"),
        ("/sys/x/y", "/sys", "Operation not permitted|Permission denied|Read-only file system"),
        ("file/x", "file", "Not a directory"),
        ("link/x", "link", "No such file or directory|Not a directory"),
        ("n" * 300 + "/x", "n", "File name too long"),
        ("missing/" + "n" * 300, "", "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_the_reason(check, place, closest, reason, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    path = tmp_path / place
    with pytest.raises(UserError) as error:
        check(path, "--output=")
    name = f"--output={path} cannot be written: "
    assert re.fullmatch(rf"{name}\S*{closest}\S* is not a writable folder \(({reason})\): .*", str(error.value))


@pytest.mark.parametrize(("check", "place"), [(check_writable, "a/b"), (check_new_folder, "a"), (check_new_file, "a")])
def test_a_check_of_a_place_that_can_be_written_leaves_nothing_behind(check, place, tmp_path):
    check(tmp_path / place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "write", [lambda path: write_atomic(path, "new"), partial_folder, lambda path: write_folder(path / "x")]
)
def test_an_error_does_not_show_a_temporary_name(write, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises((UserError, OSError)) as error:
        write(tmp_path / "file/x")
    assert "file/x" in str(error.value)
    assert "partial" not in str(error.value)


def test_an_error_of_the_writer_names_the_new_folder(tmp_path):
    with pytest.raises(UserError) as error, new_folder(tmp_path / "x") as partial:
        raise UserError(f"{partial}/model cannot be written")
    assert str(error.value) == f"{tmp_path}/x/model cannot be written"


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    check_new_folder(tmp_path / "empty")
    with pytest.raises(UserError, match=r"--output=\S+/link is a link or a mount point.*name a new folder in it"):
        check_new_folder(tmp_path / "link", "--output=")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "empty")
    with pytest.raises(UserError, match="empty is a link or a mount point"):
        check_new_folder(tmp_path / "empty")


def test_the_files_of_a_new_folder_are_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append((tmp_path / "x").exists()))
    with new_folder(tmp_path / "x") as partial:
        (partial / "inner").mkdir()
        for name in ("a", "inner/b"):
            (partial / name).write_text(name)
    assert flushed == [False, False]


# Links in a folder of another person ----------------------------------------------------------------------------------


def write_folder(path):
    with new_folder(path) as partial:
        (partial / "content").touch()


def replace_folder(path):
    path.mkdir()
    replace_path(partial_folder(path), path)


def lock(path):
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)), locked(path.with_name(f"{path.name}.lock")):
        pass


@pytest.mark.parametrize("write", [lambda path: write_atomic(path, "new"), write_folder, replace_folder, lock])
def test_no_write_follows_a_link(write, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    for name in (".x.partial", f".x.{os.getpid()}.partial", ".x.old.partial", "x.lock"):
        (tmp_path / "run" / name).symlink_to(victim)
    write(tmp_path / "run" / "x")
    assert victim.read_text() == "mine"


def test_temporary_names_are_unpredictable(tmp_path):
    assert partial_folder(tmp_path / "x") != partial_folder(tmp_path / "x")


def test_a_link_at_the_name_of_a_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    write_atomic(tmp_path / "x", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "x").read_text() == "new"


# Bombs ----------------------------------------------------------------------------------------------------------------


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def checkpoint(folder):
    return read_checkpoint(folder / "x.ckpt")


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize(
    ("name", "read", "message"),
    [
        (MANIFEST, read_manifest, "not a regular file"),
        ("x.ckpt", checkpoint, "not a regular file"),
        (CONFIG, load_config, "not a run folder"),
        ("record.json", read_record, "not a regular file"),
    ],
)
def test_a_pipe_or_a_device_is_refused_without_waiting(make, name, read, message, tmp_path):
    make(tmp_path / name)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_compressed_checkpoint_is_refused_before_it_is_inflated(tmp_path, monkeypatch):
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"a": torch.zeros(2)}, "tokens": 0}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/1", bytes(10**6))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(UserError, match="it is compressed, but checkpoints are not"):
        read_checkpoint(path)


def test_yaml_aliases_are_refused(tmp_path):
    save_config(compose(["norm=lns"]), tmp_path)
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text() + bomb)
    with pytest.raises(UserError, match="YAML aliases"):
        load_config(tmp_path)


def test_files_and_folders_have_the_permissions_of_the_umask(tmp_path, monkeypatch):
    old = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # it would change that of other threads
        write_atomic(tmp_path / "file", "x")
        with new_folder(tmp_path / "folder") as folder:
            (folder / "x").touch(0o600)  # as safetensors does
    finally:
        monkeypatch.undo()
        os.umask(old)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/x")]
    assert modes == [0o640, 0o750, 0o640]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory")])
def test_lack_of_memory_is_no_damage_of_a_file(tmp_path, error):
    (tmp_path / "file").touch()
    with pytest.raises(type(error)), translate_read_errors(tmp_path / "file"):
        raise error


def test_free_memory_leaves_out_what_a_container_uses(tmp_path, monkeypatch):
    monkeypatch.setattr("cod_lightning.memory.LIMITS", [str(tmp_path / "memory.max")])
    for name, content in (("max", "40000"), ("current", "30000"), ("stat", "anon 1\ninactive_file 5000\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert free_memory() == 15000
