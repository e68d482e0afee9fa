"""Batches to measure on: their tokens without padding, and their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE, chunk_size, next_tokens
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.result import Progress
from cod_lightning.nn.vit import Images, VisionTransformer


def checked_batches(model: ModelAdapter, batches: Any, pad_id: int | None = None, name: str = "batches") -> list[Batch]:
    """One batch, or each of several, as `checked_tokens` returns it; for a model of images, `Images` as they are.

    Raises:
        UserError: as `checked_tokens`, or a model of images is not given images; names the argument `name`.
    """
    several = isinstance(batches, Iterable) and not isinstance(batches, Batch | Mapping)
    batches = list(batches) if several else [batches]
    if not model.reads_images:
        return [checked_tokens(model, batch, pad_id, name) for batch in batches]
    if wrong := [batch for batch in batches if not isinstance(batch, Images)]:
        raise UserError(f"{name}: expected Images, not {type(wrong[0]).__name__}: {model.name} is a model of images")
    return batches


def checked_tokens(model: ModelAdapter, batch: Any, pad_id: int | None, name: str) -> Tensor:
    """A batch as tokens [batch, length] that the model has embeddings for.

    Args:
        model: a language model.
        batch: a tensor, or the encoding that a tokenizer returns.
        pad_id: padding token; None: there is no padding.
        name: of the argument, for errors.

    Raises:
        UserError: as `as_tokens`, `require_pad_id`, `check_encoding` and `check_inputs`; a token is not in the
            vocabulary; there are more tokens than position embeddings; or tokens of a causal model follow padding,
            which it would attend to.
    """
    require_pad_id(pad_id)
    tokens = as_tokens(batch, name)
    if model.positions is not None and tokens.shape[1] > model.positions:
        raise UserError(
            f"{name}: {tokens.shape[1]} tokens, but the model has embeddings for {model.positions}: truncate"
        )
    weight = model.known_weight
    if weight is not None and tokens.numel() and (largest := int(tokens.max())) >= len(weight):
        raise UserError(
            f"{name}: token {largest} is not in the model's vocabulary of {len(weight)}: another tokenizer?"
        )
    check_encoding(batch, tokens, pad_id, name)
    if isinstance(batch, Mapping):
        check_inputs(model, batch, name)
    if pad_id is not None and model.predicts_next:
        is_padding = tokens == pad_id
        if (is_padding[:, :-1] & ~is_padding[:, 1:]).any():
            raise UserError(
                f"{name}: padding must follow the tokens: padding_side='right'; pass pad_id=None if {pad_id} is no "
                "padding"
            )
    return tokens


def check_encoding(batch: Any, tokens: Tensor, pad_id: int | None, name: str) -> None:
    """Check that mask, segments and positions of an encoding are the model's defaults: only its tokens are used.

    Args:
        batch: the encoding, or a tensor, which has nothing else.
        tokens: its tokens [batch, length].
        pad_id: padding token; None: there is no padding.
        name: of the argument, for errors.

    Raises:
        UserError: names the key: `attention_mask` hides other tokens than padding, `token_type_ids` are not 0, or
            `position_ids` do not count from 0; or one of them has another shape than the tokens.
    """
    if not isinstance(batch, Mapping):
        return
    is_padding = torch.zeros_like(tokens, dtype=torch.bool) if pad_id is None else tokens == pad_id
    expected = {
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
        "position_ids": torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens),
    }
    for key, default in expected.items():
        if (given := batch.get(key)) is None:
            continue
        values = torch.as_tensor(given, device=tokens.device)
        if key == "position_ids" and values.shape in (tokens.shape[1:], (1, tokens.shape[1])):
            values = values.expand_as(tokens)
        if values.shape != tokens.shape:
            raise UserError(
                f"{name}: its {key} has the shape {list(values.shape)}, its tokens {list(tokens.shape)}: pass what the "
                "tokenizer returns"
            )
        if not ((values != default) & ~is_padding).any():
            continue
        if key != "attention_mask":
            usual = "0" if key == "token_type_ids" else "0, 1, 2, ..."
            raise UserError(
                f"{name}: its {key} are not read, and differ from {usual}: leave them out to measure the tokens "
                "without them"
            )
        if ((values != 0) & (values != 1)).any():
            raise UserError(f"{name}: its attention_mask holds other numbers than 0 and 1, which are not read")
        raise UserError(
            f"{name}: its attention_mask hides tokens that are not pad_id={pad_id}: pass pad_id=tokenizer.pad_token_id"
        )


def check_inputs(model: ModelAdapter, batch: Mapping[str, Any], name: str) -> None:
    """Check that an encoding has no other input of the model than those that `check_encoding` knows, and labels.

    Raises:
        UserError: names the key that is not read.
    """
    known = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"}
    parameters = signature(model.model.forward).parameters
    if others := [key for key, value in batch.items() if key in parameters and key not in known and value is not None]:
        raise UserError(f"{name}: its {others[0]} is not read: leave it out to measure the tokens without it")


def require_pad_id(pad_id: Any) -> None:
    """Check that a padding token is an integer, or None.

    Raises:
        UserError: it is neither.
    """
    if pad_id is not None and (not isinstance(pad_id, Integral) or isinstance(pad_id, bool)):
        raise UserError(f"pad_id={pad_id!r}: expected an integer, such as tokenizer.pad_token_id, or None")


def as_tokens(batch: Any, name: str) -> Tensor:
    """A batch of tokens in int64 [batch, length], from any integers or from the encoding that a tokenizer returns.

    Raises:
        UserError: it is neither, or a token is negative; names the argument `name`.
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(tokens, Tensor):
        problem = type(tokens).__name__
    elif tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        problem = f"{tokens.dtype} {list(tokens.shape)}"
    elif tokens.is_meta:
        problem = "tokens on the meta device"
    elif tokens.numel() and int(tokens.min()) < 0:
        raise UserError(f"{name}: token {int(tokens.min())} is negative: pass input_ids, not labels")
    else:
        return tokens.long()
    raise UserError(
        f"{name}: expected tokens [batch, length], not {problem}: pass tokenizer(texts, return_tensors='pt')"
    )


def iter_batches(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the batches that are not all padding, on the model's device, each with its `token_mask` [batch, length].

    `progress` is called after each batch.

    Raises:
        UserError: all batches are padding.
    """
    empty = True
    for done, batch in enumerate(batches, start=1):
        batch = batch.to(model.device)
        mask = token_mask(model, batch, pad_id)
        if mask.any():
            empty = False
            yield batch, mask
        if progress is not None:
            progress(done, len(batches))
    if empty:
        raise UserError(f"{model.name}: no tokens to measure on: the batches are empty or all padding")


def iter_targets(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Batch, Tensor]]:
    """Like `iter_batches`, with the targets [batch, length] of each batch instead of the mask; `IGNORE` is no target.

    Raises:
        UserError: no token has a next one.
    """
    empty = True
    for batch, _ in iter_batches(model, batches, pad_id, progress):
        targets = prediction_targets(model, batch, pad_id)
        if (targets != IGNORE).any():
            empty = False
            yield batch, targets
    if empty:
        raise UserError(f"{model.name}: no token has a next one to predict")


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches of equal length, or of images, as one batch."""
    if images := [batch for batch in batches if isinstance(batch, Images)]:
        return Images(torch.cat([batch.pixels for batch in images]), torch.cat([batch.labels for batch in images]))
    return torch.cat([batch for batch in batches if isinstance(batch, Tensor)])


def token_mask(model: ModelAdapter, batch: Batch, pad_id: int | None) -> Tensor:
    """True for tokens that are not padding, and for patches of images with a label: [batch, length]."""
    if isinstance(batch, Images):
        mask = (batch.labels != IGNORE)[:, None].repeat(1, num_positions(model))
        mask[:, 0] = False  # the class token
        return mask
    return torch.ones_like(batch, dtype=torch.bool) if pad_id is None else batch != pad_id


def prediction_targets(model: ModelAdapter, batch: Batch, pad_id: int | None) -> Tensor:
    """Next tokens, or for images the label at the class token: [batch, length], elsewhere `IGNORE`."""
    if isinstance(batch, Images):
        targets = torch.full((len(batch), num_positions(model)), IGNORE, device=batch.labels.device)
        targets[:, 0] = batch.labels
        return targets
    return next_tokens(batch, pad_id)


def num_positions(model: ModelAdapter) -> int:
    """Length of an image: the class token and the patches."""
    assert isinstance(model.model, VisionTransformer)
    return len(model.model.embedding.positions)


def hidden_states(model: ModelAdapter, batch: Batch, mask: Tensor, chosen: Tensor | None = None) -> list[Tensor]:
    """The embedding and the output of every block, each [chosen tokens, hidden].

    Args:
        model: in evaluation mode.
        batch: tokens or images.
        mask: False for padding, which the model does not read [batch, length].
        chosen: True for the tokens to return [batch, length]; None: all of `mask`.
    """
    states: list[Tensor] = []
    chosen = mask if chosen is None else chosen

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name in ("embedding", "residual"):
            states.append(x[chosen])

    model.run(batch, hook, mask)
    return states


def first_sequences(batches: Sequence[Batch], number: int | None) -> list[Batch]:
    """The first sequences of batches, in batches of the same size; None: all."""
    if number is None:
        return list(batches)
    chosen: list[Batch] = []
    for batch in batches:
        chosen.append(batch[: number - sum(map(len, chosen))])
    return [batch for batch in chosen if len(batch)]


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def step_counter(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return a function that reports one more step of `total` to `progress` on each call."""
    steps = iter(range(1, total + 1))

    def advance() -> None:
        if progress is not None:
            progress(next(steps), total)

    return advance


class RunningMean:
    """Mean of vectors over samples, and its standard error, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total = self.squares = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, samples: Tensor) -> None:
        """Add samples [samples, ...]."""
        samples = samples.detach().double().cpu()
        self.count += len(samples)
        self.total = self.total + samples.sum(0)
        self.squares = self.squares + samples.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def error(self) -> Tensor:
        """Standard error; NaN for a single sample."""
        variance = (self.squares / self.count - self.mean**2).clamp(min=0)
        return (variance / (self.count - 1)).sqrt() if self.count > 1 else torch.full_like(variance, math.nan)


def error_over_sequences(sums: Tensor, counts: Tensor) -> float:
    """Standard error of sums.sum() / counts.sum() over sequences, some of which may have fewer targets than others.

    Args:
        sums: of a quantity over the targets of every sequence [sequences].
        counts: numbers of targets [sequences]; sequences without any do not count.

    Returns:
        NaN for a single sequence.
    """
    sequences, total = int((counts > 0).sum()), counts.sum()
    if sequences < 2:
        return math.nan
    deviations = sums.double() - sums.sum() / total * counts
    return float((deviations.square().sum() * sequences / (sequences - 1)).sqrt() / total)


def log_probabilities(model: ModelAdapter, x: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of hidden states [tokens, hidden] after final norm and head, in at least
    float32.
    """
    logits = model.head(x.to(model.head_weight.dtype))
    return at_least_fp32(logits).log_softmax(-1)


def token_chunks(model: ModelAdapter, tokens: int) -> Iterator[slice]:
    """Split tokens into chunks whose logits fit into memory."""
    size = chunk_size(model.device, len(model.head_weight))
    return (slice(first, first + size) for first in range(0, tokens, size))
