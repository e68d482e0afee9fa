import math

import pytest
import torch
import torch.nn.functional as F

from cod_lightning.errors import UserError
from cod_lightning.measure.influence import coalition_losses
from cod_lightning.measure.layered import Layered
from cod_lightning.measure.prune import prune, removed
from cod_lightning.measure.result import save
from cod_lightning.measure.tokens import evaluate
from cod_lightning.nn.decoder import Decoder

HF = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
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


def reloaded(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_removed_from_a_copy(causal_lm, family):
    model = causal_lm(family)
    whole, blocks = logits(model), model.blocks
    smaller = removed(model, [1, 3, 3])
    with model.arranged([blocks[1], blocks[3]]):
        assert torch.equal(logits(smaller), logits(model))
    assert not torch.equal(logits(smaller), whole)
    with torch.no_grad():
        for parameter in smaller.model.parameters():
            parameter.zero_()
    assert torch.equal(logits(model), whole)
    assert (model.depth, model.model.config.num_hidden_layers) == (4, 4)
    assert (smaller.depth, smaller.model.config.num_hidden_layers) == (2, 2)
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
    assert torch.equal(logits(Layered(again)), logits(smaller))


@pytest.mark.parametrize("family", HF)
def test_a_pruned_checkpoint_reloads(causal_lm, family, tmp_path):
    model = causal_lm(family)
    result = prune(model, batches(), PAD, layers=[2], folder=tmp_path / "deep" / "small")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["small"]
    again, smaller = reloaded(tmp_path / "deep" / "small"), removed(model, [2])
    assert again.config.num_hidden_layers == 3
    assert torch.equal(logits(Layered(again)), logits(smaller))
    with torch.no_grad():
        plain, tokens = logits(smaller), batches()[1]
        for pruned in (again, smaller.model):
            first = pruned(input_ids=tokens[:, :4], use_cache=True)
            cached = [first.logits]
            past = first.past_key_values
            for position in range(4, tokens.shape[1]):
                step = pruned(input_ids=tokens[:, position : position + 1], past_key_values=past, use_cache=True)
                cached.append(step.logits)
                past = step.past_key_values
            torch.testing.assert_close(torch.cat(cached, dim=1), plain, rtol=1e-4, atol=1e-4)
    assert (result.removed, result.layers_before, result.layers_after) == ([2], 4, 3)
    assert result.loss_before == pytest.approx(evaluate(model, batches(), PAD)[0])
    assert result.loss_after == pytest.approx(evaluate(Layered(again), batches(), PAD)[0])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_every_block_keeps_its_kind_of_attention(causal_lm, family, tmp_path):
    """Windows of two tokens in layers 2 and 4: when layer 2 moves up, its window goes with it."""
    transformers = pytest.importorskip("transformers")
    config = causal_lm(family).model.config
    config.sliding_window, config.use_sliding_window = 2, True
    config.layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    model = Layered(transformers.AutoModelForCausalLM.from_config(config).eval(), family)
    expected = coalition_losses(model, [(2, 3)], batches(), PAD)[2, 3]
    assert evaluate(removed(model, [1, 4]), batches(), PAD)[0] == pytest.approx(expected, rel=1e-5)
    prune(model, batches(), PAD, layers=[1, 4], folder=tmp_path / "small")
    again = reloaded(tmp_path / "small")
    assert again.config.layer_types == ["sliding_attention", "full_attention"]
    assert evaluate(Layered(again), batches(), PAD)[0] == pytest.approx(expected, rel=1e-5)


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


def test_ours_is_written_by_whoever_can(causal_lm, tmp_path):
    model, told = causal_lm("ours"), []

    def export(decoder, folder):
        folder.mkdir()
        torch.save(decoder.state_dict(), folder / "weights.pt")

    result = prune(
        model, batches(), PAD, lambda *steps: told.append(steps), layers=[4], folder=tmp_path / "small", export=export
    )
    assert "model.layers.3.mlp.up_proj.weight" not in torch.load(tmp_path / "small" / "weights.pt", weights_only=True)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.ppl_after == pytest.approx(math.exp(result.loss_after))
    save(result, tmp_path / "tables", "prune")
    assert [row["layers"] for row in result.rows()] == [4, 3]


def test_what_cannot_be_pruned_is_refused(causal_lm, tmp_path):
    model = causal_lm("ours")
    with pytest.raises(UserError, match=r"layers=\[1, 2, 3, 4\] are all that ours has: at least one must stay"):
        removed(model, [1, 2, 3, 4])
    with pytest.raises(UserError, match=r"layers=\[0, 5\] do not exist: ours has 1 to 4"):
        removed(model, [0, 1, 5])
    with pytest.raises(UserError, match="Decoder is no model of transformers: pass an export"):
        prune(model, batches(), layers=[1], folder=tmp_path / "small")
    with pytest.raises(UserError, match="exists already"):
        prune(model, batches(), layers=[1], folder=tmp_path)
    with pytest.raises(UserError, match="no tokens to measure on"):
        prune(causal_lm("llama"), [], layers=[1], folder=tmp_path / "small")
    assert not list(tmp_path.iterdir())
    scaled = causal_lm("gpt2")
    scaled.model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx divides attention"):
        removed(scaled, [1])
