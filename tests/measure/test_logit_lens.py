import numpy as np
import pytest
import torch
from builders import PAD, padded_batches, residual_stream

from cod_lightning.errors import UserError
from cod_lightning.measure.logit_lens import logit_lens


def log_softmax(logits):
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def test_losses_follow_their_definition(model):
    expected = [[] for _ in range(4)]
    for batch in padded_batches():
        with torch.no_grad():
            logits = model.head(residual_stream(model, batch)[1:].float()).double().numpy()
        for row, position in np.argwhere(batch[:, 1:].numpy() != PAD):
            target = int(batch[row, position + 1])
            final = log_softmax(logits[-1][row, position])
            for layer in range(4):
                logs = log_softmax(logits[layer][row, position])
                p, q = np.exp(final), np.exp(logs)
                m = (p + q) / 2
                js = (p * np.log(p / m)).sum() / 2 + (q * np.log(q / m)).sum() / 2
                expected[layer].append((-logs[target], (p * np.log(p / q)).sum(), js))
    loss, kl, js = np.array(expected).mean(1).T
    result = logit_lens(model, padded_batches(), PAD)
    np.testing.assert_allclose(result.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(result.kl, kl, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.js, js, rtol=1e-4, atol=1e-6)
    assert result.kl[-1] == 0


def test_a_single_token_is_an_error(causal_lm):
    with pytest.raises(UserError, match="ours: no token has a next one to predict"):
        logit_lens(causal_lm("ours"), [torch.ones(2, 1, dtype=torch.long)], PAD)
