"""Every benchmark runs at a small size and prints its rows; its numbers are not tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TESTED_ELSEWHERE = {"kernel_resources.py"}  # tests/kernels
FILES = "data=files data.files={corpus}/*.jsonl data.vocab_size=300 data.workers=1"
TINY = "model=tiny data.seq_len=8 data.batch_size=2 data.micro_batch_size=2 trainer.probe_rows=5"
CASES = {
    "norm.py": ("--rows 8 --widths 64 --seconds 0", ["nn.RMSNorm", "inductor", "add_norm"]),
    "loss.py": ("--tokens 64 --vocabulary 100 --seconds 0", ["ours", "all logits"]),
    "train_step.py": (
        "--models toy --rows 1 --length 8 --seconds 0",
        ["torch norms, compiled", "released norms", "transformers"],
    ),
    "strategies.py": ("--model tiny --strategies lns gpas --rows 1 --length 8 --seconds 0", ["lns", "gpas", "memory"]),
    "startup.py": (
        f"--repeats 1 --steps 2 --set data.root={{folder}} {FILES} {TINY} data.val_tokens=400",
        ["--help", "first step", "loading"],
    ),
    "estimate.py": (
        "--models tiny vit_tiny --rows 2 --length 16 --vocabulary 300 --seconds 0",
        ["vit_tiny", "post_ln", "32-true"],
    ),
    "measures.py": (
        f"--experiments quickstart --seconds 0 --set {TINY} data.vocab_size=300",
        ["layer statistics", "importance", "all by default"],
    ),
    "pruning.py": (
        f"glassllm data.seq_len=16 {FILES} --rows 2 --blocks 2 --other glassllm",
        ["streamline", "deepest", "glassllm"],
    ),
    "soak.py": (f"--kills 3 --steps 120 {FILES}", ["checkpoint", "True"]),
    "long_run.py": (
        f"--steps 400 --parts 4 model=tiny {FILES} data.seq_len=32 data.val_tokens=512 eval.paper_batch=4 "
        "data.batch_size=4 data.micro_batch_size=4",
        ["largest MiB: second half over first half"],
    ),
    "prepare.py": ("--characters 400000 --vocab-size 300 --workers 1 --repeats 1", ["prepare / raw, 1"]),
}


def test_every_benchmark_is_tested():
    assert CASES.keys() | TESTED_ELSEWHERE == {path.name for path in BENCHMARKS.glob("[a-z]*.py")}


@pytest.mark.extended
@pytest.mark.parametrize("script", CASES)
def test_benchmark_runs_and_prints_its_rows(script, corpus, tmp_path):
    cli_args, printed = CASES[script]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    run = subprocess.run(
        [sys.executable, BENCHMARKS / script, *cli_args.format(folder=tmp_path, corpus=corpus).split()],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert [text for text in printed if text not in run.stdout] == []
