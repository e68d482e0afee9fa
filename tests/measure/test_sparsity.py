import math

import numpy as np
import pytest
import torch

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.result import save
from cod_lightning.measure.sparsity import (
    alpha_sparsities,
    input_norms,
    layer_alphas,
    layer_sparsity,
    matrices,
    outlier_ratios,
    owl_sparsities,
    pl_alpha_hill,
    sparsified,
)

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
LLAMA = {*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
PAD = 0


def batches(count=2, rows=2, length=9, pads=2):
    """Random tokens whose rows end in pads."""
    made = torch.randint(3, 37, (count * rows, length), generator=torch.Generator().manual_seed(1))
    made[::2, length - pads :] = PAD
    return list(made.split(rows))


def weights(block, family):
    """The linear weights of a block as [out, in], in float64."""
    found = {}
    for name in GPT2 if family == "gpt2" else LLAMA:
        weight = block.get_submodule(name).weight.detach().double().numpy()
        found[name] = weight.T if family == "gpt2" else weight
    return found


@torch.no_grad()
def norms_of(model, family):
    """Norms of the input channels of every linear layer, token by token; a layer's output tells what it was given."""
    found = []
    for block in model.blocks:
        found.append({})
        for name in weights(block, family):
            squares = 0.0
            for tokens in batches():
                given = []
                handle = block.get_submodule(name).register_forward_hook(lambda m, args, y, g=given: g.append(args[0]))
                model.logits(tokens)
                handle.remove()
                for row in range(tokens.shape[0]):
                    for position in range(tokens.shape[1]):
                        if tokens[row, position] != PAD:
                            squares = squares + given[0][row, position].double().numpy() ** 2
            found[-1][name] = np.sqrt(squares)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_layers_and_their_input_norms(causal_lm, family):
    model = causal_lm(family)
    found, wanted = input_norms(model, batches(), PAD), norms_of(model, family)
    for block, norms, expected in zip(model.blocks, found, wanted, strict=True):
        assert set(matrices(block)) == set(norms) == set(expected)
        for name, (module, weight) in matrices(block).items():
            np.testing.assert_array_equal(weight.numpy(), weights(block, family)[name].astype("float32"))
            np.testing.assert_allclose(norms[name].numpy(), expected[name], rtol=1e-5)
            assert weight.data_ptr() == module.weight.data_ptr()
            assert not module._forward_pre_hooks


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_ratios_and_sparsities_of_owl(causal_lm, family):
    model = causal_lm(family)
    with torch.no_grad():
        for _, weight in matrices(model.blocks[1]).values():
            weight[0] *= 30
    found = layer_sparsity(model, batches(), PAD, sparsity=0.6, threshold=3, owl_lambda=0.1)
    ratios = []
    for block, norms in zip(model.blocks, norms_of(model, family), strict=True):
        scores = [(np.abs(weight) * norms[name]).ravel() for name, weight in weights(block, family).items()]
        scores = np.concatenate(scores)
        ratios.append((scores > 3 * scores.mean()).mean())
    np.testing.assert_allclose(found.outlier_ratio, ratios, atol=1e-12)
    ratios = np.array(ratios)
    keep = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 2 * 0.1
    np.testing.assert_allclose(found.owl, 1 - (keep - keep.mean() + (1 - 0.6)), atol=1e-12)
    assert np.mean(found.owl) == pytest.approx(0.6, abs=1e-6)
    assert found.owl[int(ratios.argmax())] == min(found.owl)
    assert outlier_ratios(model, input_norms(model, batches(), PAD), 1e9) == [0] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_alphas_and_sparsities_of_alpha_pruning(causal_lm, family):
    model = causal_lm(family)
    found = layer_sparsity(model, batches(), PAD, sparsity=0.7, epsilon=0.2)
    alphas = []
    for block in model.blocks:
        hills = []
        for weight in weights(block, family).values():
            small = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight  # same, but for zeros
            eigenvalues = np.sort(np.linalg.eigvalsh(small))
            tail = eigenvalues[len(eigenvalues) // 2 :]
            hills.append(1 + len(tail) / sum(math.log(value / tail[0]) for value in tail))
        alphas.append(np.mean(hills))
    np.testing.assert_allclose(found.alpha, alphas, rtol=1e-4)
    alphas = np.array(alphas)
    mapped = 0.7 * (0.8 + 0.4 * (alphas - alphas.min()) / (alphas.max() - alphas.min()))
    np.testing.assert_allclose(found.alpha_pruning, mapped * 0.7 / mapped.mean(), rtol=1e-3)
    assert np.mean(found.alpha_pruning) == pytest.approx(0.7, abs=1e-6)
    assert found.alpha_pruning[int(alphas.argmin())] == min(found.alpha_pruning)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_least_weights_of_every_matrix_go(causal_lm, family, method):
    model, shares = causal_lm(family), [0.25, 0.5, 0.0, 1.0]
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    made = sparsified(model, shares, method, input_norms(model, batches(), PAD) if method == "wanda" else None)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    for norms, block, pruned, share in zip(norms_of(model, family), model.blocks, made.blocks, shares, strict=True):
        for name, dense in weights(block, family).items():
            sparse = weights(pruned, family)[name]
            scores = np.abs(dense) * (norms[name] if method == "wanda" else 1)
            groups = list(zip(scores, dense, sparse, strict=True))
            if method == "magnitude":
                groups = [(scores.ravel(), dense.ravel(), sparse.ravel())]
            for score, old, new in groups:
                gone = new == 0
                assert gone.sum() == round(share * len(new))
                np.testing.assert_array_equal(new[~gone], old[~gone])
                if 0 < share < 1:
                    assert score[gone].max() <= score[~gone].min()
    for name in {name for name in before if "layers" not in name and ".h." not in name}:
        assert torch.equal(made.model.state_dict()[name], before[name])
    with torch.no_grad():
        assert torch.isfinite(made.logits(batches()[0])).all()
        same = sparsified(model, [0.0] * 4, "magnitude")
        assert torch.equal(same.logits(batches()[0]), model.logits(batches()[0]))


def test_a_hill_estimate_by_hand():
    """Eigenvalues 1, e, e^2, e^3: the upper half is 2, 3 in logarithms, so that alpha is 1 + 2 / (0 + 1)."""
    weight = torch.diag(torch.tensor([0.5, 0.0, 1.5, 1.0]).exp())
    assert pl_alpha_hill(weight) == pytest.approx(3, rel=1e-5)
    assert pl_alpha_hill(weight[:, [2, 0, 3, 1]]) == pytest.approx(3, rel=1e-5)
    assert pl_alpha_hill(torch.cat((weight, torch.zeros(4, 3)), dim=1).bfloat16()) == pytest.approx(3, rel=0.01)
    assert math.isnan(pl_alpha_hill(torch.zeros(4, 4)))
    assert math.isnan(pl_alpha_hill(torch.eye(4)))


def test_matrices_without_a_tail_do_not_count(causal_lm):
    model = causal_lm("llama")
    wanted = layer_alphas(model)
    with torch.no_grad():
        model.blocks[1].get_submodule("self_attn.o_proj").weight.zero_()
        alphas = [pl_alpha_hill(weight) for _, weight in matrices(model.blocks[1]).values()]
        assert math.isnan(alphas[3])
        found = layer_alphas(model)
        assert found == pytest.approx([wanted[0], np.nanmean(alphas), *wanted[2:]])
        for _, weight in matrices(model.blocks[1]).values():
            weight.zero_()
    with pytest.raises(UserError, match="layer 2: no weight matrix has a spectrum with a tail"):
        layer_alphas(model)


def test_equal_blocks_get_equal_sparsities():
    assert owl_sparsities([0.1] * 3, 0.7) == pytest.approx([0.7] * 3)
    assert alpha_sparsities([4.0] * 3, 0.7) == pytest.approx([0.7] * 3)
    assert owl_sparsities([0.0, 0.1], 0.7) == pytest.approx([0.78, 0.62])
    assert alpha_sparsities([2.0, 6.0], 0.5) == pytest.approx([0.35, 0.65])


def test_the_result_is_saved_and_progress_is_told(causal_lm, tmp_path):
    told = []
    result = layer_sparsity(causal_lm("gpt2"), batches(), PAD, lambda *steps: told.append(steps))
    save(result, tmp_path, "sparsity")
    assert told == [(1, 2), (2, 2)]
    assert [row["layer"] for row in result.rows()] == [1, 2, 3, 4]
    assert result.rows()[2]["owl"] == result.owl[2]


def test_what_cannot_be_pruned_is_refused(causal_lm):
    model = causal_lm("ours")
    with pytest.raises(UserError, match=r"owl_lambda=0.4 with sparsity=0.7 takes layer 1 to 1.100, outside 0 to 1"):
        owl_sparsities([0.0, 0.1], 0.7, owl_lambda=0.4)
    with pytest.raises(UserError, match=r"epsilon=0.3 with sparsity=0.9 takes layer 2 to 1.170"):
        alpha_sparsities([1.0, 2.0], 0.9)
    with pytest.raises(UserError, match=r"epsilon=1.5 .* takes layer 1 to -0.250"):
        alpha_sparsities([1.0, 2.0], 0.5, epsilon=1.5)
    for sparsities in (owl_sparsities, alpha_sparsities):
        with pytest.raises(UserError, match=r"sparsity=1.2 is not a share"):
            sparsities([1.0, 2.0], 1.2)
    with pytest.raises(UserError, match="method='wand': did you mean 'wanda'"):
        sparsified(model, [0.5] * 4, "wand")
    with pytest.raises(UserError, match="needs norms"):
        sparsified(model, [0.5] * 4)
    for shares in ([0.5] * 3, [0.5, 0.5, 0.5, 1.5]):
        with pytest.raises(UserError, match="expected 4 numbers from 0 to 1"):
            sparsified(model, shares, "magnitude")
    with pytest.raises(UserError, match="no tokens to measure on"):
        layer_sparsity(model, [])
    with pytest.raises(UserError, match="Identity has no linear layers"):
        matrices(torch.nn.Identity())
    assert isinstance(sparsified(model, [0.5] * 4, "magnitude"), ModelAdapter)
