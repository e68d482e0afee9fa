import pytest
import torch
import torch.nn.functional as F
from builders import ALL_FAMILIES, decoder, tiny_model, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.open_model import check_layout, load_pretrained
from cod_lightning.nn.parallel import parallelise
from tiny_models import tiny_llama

every_family = pytest.mark.parametrize("family", ALL_FAMILIES)
TOKENS = tokens(2, 7)


@torch.no_grad()
def run(model):
    """Logits, and activations by (name, layer)."""
    activations = {}
    logits = model.logits(TOKENS, lambda name, layer, x: activations.__setitem__((name, layer), x))
    return logits, activations


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_sizes_are_read_from_the_model(causal_lm, family):
    model = causal_lm(family)
    assert (model.depth, model.hidden, model.config.num_hidden_layers) == (4, 16, 4)
    assert model.logits(TOKENS).shape == (2, 7, 37)


@every_family
def test_a_hook_changes_no_logits_and_is_removed(causal_lm, family):
    model = causal_lm(family)
    logits, activations = run(model)
    assert len(activations) == 1 + 3 * 4
    activations.clear()
    assert torch.equal(logits, model.logits(TOKENS))
    assert not activations


@every_family
def test_a_block_adds_its_branches_to_its_input(causal_lm, family):
    _, activations = run(causal_lm(family))
    for layer in range(1, 5):
        x = activations["residual", layer - 1] if layer > 1 else activations["embedding", 0]
        for branch in ("attention", "ffn"):
            x = x + activations[branch, layer]
            if family == "bert":  # Post-LN; a new norm's weight is 1, its bias 0
                x = F.layer_norm(x, (16,), eps=1e-12)
        close(x, activations["residual", layer])


@every_family
def test_the_head_gives_the_logits_of_the_last_block(causal_lm, family):
    model = causal_lm(family)
    logits, activations = run(model)
    close(model.head(activations["residual", 4]), logits)


@every_family
@torch.no_grad()
def test_a_block_is_a_function_of_its_input(causal_lm, family):
    model = causal_lm(family)
    _, activations = run(model)
    for layer, (x, function) in enumerate(zip(*model.block_functions(TOKENS), strict=True), start=1):
        close(function(x), activations["residual", layer])
        assert not torch.allclose(function(2 * x + 1), function(x))


@pytest.mark.parametrize("strategy", ["x0_mix", "value_residual"])
@torch.no_grad()
def test_a_block_keeps_what_it_reads_from_the_first_one(strategy):
    model = decoder(strategy)
    for parameter in model.model.parameters():
        if parameter.shape in ((2,), (3,)):
            parameter += 0.5
    _, activations = run(model)
    inputs, functions = model.block_functions(TOKENS)
    for layer, (x, function) in enumerate(zip(inputs, functions, strict=True), start=1):
        close(function(x), activations["residual", layer])
    with model.with_blocks(model.blocks[1:]):  # now the second block is the first one
        assert model.logits(TOKENS).isfinite().all()


def wrap_blocks(model):
    model.model.layers = nn.ModuleList(map(checkpoint_wrapper, model.blocks))


@pytest.mark.parametrize("wrap", [wrap_blocks, lambda model: parallelise(model, checkpointing="full")])
@pytest.mark.parametrize("measure", ["jacobian", "contribution", "swaps"])
@pytest.mark.parametrize("strategy", ["x0_mix", "peri_ln"])
def test_checkpointed_blocks_are_measured(strategy, measure, wrap):
    model = decoder(strategy).model
    expected = getattr(cod.measure, measure)(model, TOKENS)
    wrap(model)
    assert getattr(cod.measure, measure)(model, TOKENS).rows() == expected.rows()


def test_a_block_runs_the_forward_that_its_user_gave_it():
    model = decoder("pre_ln")
    forward = model.blocks[1].forward
    model.blocks[1].forward = lambda *arguments: (2 * forward(*arguments)[0], None)
    inputs, functions = model.block_functions(TOKENS)
    close(functions[1](inputs[1]), inputs[2])


@every_family
@torch.no_grad()
def test_a_model_runs_with_other_blocks(causal_lm, family):
    model = causal_lm(family)
    whole, blocks = model.logits(TOKENS), model.blocks
    with model.with_blocks([blocks[0], *blocks[2:]]):
        assert model.depth == 3
        (x, *_), functions = model.block_functions(TOKENS)
        without = model.logits(TOKENS)
    for function in functions:
        x = function(x)
    close(model.head(x), without)
    assert not torch.allclose(without, whole)


@every_family
@torch.no_grad()
def test_the_blocks_come_back(causal_lm, family):
    model = causal_lm(family)
    whole = model.logits(TOKENS)
    with pytest.raises(KeyError), model.with_blocks(model.blocks[:1]):
        raise KeyError
    assert torch.equal(model.logits(TOKENS), whole)


@pytest.mark.parametrize(("count", "layers"), [(1, [1]), (2, [1, 4]), (3, [1, 2, 4]), (9, [1, 2, 3, 4])])
def test_layers_are_evenly_spaced(causal_lm, count, layers):
    assert causal_lm("ours").evenly_spaced(count) == layers


@pytest.mark.parametrize(
    ("family", "fields", "causal"),
    [
        ("llama", {}, True),
        ("llama", {"is_causal": False}, False),
        ("gemma3_text", {}, True),
        ("gemma3_text", {"use_bidirectional_attention": True}, False),
    ],
)
@torch.no_grad()
def test_only_a_causal_model_has_a_loss_of_next_tokens(family, fields, causal):
    model = ModelAdapter(tiny_model(family, **fields), family)
    batch = TOKENS % 32
    other = batch.clone()
    other[:, -1] = (other[:, -1] + 1) % 32
    assert torch.equal(model.logits(batch)[:, 0], model.logits(other)[:, 0]) == causal
    assert model.predicts_next == causal
    assert bool(model.why_no_loss) != causal


def test_a_model_whose_logits_are_nan_is_refused():
    with pytest.raises(UserError, match="cannot be measured: its logits are NaN"):
        check_layout(ModelAdapter(tiny_llama(rms_norm_eps=float("nan"))))


@torch.no_grad()
def test_an_encoder_without_a_head_is_the_one_of_bert(causal_lm):
    bert, encoder = causal_lm("bert"), causal_lm("bert_encoder")
    encoder.model.load_state_dict(bert.model.bert.state_dict())
    (_, expected), (hidden, found) = run(bert), run(encoder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(hidden, expected["residual", 4])
    assert not encoder.predicts_next
    check_layout(encoder)
    with pytest.raises(UserError, match="bert_encoder: bert has no head, which gives logits"):
        encoder.head(hidden)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "bert", "bert_encoder"])
@torch.no_grad()
def test_a_model_is_loaded_with_its_tokenizer(causal_lm, family, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    saved = causal_lm(family)
    saved.model.save_pretrained(tmp_path)
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(37)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    loaded, tokenizer = load_pretrained(str(tmp_path))
    torch.testing.assert_close(loaded.logits(TOKENS), saved.logits(TOKENS))
    assert tokenizer("w7", add_special_tokens=False)["input_ids"] == [7]


@pytest.mark.parametrize(("family", "causal"), [("llama", True), ("qwen2_5_vl", True), ("bert", False)])
@torch.no_grad()
def test_only_bert_sees_later_tokens(causal_lm, family, causal):
    model, changed = causal_lm(family), TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 37
    assert torch.equal(model.logits(TOKENS)[:, :-1], model.logits(changed)[:, :-1]) == causal


def test_a_model_with_an_unknown_layout_is_an_error():
    with pytest.raises(UserError, match="odd: Linear has an unknown layout and cannot be measured"):
        ModelAdapter(nn.Linear(2, 2), "odd")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_what_is_no_floating_point_dtype_is_named(tmp_path, dtype):
    with pytest.raises(UserError, match=f"^dtype={dtype!r} is not a floating-point dtype of torch"):
        load_pretrained(tmp_path, dtype=dtype)


@pytest.mark.parametrize("name", ["/tmp/none", "./none", "none.gguf", "a/b/none"])
def test_a_path_to_nothing_is_refused(name):
    with pytest.raises(UserError, match=f"{name} does not exist: name the folder of a model"):
        load_pretrained(name)


def test_a_file_of_weights_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(UserError, match=f"{path} is a file: name the folder of the model"):
        load_pretrained(path)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="not a checkpoint of a causal language model"):
        load_pretrained(str(tmp_path))


@every_family
def test_activations_need_only_the_last_logits(causal_lm, family):
    model, sizes = causal_lm(family), []
    _, expected = run(model)
    if head := model.layout.head:
        model.model.get_submodule(head).register_forward_hook(lambda head, args, y: sizes.append(y.shape[1]))
    activations = {}
    model.run(TOKENS, lambda name, layer, x: activations.__setitem__((name, layer), x))
    assert sizes == [1]
    assert activations.keys() == expected.keys()
    assert all(torch.equal(x, expected[place]) for place, x in activations.items())
