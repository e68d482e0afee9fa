"""Next-token cross-entropy from hidden states, a chunk of tokens at a time: all logits never exist together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """Tokens whose logits may exist together.

    On a GPU enough for the matrix products to fill it (2^27 logits); on a CPU few enough for its caches, but not so few
    that adding to the weight's gradient takes over.
    """
    return max(1, 2**27 // vocabulary) if device.type == "cuda" else max(64, 2**21 // vocabulary)


class TokenLoss(NamedTuple):
    """A cross-entropy in nats, at least in float32."""

    total: Tensor
    """Summed over all targets, 0-dimensional; differentiable."""
    rows: Tensor
    """Summed over each row [rows], without gradient."""
    counts: Tensor
    """Number of targets of each row [rows], int64."""
    hits: Tensor | None = None
    """How many of them have the largest logit [rows], int64; None where `linear_cross_entropy` makes gradients."""


def next_tokens(tokens: Tensor, pad_id: int | None = None, prompt: Tensor | None = None) -> Tensor:
    """What position t is to predict: token t + 1, nothing at the end of a row, where that is a pad or in the prompt.

    Args:
        tokens: [rows, length], integers.
        pad_id: the padding token, None if there is none.
        prompt: how many tokens at the start of each row are given [rows], None for none.

    Returns:
        [rows, length], `IGNORE` where there is no target.
    """
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    if prompt is not None:
        targets.masked_fill_(torch.arange(1, tokens.shape[1] + 1, device=tokens.device) < prompt[:, None], IGNORE)
    return targets if pad_id is None else targets.masked_fill_(targets == pad_id, IGNORE)


def reference_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenLoss:
    """`linear_cross_entropy` with all logits at once; the specification."""
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    rows = losses.view(targets.shape).sum(-1)
    return TokenLoss(rows.sum(), rows.detach(), (targets != IGNORE).sum(-1), (logits.argmax(-1) == targets).sum(-1))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenLoss:
    """Cross-entropy of the logits `hidden @ weight.T`.

    The gradients of a chunk are made while its logits exist; the weight's is summed in float32. The products are taken
    in the dtype of `hidden`, under autocast in its dtype.

    Args:
        hidden: [rows, length, width].
        weight: [vocabulary, width].
        targets: [rows, length], `IGNORE` where there is none.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if torch._C._are_functorch_transforms_active():
        return reference_linear_cross_entropy(hidden, weight, targets)
    if not torch.is_grad_enabled():  # a parameter wants a gradient even then
        hidden, weight = hidden.detach(), weight.detach()
    total, rows, hits = LinearCrossEntropy.apply(hidden, weight, targets)
    return TokenLoss(total, rows, (targets != IGNORE).sum(-1), hits)


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets) -> (total, rows, hits)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        flat, head, wanted = hidden.flatten(0, 1), weight.to(hidden.dtype), targets.flatten()
        chunk = tokens_at_once(hidden.device, len(weight))
        losses = torch.empty(wanted.shape, dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        hits = torch.empty_like(wanted, dtype=torch.bool) if dhidden is None and dweight is None else None
        for first in range(0, len(flat), chunk):
            part = slice(first, first + chunk)
            ignored = wanted[part] == IGNORE
            index = wanted[part].masked_fill(ignored, 0)[:, None]
            logs = F.log_softmax(flat[part] @ head.T, -1, dtype=wide)
            losses[part] = logs.gather(1, index)[:, 0].neg().masked_fill_(ignored, 0)
            if hits is not None:
                hits[part] = logs.argmax(-1) == wanted[part]
                continue
            gradient = logs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=wide)).to(hidden.dtype)
            if dhidden is not None:
                # Here and below, not in the gradient of the logits, which has a vocabulary's width.
                torch.mm(gradient, head, out=dhidden[part]).masked_fill_(ignored[:, None], 0)
            if dweight is None:
                continue
            counted = flat[part].masked_fill(ignored[:, None], 0)
            if dweight.dtype == gradient.dtype:
                dweight.addmm_(gradient.T, counted)
            else:
                dweight += gradient.T @ counted
        ctx.save_for_backward(dhidden, dweight)
        ctx.shape, ctx.dtype = hidden.shape, weight.dtype
        rows = losses.view(targets.shape).sum(-1)
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows, None if hits is None else hits.view(targets.shape).sum(-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_cross_entropy has no second derivative; reference_linear_cross_entropy has")
        dhidden, dweight = ctx.saved_tensors
        return (
            # In half precision 1 / number of tokens would be the same wrong factor for all, or beyond its range.
            None if dhidden is None else (dhidden * upstream[0][None]).to(dhidden.dtype).view(ctx.shape),
            None if dweight is None else (dweight * upstream[0]).to(ctx.dtype),
            None,
        )
