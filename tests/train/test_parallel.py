"""Several ranks: what they compute, keep and resume is what one process does; in processes, over gloo."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from cod_lightning.cli import main
from cod_lightning.config.compose import compose
from cod_lightning.errors import UserError
from cod_lightning.nn.strategies import STRATEGIES
from cod_lightning.train.checkpoint import AtomicCheckpointIO, checkpoints, read_checkpoint

pytestmark = pytest.mark.slow
TIMEOUT = 240
BETA = 0.9
"""Of Adam's first moment."""
CLIP = 0.01
"""Largest norm of a gradient, below that of every strategy."""

RUNS = """
import json, sys
from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose
for words in json.load(open(sys.argv[1])):
    train_run(compose(words))
"""
"""Several runs, one after the other, in one group of processes."""


def environment():
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def run_all(folder, runs, ranks):
    """Carry out runs, each given as its overrides, on so many ranks that `torchrun` starts."""
    script, listed = folder / "runs.py", folder / f"runs-on-{ranks}.json"
    script.write_text(RUNS)
    listed.write_text(json.dumps(runs))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    process = [sys.executable, *launcher, str(script), str(listed)]
    done = subprocess.run(process, env=environment(), capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


def command(*words):
    return [sys.executable, "-m", "cod_lightning", *words]


def world(strategy, ranks=2):
    return ["trainer=" + strategy, "trainer.accelerator=cpu", f"trainer.devices={ranks}", "trainer.timeout=120"]


def node(rank):
    """The environment of a node by Lightning's names."""
    return {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29400 + os.getpid() % 500)}


def on_two_nodes(words_of):
    """Start `fit` with `words_of(rank)` on each; returns their statuses and what they said."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen(command("fit", *words_of(rank)), env=environment() | node(rank), **streams)
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(both, said, strict=True)]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def newest(folder):
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_first_losses_and_gradients_of_every_strategy_are_those_of_one_process(toy, train, tmp_path, strategy):
    """A moment of Adam after one step is the gradient, as it was clipped, times 1 - beta."""
    words = [
        *("trainer.max_steps=1", "trainer.stats_every=0", "trainer.measures.jacobian=0", "eval.every=100"),
        *(f"optim.clip={CLIP}", "optim.warmup_ratio=0", "data.micro_batch_size=2", "data.val_tokens=512"),
    ]
    there = [*toy, *words, *world(strategy), f"output={tmp_path / strategy}"]
    run_all(tmp_path, [[*there, f"norm={name}", f"name={name}"] for name in STRATEGIES], ranks=2)
    for name in STRATEGIES:
        one, folder = train(*words, f"norm={name}", f"name={name}")
        two = record_of(tmp_path / strategy / name)
        assert two["world_size"] == 2
        assert two["parameters"] == one["parameters"]
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6), name
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6), name
        expected, found = newest(folder), newest(tmp_path / strategy / name)
        assert found["state_dict"].keys() == expected["state_dict"].keys()
        expected, found = (state["optimizer_states"][0]["state"] for state in (expected, found))
        assert expected.keys() == found.keys()
        norm = sum(float(moments["exp_avg"].square().sum()) for moments in found.values()) ** 0.5 / (1 - BETA)
        assert norm == pytest.approx(CLIP, rel=1e-3), name
        largest = max(float(moments["exp_avg"].abs().max()) for moments in expected.values())
        for number, moments in expected.items():
            # Sums of other orders: what cancels in a parameter is as exact as the largest gradient.
            torch.testing.assert_close(found[number]["exp_avg"], moments["exp_avg"], rtol=1e-4, atol=1e-6 * largest)


def test_a_run_goes_on_on_any_number_of_ranks_and_under_any_strategy(toy, train, tmp_path):
    """Saved sharded on 2 ranks, gone on with on 1, 2 and 4; saved as a file, gone on with sharded."""
    words = ["data.micro_batch_size=1", "trainer.stats_every=3"]
    one, _ = train(*words, "name=one")
    losses = one["history"]["train"]["loss"]
    all_words = [*toy, *words, f"output={tmp_path}"]
    mixed = ["trainer.precision=bf16-mixed", "name=mixed"]
    wrapped = [*world("fsdp"), "trainer.checkpointing=selective"]
    run_all(tmp_path, [[*all_words, *world("fsdp"), "name=two"], [*all_words, *wrapped, *mixed]], ranks=2)
    sharded = record_of(tmp_path / "mixed")["history"]["train"]["loss"]
    assert sharded == pytest.approx(
        train(*words, *mixed[:1], "name=mixed_on1")[0]["history"]["train"]["loss"], rel=1e-3
    )
    assert sharded != pytest.approx(losses, rel=1e-6)
    two = record_of(tmp_path / "two")
    assert two["history"]["train"]["loss"] == pytest.approx(losses, rel=1e-5)
    for layer, measured in one["history"]["layers"].items():
        assert np.array(two["history"]["layers"][layer]) == pytest.approx(np.array(measured), rel=1e-3)
    for source, names in (("one", ("file",)), ("two", ("on1", "on2", "on4", "ddp"))):
        last = checkpoints(tmp_path / source / "checkpoints")[-1]
        last.rename(tmp_path / f"{source}.ckpt")
        for name in names:
            shutil.copytree(tmp_path / source / "checkpoints", tmp_path / name / "checkpoints")
    again = [("on2", "fsdp"), ("ddp", "ddp"), ("file", "fsdp")]
    run_all(tmp_path, [[*all_words, *world(strategy), f"name={name}"] for name, strategy in again], ranks=2)
    # Four ranks on two nodes, each of which has all of the model: our launcher starts the second rank of a node.
    nodes = [*all_words, *world("fsdp"), "trainer.num_nodes=2", "trainer.hybrid=true", "name=on4"]
    for status, said in on_two_nodes(lambda rank: nodes):
        assert status == 0, said
    train(*words, "name=on1")
    for name in ("on1", "on2", "on4", "ddp", "file"):
        again = record_of(tmp_path / name)
        assert again["history"]["train"]["loss"] == pytest.approx(losses, rel=1e-5), name
        assert again["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5), name
        assert checkpoints(tmp_path / name / "checkpoints")[-1].is_dir() == (name in ("on2", "on4", "file")), name
    assert record_of(tmp_path / "on2")["history"]["train"]["loss"] == two["history"]["train"]["loss"]
    # One file of it, as a single process would have written it; what reads checkpoints reads both.
    (tmp_path / "two.ckpt").rename(tmp_path / "two" / "checkpoints" / "step-00000006.ckpt")
    assert main(["consolidate", str(tmp_path / "two"), f"--output={tmp_path / 'whole.ckpt'}"]) == 0
    whole, parts = read_checkpoint(tmp_path / "whole.ckpt"), newest(tmp_path / "two")
    assert whole.keys() == parts.keys() == read_checkpoint(tmp_path / "one.ckpt").keys()
    assert all(torch.equal(whole["state_dict"][name], tensor) for name, tensor in parts["state_dict"].items())
    assert main(["evaluate", str(tmp_path / "two"), "trainer=cpu", "trainer.strategy=auto", "trainer.devices=1"]) == 0


def write_parts(path, store):
    """Save a checkpoint as a folder, in a group of one process; returns why it could not be, or None."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        checkpoint = {"state_dict": {"decoder.weight": torch.ones(3)}, "tokens": 3, "optimizer_states": []}
        io = AtomicCheckpointIO()
        io.save_sharded(checkpoint, path, True, lambda failure: failure)
        return io.failure
    finally:
        torch.distributed.destroy_process_group()


def test_a_sharded_checkpoint_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    failure = write_parts(tmp_path / "file" / "step-00000001.ckpt", tmp_path / "store")
    assert "step-00000001.ckpt: the checkpoint cannot be written" in failure


@pytest.mark.parametrize("damage", ["malicious", "bytes", "cut", "no list"])
def test_nothing_in_a_sharded_checkpoint_is_executed(tmp_path, damage):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "step-00000001.ckpt"
    for _ in range(2):  # the second takes the place of the first
        assert write_parts(path, tmp_path / "store") is None
    assert torch.equal(read_checkpoint(path)["state_dict"]["decoder.weight"], torch.ones(3))
    assert [child.name for child in tmp_path.glob(".*")] == []
    listed = path / ".metadata"
    if damage == "malicious":
        listed.write_bytes(pickle.dumps(Malicious()))
    elif damage == "bytes":
        content = pickle.loads(listed.read_bytes())
        content.state_dict_metadata["state_dict/decoder.weight"] = (
            torch.distributed.checkpoint.metadata.BytesStorageMetadata()
        )
        listed.write_bytes(pickle.dumps(content))
    elif damage == "cut":
        (part,) = path.glob("*.distcp")
        part.write_bytes(part.read_bytes()[:20])
    else:
        listed.unlink()
    with pytest.raises(UserError, match=r"step-00000001\.ckpt: not a readable checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_activations_change_nothing(train, checkpointing):
    words = ("trainer.max_steps=3", "trainer.measures.jacobian=3", "norm=mix_ln")
    plain, again = train(*words, "name=plain")[0], train(*words, f"trainer.checkpointing={checkpointing}", "name=r")[0]
    assert again["history"]["train"]["loss"] == plain["history"]["train"]["loss"]
    assert again["history"]["layers"] == plain["history"]["layers"]
    assert again["history"]["jacobian"] == plain["history"]["jacobian"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_stops_and_the_same_command_goes_on(toy, train, tmp_path, wait_for, ranks):
    words = ["trainer.max_steps=60", "trainer.checkpoint_every=1000", "data.micro_batch_size=4", "eval.every=20"]
    words += ["trainer.stats_every=0", "trainer.measures.jacobian=0"]
    whole, _ = train(*words, "name=whole")
    words = ["fit", *toy, f"output={tmp_path}", *words, *(world("ddp") if ranks == 2 else []), "name=stopped"]
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(command(*words, "trainer.progress=true"), env=environment(), stdout=out, stderr=out)
    wait_for(lambda: "step      7/" in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 75, log.read_text()
    assert "run the same command again to resume" in log.read_text()
    assert len(checkpoints(tmp_path / "stopped" / "checkpoints")) == 1
    again = subprocess.run(command(*words), env=environment(), capture_output=True, text=True, timeout=TIMEOUT)
    assert again.returncode == 0, again.stderr
    stopped = record_of(tmp_path / "stopped")
    for series in ("train", "val"):
        for name in whole["history"][series].keys() - {"tokens_per_second"}:
            expected = whole["history"][series][name]
            assert stopped["history"][series][name] == (expected if ranks == 1 else pytest.approx(expected, rel=1e-5))


def test_a_run_stopped_before_a_validation_begins_with_it(train, monkeypatch):
    from cod_lightning.errors import Stopped
    from cod_lightning.train.callbacks import StopOnSignal

    words = ("trainer.max_steps=6", "eval.every=2", "trainer.checkpoint_every=100")
    whole, _ = train(*words, "name=whole")
    install_handler, calls = StopOnSignal.install_handler, []

    def stop_in_the_second(self, module):
        calls.append(module)
        module.stop_requested = len(calls) == 3  # the fit, the first validation, the second
        install_handler(self, module)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "install_handler", stop_in_the_second)
        with pytest.raises(Stopped, match="in the validation after step 4"):
            train(*words, "name=stopped")
    again, _ = train(*words, "name=stopped")
    assert again["history"]["val"] == whole["history"]["val"]
    assert again["history"]["train"]["loss"] == whole["history"]["train"]["loss"]


def test_a_rank_that_dies_ends_the_others_with_a_clear_error(toy, tmp_path, wait_for):
    words = ["fit", *toy, *world("ddp"), f"output={tmp_path}", "data.micro_batch_size=4", "trainer.max_steps=100000"]
    log = tmp_path / "log"
    with open(log, "w") as out:
        first, second = (
            subprocess.Popen(
                command(*words, "trainer.progress=true", "trainer.num_nodes=2", "trainer.devices=1"),
                env=environment() | node(rank),
                stdout=out if rank == 0 else subprocess.DEVNULL,
                stderr=out if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(2)
        )
    try:
        wait_for(lambda: "step      3/" in log.read_text(), first, log)
        second.kill()
        assert first.wait(TIMEOUT) == 75, log.read_text()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert "another of the 2 ranks is gone" in log.read_text()


def test_ranks_that_see_different_checkpoints_do_not_start(toy, train, tmp_path):
    """As on nodes that do not share the run's folder."""
    words = ["data.micro_batch_size=4", "trainer.stats_every=0", "trainer.measures.jacobian=0"]
    _, folder = train(*words, "name=run")
    shutil.copytree(folder / "checkpoints", tmp_path / "0" / "run" / "checkpoints")
    words = [*toy, *words, *world("ddp"), "trainer.num_nodes=2", "trainer.devices=1"]
    for status, said in on_two_nodes(lambda rank: [*words, f"output={tmp_path / str(rank)}", "name=run"]):
        assert status == 2, said
        assert "put the run folder on a file system that all nodes share" in said


def test_what_only_sharding_can_do_is_refused_elsewhere(toy):
    with pytest.raises(UserError, match=r"trainer\.hybrid=true requires trainer\.strategy=fsdp"):
        compose([*toy, "trainer.hybrid=true"])
    with pytest.raises(UserError, match=r"optim\.lisa_layers"):
        compose([*toy, *world("fsdp"), "optim=lisa", "data.micro_batch_size=4"])
    assert compose([*toy, *world("fsdp"), "data.micro_batch_size=4"]).folder == compose(toy).folder
