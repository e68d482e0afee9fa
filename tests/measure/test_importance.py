import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cod_lightning.errors import UserError
from cod_lightning.measure.importance import block_influence, coalition_losses, layer_importance, readout
from cod_lightning.measure.result import save

FAMILIES = ("ours", "ours-lns", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2")
PAD = 0


def batches(count=2, rows=2, length=9, pads=2):
    """Random tokens whose rows end in pads."""
    made = torch.randint(3, 37, (count * rows, length), generator=torch.Generator().manual_seed(1))
    made[::2, length - pads :] = PAD
    return list(made.split(rows))


def learn(model, tokens, steps=30):
    """Fit the model to tokens, so that each of its blocks serves it; what is silent remains so."""
    parameters = [p for p in model.model.parameters() if p.any()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(steps):
        loss = F.cross_entropy(model.logits(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def silence(model, layers):
    """Let blocks add nothing to the stream."""
    with torch.no_grad():
        for layer in layers:
            for name, parameter in model.blocks[layer - 1].named_parameters():
                if {"o_proj", "down_proj", "c_proj"} & set(name.split(".")):
                    parameter.zero_()


@torch.no_grad()
def hidden_states(model, tokens):
    """Embedding and block outputs [rows, length, hidden] in float64."""
    seen = {}
    model.logits(tokens, lambda what, layer, x: seen.__setitem__((what, layer), x.double().numpy()))
    return [seen["embedding", 0], *(seen["residual", layer] for layer in range(1, model.depth + 1))]


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_influence_is_its_definition(causal_lm, family):
    model = causal_lm(family)
    found = block_influence(model, batches(), PAD)
    cosines = {(i, j): [] for i in range(5) for j in range(i + 1, 5)}
    for tokens in batches():
        x = hidden_states(model, tokens)
        for row, position in zip(*np.nonzero(tokens.numpy() != PAD), strict=True):
            for i, j in cosines:
                a, b = x[i][row, position], x[j][row, position]
                cosines[i, j].append(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))
    for layer in range(4):
        values = 1 - np.array(cosines[layer, layer + 1])
        assert found.influence[layer] == pytest.approx(values.mean(), abs=1e-6)
        assert found.error[layer] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), abs=1e-6)
        for n in range(1, 5):
            value = found.distance[n - 1][layer]
            if layer + n > 4:
                assert value is None
            else:
                assert value == pytest.approx(1 - np.mean(cosines[layer, layer + n]), abs=1e-6)
    best = max(range(3), key=lambda i: np.mean(cosines[i, i + 2]))
    assert found.best[1] == (best + 1, best + 2)
    assert found.best[3] == (1, 4)
    assert found.tokens == len(cosines[0, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_readout_is_its_definition(causal_lm, family):
    model = causal_lm(family)
    found = readout(model, batches(), PAD)
    wanted = [[] for _ in range(4)]
    for tokens in batches():
        x = hidden_states(model, tokens)[1:]
        with torch.no_grad():
            logits = [model.head(torch.from_numpy(y).float()).double().numpy() for y in x]
        for row in range(tokens.shape[0]):
            for position in range(tokens.shape[1] - 1):
                target = int(tokens[row, position + 1])
                if target == PAD:
                    continue
                final = log_softmax(logits[-1][row, position])
                for layer in range(4):
                    logs = log_softmax(logits[layer][row, position])
                    p, q = np.exp(final), np.exp(logs)
                    m = (p + q) / 2
                    js = (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2
                    wanted[layer].append((-logs[target], (p * np.log(p / q)).sum(), js))
    means = np.array(wanted).mean(1)
    np.testing.assert_allclose(found.loss, means[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found.kl, means[:, 1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.js, means[:, 2], rtol=1e-4, atol=1e-6)
    assert found.kl[-1] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_coalition_is_the_model_with_only_its_blocks(causal_lm, family):
    model, total, count = causal_lm(family), 0.0, 0
    losses, targets = coalition_losses(model, [(), (2,), (1, 3), (1, 2, 3, 4)], batches(), PAD)
    blocks = model.blocks
    for coalition, loss in losses.items():
        total, count = 0.0, 0
        for tokens in batches():
            if coalition:
                with torch.no_grad(), model.with_blocks([blocks[layer - 1] for layer in coalition]):
                    logits = model.logits(tokens).double().numpy()
            else:
                with torch.no_grad():
                    logits = model.head(torch.from_numpy(hidden_states(model, tokens)[0]).float()).double().numpy()
            for row in range(tokens.shape[0]):
                for position in range(tokens.shape[1] - 1):
                    if tokens[row, position + 1] != PAD:
                        total -= log_softmax(logits[row, position])[tokens[row, position + 1]]
                        count += 1
        assert loss == pytest.approx(total / count, rel=1e-5)
        assert targets == count


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_importance_is_the_mean_over_all_orders(causal_lm, family):
    model = causal_lm(family)
    found = layer_importance(model, batches(), PAD, permutations=None)
    subsets = [s for size in range(5) for s in itertools.combinations(range(1, 5), size)]
    losses, _ = coalition_losses(model, subsets, batches(), PAD)
    gains = np.zeros((24, 4))
    for number, order in enumerate(itertools.permutations(range(1, 5))):
        for place, layer in enumerate(order):
            before, after = tuple(sorted(order[:place])), tuple(sorted(order[: place + 1]))
            gains[number, layer - 1] = losses[before] - losses[after]
    np.testing.assert_allclose(found.shapley, gains.mean(0), rtol=1e-9, atol=1e-12)
    assert found.error == [0] * 4
    assert math.fsum(found.shapley) == pytest.approx(found.empty_loss - found.loss, abs=1e-9)
    for layer in range(1, 5):
        rest = tuple(other for other in range(1, 5) if other != layer)
        assert found.leave_one_out[layer - 1] == pytest.approx(losses[rest] - losses[1, 2, 3, 4], abs=1e-9)

    sampled = layer_importance(model, batches(), PAD, permutations=200, seed=3)
    assert math.fsum(sampled.shapley) == pytest.approx(sampled.empty_loss - sampled.loss, abs=1e-9)
    np.testing.assert_allclose(sampled.leave_one_out, found.leave_one_out, atol=1e-9)
    np.testing.assert_allclose(sampled.error, gains.std(0) / math.sqrt(200), rtol=0.25)
    assert all(abs(a - b) < 5 * e for a, b, e in zip(sampled.shapley, found.shapley, sampled.error, strict=True))
    assert sampled == layer_importance(model, batches(), PAD, permutations=200, seed=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_useless_block_is_found(causal_lm, family):
    model = causal_lm(family)
    silence(model, [3])
    tokens = batches(pads=0)
    learn(model, torch.cat(tokens))
    influence = block_influence(model, tokens)
    assert influence.influence[2] == 0 == min(influence.influence)
    assert sorted(influence.influence)[1] > 1e-3
    assert influence.best[0] == (3, 3)
    for permutations in (None, 12):
        importance = layer_importance(model, tokens, permutations=permutations)
        for values in (importance.shapley, importance.leave_one_out):
            assert values[2] == 0 == min(values)
            assert sorted(values)[1] > 1e-3
    read = readout(model, tokens)
    assert (read.loss[2], read.kl[2], read.js[2]) == (read.loss[1], read.kl[1], read.js[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_of_identities_does_nothing(causal_lm, family):
    model = causal_lm(family)
    silence(model, range(1, 5))
    influence = block_influence(model, batches())
    assert influence.influence == influence.error == [0] * 4
    assert {value for row in influence.distance for value in row} == {0, None}
    found = readout(model, batches())
    assert found.kl == [0] * 4
    assert found.js == pytest.approx([0] * 4, abs=1e-9)
    assert len(set(found.loss)) == 1
    importance = layer_importance(model, batches(), permutations=None)
    assert importance.shapley == importance.leave_one_out == [0] * 4


def test_results_are_saved_and_progress_is_told(causal_lm, tmp_path):
    model = causal_lm("llama")
    for measure, steps in ((block_influence, 2), (readout, 2), (layer_importance, 2 * 16)):
        told = []
        result = measure(model, batches(), PAD, lambda done, total, told=told: told.append((done, total)))
        save(result, tmp_path, measure.__name__)
        assert told[-1][0] == told[-1][1] == len(told) <= steps
        if measure is block_influence:
            runs = [(row["n"], row["first"]) for row in result.rows()]
            assert runs == [(n, first) for n in range(1, 5) for first in range(1, 6 - n)]
            best = [(row["first"], row["first"] + row["n"] - 1) for row in result.rows() if row["best"]]
            assert best == result.best
        else:
            assert [row["layer"] for row in result.rows()] == [1, 2, 3, 4]


def test_batches_of_pads_are_passed_over(causal_lm):
    model, told = causal_lm("ours"), []
    padded = [torch.full((2, 4), PAD), *batches()]
    for measure in (block_influence, readout, layer_importance):
        assert measure(model, padded, PAD) == measure(model, batches(), PAD)
    coalition_losses(model, [(), (1,)], padded, PAD, lambda *call: told.append(call))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_influence_of_short_runs_alone(causal_lm):
    model = causal_lm("ours")
    everything, short = block_influence(model, batches()), block_influence(model, batches(), longest=2)
    assert short.influence == everything.influence
    assert short.distance == everything.distance[:2]
    assert short.best == everything.best[:2]


def test_what_cannot_be_measured_is_refused(causal_lm):
    model, pads = causal_lm("ours"), [torch.zeros(2, 4, dtype=torch.long)]
    for measure in (block_influence, readout, layer_importance):
        for nothing in ([], pads):
            with pytest.raises(UserError, match="no tokens to measure on"):
                measure(model, nothing, PAD)
    for measure in (readout, layer_importance):
        with pytest.raises(UserError, match="ours: no token has a next one to predict"):
            measure(model, [torch.ones(2, 1, dtype=torch.long)], PAD)
    with pytest.raises(UserError, match="longest=5 is not a number of blocks"):
        block_influence(model, batches(), longest=5)
    with pytest.raises(UserError, match="permutations=0 must be positive"):
        layer_importance(model, batches(), permutations=0)
    with pytest.raises(UserError, match=r"permutations=None takes 2\^17 losses"):
        layer_importance(causal_lm("ours", depth=17), batches(), permutations=None)
