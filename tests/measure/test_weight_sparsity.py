import math
from functools import partial

import numpy as np
import pytest
import torch
from builders import PAD, padded_batches, tokens

from cod_lightning.errors import UserError
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.weight_sparsity import (
    alpha_sparsities,
    input_norms,
    layer_alphas,
    layer_sparsity,
    linear_weights,
    outlier_ratios,
    owl_sparsities,
    pl_alpha_hill,
    sparsify,
    sparsify_sequentially,
)

LLAMA = {*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def weights_of(model, block):
    """The linear weights of a block as [out, in], in float64."""
    gpt2 = model.name == "gpt2"
    weights = {name: block.get_submodule(name).weight.detach().double().numpy() for name in (GPT2 if gpt2 else LLAMA)}
    return {name: weight.T if gpt2 else weight for name, weight in weights.items()}


@torch.no_grad()
def norms_of(model):
    """Norms of the input channels of every linear layer, from the inputs that a hook sees."""
    norms = []
    for block in model.blocks:
        norms.append({})
        for name in weights_of(model, block):
            inputs = []
            layer = block.get_submodule(name)
            handle = layer.register_forward_hook(lambda module, args, y, inputs=inputs: inputs.append(args[0]))
            for batch in padded_batches():
                model.logits(batch)
            handle.remove()
            x = torch.cat([x[batch != PAD] for x, batch in zip(inputs, padded_batches(), strict=True)])
            norms[-1][name] = x.double().norm(dim=0).numpy()
    return norms


def test_linear_weights_are_views_of_the_parameters(model):
    for block in model.blocks:
        expected = weights_of(model, block)
        weights = linear_weights(block)
        assert set(weights) == set(expected)
        for name, weight in weights.items():
            np.testing.assert_array_equal(weight.numpy(), expected[name].astype("float32"))
            assert weight.data_ptr() == block.get_submodule(name).weight.data_ptr()


def test_input_norms_are_those_of_all_tokens_but_padding(model):
    for norms, expected in zip(input_norms(model, padded_batches(), PAD), norms_of(model), strict=True):
        assert set(norms) == set(expected)
        for name in norms:
            np.testing.assert_allclose(norms[name].numpy(), expected[name], rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_outlier_ratios_follow_owl(model):
    with torch.no_grad():
        for weight in linear_weights(model.blocks[1]).values():
            weight[0] *= 30
    expected = []
    for block, norms in zip(model.blocks, norms_of(model), strict=True):
        scores = [(np.abs(weight) * norms[name]).ravel() for name, weight in weights_of(model, block).items()]
        scores = np.concatenate(scores)
        expected.append((scores > 3 * scores.mean()).mean())
    norms = input_norms(model, padded_batches(), PAD)
    np.testing.assert_allclose(outlier_ratios(model, norms, 3), expected, atol=1e-12)
    assert outlier_ratios(model, norms, 1e9) == [0] * 4


def test_owl_sparsities_follow_their_definition():
    ratios = np.array([0.02, 0.1, 0.05, 0.04])
    keep = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 2 * 0.1
    sparsities = owl_sparsities(ratios.tolist(), 0.6, owl_lambda=0.1)
    np.testing.assert_allclose(sparsities, 1 - (keep - keep.mean() + (1 - 0.6)), atol=1e-12)
    assert np.mean(sparsities) == pytest.approx(0.6)
    assert sparsities.index(min(sparsities)) == 1


def test_alphas_follow_alpha_pruning(model):
    expected = []
    for block in model.blocks:
        hills = []
        for weight in weights_of(model, block).values():
            # The smaller of both products has the same eigenvalues but for zeros.
            small = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
            eigenvalues = np.sort(np.linalg.eigvalsh(small))
            tail = eigenvalues[len(eigenvalues) // 2 :]
            hills.append(1 + len(tail) / sum(math.log(value / tail[0]) for value in tail))
        expected.append(np.mean(hills))
    np.testing.assert_allclose(layer_alphas(model), expected, rtol=1e-4)


def test_alpha_sparsities_follow_their_definition():
    alphas = np.array([2.0, 3.5, 2.5, 6.0])
    mapped = 0.7 * (0.8 + 0.4 * (alphas - alphas.min()) / (alphas.max() - alphas.min()))
    sparsities = alpha_sparsities(alphas.tolist(), 0.7, epsilon=0.2)
    np.testing.assert_allclose(sparsities, mapped * 0.7 / mapped.mean(), rtol=1e-12)
    assert np.mean(sparsities) == pytest.approx(0.7)
    assert sparsities.index(min(sparsities)) == 0


def test_the_measure_joins_both_methods(causal_lm):
    model = causal_lm("gpt2")
    options = {"sparsity": 0.6, "threshold": 3, "owl_lambda": 0.1, "epsilon": 0.2}
    result = layer_sparsity(model, padded_batches(), PAD, **options)
    assert result.outlier_ratio == outlier_ratios(model, input_norms(model, padded_batches(), PAD), 3)
    assert result.owl == owl_sparsities(result.outlier_ratio, 0.6, 0.1)
    assert result.alpha == layer_alphas(model)
    assert result.alpha_pruning == alpha_sparsities(result.alpha, 0.6, 0.2)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_smallest_weights_of_every_matrix_are_pruned(model, method):
    shares = [0.25, 0.5, 0.0, 1.0]
    sparse = sparsify(model, shares, method, input_norms(model, padded_batches(), PAD) if method == "wanda" else None)
    for norms, block, pruned, share in zip(norms_of(model), model.blocks, sparse.blocks, shares, strict=True):
        for name, dense in weights_of(model, block).items():
            scores = np.abs(dense) * (norms[name] if method == "wanda" else 1)
            groups = list(zip(scores, dense, weights_of(model, pruned)[name], strict=True))
            if method == "magnitude":  # the whole matrix instead of each row
                groups = [tuple(np.concatenate(parts) for parts in zip(*groups, strict=True))]
            for score, old, new in groups:
                gone = new == 0
                assert gone.sum() == round(share * len(new))
                np.testing.assert_array_equal(new[~gone], old[~gone])
                if 0 < share < 1:
                    assert score[gone].max() <= score[~gone].min()


def add_sample(squares, name, samples, module, args, y):
    squares[name] = squares[name] + args[0][0].norm(dim=0) ** 2 / samples


@torch.no_grad()
def prune_wanda(llama, rows, ratio):
    """Masks of `prune_wanda` in lib/prune.py of locuslab/wanda, by block and layer; `llama` is pruned."""
    masks = []
    inputs = llama.model.embed_tokens(rows).split(1)
    length = rows.shape[1]
    context = {
        "attention_mask": torch.full((1, 1, length, length), -torch.inf).triu(1),
        "position_embeddings": llama.model.rotary_emb(inputs[0], torch.arange(length)[None]),
    }
    for block in llama.model.layers:
        squares, handles = {name: 0 for name in LLAMA}, []
        for name in LLAMA:
            hook = partial(add_sample, squares, name, len(inputs))
            handles.append(block.get_submodule(name).register_forward_hook(hook))
        for x in inputs:
            block(x, **context)
        for handle in handles:
            handle.remove()
        masks.append({})
        for name in LLAMA:
            weight = block.get_submodule(name).weight
            order = (weight.abs() * squares[name].sqrt()).sort(dim=-1, stable=True).indices
            masks[-1][name] = torch.zeros_like(weight, dtype=torch.bool)
            masks[-1][name].scatter_(1, order[:, : int(weight.shape[1] * ratio)], True)
            weight[masks[-1][name]] = 0
        inputs = [block(x, **context) for x in inputs]
    return masks


def masks_of(model):
    return [{name: weight == 0 for name, weight in linear_weights(block).items()} for block in model.blocks]


def test_sequential_wanda_has_the_masks_of_its_released_code(causal_lm):
    model, ratio = causal_lm("llama"), 0.45  # of 24 weights 10.8, which the released code rounds down
    batches = list(tokens(batch=6).split(2))
    masks = masks_of(sparsify_sequentially(model, [ratio] * 4, batches))
    expected = prune_wanda(model.model, torch.cat(batches), ratio)
    torch.testing.assert_close(masks, expected)


def test_sequential_wanda_measures_behind_the_pruned_blocks(causal_lm):
    model = causal_lm("ours-lns")
    half_dense = sparsify_sequentially(model, [0.5, 0.5, 0, 0], padded_batches(), PAD)
    norms = input_norms(half_dense, padded_batches(), PAD)
    expected = sparsify(half_dense, [0, 0, 0.5, 0], "wanda", norms)
    sparse = sparsify_sequentially(model, [0.5, 0.5, 0.5, 0], padded_batches(), PAD)
    torch.testing.assert_close(masks_of(sparse), masks_of(expected))


@torch.no_grad()
def test_pruning_changes_only_linear_layers_of_a_copy(model):
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    after = sparsify(model, [0.25, 0.5, 0.0, 1.0], "magnitude").model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert all(torch.equal(after[name], before[name]) for name in before if "layers" not in name and ".h." not in name)


@torch.no_grad()
def test_a_sparsity_of_zero_is_the_dense_model(model):
    same = sparsify(model, [0.0] * 4, "magnitude")
    assert torch.equal(same.logits(padded_batches()[0]), model.logits(padded_batches()[0]))


class TestHillEstimate:
    """Eigenvalues 1, e, e^2, e^3: logarithms of the upper half are 2 and 3, so alpha is 1 + 2 / (0 + 1)."""

    weight = torch.diag(torch.tensor([0.5, 0.0, 1.5, 1.0]).exp())

    @pytest.mark.parametrize("columns", [[0, 1, 2, 3], [2, 0, 3, 1]])
    def test_it_does_not_depend_on_the_order_of_columns(self, columns):
        assert pl_alpha_hill(self.weight[:, columns]) == pytest.approx(3, rel=1e-5)

    def test_zero_eigenvalues_do_not_count(self):
        padded = torch.cat((self.weight, torch.zeros(4, 3)), dim=1)
        assert pl_alpha_hill(padded.bfloat16()) == pytest.approx(3, rel=0.01)

    @pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.eye(4)])
    def test_it_is_nan_without_a_tail(self, weight):
        assert math.isnan(pl_alpha_hill(weight))


@torch.no_grad()
def test_matrices_without_a_tail_do_not_count(causal_lm):
    model = causal_lm("llama")
    expected = layer_alphas(model)
    model.blocks[1].get_submodule("self_attn.o_proj").weight.zero_()
    alphas = [pl_alpha_hill(weight) for weight in linear_weights(model.blocks[1]).values()]
    assert math.isnan(alphas[3])
    assert layer_alphas(model) == pytest.approx([expected[0], np.nanmean(alphas), *expected[2:]])


@torch.no_grad()
def test_a_block_without_a_tail_is_an_error(causal_lm):
    model = causal_lm("llama")
    for weight in linear_weights(model.blocks[1]).values():
        weight.zero_()
    with pytest.raises(UserError, match="layer 2: the spectrum of no weight matrix has a tail"):
        layer_alphas(model)


@torch.no_grad()
def test_a_weight_that_is_not_finite_is_an_error(causal_lm):
    model = causal_lm("llama")
    model.blocks[1].get_submodule("self_attn.o_proj").weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"^llama: layer 2: a weight is NaN or infinite$"):
        layer_alphas(model)


@pytest.mark.parametrize("sparsities", [owl_sparsities, alpha_sparsities])
def test_equal_blocks_get_equal_sparsities(sparsities):
    assert sparsities([0.1] * 3, 0.7) == pytest.approx([0.7] * 3)


@pytest.mark.parametrize(
    ("sparsities", "values", "options", "message"),
    [
        (
            owl_sparsities,
            [0.0, 0.1],
            (0.7, 0.4),
            "layer 1 would lose 1.1 of its weights: bring owl_lambda= nearer to 0, or lower sparsity=",
        ),
        (
            owl_sparsities,
            [0.0, 0.1],
            (0.2, 0.4),
            "layer 2 would lose -0.2 of .*: bring owl_lambda= nearer to 0, or raise",
        ),
        (
            alpha_sparsities,
            [1.0, 2.0],
            (0.9,),
            "layer 2 would lose 1.17 of its weights: bring epsilon= nearer to 0, or lower",
        ),
        (
            alpha_sparsities,
            [1.0, 2.0],
            (0.5, 1.5),
            "layer 1 would lose -0.25 of its weights: bring epsilon= nearer to 0",
        ),
        (owl_sparsities, [1.0, 2.0], (1.2,), "layer 1 would lose 1.28"),
        (alpha_sparsities, [1.0, 2.0], (1.2,), "layer 2 would lose 1.56"),
    ],
)
def test_sparsities_outside_0_to_1_are_errors(sparsities, values, options, message):
    with pytest.raises(UserError, match=message):
        sparsities(values, *options)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sparsity", 1.2), ("epsilon", -0.5), ("owl_lambda", -0.2), ("threshold", -1.0), ("threshold", math.nan)],
)
def test_options_out_of_range_are_errors_before_anything_is_measured(causal_lm, option, value):
    with pytest.raises(UserError, match=f"^{option}={value} must be"):
        MEASURES["sparsity"].check_options(causal_lm("ours"), {option: value})


def test_a_block_without_linear_layers_is_an_error():
    with pytest.raises(UserError, match="Identity has no linear layers"):
        linear_weights(torch.nn.Identity())


def test_sparsities_lie_around_the_mean_by_their_signal():
    assert owl_sparsities([0.0, 0.1], 0.7) == pytest.approx([0.78, 0.62])
    assert alpha_sparsities([2.0, 6.0], 0.5) == pytest.approx([0.35, 0.65])
