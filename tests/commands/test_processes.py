"""Signals reach child processes and workers, which end with their parent."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cod_lightning.cli import main
from cod_lightning.commands.processes import CommandPool
from cod_lightning.errors import Stopped
from cod_lightning.signals import PARENT, STOP_SIGNALS, raise_on_stop_signals
from cod_lightning.train.checkpoint import list_checkpoints
from command_words import start_command

KINDS = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]
"""The other stop signals have the handler of SIGTERM."""
WAIT = 300
"""Seconds after which a process counts as hanging, as for `wait_for`."""

pytestmark = pytest.mark.usefixtures("default_handlers")


def names(signals):
    return [number.name for number in signals]


# In this process ------------------------------------------------------------------------------------------------------


def raise_all(first):
    """Raise a signal, and all others while the exception of the first unwinds."""
    try:
        signal.raise_signal(first)
    finally:
        for other in STOP_SIGNALS:
            signal.raise_signal(other)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=names(STOP_SIGNALS))
def test_a_signal_stops_a_command_and_later_ones_are_ignored(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"interrupted by {number.name}"), raise_on_stop_signals():
        raise_all(number)
    assert signal.getsignal(number) == before


def test_a_signal_that_is_ignored_from_the_start_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with raise_on_stop_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def train_signalled(train, send_signals):
    """`train_signalled(*numbers)` trains a run that receives these signals after step 3."""

    def train_until(*numbers):
        send_signals(*numbers)
        train("name=run", "trainer.checkpoint_every=100", "eval.every=100")

    return train_until


@pytest.mark.parametrize(
    ("number", "status"),
    [*((number, 75) for number in STOP_SIGNALS), (signal.SIGINT, 130)],
    ids=[*names(STOP_SIGNALS), "SIGINT"],
)
def test_training_saves_a_checkpoint_and_stops(number, status, train_signalled, tmp_path):
    with pytest.raises(Stopped, match="interrupted at step 4; checkpoint saved") as stopped:
        train_signalled(number)
    assert stopped.value.status == status
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000004.ckpt"]


def test_a_second_ctrl_c_interrupts_training_at_once(train_signalled, capfd, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_signalled(signal.SIGINT, signal.SIGINT)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_the_process_id_of_the_parent_does_not_leak(monkeypatch):
    monkeypatch.setenv(PARENT, "7")
    with raise_on_stop_signals():
        assert os.environ[PARENT] == str(os.getpid())
    assert os.environ[PARENT] == "7"


# In other processes ---------------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from pathlib import Path
from cod_lightning.errors import Stopped
from cod_lightning.signals import raise_on_stop_signals
name = f"{Path(__file__).parent}/{os.getpid()}"
try:
    with raise_on_stop_signals():
        Path(f"{name}.started").touch()
        time.sleep(100)
except Stopped:
    Path(f"{name}.stopped").touch()
    time.sleep(float(os.environ.get("SAVING", 0)))
    sys.exit(75)
"""
"""Stands for the interpreter of a child process."""
POOL = """
import sys
from cod_lightning.commands.processes import CommandPool
from cod_lightning.errors import Stopped
from cod_lightning.signals import raise_on_stop_signals
sys.executable = sys.argv[1]
try:
    with raise_on_stop_signals(), CommandPool(2) as pool:
        list(pool.map(pool.run_command, [["fit"]] * 3, "abc"))
except Stopped as stopped:
    sys.exit(stopped.status)
"""
WORKERS = """
import os, sys, time
from pathlib import Path
from cod_lightning.data.workers import worker_pool
from cod_lightning.errors import Stopped
from cod_lightning.signals import raise_on_stop_signals
def work(number):
    Path(f"{sys.argv[1]}.{os.getpid()}.started").touch()
    time.sleep(0.2)
if __name__ == "__main__":
    try:
        with raise_on_stop_signals(), worker_pool(2) as pool:
            list(pool.map(work, range(1000)))
    except Stopped as stopped:
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(script, folder, *arguments):
    (folder / "script.py").write_text(script)
    command = [sys.executable, folder / "script.py", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **streams)


def start_sweep(folder, wait_for):
    """A sweep, two of whose runs have started."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{CHILD}")
    python.chmod(0o755)
    process = start(POOL, folder, python)
    wait_for(lambda: len(list(folder.glob("*.started"))) == 2, process)
    return process


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", KINDS, ids=names(KINDS))
def test_a_signal_to_a_sweep_stops_its_runs(number, running, wait_for, tmp_path):
    process = start_sweep(tmp_path, wait_for)
    # A terminal signals all processes of a command.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(WAIT) == (-number if number == signal.SIGKILL else 75), process.communicate()
    wait_for(lambda: not running(process.pid))
    assert len(list(tmp_path.glob("*.stopped"))) == 2
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_second_ctrl_c_kills_the_runs_of_a_sweep(running, wait_for, tmp_path, monkeypatch):
    monkeypatch.setenv("SAVING", "100")
    process = start_sweep(tmp_path, wait_for)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: len(list(tmp_path.glob("*.stopped"))) == 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(WAIT) not in (0, 75), process.communicate()
    wait_for(lambda: not running(process.pid))
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("number", KINDS, ids=names(KINDS))
def test_a_signal_to_a_preparation_ends_its_workers(number, running, wait_for, tmp_path):
    process = start(WORKERS, tmp_path, tmp_path / "worker")
    wait_for(lambda: len(list(tmp_path.glob("worker.*.started"))) == 2, process)
    # A scheduler signals all processes of a job.
    (process.send_signal if number in (signal.SIGKILL, signal.SIGTERM) else lambda n: os.killpg(process.pid, n))(number)
    status = process.wait(WAIT)
    wait_for(lambda: not running(process.pid))
    _, printed = process.communicate()
    assert status == {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number], printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_sweep_with_sigint_ignored_stops_on_sigterm_with_a_checkpoint(toy, running, tmp_path):
    words = ["fit", "-m", *toy, f"output={tmp_path}", "trainer.max_steps=100000", "trainer.checkpoint_every=100000"]
    words += ["eval.every=100000", "trainer.progress=true", "trainer.stats_every=0"]
    process = start_command(
        *words,
        "data.loader_workers=1",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert any(line.startswith("step ") for line in process.stderr)
    os.killpg(process.pid, signal.SIGTERM)
    _, printed = process.communicate(timeout=WAIT)
    assert process.returncode == 75, printed
    assert "checkpoint saved" in printed
    assert not running(process.pid)
    assert len(list(tmp_path.glob("*/*/checkpoints/step-*.ckpt"))) == 1


@pytest.mark.slow
def test_more_signals_while_a_run_ends_do_not_change_its_status(toy, tmp_path):
    words = [*toy, f"output={tmp_path}", "trainer.max_steps=100000", "trainer.stats_every=0", "trainer.progress=true"]
    with start_command("fit", *words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any(line.startswith("step ") for line in process.stderr)
        process.terminate()
        assert any("checkpoint saved" in line for line in process.stderr)
        while process.poll() is None:
            process.terminate()
            time.sleep(0.01)
    assert process.returncode == 75


def test_output_that_is_no_utf8_and_a_kill_are_reported(tmp_path, monkeypatch, capsys):
    child = tmp_path / "python"
    child.write_text("#!/bin/sh\nprintf 'caf\\351\\n'\nkill -9 $$\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    with CommandPool(2) as pool:
        assert pool.run_command([], "run") == 137
    assert "[run] caf\ufffd" in capsys.readouterr().err


def test_jobs_is_the_number_of_runs_at_the_same_time(monkeypatch, tmp_path):
    together = threading.Barrier(2)

    def run_command(pool, words, label):
        together.wait(WAIT)
        return 1

    monkeypatch.setattr(CommandPool, "run_command", run_command)
    assert main(["fit", "-m", "-j", "2", "seed=1,2", f"output={tmp_path}"]) == 1
