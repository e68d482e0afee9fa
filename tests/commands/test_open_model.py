"""Models of `transformers` that `measure` opens with text."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cod_lightning.commands.measure_runner import open_model, run_prune
from cod_lightning.config.compose import compose
from cod_lightning.data.corpora import open_corpus
from cod_lightning.errors import UserError


@pytest.fixture
def config(corpus):
    words = ["data=files", f"data.files={corpus}/*.jsonl", "data.seq_len=16", "trainer.accelerator=cpu"]
    return compose(words)


@pytest.fixture
def model(tiny_llama, tmp_path):
    """`model(vocab_size)` saves a bfloat16 Llama with a tokenizer of 8 words."""

    def save(vocab_size=8, **settings):
        folder = tiny_llama(tmp_path / "llama", torch.bfloat16, vocab_size=vocab_size, max_position_embeddings=32)
        (tmp_path / "llama/generation_config.json").write_text(json.dumps(settings))
        return folder

    return save


def test_the_threads_of_the_configuration_are_used(model, config, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    open_model(model(), replace(config, trainer=replace(config.trainer, threads=3)), open_corpus(config.data), 2)
    assert used == [3]


def test_the_measured_text_is_held_out(model, config):
    corpus = SimpleNamespace(val=lambda: ["deep norm"] * 30, train=lambda: ["of a"] * 30)
    (tokens,) = open_model(model(), config, corpus, 2).batches
    assert tokens.flatten().tolist() == ([6, 3, 1] * 11)[:32]  # deep, norm, </s>


def test_a_pruned_model_keeps_dtype_and_drops_contradictory_generation_settings(model, config, tmp_path, capsys):
    subject = open_model(model(do_sample=False, temperature=0.9, top_p=0.6), config, open_corpus(config.data), 2)
    assert next(subject.model.model.parameters()).dtype == torch.float32
    run_prune(subject, {"layers": [1]}, tmp_path / "small")
    assert "generation settings dropped as invalid: temperature, top_p" in capsys.readouterr().err
    state = load_file(tmp_path / "small/model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert {int(name.split(".")[2]) for name in state if ".layers." in name} == {0, 1}
    words = json.loads((tmp_path / "small/tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_token_of_the_text_without_an_embedding_is_named(model, config):
    with pytest.raises(
        UserError, match=r"token 7 \('grows'\) has no embedding: the tokenizer has 8 tokens and the mod"
    ):
        open_model(model(vocab_size=7), config, open_corpus(config.data), 2)


def test_sequences_longer_than_the_context_are_refused(model, config):
    config.data.seq_len = 33
    with pytest.raises(UserError, match=r"data\.seq_len=33 is longer than max_position_embeddings=32"):
        open_model(model(), config, open_corpus(config.data), 2)


def test_a_model_that_does_not_run_as_its_layout_says_is_refused(model, config):
    """MiniMax has the names of Llama, and starts its skips after its norms."""
    transformers = pytest.importorskip("transformers")
    folder = Path(model())
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"vocab_size": 8, "num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 2}
    transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**shape)).save_pretrained(folder)
    with pytest.raises(UserError, match="block 1 adds something else than its attention and FFN to the residual"):
        open_model(str(folder), config, open_corpus(config.data), 2)


def test_the_folder_of_a_pruned_model_must_be_writable(model, config, tmp_path):
    (tmp_path / "file").write_text("")
    subject = open_model(model(), config, open_corpus(config.data), 2)
    subject.model.model.forward = None  # nothing is computed
    with pytest.raises(UserError, match="file is not a writable folder"):
        run_prune(subject, {"layers": [1]}, tmp_path / "file/small")


def test_every_sequence_begins_with_bos_if_the_tokenizer_adds_it(model, config):
    folder = Path(model())
    (plain,) = open_model(str(folder), config, open_corpus(config.data), 2).batches
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    begin, text = {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "</s>"}))
    (tokens,) = open_model(str(folder), config, open_corpus(config.data), 2).batches
    assert tokens.shape == plain.shape
    assert tokens[:, 0].tolist() == [1, 1]
    assert tokens[:, 1:].flatten().tolist() == plain.flatten()[:30].tolist()
