from copy import deepcopy

import pytest
import torch

from cod_lightning.errors import UserError
from cod_lightning.evaluate.generate import dola_layers, dola_logits, generate
from tiny_models import tiny_decoder


@pytest.fixture(scope="module")
def decoder():
    return tiny_decoder(depth=2, vocab_size=9, init_std=0.5).eval()


@torch.no_grad()
def greedy(decoder, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_temperature_zero_is_greedy_decoding(decoder):
    assert list(generate(decoder, [1, 2], max_tokens=6, temperature=0)) == greedy(decoder, [1, 2], 6)


def test_top_1_is_greedy_decoding(decoder):
    assert list(generate(decoder, [1, 2], max_tokens=6, temperature=5, top_k=1)) == greedy(decoder, [1, 2], 6)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, None), (2.0, 3)])
@torch.no_grad()
def test_a_token_is_drawn_by_its_probability_among_the_most_likely(decoder, temperature, top_k, monkeypatch):
    drawn = []  # pins the sampler: frequencies over hundreds of seeds are slower and tell less
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: drawn.append(p) or p.argmax()[None])
    next(generate(decoder, [1, 2], max_tokens=1, temperature=temperature, top_k=top_k))
    logits = decoder(torch.tensor([[1, 2]]))[0, -1]
    expected = (logits / temperature).exp() * (logits.argsort(descending=True).argsort() < (top_k or len(logits)))
    torch.testing.assert_close(drawn[0], expected / expected.sum())


def test_the_seed_determines_the_sample(decoder):
    samples = [tuple(generate(decoder, [1], max_tokens=12, seed=seed)) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_generation_stops_before_the_end_token(decoder):
    tokens = greedy(decoder, [1], 1)
    assert list(generate(decoder, [1], max_tokens=6, temperature=0, eos_id=tokens[0])) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_with_nan_in_its_weights_is_an_error(decoder, temperature):
    broken = deepcopy(decoder)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        list(generate(broken, [1], max_tokens=2, temperature=temperature))


def test_a_token_without_an_embedding_is_an_error(decoder):
    with pytest.raises(UserError, match="token 9, but the model has embeddings for 9"):
        next(generate(decoder, [1, 9], max_tokens=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dola": "hgih"}, "dola='hgih' does not exist: did you mean 'high'"),
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"temperature": float("inf")}, "temperature=inf must be at most"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": True}, "top_k=True: expected a whole number"),
        ({"seed": 0.5}, "seed=0.5: expected a whole number"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": 0, "top_k": 3}, "top_k=3 has no effect on greedy decoding"),
        ({"prompt": []}, "the prompt has no tokens"),
    ],
)
def test_an_option_out_of_range_or_without_effect_is_an_error(decoder, options, message):
    with pytest.raises(UserError, match=message):
        next(generate(decoder, **{"prompt": [1], "max_tokens": 2, **options}))


@pytest.mark.parametrize(
    ("depth", "half", "tied", "layers"),
    [
        (32, "low", False, [*range(0, 16, 2)]),
        (32, "high", False, [*range(16, 32, 2)]),
        (32, "low", True, [*range(2, 16, 2)]),
        (80, "low", False, [*range(0, 20, 2)]),
        (80, "high", False, [*range(60, 80, 2)]),
        (2, "low", True, [1]),
        (1, "high", False, [0]),
    ],
)
def test_dola_chooses_from_the_layers_of_its_paper(depth, half, tied, layers):
    assert dola_layers(depth, half, tied) == layers


@torch.no_grad()
def test_dola_contrasts_the_last_layer_with_the_one_that_differs_most(decoder):
    tokens, streams = torch.tensor([[1, 2, 3]]), {}
    last = decoder(tokens, hook=lambda name, layer, x: streams.update({(name, layer): x}))[0, -1].softmax(-1)
    early = {}
    for name, layer in (("embedding", 0), ("residual", 1)):
        early[layer] = decoder.lm_head(decoder.model.norm(streams[name, layer]))[0, -1].softmax(-1)

    def js(q):
        mixture = (last + q) / 2
        return sum(float((p * (p / mixture).log()).sum()) for p in (last, q)) / 2

    expected = (last / early[max(early, key=lambda layer: js(early[layer]))]).log()
    expected[last < 0.1 * last.max()] = -torch.inf
    torch.testing.assert_close(dola_logits(decoder, tokens, [0, 1]), expected, rtol=1e-5, atol=1e-5)
    assert expected.isinf().any()


def test_dola_changes_what_is_generated(decoder):
    plain, contrasted = (list(generate(decoder, [1, 2], max_tokens=9, temperature=0, dola=d)) for d in (None, "low"))
    assert plain != contrasted
