import random

import pytest

from cod_lightning.cli import sections
from cod_lightning.config import claim, compose
from cod_lightning.train.run import fit

WORDS = "the norm of a deep block grows with depth and its branch adds less while early layers learn most".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with 300 documents of pseudo-English, one per file line, short and long."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for part in range(3):
        lines = [" ".join(draw.choices(WORDS, k=draw.randint(5, 120))) for _ in range(100)]
        (folder / f"part{part}.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return folder


@pytest.fixture(scope="session")
def toy(corpus, tmp_path_factory):
    """Overrides for a run of seconds; its data is prepared once for the whole session."""
    return [
        "model=tiny",
        "data=files",
        f"data.files={corpus}/*.jsonl",
        f"data.root={tmp_path_factory.mktemp('prepared')}",
        "data.vocab_size=300",
        "data.seq_len=32",
        "data.workers=1",
        "data.batch_size=8",
        "data.micro_batch_size=8",
        "trainer.accelerator=cpu",
        "trainer.threads=1",
        "trainer.max_steps=6",
        "trainer.log_every=1",
        "trainer.stats_every=3",
        "trainer.probe_rows=4",
        "trainer.checkpoint_every=2",
        "trainer.progress=false",
        "eval.every=3",
        "eval.paper_batch=4",
        "logger=none",
    ]


@pytest.fixture
def train(toy, tmp_path):
    """`train(*overrides)` runs a toy fit in this process and returns its record and folder."""

    def run(*overrides):
        config = compose([*toy, f"output={tmp_path}", *overrides])
        folder = claim(config)
        return fit(sections(config), folder), folder

    return run
