"""The public names of the package."""

import subprocess
import sys

import pytest

import cod_lightning as cod


@pytest.mark.parametrize("name", cod.__all__)
def test_every_public_name_exists(name):
    if name == "hf":
        pytest.importorskip("transformers")
    assert getattr(cod, name) is not None


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, cod_lightning; print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_load_run_returns_the_decoder_of_a_run_and_its_tokenizer(train):
    _, folder = train("norm=lns")
    decoder, tokenizer = cod.load_run(folder)
    assert [block.input_layernorm.gain for block in decoder.blocks][:2] == [1, 2**-0.5]
    assert tokenizer.vocab_size == decoder.config.vocab_size
