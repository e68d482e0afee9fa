"""Job scripts, run by stand-ins for the scheduler's programs."""

import json
import math
import os
import subprocess

import pytest

from cod_lightning.cli import main
from cod_lightning.commands.launch import seconds_of
from command_words import start_command

SBATCH = """#!/bin/bash
script=$(mktemp); cat > "$script"
export SLURM_JOB_ID=7 SLURM_JOB_NAME=a_job SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NODELIST=localhost
while true; do
    rm -f requeued
    bash "$script"
    status=$?
    [ -e requeued ] || exit $status
done
"""
SRUN = """#!/bin/bash
export SLURM_NODEID=0 SLURM_STEP_ID=0
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    echo $! > task$rank
done
most=0
for task in $(jobs -p); do
    wait $task; status=$?
    [ $status -gt $most ] && most=$status
done
exit $most
"""
SCONTROL = """#!/bin/bash
echo "$@" >> requeued
echo "$@" >> requests
"""


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_stopped_job_is_requeued_until_it_finishes(scheduler, toy, train, wait_for):
    words = ["trainer.max_steps=30", "data.micro_batch_size=4", "eval.every=15", "trainer.stats_every=0"]
    words += ["trainer.checkpoint_every=1000"]
    alone, _ = train(*words, "name=alone")
    words = [*toy, *words, "trainer=ddp", "trainer.accelerator=cpu", "trainer.progress=true", "name=job", "output=runs"]
    log = scheduler / "log"
    with open(log, "w") as out:
        job = start_command("launch", "slurm", *words, "--submit", log=out)
    wait_for(lambda: "step      9/" in log.read_text(), job, log)
    for rank in range(2):  # as the scheduler does before the limit
        os.kill(int((scheduler / f"task{rank}").read_text()), 15)
    assert job.wait(240) == 0, log.read_text()
    assert (scheduler / "requests").read_text() == "requeue 7\n"
    record = json.loads((scheduler / "runs" / "job" / "record.json").read_text())
    for kind in ("train", "val"):
        for name, values in alone["history"][kind].items():
            if name != "tokens_per_second":
                assert record["history"][kind][name] == pytest.approx(values, rel=1e-5), (kind, name)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (75, 0, True), (75, 99, True), (134, 0, True), (137, 9, True), (137, 10, False)],
)
def test_a_job_is_requeued_by_its_exit_status(status, restarts, requeued, scheduler, capsys):
    (scheduler / "programs" / "srun").write_text(f"#!/bin/bash\necho $@ > ranks\nexit {status}\n")
    assert main(["launch", "slurm", "trainer=cpu", "--cpus-per-task", "3"]) == 0
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    job = subprocess.run(["bash"], input=capsys.readouterr().out, text=True, env=environment)
    assert job.returncode == status
    assert (scheduler / "requests").exists() == requeued
    assert (scheduler / "ranks").read_text().startswith("--cpus-per-task=3 ")


def test_scripts_say_what_the_configuration_says(capsys, tmp_path):
    words = ["launch", "slurm", "experiments=table1_1b", "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=4"]
    assert main([*words, "--time", "2:00:00", "--partition", "long", "data.micro_batch_size=16", "output=a b"]) == 0
    script = capsys.readouterr().out
    for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=2:00:00", "--partition=long"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --signal=TERM@300\n" in script
    assert "'output=a b'" in script
    assert "--account" not in script
    assert main(["launch", "slurm", "--signal", "USR1", "--grace", "60"]) == 0
    assert "#SBATCH --signal=USR1@60\n" in capsys.readouterr().out
    assert main(["launch", "slurm", "trainer=cpu", f"--output={tmp_path / 'job.sh'}"]) == 0
    assert "--gpus-per-node" not in (tmp_path / "job.sh").read_text()
    assert subprocess.run(["bash", "-n", tmp_path / "job.sh"]).returncode == 0


@pytest.mark.parametrize(
    ("option", "value"), [("--mem", "1G\nrm -rf x"), ("--partition", "a b"), ("--qos", ""), ("--time", "1:00 ")]
)
def test_an_option_of_sbatch_is_one_word(option, value, capsys):
    assert main(["launch", "slurm", option, value]) == 2
    printed = capsys.readouterr()
    assert f"{option}={value!r} must be one word" in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grace=300", "--time=5"], "--grace=300 must be less than the 300 seconds of --time=5"),
        (["--grace=600", "--time=0:09:59"], "--grace=600 must be less than the 599 seconds of --time=0:09:59"),
        (["--grace=0"], "--grace=0 must be at least 1"),
        (["--time=0"], "--time=0 must be longer than 0"),
        (["--time=0-00:00:00"], "--time=0-00:00:00 must be longer than 0"),
        (["--time=-5"], "--time=-5 must be MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
        (["--time=tomorrow"], "--time=tomorrow must be MINUTES"),
        (["--cpus-per-task=0"], "--cpus-per-task=0 must be at least 1"),
        (["--cpus-per-task=-2"], "--cpus-per-task=-2 must be at least 1"),
        (["--mem=-1G"], "--mem=-1G must be a number of megabytes"),
        (["trainer.devices=0"], "trainer.devices=0 must be at least 1"),
        (["trainer.num_nodes=-1"], "trainer.num_nodes=-1 must be at least 1"),
        (["resume=false"], "resume=false would start again at every requeue"),
    ],
)
def test_numbers_that_sbatch_cannot_use_are_refused(words, message, capsys):
    assert main(["launch", "slurm", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert not printed.out


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        *(("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("1-0", 86400), ("1-12:30", 131400), ("0-0:0:9", 9)),
        ("UNLIMITED", math.inf),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    assert seconds_of(time) == seconds


def test_an_existing_script_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "job.sh").write_text("mine")
    assert main(["launch", "slurm", f"--output={tmp_path / 'job.sh'}"]) == 2
    assert (tmp_path / "job.sh").read_text() == "mine"


def test_an_invalid_configuration_prints_no_script(capsys):
    assert main(["launch", "slurm", "norm=none"]) == 2
    assert not capsys.readouterr().out
