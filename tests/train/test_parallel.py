"""Training on several gloo ranks equals training in one process."""

import functools
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_files import copy_checkpoints, history, last, losses, newest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from cod_lightning.cli import main
from cod_lightning.errors import Stopped, UserError
from cod_lightning.nn.spec import SublayerSpec
from cod_lightning.train.callbacks import StopOnSignal
from cod_lightning.train.checkpoint import (
    AtomicCheckpointIO,
    MetadataUnpickler,
    list_checkpoints,
    read_checkpoint,
    read_for_weights,
)
from command_words import run_python, start_command
from strategy_kinds import covering_strategies, label

pytestmark = pytest.mark.slow
TIMEOUT = 240
BETA = 0.9
"""Adam's beta1."""
CLIP = 0.01
"""Maximum gradient norm, below the norm of every strategy."""
QUIET = "trainer.stats_every=0"


def on_two_ranks(folder, entries):
    """Run `train_runs.py` with these entries on two ranks started by torchrun."""
    listed = folder / "runs.json"
    listed.write_text(json.dumps(entries))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = [sys.executable, *launcher, str(Path(__file__).with_name("train_runs.py")), str(listed)]
    done = subprocess.run(process, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GLOBAL_RANK" not in done.stderr  # Lightning's message of every rank


def start(words, log, **variables):
    """Start the command line with more environment variables; its output goes to the file `log`."""
    with open(log, "w") as out:
        return start_command(*words, log=out, env=os.environ | variables)


def world(strategy, ranks=2):
    return ["trainer=" + strategy, "trainer.accelerator=cpu", f"trainer.devices={ranks}", "trainer.timeout=120"]


def two_nodes():
    """The environment variables of each of two nodes, which meet at a free port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    return [{"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for rank in "01"]


def on_two_nodes(folder, overrides_of):
    """Run `fit` with `overrides_of(rank)` on two nodes; return the status and the output of each."""
    logs = [folder / "log0", folder / "log1"]
    pairs = enumerate(zip(logs, two_nodes(), strict=True))
    both = [start(["fit", *overrides_of(rank)], log, **node) for rank, (log, node) in pairs]
    try:
        return [(process.wait(TIMEOUT), log.read_text()) for process, log in zip(both, logs, strict=True)]
    finally:
        stop(both)


def stop(processes):
    for process in processes:
        process.kill()
        process.wait()


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


# --- runs on two ranks ------------------------------------------------------------------------------------------------

FIRST_STEP = [
    *("trainer.max_steps=1", "eval.every=100", QUIET),
    *(f"optim.clip={CLIP}", "optim.warmup_ratio=0", "data.micro_batch_size=2", "data.val_tokens=512"),
]
PROTOCOL = [
    *("data.layout=document", "data.micro_batch_size=2", "trainer.max_steps=4", "optim.warmup_ratio=0"),
    *("trainer.probe_rows=3", "trainer.measures={jacobian: 4, angular: 2, removal: 4}"),
]
SHORT = ["data.micro_batch_size=2", "trainer.measures.jacobian=6"]
MIXED = "trainer.precision=bf16-mixed"
PROTOCOLS = ["strict", "paper"]


NUMBERS = [name for name, value in vars(SublayerSpec()).items() if type(value) in (int, float, type(None))]
COVERING = covering_strategies(ignore={*NUMBERS} - {"input_rates", "norm_rates", "branch_schedule"})
UNCUT = [{"name": "admin"}, {"name": "gpas"}, {"name": "lns_as_rates"}]
NORMS = {label(norm): norm for norm in (*COVERING, *UNCUT)}
MODES = {"ddp": list(map(label, UNCUT)), "fsdp": list(map(label, COVERING))}
"""Strategies by mode: DDP leaves parameters as they are, FSDP cuts them, so it gets every coefficient that ranks can
tell apart."""


def one_step(name):
    """Overrides of a run of one step with the strategy of this label."""
    norm = [f"norm.{key}={value}".replace("norm.name=", "norm=") for key, value in NORMS[name].items()]
    return [*FIRST_STEP, *norm, f"name={name}"]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def single(train_in, output):
    """Record of a run in one process."""
    return train_in(output, *SHORT, "name=one")[0]


RESUMED = {"on2": ("two", "fsdp"), "ddp": ("two", "ddp"), "file": ("one", "fsdp")}
"""Runs on two ranks that resume another one: its name, and the strategy."""


def interrupted_copy(output, source, target):
    """The arguments of `copy_checkpoints` for a run `target` that resumes the run `source` after step 4."""
    return {"source": str(output / source), "target": str(output / target), "until": 4}


@pytest.fixture(scope="module")
def two_ranks(toy, output, single):
    """Folder of the runs that two ranks train, all in one process group: starting another takes 10 s."""
    short = [*toy, *SHORT, f"output={output}"]
    runs = [[*short, *world("fsdp"), "name=two"]]
    runs += [[*short, *world("fsdp"), "trainer.checkpointing=selective", MIXED, "name=mixed"]]
    for name, (source, strategy) in RESUMED.items():
        runs += [interrupted_copy(output, source, name), [*short, *world(strategy), f"name={name}"]]
    for mode in MODES:
        words = [*toy, *world(mode), f"output={output / mode}"]
        runs += [[*words, *one_step(name)] for name in MODES[mode]]
    words = [*toy, *PROTOCOL, *world("ddp"), f"output={output / 'protocols'}"]
    runs += [[*words, f"protocol={protocol}", f"name={protocol}"] for protocol in PROTOCOLS]
    on_two_ranks(output, runs)
    return output


# --- the first step ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(train_in, tmp_path_factory):
    """Run folders by strategy of one step in this process."""
    folder = tmp_path_factory.mktemp("one")
    return {name: train_in(folder, *one_step(name))[1] for name in NORMS}


checkpoint_of = functools.cache(newest)
"""The content of a run's last checkpoint, read once."""


def first_moments(folder):
    """Adam's first moment by number of the parameter; after one step it is the clipped gradient times 1 - beta1."""
    return {number: state["exp_avg"] for number, state in checkpoint_of(folder)["optimizer_states"][0]["state"].items()}


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_report_the_losses_of_one_process(one_process, two_ranks, mode):
    for name in MODES[mode]:
        one, two = record_of(one_process[name]), record_of(two_ranks / mode / name)
        assert two["world_size"] == 2
        for field in ("train_loss", "val_loss"):
            assert two[field] == pytest.approx(one[field], rel=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_have_the_parameters_of_one_process(one_process, two_ranks, mode):
    for name in MODES[mode]:
        one, two = one_process[name], two_ranks / mode / name
        assert record_of(two)["parameters"] == record_of(one)["parameters"]
        assert checkpoint_of(two)["state_dict"].keys() == checkpoint_of(one)["state_dict"].keys()


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_compute_the_gradients_of_one_process(one_process, two_ranks, mode):
    for name in MODES[mode]:
        expected, moments = first_moments(one_process[name]), first_moments(two_ranks / mode / name)
        assert moments.keys() == expected.keys()
        largest = max(float(moment.abs().max()) for moment in expected.values())
        for number, moment in expected.items():
            # The order of a sum differs: a small gradient is as exact as the largest one.
            torch.testing.assert_close(moments[number], moment, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_clip_the_norm_of_the_whole_gradient(two_ranks, mode):
    for name in MODES[mode]:
        folder = two_ranks / mode / name
        moments, groups = first_moments(folder), checkpoint_of(folder)["optimizer_states"][0]["param_groups"]
        counted = {number: group.get("clip", 1.0) for group in groups for number in group["params"]}
        squares = sum(float((counted[number] * moment).square().sum()) for number, moment in moments.items())
        assert squares**0.5 / (1 - BETA) == pytest.approx(CLIP, rel=1e-3), name


# --- validation and measures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_ranks_report_the_measures_of_one_process(train, two_ranks, protocol):
    expected, _ = train(*PROTOCOL, f"protocol={protocol}")
    result = record_of(two_ranks / "protocols" / protocol)
    assert (expected["world_size"], result["world_size"]) == (1, 2)
    assert losses(result) == pytest.approx(losses(expected), rel=1e-5)
    for name in ("val_loss", "ppl_paper_protocol"):
        assert result[name] == pytest.approx(expected[name], rel=1e-5)
    assert result["tokens"] == expected["tokens"]
    assert result["val_tokens"] == expected["val_tokens"]
    for kind in ("layers", "jacobian", "angular", "removal"):
        for name, values in expected["history"][kind].items():
            for one, two in zip(values, result["history"][kind][name], strict=True):
                assert two == pytest.approx(one, rel=1e-3, abs=1e-6), (kind, name)


# --- sharded checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharded(two_ranks):
    """Record of a run under FSDP on two ranks."""
    return record_of(two_ranks / "two")


@pytest.fixture(scope="module")
def resumed(toy, train_in, output, two_ranks):
    """Records by name of runs that resume: `on1`, `on2`, `on4` and `ddp` a sharded run, `file` an unsharded one."""
    for name in ("on1", "on4"):
        copy_checkpoints(output / "two", output / name, until=4)
    # Four ranks on two nodes with hybrid sharding: our launcher starts the second rank of a node.
    nodes = [*toy, *SHORT, f"output={output}", *world("fsdp"), "trainer.num_nodes=2", "trainer.hybrid=true", "name=on4"]
    for status, printed in on_two_nodes(output, lambda rank: nodes):
        assert status == 0, printed
    train_in(output, *SHORT, "name=on1")
    return {name: record_of(output / name) for name in ("on1", "on4", *RESUMED)}


def test_a_sharded_run_has_the_losses_of_one_process(single, sharded):
    assert losses(sharded) == pytest.approx(losses(single), rel=1e-5)


def test_a_sharded_run_has_the_layer_statistics_of_one_process(single, sharded):
    for name, values in single["history"]["layers"].items():
        assert np.array(sharded["history"]["layers"][name]) == pytest.approx(np.array(values), rel=1e-3)


def test_a_sharded_run_has_the_jacobians_of_one_process(single, sharded):
    expected, measured = single["history"]["jacobian"], sharded["history"]["jacobian"]
    assert measured["layer"] == expected["layer"]
    assert np.array(measured["distance"]) == pytest.approx(np.array(expected["distance"]), rel=1e-3)


def test_a_sharded_run_in_mixed_precision_has_the_losses_of_one_process(train_in, output, single, sharded):
    mixed = losses(record_of(output / "mixed"))
    assert mixed == pytest.approx(losses(train_in(output, *SHORT, MIXED, "name=mixed_on1")[0]), rel=1e-3)
    assert mixed != pytest.approx(losses(single), rel=1e-6)


@pytest.mark.parametrize("name", ["on1", "on2", "on4", "ddp", "file"])
def test_a_run_resumes_on_any_number_of_ranks_under_any_strategy(output, single, resumed, name):
    assert losses(resumed[name]) == pytest.approx(losses(single), rel=1e-5)
    assert resumed[name]["val_loss"] == pytest.approx(single["val_loss"], rel=1e-5)
    assert list_checkpoints(output / name / "checkpoints")[-1].is_dir() == (name in ("on2", "on4", "file"))


def test_a_run_resumed_on_the_same_ranks_is_bit_identical(sharded, resumed):
    assert losses(resumed["on2"]) == losses(sharded)


def test_consolidate_writes_the_checkpoint_of_one_process(output, single, sharded, tmp_path):
    assert main(["consolidate", str(output / "two"), f"--output={tmp_path / 'whole.ckpt'}"]) == 0
    whole, shards = read_checkpoint(tmp_path / "whole.ckpt"), newest(output / "two")
    assert whole.keys() == shards.keys() == newest(output / "one").keys()
    assert all(torch.equal(whole["state_dict"][name], tensor) for name, tensor in shards["state_dict"].items())


def test_consolidate_copies_the_checkpoint_of_an_imported_model(tmp_path):
    io, source = AtomicCheckpointIO(), tmp_path / "checkpoints" / "step-00000000.ckpt"
    io.save_checkpoint({"state_dict": {"decoder.weight": torch.ones(3)}, "tokens": 0}, source)
    assert main(["consolidate", str(tmp_path)]) == 0
    assert read_checkpoint(source.with_name("whole-00000000.ckpt")).keys() == read_checkpoint(source).keys()


ONE_RANK = ["trainer=cpu", "trainer.strategy=auto", "trainer.devices=1"]


def test_evaluate_reads_a_sharded_checkpoint(output, sharded, capsys):
    assert main(["evaluate", str(output / "two"), *ONE_RANK]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["val_loss"]) == pytest.approx(sharded["val_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def consolidated(output, sharded, tmp_path_factory):
    """A copy of the sharded run with its checkpoint in one file."""
    folder = tmp_path_factory.mktemp("consolidated") / "two"
    shutil.copytree(output / "two", folder, ignore=shutil.ignore_patterns("checkpoints"))
    target = folder / "checkpoints" / last(output / "two").name
    assert main(["consolidate", str(output / "two"), f"--output={target}"]) == 0
    return folder


@pytest.mark.parametrize("words", [["evaluate", *ONE_RANK], ["generate", "the norm", "--max-tokens=8"]])
def test_a_command_prints_the_same_for_a_sharded_and_a_consolidated_run(output, consolidated, words, capsys):
    printed = []
    for folder in (output / "two", consolidated):
        assert main([words[0], str(folder), *words[1:]]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_sharded_run_is_exported_as_its_consolidated_run(output, consolidated, tmp_path):
    pytest.importorskip("transformers")
    for name, folder in (("shards", output / "two"), ("whole", consolidated)):
        assert main(["export", str(folder), f"--output={tmp_path / name}"]) == 0
    shards, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("shards", "whole"))
    assert shards == whole


def save_sharded(path, store):
    """Save a sharded checkpoint in a group of one process; return the error message or None."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        states = [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}]
        checkpoint = {"state_dict": {"decoder.weight": torch.ones(3)}, "tokens": 3, "optimizer_states": states}
        io = AtomicCheckpointIO()
        io.save_sharded(checkpoint, path, True, lambda failure: failure)
        return io.failure
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def sharded_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    assert save_sharded(path, tmp_path / "store") is None
    return path


def test_a_failed_write_of_a_sharded_checkpoint_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    failure = save_sharded(tmp_path / "file" / "step-00000001.ckpt", tmp_path / "store")
    assert "step-00000001.ckpt: the checkpoint cannot be written" in failure


def test_a_sharded_checkpoint_replaces_an_existing_one(sharded_checkpoint, tmp_path):
    assert save_sharded(sharded_checkpoint, tmp_path / "store") is None
    assert torch.equal(read_checkpoint(sharded_checkpoint)["state_dict"]["decoder.weight"], torch.ones(3))
    assert list(tmp_path.glob(".*")) == []


def test_the_optimizer_state_of_a_sharded_checkpoint_is_read_only_if_it_is_used(sharded_checkpoint):
    complete, for_weights = read_checkpoint(sharded_checkpoint), read_for_weights(sharded_checkpoint)
    assert complete["optimizer_states"][0]["state"][0].keys() == {"exp_avg"}
    assert for_weights["optimizer_states"][0]["state"] == {}
    assert torch.equal(for_weights["state_dict"]["decoder.weight"], torch.ones(3))


@pytest.mark.parametrize("damage", ["malicious", "bytes", "truncated", "no metadata"])
def test_a_damaged_sharded_checkpoint_is_an_error_and_executes_nothing(sharded_checkpoint, tmp_path, damage):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    metadata = sharded_checkpoint / ".metadata"
    if damage == "malicious":
        metadata.write_bytes(pickle.dumps(Malicious()))
    elif damage == "bytes":
        content = pickle.loads(metadata.read_bytes())
        content.state_dict_metadata["state_dict/decoder.weight"] = (
            torch.distributed.checkpoint.metadata.BytesStorageMetadata()
        )
        metadata.write_bytes(pickle.dumps(content))
    elif damage == "truncated":
        (shard,) = sharded_checkpoint.glob("*.distcp")
        shard.write_bytes(shard.read_bytes()[:20])
    else:
        metadata.unlink()
    with pytest.raises(UserError, match=r"step-00000001\.ckpt: damaged, not a readable checkpoint"):
        read_checkpoint(sharded_checkpoint)
    assert not (tmp_path / "executed").exists()


class Getattr:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enum."""

    def __init__(self, owner, name):
        self.call = getattr, (owner, name)

    def __reduce__(self):
        return self.call


def test_an_enum_in_the_metadata_is_read_as_any_python_writes_it():
    for member in _MEM_FORMAT_ENCODING:
        written = pickle.dumps(Getattr(_MEM_FORMAT_ENCODING, member.name))
        assert MetadataUnpickler(io.BytesIO(written)).load() is member


def test_metadata_cannot_get_an_attribute_of_anything_else():
    written = pickle.dumps(Getattr(torch.Size, "__init__"))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr, which is not allowed"):
        MetadataUnpickler(io.BytesIO(written)).load()


# --- activation checkpointing and interruptions -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recomputed(train_in, tmp_path_factory):
    """`recomputed(mode)` trains with a mode of activation checkpointing and returns the record."""
    folder = tmp_path_factory.mktemp("recomputed")
    overrides = ("trainer.max_steps=3", "trainer.measures.jacobian=3", "norm=mix_ln")
    return lambda mode: train_in(folder, *overrides, f"trainer.checkpointing={mode}", f"name={mode}")[0]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(recomputed, mode):
    assert history(recomputed(mode)) == history(recomputed("none"))


def test_sigterm_exits_with_status_75_and_one_checkpoint(toy, tmp_path, wait_for):
    words = ["fit", *toy, *world("ddp"), f"output={tmp_path}", "name=stopped", "data.micro_batch_size=4", QUIET]
    words += ["trainer.max_steps=1000", "trainer.checkpoint_every=1000", "eval.every=1000", "trainer.progress=true"]
    log = tmp_path / "log"
    process = start(words, log)
    wait_for(lambda: "step      7/" in log.read_text(), process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 75, log.read_text()
    assert "checkpoint saved\nrun the same command again to resume" in log.read_text()
    assert len(list_checkpoints(tmp_path / "stopped" / "checkpoints")) == 1


def test_a_run_interrupted_before_a_validation_resumes_with_it(train, monkeypatch):
    words = ("trainer.max_steps=6", "eval.every=2", "trainer.checkpoint_every=100")
    whole, _ = train(*words, "name=whole")
    on_validation_start, calls = StopOnSignal.on_validation_start, []

    def stop_in_the_second_validation(self, trainer, module):
        calls.append(module)
        if len(calls) == 2:
            module.stop_signal = signal.SIGTERM
        on_validation_start(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_validation_start", stop_in_the_second_validation)
        with pytest.raises(Stopped, match="in the validation after step 4"):
            train(*words, "name=stopped")
    again, _ = train(*words, "name=stopped")
    assert history(again) == history(whole)


def test_the_other_ranks_stop_with_an_error_if_one_dies(toy, tmp_path, wait_for):
    words = ["fit", *toy, *world("ddp"), f"output={tmp_path}", "data.micro_batch_size=4", "trainer.max_steps=100000"]
    words += ["trainer.progress=true", "trainer.num_nodes=2", "trainer.devices=1"]
    log = tmp_path / "log"
    nodes = two_nodes()
    first, second = start(words, log, **nodes[0]), start(words, tmp_path / "log1", **nodes[1])
    try:
        wait_for(lambda: "step      3/" in log.read_text(), first, log)
        second.kill()
        assert first.wait(TIMEOUT) == 75, log.read_text()
    finally:
        stop([first, second])
    assert "another of the 2 ranks is gone" in log.read_text()


def test_other_optimizer_groups_are_refused_under_fsdp(train, plain, tmp_path):
    copy_checkpoints(plain[1], tmp_path / "run", until=4)
    path = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    checkpoint = read_checkpoint(path)
    state = checkpoint["optimizer_states"][0]
    state["param_groups"] = [state["param_groups"][0] | {"params": list(state["state"])}]
    torch.save(checkpoint, path)
    try:
        with pytest.raises(UserError, match=r"optimizer groups of \["):
            train("data.micro_batch_size=4", *world("fsdp", 1), "name=run")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_with_different_checkpoints_do_not_start(toy, plain, tmp_path):
    """The nodes do not share the run folder."""
    copy_checkpoints(plain[1], tmp_path / "0" / "run", until=4)
    overrides = [
        *toy,
        "data.micro_batch_size=4",
        QUIET,
        *world("ddp"),
        "trainer.num_nodes=2",
        "trainer.devices=1",
        "name=run",
    ]
    for status, printed in on_two_nodes(tmp_path, lambda rank: [*overrides, f"output={tmp_path / str(rank)}"]):
        assert status == 2, printed
        assert "put the run folder on a file system that all nodes share" in printed


def test_no_process_group_is_left_when_python_ends(tmp_path):
    """A thread of one may kill the process, instead of the status of the command."""
    script = f"""
import atexit
import torch.distributed as dist
from cod_lightning.config.compose import compose
from cod_lightning.train.trainer import build_trainer
atexit.register(lambda: print(dist.is_initialized()))
build_trainer(compose(["trainer.accelerator=cpu"]))
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
"""
    assert run_python(script) == "False\n"
