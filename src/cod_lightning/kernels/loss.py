"""Next-token cross-entropy."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def next_token_loss(logits: Tensor, tokens: Tensor, pad_id: int | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every row, predicting token t + 1 from position t; pads are no targets.

    Args:
        logits: [rows, length, vocabulary].
        tokens: [rows, length], integers.
        pad_id: the padding token, None if there is none.

    Returns:
        Summed loss in nats [rows], at least float32, and number of targets [rows], int64.
    """
    targets = tokens[:, 1:]
    if pad_id is not None:
        targets = targets.masked_fill(targets == pad_id, IGNORE)
    logits = logits[:, :-1]
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    return loss.view_as(targets).sum(-1), (targets != IGNORE).sum(-1)
