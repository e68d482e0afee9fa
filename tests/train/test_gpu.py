"""Training on a CUDA device gives the losses of the CPU."""

import json

import pytest
import torch
from run_files import copy_checkpoints, losses, newest

from command_words import run_command

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("default"),  # the compiler warns
]

GPU = ("trainer.accelerator=gpu", "trainer.precision=32-true", "model.norm_backend=triton")


@pytest.fixture(scope="module")
def on_gpu(train_in, tmp_path_factory):
    """Record and folder of the toy run on a GPU."""
    return train_in(tmp_path_factory.mktemp("gpu"), *GPU, "trainer.keep_last=9")


def test_a_run_with_triton_norms_has_the_losses_of_the_cpu(on_gpu, plain):
    assert losses(on_gpu[0]) == pytest.approx(losses(plain[0]), rel=1e-3)
    assert on_gpu[0]["val_loss"] == pytest.approx(plain[0]["val_loss"], rel=1e-3)


def test_a_run_resumes_on_a_gpu(on_gpu, train, tmp_path):
    copy_checkpoints(on_gpu[1], tmp_path / "parts", until=2)
    resumed, _ = train(*GPU, "name=parts")
    assert losses(resumed) == pytest.approx(losses(on_gpu[0]), rel=1e-4)


def test_automatic_precision_is_bfloat16_if_the_gpu_has_it(plain, train):
    record, folder = train(*GPU, "trainer.precision=auto")
    expected = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    assert record["precision"] == newest(folder)["precision"] == expected
    assert losses(record) == pytest.approx(losses(plain[0]), rel=0.02)


def test_a_sharded_run_with_cpu_offload_has_the_losses_of_the_cpu(toy, plain, tmp_path):
    # In a process of its own: a process group outlives its run.
    words = [*toy, *GPU, "trainer=fsdp", "trainer.devices=1", "trainer.offload=true", f"output={tmp_path}", "name=run"]
    process = run_command("fit", *words, timeout=600)
    assert process.returncode == 0, process.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert losses(record) == pytest.approx(losses(plain[0]), rel=1e-3)
