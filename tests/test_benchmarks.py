"""Every benchmark runs, at a size of seconds; what it measures is no matter here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


FILES = "data=files data.files={corpus}/*.jsonl data.vocab_size=300 data.workers=1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        ("norm.py", "--rows 8 --widths 64 --seconds 0", ["nn.RMSNorm", "inductor", "add_norm"]),
        ("loss.py", "--tokens 64 --vocabulary 100 --seconds 0", ["ours", "all logits"]),
        (
            "train_step.py",
            "--models toy --rows 1 --length 8 --seconds 0",
            ["torch norms, compiled", "released norms", "transformers"],
        ),
        (
            "startup.py",
            f"--repeats 1 --steps 2 --set data.root={{folder}} {FILES} model=tiny data.seq_len=8 data.batch_size=2 "
            "data.micro_batch_size=2 data.val_tokens=400 trainer.probe_rows=5",
            ["--help", "first step", "loading"],
        ),
        (
            "estimate.py",
            "--models tiny vit_tiny --rows 2 --length 16 --vocabulary 300 --seconds 0",
            ["vit_tiny", "post_ln", "32-true"],
        ),
        (
            "measures.py",
            "--experiments quickstart --seconds 0 --set model=tiny data.seq_len=8 data.batch_size=2 "
            "data.micro_batch_size=2 data.vocab_size=300 trainer.probe_rows=5",
            ["layer statistics", "importance", "all by default"],
        ),
        ("soak.py", f"--kills 3 --steps 120 {FILES}", ["checkpoint", "True"]),
        (
            "long_run.py",
            f"--steps 400 --parts 4 model=tiny {FILES} data.seq_len=32 data.val_tokens=512 eval.paper_batch=4 "
            "data.batch_size=4 data.micro_batch_size=4",
            ["largest MiB: second half over first half"],
        ),
        ("prepare.py", "--characters 400000 --vocab-size 300 --workers 1 --repeats 1", ["prepare / raw, 1"]),
    ],
)
def test_benchmarks_run(script, words, shown, corpus, tmp_path):
    assert {path.name for path in BENCHMARKS.glob("[a-z]*.py")} == {
        "norm.py",
        "loss.py",
        "train_step.py",
        "estimate.py",
        "measures.py",
        "prepare.py",
        "soak.py",
        "long_run.py",
        "startup.py",
        "kernel_resources.py",  # in tests/kernels
    }
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    run = subprocess.run(
        [sys.executable, BENCHMARKS / script, *words.format(folder=tmp_path, corpus=corpus).split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    for word in shown:
        assert word in run.stdout
