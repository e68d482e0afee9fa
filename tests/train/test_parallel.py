"""Several ranks: what they compute, keep and resume is what one process does; in processes, over gloo."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch

from cod_lightning.config import compose
from cod_lightning.errors import UserError
from cod_lightning.nn.strategies import STRATEGIES
from cod_lightning.train.checkpoint import checkpoints, read_checkpoint

pytestmark = pytest.mark.slow
TIMEOUT = 240
STRATEGIES_HERE = ("ddp", "fsdp")

EVERY_STRATEGY = """
import sys
from cod_lightning.cli import carry_out
from cod_lightning.config import compose
for name in sys.argv[1].split(","):
    carry_out(compose([*sys.argv[2:], f"norm={name}", f"name={name}"]))
"""
"""Runs of every strategy in one group of processes."""


def environment():
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def command(*words, ranks=None):
    """The command line, under `torchrun` where a number of ranks is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "cod_lightning", *words]


def run(*words, ranks=None, status=0):
    done = subprocess.run(
        command(*words, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def world(strategy, ranks=2):
    return ["trainer=" + strategy, "trainer.accelerator=cpu", f"trainer.devices={ranks}", "trainer.timeout=120"]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def newest(folder):
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1])


@pytest.mark.parametrize("strategy", STRATEGIES_HERE)
def test_first_losses_and_gradients_of_every_strategy_are_those_of_one_process(toy, tmp_path, strategy):
    """A moment of Adam after one step is the gradient, as it was clipped, times 1 - beta."""
    words = [
        *(*toy, "trainer.max_steps=1", "trainer.stats_every=0", "trainer.measures.jacobian=0", "eval.every=100"),
        *("optim.clip=0.5", "optim.warmup_ratio=0", "data.micro_batch_size=2", "data.val_tokens=512"),
    ]
    here, there = tmp_path / "one", tmp_path / "two"
    script = tmp_path / "every_strategy.py"
    script.write_text(EVERY_STRATEGY)
    for folder, ranks, more in ((here, 1, []), (there, 2, world(strategy))):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        process = [sys.executable, *launcher, str(script), ",".join(STRATEGIES), *words, f"output={folder}", *more]
        done = subprocess.run(process, env=environment(), capture_output=True, text=True, timeout=2 * TIMEOUT)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in STRATEGIES:
        one, two = record_of(here / name), record_of(there / name)
        assert two["world_size"] == 2
        assert two["parameters"] == one["parameters"]
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-6), name
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-6), name
        expected, found = newest(here / name), newest(there / name)
        parameters = {n: t for n, t in expected["state_dict"].items() if n.startswith("decoder.")}
        assert found["state_dict"].keys() >= parameters.keys()
        expected, found = (state["optimizer_states"][0]["state"] for state in (expected, found))
        assert expected.keys() == found.keys()
        largest = max(float(moments["exp_avg"].abs().max()) for moments in expected.values())
        for number, moments in expected.items():
            # Sums of other orders: what cancels in a parameter is as exact as the largest gradient.
            torch.testing.assert_close(found[number]["exp_avg"], moments["exp_avg"], rtol=1e-4, atol=1e-6 * largest)


def test_a_sharded_run_goes_on_on_any_number_of_ranks_and_under_any_strategy(toy, tmp_path):
    """Saved on 2 ranks, gone on with on 1, 2 and 4, and from a file on 2; the launchers are ours and torchrun."""
    words = ["fit", *toy, f"output={tmp_path}", "data.micro_batch_size=1", "trainer.stats_every=3"]
    run(*words, "name=one")
    run(*words, *world("fsdp"), "name=two", ranks=2)
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    losses = one["history"]["train"]["loss"]
    assert two["history"]["train"]["loss"] == pytest.approx(losses, rel=1e-5)
    for layer, measured in one["history"]["layers"].items():
        assert torch.tensor(two["history"]["layers"][layer]) == pytest.approx(torch.tensor(measured), rel=1e-3)
    for name, source, more, ranks in (
        ("on1", "two", [], None),
        ("on2", "two", world("fsdp"), None),
        ("on4", "two", world("fsdp", 4), 4),
        ("ddp", "two", world("ddp"), 2),
        ("file", "one", world("fsdp"), 2),
    ):
        target = tmp_path / name
        begin_again(tmp_path / source, target)
        run(*words, *more, f"name={name}", ranks=ranks)
        again = record_of(target)
        assert again["history"]["train"]["loss"] == pytest.approx(losses, rel=1e-5), name
        assert again["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5), name
        assert checkpoints(target / "checkpoints")[-1].is_dir() == ("trainer=fsdp" in more), name
    # One file of it, as a single process would have written it; what reads checkpoints reads both.
    run("consolidate", str(tmp_path / "two"), f"--output={tmp_path / 'whole.ckpt'}")
    whole, parts = read_checkpoint(tmp_path / "whole.ckpt"), newest(tmp_path / "two")
    assert whole.keys() == parts.keys() == newest(tmp_path / "one").keys()
    assert all(torch.equal(whole["state_dict"][name], tensor) for name, tensor in parts["state_dict"].items())
    run("evaluate", str(tmp_path / "two"))


def begin_again(source, target):
    """A copy of a run folder without its record and its last checkpoint."""
    subprocess.run(["cp", "-r", source, target], check=True)
    (target / "record.json").unlink()
    last = checkpoints(target / "checkpoints")[-1]
    subprocess.run(["rm", "-r", last], check=True)
    config = target / "config.yaml"
    config.write_text(config.read_text().replace(f"name: {source.name}", f"name: {target.name}"))


@pytest.mark.parametrize("damage", ["malicious", "bytes", "cut", "no list"])
def test_nothing_in_a_sharded_checkpoint_is_executed(toy, tmp_path, damage):
    from cod_lightning.train.checkpoint import AtomicCheckpointIO

    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "step-00000001.ckpt"
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        checkpoint = {"state_dict": {"decoder.weight": torch.ones(3)}, "tokens": 3, "optimizer_states": []}
        AtomicCheckpointIO().save_parts(checkpoint, path, True, lambda: None)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(read_checkpoint(path)["state_dict"]["decoder.weight"], torch.ones(3))
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


def wait_for(condition, process):
    end = time.time() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_stops_and_the_same_command_goes_on(toy, tmp_path, ranks):
    words = ["fit", *toy, f"output={tmp_path}", "trainer.max_steps=60", "trainer.checkpoint_every=1000"]
    words += ["data.micro_batch_size=4", "eval.every=20", "trainer.stats_every=0", "trainer.measures.jacobian=0"]
    words += world("ddp") if ranks == 2 else []
    run(*words, "name=whole")
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            command(*words, "name=stopped", "trainer.progress=true"), env=environment(), stdout=out, stderr=out
        )
    wait_for(lambda: "step      7/" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 75, log.read_text()
    assert "run the same command again to go on" in log.read_text()
    assert len(checkpoints(tmp_path / "stopped" / "checkpoints")) == 1
    run(*words, "name=stopped")
    whole, stopped = record_of(tmp_path / "whole"), record_of(tmp_path / "stopped")
    for series in ("train", "val"):
        for name in whole["history"][series].keys() - {"tokens_per_second"}:
            assert stopped["history"][series][name] == whole["history"][series][name], name


def test_a_run_stopped_before_a_validation_begins_with_it(train, monkeypatch):
    from cod_lightning.errors import Stopped
    from cod_lightning.train.callbacks import StopSignal

    words = ("trainer.max_steps=6", "eval.every=2", "trainer.checkpoint_every=100")
    whole, _ = train(*words, "name=whole")
    listen, calls = StopSignal.listen, []

    def stop_in_the_second(self, module):
        calls.append(module)
        module.stop_asked = len(calls) == 3  # the fit, the first validation, the second
        listen(self, module)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "listen", stop_in_the_second)
        with pytest.raises(Stopped, match="in the validation after step 4"):
            train(*words, "name=stopped")
    again, _ = train(*words, "name=stopped")
    assert again["history"]["val"] == whole["history"]["val"]
    assert again["history"]["train"]["loss"] == whole["history"]["train"]["loss"]


def test_a_rank_that_dies_ends_the_others_with_a_clear_error(toy, tmp_path):
    words = ["fit", *toy, *world("ddp"), f"output={tmp_path}", "data.micro_batch_size=4", "trainer.max_steps=100000"]
    log = tmp_path / "log"
    with open(log, "w") as out:
        first, second = (
            subprocess.Popen(
                command(*words, "trainer.progress=true", "trainer.num_nodes=2", "trainer.devices=1"),
                env=environment()
                | {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29400 + os.getpid() % 500)},
                stdout=out if rank == 0 else subprocess.DEVNULL,
                stderr=out if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(2)
        )
    try:
        wait_for(lambda: "step      3/" in log.read_text(), first)
        second.kill()
        assert first.wait(TIMEOUT) == 75, log.read_text()
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert "another of the 2 ranks is gone" in log.read_text()


def test_what_only_sharding_can_do_is_refused_elsewhere(toy):
    with pytest.raises(UserError, match=r"trainer\.hybrid=true is for trainer\.strategy=fsdp"):
        compose([*toy, "trainer.hybrid=true"])
    with pytest.raises(UserError, match=r"optim\.lisa_layers"):
        compose([*toy, *world("fsdp"), "optim=lisa", "data.micro_batch_size=4"])
    assert compose([*toy, *world("fsdp"), "data.micro_batch_size=4"]).folder == compose(toy).folder
