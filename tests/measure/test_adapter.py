import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter, load_pretrained

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2", "qwen2_5_vl", "bert")


def tokens(rows=2, length=7):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_make_up_the_whole(causal_lm, family):
    model, seen = causal_lm(family), {}
    with torch.no_grad():
        logits = model.logits(tokens(), lambda what, layer, x: seen.__setitem__((what, layer), x))
        assert torch.equal(logits, model.logits(tokens()))
        assert logits.shape == (2, 7, 37)
        assert (model.depth, model.hidden) == (4, 16)
        assert len(seen) == 1 + 3 * 4
        for layer in range(1, 5):
            total = seen["embedding", 0] if layer == 1 else seen["residual", layer - 1]
            for branch in ("attention", "ffn"):
                total = total + seen[branch, layer]
                if family == "bert":  # Post-LN; a new norm's weight is 1, its bias 0
                    total = F.layer_norm(total, (16,), eps=1e-12)
            torch.testing.assert_close(total, seen["residual", layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.head(seen["residual", 4]), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_a_function_of_its_input(causal_lm, family):
    model, seen = causal_lm(family), {}
    with torch.no_grad():
        model.logits(tokens(), lambda what, layer, x: seen.__setitem__((what, layer), x))
        inputs, functions = model.block_functions(tokens())
        for layer, (x, function) in enumerate(zip(inputs, functions, strict=True), start=1):
            torch.testing.assert_close(function(x), seen["residual", layer], rtol=1e-5, atol=1e-5)
            assert not torch.allclose(function(2 * x + 1), function(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_rearranged_for_a_while(causal_lm, family):
    model = causal_lm(family)
    with torch.no_grad():
        whole = model.logits(tokens())
        blocks = model.blocks
        with model.with_blocks([blocks[0], *blocks[2:]]):
            assert model.depth == 3
            inputs, functions = model.block_functions(tokens())
            without = model.logits(tokens())
        x = inputs[0]
        for function in functions:
            x = function(x)
        torch.testing.assert_close(model.head(x), without, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(without, whole)
        assert torch.equal(model.logits(tokens()), whole)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "bert"])
def test_a_model_that_is_more_than_a_decoder_is_loaded(causal_lm, family, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = causal_lm(family)
    made.model.save_pretrained(tmp_path)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(37)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded, tokenizer = load_pretrained(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(tokens()), made.logits(tokens()))
    assert tokenizer("w7", add_special_tokens=False)["input_ids"] == [7]


def test_only_bert_sees_later_tokens(causal_lm):
    changed = tokens()
    changed[:, -1] = (changed[:, -1] + 1) % 37
    with torch.no_grad():
        for family in ("llama", "qwen2_5_vl", "bert"):
            model = causal_lm(family)
            same = torch.equal(model.logits(tokens())[:, :-1], model.logits(changed)[:, :-1])
            assert same == (family != "bert")


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"odd: Linear is not laid out .* expected blocks at model\.layers"):
        ModelAdapter(nn.Linear(2, 2), "odd")


def test_a_folder_without_a_model_is_refused(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="not a causal language model of transformers"):
        load_pretrained(str(tmp_path))
