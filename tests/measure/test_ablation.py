import math

import pytest
import torch
import torch.nn.functional as F

from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import (
    causal_score,
    fit_linear,
    linear_replacement,
    removal,
    replaced,
    run_removal,
    swaps,
)
from cod_lightning.measure.angular import angular_distance
from cod_lightning.measure.batches import evaluate
from cod_lightning.measure.result import save

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
PAD = 0


def tokens(rows=6, length=9, seed=0):
    return torch.randint(3, 37, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(logits, batch):
    """Mean next-token loss of logits [rows, length, vocabulary], in float64."""
    logs = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    return float(-logs[:, :-1].gather(-1, batch[:, 1:, None]).mean())


def loss_through(model, batch, order):
    """Loss with the blocks called by hand, `order` numbering them from 1."""
    with torch.no_grad():
        inputs, functions = model.block_functions(batch)
        x = inputs[0]
        for layer in order:
            x = functions[layer - 1](x)
        return loss_of(model.head(x), batch)


def silence(block):
    """Let a block add nothing to the stream."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if any(end in name for end in ("o_proj", "down_proj", "c_proj", "post_feedforward", "post_attention")):
                parameter.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    with torch.no_grad():
        expected = loss_of(model.logits(batch), batch)
    loss, count = evaluate(model, batch.split(4))
    assert (loss, count) == (pytest.approx(expected, rel=1e-6), 48)
    padded = torch.cat([batch, torch.full((6, 2), PAD)], dim=1)
    assert evaluate(model, padded.split(1), PAD) == (pytest.approx(expected, rel=1e-6), 48)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_removed(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    found = removal(model, batch.split(4))
    assert found.tokens == 48
    assert found.loss == pytest.approx(loss_through(model, batch, [1, 2, 3, 4]), rel=1e-5)
    orders = ([2, 3, 4], [1, 3, 4], [1, 2, 4], [1, 2, 3])
    assert found.losses == pytest.approx([loss_through(model, batch, order) for order in orders], rel=1e-5)
    for loss, row in zip(found.losses, found.rows(), strict=True):
        assert row["delta_loss"] == loss - found.loss
        assert row["perplexity"] == pytest.approx(math.exp(loss))
    assert evaluate(model, [batch])[0] == pytest.approx(found.loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_of_blocks_removed(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    found = run_removal(model, [batch], sizes=(1, 3, 4))
    assert found.losses[0] == pytest.approx(removal(model, [batch]).losses, rel=1e-6)
    assert found.losses[1] == pytest.approx(
        [loss_through(model, batch, [4]), loss_through(model, batch, [1])], rel=1e-5
    )
    assert found.losses[2] == pytest.approx([loss_through(model, batch, [])], rel=1e-5)
    assert [(row["n"], row["first"]) for row in found.rows()] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 4),
        (3, 1),
        (3, 2),
        (4, 1),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_exchanged(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    found = swaps(model, [batch])
    assert found.pairs == [(1, 2), (2, 3), (3, 4)]
    orders = ([2, 1, 3, 4], [1, 3, 2, 4], [1, 2, 4, 3])
    losses = [loss_through(model, batch, order) for order in orders]
    assert found.losses == pytest.approx(losses, rel=1e-5)
    assert found.scores == pytest.approx([abs(found.loss - loss) / found.loss for loss in losses], abs=1e-5)
    assert found.score == pytest.approx(sum(found.scores) / 3)


def test_all_pairs_exchanged(causal_lm, tmp_path):
    model, batch = causal_lm("ours"), tokens()
    found = swaps(model, [batch], pairs="all")
    assert found.pairs == [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    assert found.losses[2] == pytest.approx(loss_through(model, batch, [4, 2, 3, 1]), rel=1e-5)
    assert len(found.rows()) == 6
    assert all(path.stat().st_size for path in save(found, tmp_path, "all"))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_made_linear(causal_lm, family):
    model, batch, fit = causal_lm(family), tokens(), tokens(seed=1)
    found = linear_replacement(model, [batch], fit=fit.split(4))
    assert (found.tokens, found.fit_tokens) == (48, 54)
    with torch.no_grad():
        inputs, functions = model.block_functions(batch)
        fit_inputs, fit_functions = model.block_functions(fit)
        for layer in range(4):
            x, y = fit_inputs[layer].double().flatten(0, 1), fit_functions[layer](fit_inputs[layer]).double()
            x = torch.cat([x, torch.ones(54, 1)], dim=1)
            map_ = torch.linalg.lstsq(x, y.flatten(0, 1)).solution
            x = (inputs[layer].double() @ map_[:-1] + map_[-1]).float()
            for function in functions[layer + 1 :]:
                x = function(x)
            assert found.losses[layer] == pytest.approx(loss_of(model.head(x), batch), rel=1e-4)
    assert found.usefulness == sum(loss > 1.1 * found.loss for loss in found.losses) / 4
    assert evaluate(model, [batch])[0] == found.loss


def test_a_linear_block_is_met_exactly(causal_lm):
    model, batch = causal_lm("llama"), tokens()
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(16, 16, generator=generator), torch.randn(16, generator=generator)
    with replaced(model.blocks[2], lambda x: F.linear(x, weight, bias)):
        function, count = fit_linear(model, 3, batch.split(4))
    x = torch.randn(2, 3, 16, generator=generator)
    assert count == 54
    torch.testing.assert_close(function(x), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_channels_of_any_size_are_fitted(causal_lm):
    model, batch = causal_lm("llama"), tokens()
    model.model.double()
    generator = torch.Generator().manual_seed(0)
    weight, sizes = torch.randn(16, 16, generator=generator).double(), torch.logspace(-5, 5, 16).double()
    with torch.no_grad():
        model.model.model.embed_tokens.weight.mul_(sizes)
    with replaced(model.blocks[0], lambda x: x + F.linear(x / sizes, weight)):
        function, _ = fit_linear(model, 1, [batch])
    x = torch.randn(2, 3, 16, generator=generator).double() * sizes
    torch.testing.assert_close(function(x), x + F.linear(x / sizes, weight), rtol=1e-6, atol=1e-6)


def test_fewer_different_inputs_than_dimensions(causal_lm):
    model = causal_lm("llama")
    batch = torch.randint(3, 8, (40, 2), generator=torch.Generator().manual_seed(0))
    function, _ = fit_linear(model, 1, [batch])
    inputs, blocks = model.block_functions(batch)
    with torch.no_grad():
        x, y = inputs[0], blocks[0](inputs[0])
    means = torch.stack([y[batch == token].mean(0) for token in range(3, 8)])
    torch.testing.assert_close(function(x), means[batch - 3], rtol=1e-4, atol=1e-4)


def test_too_few_tokens_to_fit(causal_lm):
    with pytest.raises(UserError, match="a linear map of 16 dimensions needs 17 tokens or more, not 16"):
        linear_replacement(causal_lm("ours", depth=2), [tokens()], fit=[tokens(2, 8)])


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_on_later_layers(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    found = causal_score(model, batch.split(4))
    assert found.tokens == 54

    def streams(blocks):
        seen = {}
        with torch.no_grad(), model.with_blocks(blocks):
            model.logits(batch, lambda what, layer, x: seen.__setitem__((what, layer), x.double()))
        return [seen["embedding", 0], *(seen["residual", layer + 1] for layer in range(len(blocks)))]

    blocks = model.blocks
    whole = streams(blocks)
    pairs = []
    for s in range(4):
        without = streams([*blocks[:s], *blocks[s + 1 :]])
        without.insert(s, without[s])
        effects = []
        for later in range(s + 1, 4):
            added, then = whole[later + 1] - whole[later], without[later + 1] - without[later]
            effects.append(float((then - added).norm(dim=-1).sum() / added.norm(dim=-1).sum()))
        assert found.effects[s][: s + 1] == [None] * (s + 1)
        assert found.effects[s][s + 1 :] == pytest.approx(effects, rel=1e-3)
        assert found.scores[s] == (pytest.approx(sum(effects) / len(effects), rel=1e-3) if effects else None)
        pairs += effects
    assert found.score == pytest.approx(sum(pairs) / 6, rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_useless_block_is_found_by_every_signal(causal_lm, family):
    model, batch, useless = causal_lm(family), tokens(), 2
    silence(model.blocks[useless - 1])
    costs = [abs(row["delta_loss"]) for row in removal(model, [batch]).rows()]
    assert costs[useless - 1] < 1e-6
    runs = run_removal(model, [batch], sizes=[2]).losses[0]
    alone = removal(model, [batch]).losses
    assert (runs[0], runs[1]) == (pytest.approx(alone[0], rel=1e-6), pytest.approx(alone[2], rel=1e-6))
    linear = linear_replacement(model, [batch])
    assert linear.losses[useless - 1] == pytest.approx(linear.loss, rel=1e-6)
    angles = angular_distance(model, [batch]).distances[0]
    assert angles[useless - 1] < 1e-8
    causal = causal_score(model, [batch])
    assert causal.scores[useless - 1] < 1e-6
    assert causal.effects[0][useless - 1] is None
    assert causal.effects[0][useless] > 0
    changes = [abs(loss - linear.loss) for loss in linear.losses]
    for signal in (costs, changes, angles, causal.scores[:3]):
        others = [value for layer, value in enumerate(signal, start=1) if layer != useless]
        assert signal[useless - 1] < 1e-3 * min(others)


@pytest.mark.parametrize("family", ["ours", "gpt2"])
def test_neither_pads_nor_batches_matter(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    padded = torch.cat([batch, torch.full((6, 3), PAD)], dim=1)
    for measure in (removal, run_removal, swaps, linear_replacement):
        whole = measure(model, [batch], PAD)
        for batches in (iter(batch.split(1)), padded.split(4)):
            other = measure(model, batches, PAD)
            assert other.tokens == whole.tokens
            assert other.losses[0] == pytest.approx(whole.losses[0], rel=1e-5)
            assert other.losses[-1] == pytest.approx(whole.losses[-1], rel=1e-5)
    whole = causal_score(model, [batch], PAD)
    for batches in (batch.split(1), padded.split(4)):
        assert causal_score(model, batches, PAD).scores[:3] == pytest.approx(whole.scores[:3], rel=1e-4)


def test_a_model_in_bfloat16(causal_lm):
    model, batch = causal_lm("llama"), tokens()
    exact = removal(model, [batch]), linear_replacement(model, [batch]), causal_score(model, [batch])
    model.model.bfloat16()
    assert removal(model, [batch]).losses == pytest.approx(exact[0].losses, rel=0.1)
    assert linear_replacement(model, [batch]).losses == pytest.approx(exact[1].losses, rel=0.1)
    assert causal_score(model, [batch]).scores[:3] == pytest.approx(exact[2].scores[:3], rel=0.1)


@pytest.mark.parametrize("family", ["ours", "llama"])
def test_compiled_blocks(causal_lm, family):
    model, batch = causal_lm(family), tokens()
    expected = linear_replacement(model, [batch]), causal_score(model, [batch])
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model.model(batch)
    assert (linear_replacement(model, [batch]), causal_score(model, [batch])) == expected


def test_the_model_is_left_as_it_was(causal_lm):
    model = causal_lm("qwen2")
    blocks, broken = model.blocks, RuntimeError("stop")

    def stop(done, total):
        raise broken

    for measure in (removal, swaps, linear_replacement):
        with pytest.raises(RuntimeError, match="stop"):
            measure(model, [tokens()], progress=stop)
        assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))
        assert not any(block._forward_hooks for block in blocks)


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (run_removal, {"sizes": [1, 5]}, "sizes: 5 neighbouring blocks cannot be removed from 4: 1 to 4 can"),
        (swaps, {"pairs": "neighbors"}, r"pairs='neighbors': did you mean 'neighbours'\? known: all, neighbours"),
    ],
)
def test_a_wrong_option_is_refused(causal_lm, measure, options, message):
    with pytest.raises(UserError, match=message):
        measure(causal_lm("ours"), [tokens()], **options)


def test_nothing_to_predict(causal_lm):
    with pytest.raises(UserError, match="no token has a next one"):
        removal(causal_lm("ours", depth=2), [tokens(length=1)])
    with pytest.raises(UserError, match="has none to exchange it with"):
        swaps(causal_lm("ours", depth=1), [tokens()])


@pytest.mark.parametrize(
    ("measure", "calls"),
    [(removal, 4), (run_removal, 8), (swaps, 3), (linear_replacement, 4), (causal_score, 2)],
)
def test_they_are_saved_and_tell_their_progress(causal_lm, tmp_path, measure, calls):
    seen = []
    found = measure(causal_lm("ours"), [tokens(), tokens(seed=1)], progress=lambda *call: seen.append(call))
    assert seen == [(done, calls) for done in range(1, calls + 1)]
    assert found.rows()
    assert all(path.stat().st_size for path in save(found, tmp_path, "found"))
