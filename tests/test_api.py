"""The public names of the package."""

import inspect

import pytest
import torch

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.measure.registry import MEASURES
from command_words import run_python
from tiny_models import tiny_decoder, tiny_llama


@pytest.mark.parametrize("name", cod.__all__)
def test_every_public_name_exists(name):
    if name == "hf":
        pytest.importorskip("transformers")
    assert getattr(cod, name) is not None


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, cod_lightning; print([name for name in ('torch', 'lightning', 'numpy') if name in sys.modules])"
    assert run_python(code) == "[]\n"


@pytest.mark.parametrize("name", ["variance", "jacobian", "angular", "removal", "importance", "sparsity"])
def test_a_measure_takes_a_plain_model_and_one_batch(name):
    pytest.importorskip("transformers")
    result = getattr(cod.measure, name)(tiny_llama().eval(), torch.arange(24).reshape(2, 12))
    assert result.model == "LlamaForCausalLM"
    assert result.series()["layer"]


def test_a_measure_uses_evaluation_mode_and_restores_the_mode():
    pytest.importorskip("transformers")
    model = tiny_llama(attention_dropout=0.5)
    batch = torch.arange(24).reshape(2, 12)
    expected = cod.measure.variance(model.eval(), batch)
    assert cod.measure.variance(model.train(), batch) == expected
    assert all(module.training for module in model.modules())


def test_a_model_whose_layout_does_not_hold_is_refused():
    pytest.importorskip("transformers")
    model = tiny_llama()

    class Shifted(type(model)):
        def forward(self, *arguments, **named):
            output = super().forward(*arguments, **named)
            output.logits = output.logits + torch.arange(32)
            return output

    model.__class__ = Shifted
    with pytest.raises(UserError, match="final norm and head do not give its logits"):
        cod.measure.removal(model, torch.arange(12)[None])


def test_a_measure_takes_its_options():
    result = cod.measure.run_removal(tiny_decoder(), [torch.arange(12)[None]], sizes=[2])
    assert result.sizes == [2]


def test_measures_and_their_options_take_what_a_tokenizer_returns():
    encoding = {"input_ids": torch.arange(24, dtype=torch.int32).reshape(2, 12)}
    assert cod.measure.linear_replacement(tiny_decoder(), encoding, fit=encoding).fit_tokens == 24


def test_a_measure_can_be_completed_and_shows_what_it_takes():
    assert set(MEASURES) <= set(dir(cod.measure))
    parameters = inspect.signature(cod.measure.jacobian).parameters
    assert list(parameters)[:4] == ["model", "batches", "pad_id", "progress"]
    assert {"layers", "probes", "tokens", "layout"} <= set(parameters)


def test_an_unknown_measure_names_the_known_ones():
    with pytest.raises(AttributeError, match="measures: variance, jacobian"):
        _ = cod.measure.varianc


def test_load_run_returns_the_decoder_of_a_run_and_its_tokenizer(train):
    _, folder = train("norm=lns")
    decoder, tokenizer = cod.load_run(folder)
    assert [block.input_layernorm.gain for block in decoder.blocks][:2] == [1, 2**-0.5]
    assert tokenizer.vocab_size == decoder.config.vocab_size
