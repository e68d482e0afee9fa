"""Walking over batches of tokens or images: those that count, those that have a target, and their mean loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE, next_tokens
from cod_lightning.measure.adapter import Batch, Images, ModelAdapter
from cod_lightning.measure.result import Progress
from cod_lightning.nn.vit import VisionTransformer


def iter_batches(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """The batches that hold tokens, on the model's device, each with a mask [rows, length] of what is not a pad.

    `progress` is called after each batch; of how many is 0 where `batches` has no length.

    Raises:
        UserError: none does.
    """
    total, found = len(batches) if isinstance(batches, Sized) else 0, False
    for done, tokens in enumerate(batches, start=1):
        tokens = tokens.to(model.device)
        keep = counted(model, tokens, pad_id)
        if keep.any():
            found = True
            yield tokens, keep
        if progress is not None:
            progress(done, total)
    if not found:
        raise UserError(f"{model.name}: no tokens to measure on: the batches are empty or hold only pads")


def counted(model: ModelAdapter, batch: Batch, pad_id: int | None) -> Tensor:
    """What counts, [rows, length]: tokens that are no pads, patches of images that have a label."""
    if isinstance(batch, Images):
        keep = (batch.labels != IGNORE)[:, None].repeat(1, positions(model))
        keep[:, 0] = False  # the class token
        return keep
    return torch.ones_like(batch, dtype=torch.bool) if pad_id is None else batch != pad_id


def targets_of(model: ModelAdapter, batch: Batch, pad_id: int | None) -> Tensor:
    """What is to be predicted, [rows, length], `IGNORE` where nothing is: next tokens, at the class token the label."""
    if isinstance(batch, Images):
        targets = torch.full((len(batch), positions(model)), IGNORE, device=batch.labels.device)
        targets[:, 0] = batch.labels
        return targets
    return next_tokens(batch, pad_id)


def positions(model: ModelAdapter) -> int:
    """Of an image: the class token and the patches."""
    assert isinstance(model.model, VisionTransformer)
    return len(model.model.embedding.positions)


def iter_targets(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Like `iter_batches`, each batch with its targets [rows, length], `IGNORE` where there is none.

    Raises:
        UserError: no token has a next one.
    """
    found = False
    for tokens, _ in iter_batches(model, batches, pad_id, progress):
        targets = targets_of(model, tokens, pad_id)
        if (targets != IGNORE).any():
            found = True
            yield tokens, targets
    if not found:
        raise UserError(f"{model.name}: no token has a next one to predict")


@torch.no_grad()
def evaluate(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> tuple[float, int]:
    """Mean loss in nats per target, the next token or an image's label, and the number of targets.

    The losses are taken from logits in at least float32, row by row, and summed in float64 over all batches.

    Args:
        model: in any dtype.
        batches: tokens [rows, length] each, or images.
        pad_id: tokens that are no target; they follow the others in a row.
        progress: called after each batch.

    Raises:
        UserError: there is no target.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for tokens, targets in iter_targets(model, batches, pad_id, progress):
        for logits, row in zip(model.logits(tokens), targets, strict=True):
            logits = at_least_fp32(logits)
            losses = F.cross_entropy(logits, row[: len(logits)], ignore_index=IGNORE, reduction="none")
            total += losses.double().sum()
        count += int((targets != IGNORE).sum())
    return float(total) / count, count


def hidden_states(model: ModelAdapter, tokens: Batch, keep: Tensor) -> list[Tensor]:
    """The embedding and the output of every block, each [kept tokens, hidden]; keep [rows, length]."""
    found: list[Tensor] = []

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name in ("embedding", "residual"):
            found.append(x[keep])

    model.logits(tokens, hook)
    return found


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
