import math

import pytest
import torch
import torch.nn.functional as F

from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import removal
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.batches import evaluate
from cod_lightning.measure.importance import block_influence, coalition_losses
from cod_lightning.measure.pruning import prune, removed
from cod_lightning.measure.result import save
from cod_lightning.measure.sparsity import input_norms, layer_sparsity, matrices, sparsified
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import export
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all

HF = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2", "qwen2_5_vl")
FAMILIES = ("ours", "ours-lns", *HF)
PAD = 0


def batches(count=2, rows=2, length=9, pads=2):
    """Random tokens whose rows end in pads."""
    made = torch.randint(3, 37, (count * rows, length), generator=torch.Generator().manual_seed(1))
    made[::2, length - pads :] = PAD
    return list(made.split(rows))


def logits(model):
    with torch.no_grad():
        return model.logits(batches()[1])


def save_hf(model, folder):
    model.save_pretrained(folder)


def reloaded(folder):
    transformers = pytest.importorskip("transformers")
    sees = hasattr(transformers.AutoConfig.from_pretrained(folder), "vision_config")
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_blocks_are_removed_from_a_copy(causal_lm, family):
    model = causal_lm(family)
    whole, blocks = logits(model), model.blocks
    smaller = removed(model, [1, 3, 3])
    with model.with_blocks([blocks[1], blocks[3]]):
        assert torch.equal(logits(smaller), logits(model))
    assert not torch.equal(logits(smaller), whole)
    with torch.no_grad():
        for parameter in smaller.model.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), whole)
    assert (model.depth, model.config.num_hidden_layers) == (4, 4)
    assert (smaller.depth, smaller.config.num_hidden_layers) == (2, 2)
    assert removed(model, []).depth == 4


@pytest.mark.parametrize("family", ["ours", "ours-lns"])
def test_ours_keeps_what_its_blocks_were_trained_with(causal_lm, family):
    model = causal_lm(family)
    smaller = removed(model, [2])
    specs = [block.spec for block in smaller.blocks]
    assert specs == [model.blocks[index].spec for index in (0, 2, 3)]
    if family == "ours-lns":
        assert [spec.attention.gain for spec in specs] == pytest.approx([1, 3**-0.5, 4**-0.5])
    again = Decoder(smaller.model.config, specs).eval()
    again.load_state_dict(smaller.model.state_dict())
    assert torch.equal(logits(ModelAdapter(again)), logits(smaller))


@pytest.mark.parametrize("family", HF)
def test_a_pruned_checkpoint_reloads(causal_lm, family, tmp_path):
    model = causal_lm(family)
    result = prune(model, batches(), PAD, layers=[2], folder=tmp_path / "deep" / "small", export=save_hf)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["small"]
    again, smaller = reloaded(tmp_path / "deep" / "small"), removed(model, [2])
    assert ModelAdapter(again).config.num_hidden_layers == 3
    assert torch.equal(logits(ModelAdapter(again)), logits(smaller))
    for pruned in (again, smaller.model):  # its key/value cache has a place for each layer that is left
        tokens = batches()[1][:, :4]
        mask = torch.ones_like(tokens)
        settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        made = pruned.generate(tokens, attention_mask=mask, min_new_tokens=5, max_new_tokens=5, **settings)
        with torch.no_grad():
            plain = pruned(input_ids=made.sequences, use_cache=False).logits[:, 3:-1]
        torch.testing.assert_close(torch.stack(made.logits, dim=1), plain, rtol=1e-4, atol=1e-4)
    assert (result.removed, result.layers_before, result.layers_after) == ([2], 4, 3)
    assert result.loss_before == pytest.approx(evaluate(model, batches(), PAD)[0])
    assert result.loss_after == pytest.approx(evaluate(ModelAdapter(again), batches(), PAD)[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_every_block_keeps_its_kind_of_attention(causal_lm, family, tmp_path):
    """Windows of two tokens in layers 2 and 4: when layer 2 moves up, its window goes with it."""
    transformers = pytest.importorskip("transformers")
    config = causal_lm(family).model.config
    config.sliding_window, config.use_sliding_window = 2, True
    config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    model = ModelAdapter(transformers.AutoModelForCausalLM.from_config(config).eval(), family)
    expected = coalition_losses(model, [(2, 3)], batches(), PAD)[0][2, 3]
    assert evaluate(removed(model, [1, 4]), batches(), PAD)[0] == pytest.approx(expected, rel=1e-5)
    prune(model, batches(), PAD, layers=[1, 4], folder=tmp_path / "small", export=save_hf)
    again = reloaded(tmp_path / "small")
    assert again.config.layer_types == ["sliding_attention", "full_attention"]
    assert evaluate(ModelAdapter(again), batches(), PAD)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_summed_over_all_targets(causal_lm, family):
    model, losses = causal_lm(family), []
    for tokens in batches():
        with torch.no_grad():
            logs = F.log_softmax(model.logits(tokens).double(), -1)
        for row in range(tokens.shape[0]):
            for position in range(tokens.shape[1] - 1):
                target = int(tokens[row, position + 1])
                if target != PAD:
                    losses.append(-float(logs[row, position, target]))
    assert evaluate(model, batches(), PAD)[0] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("family", ["ours", "ours-lns"])
def test_ours_is_folded_for_transformers(causal_lm, family, tmp_path):
    pytest.importorskip("transformers")
    model, told = causal_lm(family), []
    result = prune(
        model, batches(), PAD, lambda *step: told.append(step), layers=[3], folder=tmp_path / "small", export=export
    )
    again, smaller = reloaded(tmp_path / "small"), removed(model, [3])
    torch.testing.assert_close(logits(ModelAdapter(again)), logits(smaller), rtol=1e-5, atol=1e-5)
    assert result.loss_after == pytest.approx(evaluate(ModelAdapter(again), batches(), PAD)[0], rel=1e-6)
    assert result.ppl_after == pytest.approx(math.exp(result.loss_after))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    save(result, tmp_path / "small", "prune")
    assert [(row["layers"], row["zeros"]) for row in result.rows()] == [(4, 0), (3, 0)]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def pruned(model, tmp_path, **options):
    return prune(model, batches(), PAD, folder=tmp_path / "small", export=lambda *_: None, **options)


@pytest.mark.parametrize("family", ["ours", "gpt2"])
def test_blocks_are_chosen_by_a_signal(causal_lm, family, tmp_path):
    model = causal_lm(family, depth=5)
    influence = block_influence(model, batches(), PAD)
    found = pruned(model, tmp_path / "a", by="influence", blocks=2)
    assert set(found.removed) == set(sorted(range(1, 6), key=lambda layer: influence.influence[layer - 1])[:2])
    assert found.signal == influence.influence
    found = pruned(model, tmp_path / "b", by="streamline", blocks=3)
    first, last = influence.best[2]
    assert found.removed == [first, first + 1, last]
    assert found.signal == [value for value in influence.distance[2] if value is not None]
    found = pruned(model, tmp_path / "c", by="removal", blocks=3)
    alone = removal(model, batches(), PAD)
    assert sorted(alone.losses)[:3] == sorted(alone.losses[layer - 1] for layer in found.removed)
    assert found.loss_after == pytest.approx(evaluate(removed(model, found.removed), batches(), PAD)[0])
    assert (found.layers_after, found.how) == (2, "removal")


@pytest.mark.parametrize("family", ["ours-lns", "qwen3"])
@pytest.mark.parametrize("method", [None, "wanda", "magnitude"])
@pytest.mark.parametrize("allocation", [None, "owl", "alpha_pruning", "uniform"])
def test_weights_are_removed_by_an_allocation(causal_lm, family, method, allocation, tmp_path):
    model = causal_lm(family)
    chosen = {name: value for name, value in (("method", method), ("allocation", allocation)) if value}
    found = prune(
        model,
        batches(),
        PAD,
        sparsity=0.5,
        folder=tmp_path / "small",
        export=export if family == "ours-lns" else save_hf,
        **chosen,
    )
    known = layer_sparsity(model, batches(), PAD, sparsity=0.5)
    shares = {"alpha_pruning": known.alpha_pruning, "uniform": [0.5] * 4}.get(allocation, known.owl)
    assert found.signal == pytest.approx(shares)
    norms = input_norms(model, batches(), PAD)
    expected = sparsified(model, shares, method or "wanda", norms)
    again = ModelAdapter(reloaded(tmp_path / "small"))
    torch.testing.assert_close(logits(again), logits(expected), rtol=1e-5, atol=1e-5)
    assert found.loss_after == pytest.approx(evaluate(again, batches(), PAD)[0], rel=1e-5)
    for block, share in zip(again.blocks, shares, strict=True):
        for _, weight in matrices(block).values():
            assert float((weight == 0).float().mean()) == pytest.approx(share, abs=0.5 / min(weight.shape))
    assert found.zeros_before == 0
    assert found.zeros_after == pytest.approx(0.5, abs=0.02)
    assert (found.layers_after, found.removed) == (4, [])
    assert all(path.stat().st_size for path in save(found, tmp_path, "prune"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"one of layers=, by= with blocks=, and sparsity=; given: none"),
        ({"layers": [1], "sparsity": 0.5}, "given: layers, sparsity"),
        ({"by": "influence"}, "by= says which blocks and blocks= how many"),
        ({"layers": [1], "blocks": 2}, "by= says which blocks and blocks= how many"),
        ({"by": "influenc", "blocks": 1}, "by='influenc': did you mean 'influence'"),
        ({"by": "removal", "blocks": 4}, "blocks=4: 1 to 3 of the 4 of ours can be removed"),
        ({"by": "streamline", "blocks": 0}, "blocks=0: 1 to 3"),
        ({"layers": [1], "method": "wanda"}, "allocation= and method= are for sparsity="),
        ({"sparsity": 1.5, "allocation": "uniform"}, r"sparsity=1.5 is not a share of weights"),
        ({"sparsity": 0.5, "allocation": "even"}, "allocation='even': .*known: alpha_pruning, owl, uniform"),
        ({"sparsity": 0.5, "method": "wand"}, "method='wand': did you mean 'wanda'"),
    ],
)
def test_one_way_to_choose_is_given_whole(causal_lm, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pruned(causal_lm("ours"), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_pruned_is_refused(causal_lm, tmp_path, monkeypatch):
    model = causal_lm("ours")
    with pytest.raises(UserError, match=r"layers=\[1, 2, 3, 4\] are all that ours has: at least one must stay"):
        removed(model, [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"layers=\[0, 5\] do not exist: ours has 1 to 4"):
        removed(model, [0, 1, 5])
    with pytest.raises(UserError, match="no tokens to measure on"):
        prune(model, [], layers=[1], folder=tmp_path / "small", export=export)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        prune(model, batches(), layers=[1], folder=tmp_path / "taken", export=export)

    def full(model, folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        prune(model, batches(), layers=[1], folder=tmp_path / "small", export=full)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    scaled = causal_lm("gpt2")
    scaled.model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx divides attention"):
        removed(scaled, [1])


def test_a_strategy_that_has_no_place_is_refused_before_anything_is_computed(tmp_path):
    config = DecoderConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, vocab_size=37
    )
    model = ModelAdapter(build_decoder(config, build_all({"name": "sandwich_ln"}, 3), seed=0), "sandwich")

    def unread():
        raise AssertionError
        yield

    with pytest.raises(UserError, match=r"sandwich cannot be written .*\nbranch_norm=True .* has no place"):
        prune(model, unread(), by="removal", blocks=1, folder=tmp_path / "small", export=export)
    assert not list(tmp_path.iterdir())
