"""Next-token cross-entropy from hidden states, in chunks of tokens, so that all logits never exist at once."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target of a position that has none."""


def chunk_size(device: torch.device, vocabulary: int) -> int:
    """Tokens in a chunk.

    On a GPU, 2^27 logits fill it with matrix products. On a CPU, 2^21 logits fit its caches; more than 8,192 words take
    256 tokens nevertheless, because each chunk reads and writes the whole gradient of the weight.
    """
    return max(1, 2**27 // vocabulary) if device.type == "cuda" else max(256, 2**21 // vocabulary)


def perplexity_of(loss: float) -> float:
    """exp(loss), or infinity where it overflows a float."""
    return math.exp(loss) if loss < 709 else math.inf


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The Jensen-Shannon divergence in nats, at most log 2, of log-probabilities [..., classes]: [...]."""
    mixture = torch.logaddexp(log_p, log_q) - math.log(2)
    p, q = log_p.exp(), log_q.exp()
    return ((p * (log_p - mixture)).sum(-1) + (q * (log_q - mixture)).sum(-1)) / 2


class TokenLoss(NamedTuple):
    """A cross-entropy in nats, in at least float32."""

    total: Tensor
    """Sum over all targets, 0-dimensional; differentiable."""
    per_sequence: Tensor
    """Sum over the targets of each sequence [B], without gradient."""
    counts: Tensor
    """Number of targets of each sequence [B], int64."""
    correct: Tensor | None = None
    """Targets with the largest logit in each sequence [B], int64; None if `linear_cross_entropy` computes gradients."""


def next_tokens(tokens: Tensor, pad_id: int | None = None, prompt: Tensor | None = None) -> Tensor:
    """The targets: at position t token t + 1, except the end of a sequence, padding and the prompt.

    Args:
        tokens: [B, T], integers.
        pad_id: the padding token, or None.
        prompt: number of prompt tokens at the start of each sequence [B], or None.

    Returns:
        int64 [B, T], with -100 (`IGNORE`) at positions without a target.

    Raises:
        ValueError: the tokens are no integers.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens are {tokens.dtype}, expected integers")
    targets = tokens.long().roll(-1, dims=1)  # an unsigned type cannot hold IGNORE
    targets[:, -1] = IGNORE
    if prompt is not None:
        targets.masked_fill_(torch.arange(1, tokens.shape[1] + 1, device=tokens.device) < prompt[:, None], IGNORE)
    return targets if pad_id is None else targets.masked_fill_(targets == pad_id, IGNORE)


def reference_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenLoss:
    """`linear_cross_entropy` with all logits at once; the specification.

    A target's loss is log(sum_v exp(z_v)) - z_target, with the logits z = W h; in float32, or in float64 if the logits
    are float64.

    Args:
        hidden: h, [B, T, D].
        weight: W, [vocabulary, D].
        targets: [B, T], with -100 (`IGNORE`) at positions without a target.

    Raises:
        IndexError, or an assertion of the GPU: a target outside of the vocabulary.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    per_sequence = losses.view(targets.shape).sum(-1)
    return TokenLoss(
        per_sequence.sum(), per_sequence.detach(), (targets != IGNORE).sum(-1), (logits.argmax(-1) == targets).sum(-1)
    )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> TokenLoss:
    """Cross-entropy of the logits `hidden @ weight.T`.

    The forward pass computes the gradients of a chunk while its logits exist, and sums that of the weight in float32.
    Matrix products are in the dtype of `hidden`, or in that of autocast.

    Args:
        hidden: [B, T, D].
        weight: [vocabulary, D].
        targets: [B, T], with -100 (`IGNORE`) at positions without a target.

    Returns:
        A `TokenLoss` in at least float32; its `correct` is None if gradients are computed.

    Raises:
        RuntimeError: in a second derivative, which `reference_linear_cross_entropy` has.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if torch._C._are_functorch_transforms_active():
        return reference_linear_cross_entropy(hidden, weight, targets)
    if not torch.is_grad_enabled():  # a parameter requires a gradient even then
        hidden, weight = hidden.detach(), weight.detach()
    total, per_sequence, correct = LinearCrossEntropy.apply(hidden, weight, targets)
    return TokenLoss(total, per_sequence, (targets != IGNORE).sum(-1), correct)


class LinearCrossEntropy(torch.autograd.Function):
    """(hidden, weight, targets) -> (total, per_sequence, correct)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        flat, head, flat_targets = hidden.flatten(0, 1), weight.to(hidden.dtype), targets.flatten()
        chunk = chunk_size(hidden.device, len(weight))
        losses = torch.empty(flat_targets.shape, dtype=dtype, device=hidden.device)
        dhidden = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        correct = torch.empty_like(flat_targets, dtype=torch.bool) if dhidden is None and dweight is None else None
        for first in range(0, len(flat), chunk):
            part = slice(first, first + chunk)
            ignored = flat_targets[part] == IGNORE
            index = flat_targets[part].masked_fill(ignored, 0)[:, None]
            logs = F.log_softmax(flat[part] @ head.T, -1, dtype=dtype)
            losses[part] = logs.gather(1, index)[:, 0].neg().masked_fill_(ignored, 0)
            if correct is not None:
                correct[part] = logs.argmax(-1) == flat_targets[part]
                continue
            gradient = logs.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=dtype)).to(hidden.dtype)
            if dhidden is not None:
                # Masked here and below because the gradient of the logits has many more columns.
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
        per_sequence = losses.view(targets.shape).sum(-1)
        ctx.mark_non_differentiable(per_sequence)
        return per_sequence.sum(), per_sequence, None if correct is None else correct.view(targets.shape).sum(-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_cross_entropy has no second derivative; reference_linear_cross_entropy has")
        dhidden, dweight = ctx.saved_tensors
        return (
            # Half precision would round the upstream gradient 1 / tokens to a wrong factor, or overflow.
            None if dhidden is None else (dhidden * upstream[0][None]).to(dhidden.dtype).view(ctx.shape),
            None if dweight is None else (dweight * upstream[0]).to(ctx.dtype),
            None,
        )
