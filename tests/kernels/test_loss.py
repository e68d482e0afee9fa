import pytest
import torch

from cod_lightning.kernels.loss import next_token_loss


def by_hand(logits, tokens, pad_id):
    loss, count = torch.zeros(len(tokens), dtype=torch.float64), torch.zeros(len(tokens), dtype=torch.int64)
    for row in range(len(tokens)):
        for position in range(tokens.shape[1] - 1):
            target = tokens[row, position + 1]
            if target != pad_id:
                loss[row] -= logits[row, position].double().log_softmax(-1)[target]
                count[row] += 1
    return loss, count


@pytest.mark.parametrize("pad_id", [None, 0])
def test_every_row_sums_its_own_targets(pad_id):
    logits, tokens = torch.randn(3, 6, 11), torch.randint(1, 11, (3, 6))
    tokens[1, 3:] = 0
    loss, count = next_token_loss(logits, tokens, pad_id)
    expected, number = by_hand(logits, tokens, pad_id)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(count, number)
    assert count.tolist() == ([5, 5, 5] if pad_id is None else [5, 2, 5])


def test_low_precision_logits_are_summed_in_float32():
    logits, tokens = torch.randn(2, 9, 500, dtype=torch.bfloat16), torch.randint(500, (2, 9))
    loss, _ = next_token_loss(logits, tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), by_hand(logits, tokens, None)[0], rtol=1e-6, atol=1e-5)
