"""Two hosts, simulated by network namespaces."""

import json
import os
import subprocess

import pytest

from cod_lightning.train.checkpoint import list_checkpoints
from command_words import command

pytestmark = pytest.mark.slow
TIMEOUT = 240
RANK_TIMEOUT = 12
"""Seconds that a rank waits for the other, `trainer.timeout`."""


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts():
    """Names of two namespaces, connected, with the addresses 10.213.0.1 and 10.213.0.2."""
    names = [f"cod{os.getpid()}a", f"cod{os.getpid()}b"]
    try:
        steps = [("netns", "add", name) for name in names]
        steps += [("link", "add", names[0], "type", "veth", "peer", "name", names[1])]
        for number, name in enumerate(names, start=1):
            inside = ("-n", name)
            steps += [("link", "set", name, "netns", name), (*inside, "link", "set", "lo", "up")]
            steps += [(*inside, "addr", "add", f"10.213.0.{number}/24", "dev", name)]
            steps += [(*inside, "link", "set", name, "up")]
        for words in steps:
            try:
                done = ip(*words)
            except FileNotFoundError:
                pytest.skip("network namespaces need iproute2, which is not installed")
            if done.returncode:
                pytest.skip(f"network namespaces are not available: ip {' '.join(words)}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(host, rank, words, log):
    """Start one rank on a host with the variables of Lightning's launcher."""
    environment = {
        "NODE_RANK": str(rank),
        "MASTER_ADDR": "10.213.0.1",
        "MASTER_PORT": "29400",
        "GLOO_SOCKET_IFNAME": host,
    }
    process = ["ip", "netns", "exec", host, *command("fit", *words)]
    with open(log, "w") as out:
        return subprocess.Popen(process, env=os.environ | environment, stdout=out, stderr=out)


def test_a_lost_host_stops_the_other_and_both_resume(hosts, toy, train, tmp_path, wait_for):
    words = ["trainer.max_steps=30", "data.micro_batch_size=4", "eval.every=15", "trainer.checkpoint_every=10"]
    words += ["trainer.stats_every=0"]
    alone, _ = train(*words, "name=alone")
    words = [*toy, *words, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2"]
    words += [f"output={tmp_path}", "name=both", f"trainer.timeout={RANK_TIMEOUT}", "trainer.progress=true"]
    logs = [tmp_path / "log0", tmp_path / "log1"]

    def start_both():
        return [start(host, rank, words, log) for rank, (host, log) in enumerate(zip(hosts, logs, strict=True))]

    both = start_both()
    try:
        wait_for(lambda: "step     12/" in logs[0].read_text(), both[0], logs[0])
        assert ip("-n", hosts[1], "link", "set", hosts[1], "down").returncode == 0
        assert both[0].wait(TIMEOUT) == 75, logs[0].read_text()
        assert "another of the 2 ranks is gone, or did not answer" in logs[0].read_text()
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert 10 <= int(list_checkpoints(tmp_path / "both" / "checkpoints")[-1].stem.removeprefix("step-")) < 30
    assert ip("-n", hosts[1], "link", "set", hosts[1], "up").returncode == 0
    again = start_both()
    assert [process.wait(TIMEOUT) for process in again] == [0, 0], logs[0].read_text()
    record = json.loads((tmp_path / "both" / "record.json").read_text())
    assert record["world_size"] == 2
    assert record["history"]["train"]["loss"] == pytest.approx(alone["history"]["train"]["loss"], rel=1e-4)
    assert record["history"]["train"]["step"] == list(range(1, 31))
