"""Words of a command line, and processes that run them."""

import subprocess
import sys

TOY_TRAINING = (
    "data.loader_workers=0",
    "data.batch_size=8",
    "data.micro_batch_size=8",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.max_steps=6",
    "trainer.log_every=1",
    "trainer.stats_every=3",
    "trainer.measures.jacobian=0",
    "trainer.probe_rows=4",
    "trainer.checkpoint_every=2",
    "trainer.progress=false",
    "eval.every=3",
    "logger=none",
)
"""Overrides for a run of a few seconds, of text or images."""


def last_of_each(words):
    """The words with the last value of each key, as `compose` reads them; a command line refuses two."""
    return list({str(word).partition("=")[0]: str(word) for word in words}.values())


def command(*words):
    """The command line in a process of its own, as a list for `subprocess`."""
    return [sys.executable, "-m", "cod_lightning", *last_of_each(words)]


def run_command(*words, **options):
    """Run a command in a process of its own; return the finished process. The options are those of `subprocess.run`."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command(*words), **({"timeout": 300} | streams | options))


def start_command(*words, log=subprocess.DEVNULL, **options):
    """Start a command in a process of its own, whose output goes to `log`."""
    return subprocess.Popen(command(*words), **({"stdout": log, "stderr": log} | options))


def run_python(code, *arguments):
    """Run code in a fresh Python, in which it must succeed; return what it printed."""
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout
