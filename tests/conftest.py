"""The environment and the shared fixtures of all tests. Libraries read these variables when they are imported."""

import builtins
import contextlib
import errno
import io
import os
import random
import re
import signal
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one thread sums reproducibly; two workers of 2 threads on 2 cores are slow
os.environ["HF_HUB_OFFLINE"] = "1"  # without network a name on the hub fails at once instead of after 23-51 s
os.environ["MPLBACKEND"] = "Agg"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # servers of the tests

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from command_words import TOY_TRAINING

LAUNCHER = re.compile(r"(SLURM|GROUP|ROLE|MASTER|TORCHELASTIC)_\w+|(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE")
"""Variables by which a launcher numbers ranks: the suite may run in a job, and Lightning sets some in this process."""


def unset_launcher():
    for name in filter(LAUNCHER.fullmatch, list(os.environ)):
        del os.environ[name]


unset_launcher()  # before lightning is imported, which reads them

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and when a kernel is decorated

    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        """Round float32 to the nearest bfloat16, as every GPU does; Triton's interpreter truncates."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded


LONGEST_FIRST = [
    *("test_parallel.py", "test_experiments.py", "test_estimate.py", "test_cli.py", "test_packaging.py"),
    *("test_triton_norm.py", "test_bad_input.py", "test_norm_backends.py", "test_fit.py", "test_launch.py"),
    *("test_docs.py", "test_hosts.py", "test_sft.py"),
]


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that parallel workers finish at the same time."""
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts with the same random state and outside of a launcher, in any order of the tests."""
    torch.manual_seed(0)
    yield
    unset_launcher()


TEXT = "the norm of a deep block grows with depth and its branch adds less while early layers learn most"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with 300 documents of 5 to 120 pseudo-English words, in three JSONL files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for part in range(3):
        lines = [" ".join(draw.choices(TEXT.split(), k=draw.randint(5, 120))) for _ in range(100)]
        (folder / f"part{part}.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return folder


@pytest.fixture(scope="session")
def toy(corpus, tmp_path_factory):
    """Overrides for a run of a few seconds; its data is prepared once per session."""
    return [
        "model=tiny",
        "data=files",
        f"data.files={corpus}/*.jsonl",
        f"data.root={tmp_path_factory.mktemp('prepared')}",
        "data.vocab_size=300",
        "data.seq_len=32",
        "data.workers=1",
        "eval.paper_batch=4",
        *TOY_TRAINING,
    ]


@pytest.fixture
def train(toy, tmp_path):
    """`train(*overrides)` trains a toy run in this process and returns its record and folder."""

    from cod_lightning.commands.fit import train_run
    from cod_lightning.config.compose import compose

    def run(*overrides):
        return train_run(compose([*toy, f"output={tmp_path}", *overrides]))

    return run


@pytest.fixture(scope="session")
def tiny_llama():
    """`tiny_llama(folder, **fields)` saves an untrained Llama with a tokenizer of 8 words and returns the path."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["?", "</s>", "the", "norm", "of", "a", "deep", "grows"]
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}

    def save(folder, dtype=torch.float32, **fields):
        config = transformers.LlamaConfig(**(shape | {"vocab_size": len(words)} | fields))
        transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        numbers = {word: number for number, word in enumerate(words)}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="?"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="?")
        fast.save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def commands_in_process(monkeypatch):
    """Commands that `fit -m` and `reproduce` start run in this process, which saves 3 s of imports each."""
    from cod_lightning.cli import main
    from cod_lightning.commands.processes import CommandPool

    monkeypatch.setattr(CommandPool, "run_command", lambda pool, words, label: main([*words]))


@pytest.fixture
def without_images(monkeypatch):
    """Figures are laid out once and not rendered."""

    def lay_out(figure, suffix="png"):
        if suffix == "png":
            figure.draw_without_rendering()
        return suffix.encode()

    monkeypatch.setattr("cod_lightning.plots.figure_bytes", lay_out)
    monkeypatch.setattr("cod_lightning.paper.report.figure_bytes", lay_out)


@pytest.fixture
def default_handlers():
    """Give every stop signal its default effect, here and in child processes, however the suite was started."""
    from cod_lightning.signals import STOP_SIGNALS

    before = {number: signal.signal(number, signal.SIG_DFL) for number in (*STOP_SIGNALS, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def send_signals(monkeypatch):
    """`send_signals(*numbers)`: every run receives these signals after step 3."""
    from lightning.pytorch import Callback

    from cod_lightning.train import run

    def patch(*numbers):
        class Sender(Callback):
            def on_train_batch_end(self, trainer, *arguments):
                if trainer.global_step == 3:
                    for number in numbers:
                        signal.raise_signal(number)

        monkeypatch.setattr(run, "probe_callbacks", lambda *arguments: [Sender()])

    return patch


@pytest.fixture
def forbid(monkeypatch):
    """`forbid(path)`: opening a file fails as for a user without permission; root may read any file."""

    def patch(path):
        for module in (builtins, io, os):
            original = module.open

            def guarded(file, *arguments, original=original, **options):
                if isinstance(file, str | Path) and Path(file).absolute() == Path(path).absolute():
                    raise PermissionError(errno.EACCES, "Permission denied", str(file))
                return original(file, *arguments, **options)

            monkeypatch.setattr(module, "open", guarded)

    return patch


@pytest.fixture
def shard(tmp_path):
    """`shard(model, blocks)` shards a model by FSDP2, in a group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))

    def shard(model, blocks, **options):
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, **options)
        return model

    yield shard
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def wait_for():
    """`wait_for(condition, process, log)` returns when the condition holds; a process that ends before is a failure.

    A failure prints the file `log`; both process and log may be left out.
    """

    def wait(condition, process=None, log=None):
        end = time.monotonic() + 300
        while not condition():
            printed = log.read_text() if log else ""
            assert process is None or process.poll() is None, printed
            assert time.monotonic() < end, printed
            time.sleep(0.002)

    return wait


@pytest.fixture(scope="session")
def running():
    """`running(group)` lists the running processes of a process group, without zombies."""

    def list_running(group):
        names = []
        for process in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, number = process.read_text().rpartition(")")[2].split()[:3]
                if int(number) == group and state not in "ZX":
                    names.append(process.parent.name)
        return names

    return list_running
