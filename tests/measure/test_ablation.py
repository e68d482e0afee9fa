import statistics

import pytest
import torch
import torch.nn.functional as F
from builders import PAD, decoder, replaced, residual_stream, silence, tokens
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import causal_score, removal, run_removal, swaps
from cod_lightning.measure.linear_maps import fit_linear, linear_replacement
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.reordering import mean_loss

ABLATIONS = (removal, run_removal, swaps, linear_replacement)


@pytest.fixture
def batch():
    return tokens(batch=6)


def loss_of(logits, batch):
    """Mean next-token loss of logits [batch, length, vocabulary], in float64."""
    return float(F.cross_entropy(logits.double()[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))


@torch.no_grad()
def loss_through(model, batch, order):
    """Loss with the blocks called by hand; `order` counts them from 1."""
    inputs, blocks = model.block_functions(batch)
    x = inputs[0]
    for layer in order:
        x = blocks[layer - 1](x)
    return loss_of(model.head(x), batch)


def losses_through(model, batch, *orders):
    return pytest.approx([loss_through(model, batch, order) for order in orders], rel=1e-5)


def test_each_block_is_removed_alone(model, batch):
    result = removal(model, batch.split(4))
    assert result.tokens == 48
    assert result.loss == pytest.approx(loss_through(model, batch, [1, 2, 3, 4]), rel=1e-5)
    assert result.losses == losses_through(model, batch, [2, 3, 4], [1, 3, 4], [1, 2, 4], [1, 2, 3])


def test_the_error_of_removal_is_over_sequences_with_and_without_the_block(causal_lm, batch):
    model = causal_lm("ours")
    rises = [loss_through(model, row, [1, 2, 4]) - loss_through(model, row, [1, 2, 3, 4]) for row in batch.split(1)]
    result = removal(model, batch.split(4))
    assert result.error[2] == pytest.approx(statistics.stdev(rises) / 6**0.5, rel=1e-4)
    assert [row["error"] for row in result.rows()] == result.error


def test_removal_runs_only_the_blocks_behind_the_removed_one(causal_lm, batch):
    model, calls = causal_lm("ours"), []
    for layer, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    removal(model, [batch])
    # one forward pass, the whole model's last block, and one block for each pair
    assert sorted(calls) == sorted([1, 2, 3, 4, 4, 2, 3, 4, 3, 4, 4])


def test_the_table_has_the_rise_of_the_loss_and_the_perplexity(causal_lm, batch):
    result = removal(causal_lm("ours"), [batch])
    for loss, row in zip(result.losses, result.rows(), strict=True):
        assert row["delta_loss"] == loss - result.loss
        assert row["perplexity"] == pytest.approx(torch.tensor(loss).exp().item())


def test_contiguous_blocks_are_removed(model, batch):
    result = run_removal(model, [batch], sizes=(1, 3, 4))
    assert result.losses[0] == pytest.approx(removal(model, [batch]).losses, rel=1e-6)
    assert result.losses[1] == losses_through(model, batch, [4], [1])
    assert result.losses[2] == losses_through(model, batch, [])


def test_the_table_has_a_row_for_each_run_of_blocks(causal_lm, batch):
    rows = run_removal(causal_lm("ours"), [batch], sizes=(1, 3, 4)).rows()
    assert [(row["n"], row["first"]) for row in rows] == [(1, 1), (1, 2), (1, 3), (1, 4), (3, 1), (3, 2), (4, 1)]


@pytest.mark.parametrize(("depth", "sizes"), [(1, [1]), (2, [1]), (4, [1, 2]), (5, [1, 2, 4])])
def test_default_sizes_are_less_than_the_depth(causal_lm, batch, depth, sizes):
    assert run_removal(causal_lm("ours", depth=depth), [batch]).sizes == sizes


def test_neighbours_are_swapped(model, batch):
    result = swaps(model, [batch])
    assert result.pairs == [(1, 2), (2, 3), (3, 4)]
    assert result.losses == losses_through(model, batch, [2, 1, 3, 4], [1, 3, 2, 4], [1, 2, 4, 3])


def test_the_permutation_score_is_the_mean_relative_change(causal_lm, batch):
    result = swaps(causal_lm("ours"), [batch])
    assert result.scores == pytest.approx([abs(result.loss - loss) / result.loss for loss in result.losses])
    assert result.score == pytest.approx(sum(result.scores) / 3)


def test_all_pairs_are_swapped(causal_lm, batch):
    model = causal_lm("ours")
    result = swaps(model, [batch], pairs="all")
    assert result.pairs == [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]
    assert result.losses[2] == pytest.approx(loss_through(model, batch, [4, 2, 3, 1]), rel=1e-5)
    assert len(result.panels()[0].matrix) == 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours-lns", "peri_ln", "llama", "olmo2", "gpt2"])
def test_each_block_is_replaced_by_its_least_squares_map(causal_lm, batch, name):
    """Of Peri-LN, whose first block begins with the norm of the embeddings, without it."""
    model = decoder(name) if name == "peri_ln" else causal_lm(name)
    fit = tokens(batch=6, seed=1)
    result = linear_replacement(model, [batch], fit=fit.split(4))
    assert (result.tokens, result.fit_tokens) == (48, 54)
    inputs, blocks = model.block_functions(batch)
    fit_inputs, fit_blocks = model.block_functions(fit)
    for layer in range(4):
        x, y = fit_inputs[layer].double().flatten(0, 1), fit_blocks[layer](fit_inputs[layer]).double()
        x = torch.cat([x, torch.ones(54, 1)], dim=1)
        linear = torch.linalg.lstsq(x, y.flatten(0, 1)).solution
        x = (inputs[layer].double() @ linear[:-1] + linear[-1]).float()
        for block in blocks[layer + 1 :]:
            x = block(x)
        assert result.losses[layer] == pytest.approx(loss_of(model.head(x), batch), rel=1e-4)


def test_usefulness_is_the_share_of_losses_raised_by_a_tenth(causal_lm, batch):
    result = linear_replacement(causal_lm("ours"), [batch])
    useful = [loss > 1.1 * result.loss for loss in result.losses]
    assert result.usefulness == sum(useful) / 4
    assert [row["useful"] for row in result.rows()] == useful


def test_a_wrapped_block_is_replaced_by_the_same_map(causal_lm, batch):
    model = causal_lm("llama")
    expected = linear_replacement(model, [batch])
    model.model.model.layers = torch.nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    assert linear_replacement(model, [batch]) == expected


class TestFitLinear:
    draw = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(16, 16, generator=draw), torch.randn(16, generator=draw)
    x = torch.randn(2, 3, 16, generator=draw)

    def test_a_linear_block_is_fitted_exactly(self, causal_lm, batch):
        model = causal_lm("llama")
        with replaced(model.blocks[2], lambda x: F.linear(x, self.weight, self.bias)):
            function = fit_linear(model, 3, batch.split(4))
        torch.testing.assert_close(function(self.x), F.linear(self.x, self.weight, self.bias), rtol=1e-4, atol=1e-4)

    def test_channels_may_differ_by_orders_of_magnitude(self, causal_lm, batch):
        model = causal_lm("llama")
        model.model.double()
        weight, scale = self.weight.double(), torch.logspace(-5, 5, 16).double()
        with torch.no_grad():
            model.model.model.embed_tokens.weight.mul_(scale)
        with replaced(model.blocks[0], lambda x: x + F.linear(x / scale, weight)):
            function = fit_linear(model, 1, [batch])
        x = self.x.double() * scale
        torch.testing.assert_close(function(x), x + F.linear(x / scale, weight), rtol=1e-6, atol=1e-6)

    @torch.no_grad()
    def test_inputs_may_span_fewer_dimensions_than_the_hidden_size(self, causal_lm):
        model = causal_lm("llama")
        batch = torch.randint(3, 8, (40, 2), generator=torch.Generator().manual_seed(0))
        function = fit_linear(model, 1, [batch])
        inputs, blocks = model.block_functions(batch)
        x, y = inputs[0], blocks[0](inputs[0])
        means = torch.stack([y[batch == token].mean(0) for token in range(3, 8)])
        torch.testing.assert_close(function(x), means[batch - 3], rtol=1e-4, atol=1e-4)

    def test_too_few_tokens_are_an_error(self, causal_lm, batch):
        with pytest.raises(UserError, match="needs more tokens than the hidden size 16, not 16"):
            linear_replacement(causal_lm("ours", depth=2), [batch], fit=[tokens(2, 8)])

    @pytest.mark.parametrize("layer", [2, 4])  # the output of the last is no input
    def test_hidden_states_that_are_not_finite_are_an_error(self, causal_lm, batch, layer):
        model = causal_lm("ours")
        torch.nn.init.constant_(model.blocks[layer - 1].mlp.down_proj.weight, torch.nan)
        with pytest.raises(UserError, match=r"^ours: a linear map needs finite hidden states"):
            linear_replacement(model, [batch])


def test_the_causal_score_compares_updates_with_and_without_a_layer(model, batch):
    result = causal_score(model, batch.split(4))
    blocks, whole = model.blocks, residual_stream(model, batch)
    for s in range(4):
        with model.with_blocks([*blocks[:s], *blocks[s + 1 :]]):
            without = residual_stream(model, batch)
        change = (without.diff(dim=0) - whole.diff(dim=0)[[*range(s), *range(s + 1, 4)]]).norm(dim=-1).sum((1, 2))
        norms = whole.diff(dim=0).norm(dim=-1).sum((1, 2))
        effects = (change[s:] / norms[s + 1 :]).tolist()
        assert result.effects[s][: s + 1] == [None] * (s + 1)
        assert result.effects[s][s + 1 :] == pytest.approx(effects, rel=1e-3)


def test_causal_scores_are_means_over_later_layers(causal_lm, batch):
    result = causal_score(causal_lm("ours"), [batch])
    effects = [[effect for effect in row if effect is not None] for row in result.effects]
    assert result.scores == [*(pytest.approx(sum(row) / len(row)) for row in effects[:3]), None]
    assert result.score == pytest.approx(sum(sum(row) for row in effects) / 6)
    assert result.tokens == 54


def test_the_causal_effect_on_a_block_that_adds_nothing_is_undefined(model, batch):
    silence(model, [2])
    effects = causal_score(model, [batch]).effects
    assert effects[0][1] is None
    assert effects[0][2] > 0


@pytest.mark.parametrize("family", ["ours", "llama"])
@pytest.mark.parametrize("measure", [linear_replacement, causal_score])
def test_compiled_blocks_give_the_same_result(causal_lm, batch, family, measure):
    model = causal_lm(family, depth=2)
    expected = measure(model, [batch])
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model.model(batch)
    assert measure(model, [batch]) == expected


@pytest.mark.parametrize("measure", ABLATIONS)
def test_an_interrupted_ablation_leaves_the_model_unchanged(causal_lm, batch, measure):
    def interrupt(done, total):
        raise RuntimeError("stop")

    model = causal_lm("qwen2")
    blocks = model.blocks
    with pytest.raises(RuntimeError, match="stop"):
        measure(model, [batch], progress=interrupt)
    assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))
    assert not any(block._forward_hooks for block in blocks)


@pytest.mark.parametrize(
    ("measure", "depth", "options", "message"),
    [
        ("run_removal", 4, {"sizes": [1, 5]}, r"sizes=\[1, 5\]: expected 1 to 4, the number of blocks"),
        (
            "swaps",
            4,
            {"pairs": "neighbors"},
            r"pairs='neighbors' does not exist: did you mean 'neighbours'\? known: all, neighbours",
        ),
    ],
)
def test_bad_options_are_errors(causal_lm, batch, measure, depth, options, message):
    with pytest.raises(UserError, match=message):
        MEASURES[measure](causal_lm("ours", depth=depth), [batch], None, None, **options)


def test_no_targets_are_an_error(causal_lm):
    with pytest.raises(UserError, match="no token has a next one"):
        removal(causal_lm("ours", depth=2), [tokens(length=1)])


def test_the_loss_is_that_of_the_logits(model, batch):
    with torch.no_grad():
        expected = loss_of(model.logits(batch), batch)
    padded = torch.cat([batch, torch.full((6, 2), PAD)], dim=1)
    assert mean_loss(model, batch.split(4)) == (pytest.approx(expected, rel=1e-6), 48)
    assert mean_loss(model, padded.split(1), PAD) == (pytest.approx(expected, rel=1e-6), 48)


def test_removing_a_silent_block_with_a_neighbour_costs_the_neighbour(model, batch):
    silence(model, [2])
    runs, alone = run_removal(model, [batch], sizes=[2]).losses[0], removal(model, [batch]).losses
    assert runs[:2] == pytest.approx([alone[0], alone[2]], rel=1e-6)
