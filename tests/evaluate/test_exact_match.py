import torch

from cod_lightning.evaluate.exact_match import AnswerAccuracy
from cod_lightning.kernels.loss import IGNORE, linear_cross_entropy


def test_an_answer_is_right_when_all_its_tokens_are_the_likeliest():
    logits = torch.eye(5)[torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])]
    _ = IGNORE
    targets = torch.tensor([[1, 2, 3], [_, 2, 3], [1, 2, 4], [_, _, _]])
    accuracy = AnswerAccuracy()
    with torch.no_grad():
        accuracy.update(linear_cross_entropy(logits, torch.eye(5), targets))
        assert accuracy.compute() == 2 / 3
        accuracy.update(linear_cross_entropy(logits[2:], torch.eye(5), targets[2:]))
    assert accuracy.compute() == 2 / 4
    # The counts of a model in half precision stay exact.
    assert accuracy.to(torch.bfloat16).rows.dtype == torch.int64
