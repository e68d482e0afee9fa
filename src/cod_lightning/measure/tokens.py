"""Walking over batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE, next_tokens
from cod_lightning.measure.layered import Layered
from cod_lightning.measure.result import Progress


def walk(
    model: Layered, batches: Iterable[Tensor], pad_id: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that hold tokens, on the model's device, each with a mask [rows, length] of what is not a pad.

    Raises:
        UserError: none does.
    """
    total, found = len(batches) if isinstance(batches, Sized) else 0, False
    for done, tokens in enumerate(batches, start=1):
        tokens = tokens.to(model.device)
        keep = torch.ones_like(tokens, dtype=torch.bool) if pad_id is None else tokens != pad_id
        if keep.any():
            found = True
            yield tokens, keep
        if progress is not None:
            progress(done, total)
    if not found:
        raise UserError(f"{model.name}: no tokens to measure on: the batches are empty or hold only pads")


@torch.no_grad()
def evaluate(
    model: Layered, batches: Iterable[Tensor], pad_id: int | None = None, progress: Progress | None = None
) -> tuple[float, int]:
    """Mean next-token loss in nats per target, and the number of targets.

    The losses are taken from logits in at least float32, row by row, and summed in float64.

    Args:
        model: in any dtype.
        batches: tokens [rows, length] each.
        pad_id: tokens that are no target; they follow the others in a row.
        progress: told of every batch.

    Raises:
        UserError: there is no target.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for tokens, _ in walk(model, batches, pad_id, progress):
        targets = next_tokens(tokens, pad_id)
        for logits, row in zip(model.logits(tokens), targets, strict=True):
            total += F.cross_entropy(wide(logits), row, ignore_index=IGNORE, reduction="none").double().sum()
        count += int((targets != IGNORE).sum())
    require_targets(model, count)
    return float(total) / count, count


def require_targets(model: Layered, count: int) -> None:
    if not count:
        raise UserError(f"{model.name}: no token has a next one to predict")


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
