import pytest

from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose


@pytest.fixture(scope="session")
def train_in(toy):
    """`train_in(folder, *overrides)` trains a toy run in this process and returns its record and folder."""
    return lambda folder, *overrides: train_run(compose([*toy, f"output={folder}", *overrides]))


@pytest.fixture(scope="session")
def plain(train_in, tmp_path_factory):
    """Record and folder of the toy run with all its checkpoints; tests must not change the folder."""
    return train_in(tmp_path_factory.mktemp("plain"), "trainer.keep_last=9")
