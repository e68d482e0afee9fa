"""Linear maps in the place of blocks: of each alone, to measure the loss, and of several, in a smaller copy.

Linear replacement follows "When Does Sparsity Mitigate the Curse of Depth in LLMs" (arXiv 2603.15389). The model is not
trained afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import Batch, ModelAdapter, family
from cod_lightning.measure.batches import at_least_fp32, checked_batches, iter_batches, iter_targets, step_counter
from cod_lightning.measure.block_removal import find_site, remove_blocks
from cod_lightning.measure.open_model import differs
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.reordering import AblationResult, changed_losses, loss_columns
from cod_lightning.measure.result import Progress
from cod_lightning.measure.weight_sparsity import linear_weights

USEFUL = 1.1
"""A layer is useful if its linear replacement raises the loss above this multiple."""


@dataclass(frozen=True)
class LinearReplacement(AblationResult):
    """Loss with each block alone replaced by its best linear map."""

    fit_tokens: int
    """Number of tokens that the maps are fitted to."""
    losses: list[float]
    """Loss with block l replaced at [l - 1]."""
    usefulness: float
    """Share of layers whose replacement raises the loss by more than a tenth."""

    def series(self) -> dict[str, Sequence[Any]]:
        useful = [loss > USEFUL * self.loss for loss in self.losses]
        return {"layer": range(1, len(useful) + 1), **loss_columns(self.losses, self.loss), "useful": useful}

    def title(self) -> str:
        return f"{super().title()}, usefulness {self.usefulness:.3g}"

    def panels(self) -> list[Panel]:
        ratios = [loss / self.loss for loss in self.losses]
        return [Lines("loss with linear replacement / loss", {"replaced": ratios}, level=("useful above", USEFUL))]


def linear_replacement(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    fit: Batch | Iterable[Batch] | None = None,
) -> LinearReplacement:
    """Replace each block alone by the linear map that is nearest to it on the tokens of `fit`.

    The map of the first block of Peri-LN follows the norm of the embeddings, as its removal does. Every map takes a
    pass over `fit`, so that only its own sums are in memory, two matrices [hidden + 1, hidden + 1] in float64; the maps
    themselves stay there, depth x (hidden + 1) x hidden numbers in float32.

    Options:
        fit: tokens [batch, length], or several such; None: `batches`, as in the released code, which favours the maps.

    Raises:
        UserError: `fit` has no more tokens than the hidden size, or is not tokens.
    """
    fit_batches = batches if fit is None else checked_batches(model, fit, pad_id, "fit")
    fit_tokens = sum(int(mask.sum()) for _, mask in iter_batches(model, fit_batches, pad_id))

    batches = [batch for batch, _ in iter_targets(model, batches, pad_id)]
    depth = model.depth
    advance = step_counter(progress, depth + len(batches) * (depth + 1))
    layers, maps = range(1, depth + 1), []
    for layer in layers:
        maps.append(fit_linear(model, layer, fit_batches, pad_id))
        advance()
    orders = [[depth + layer if layer == mapped else layer for layer in layers] for mapped in layers]
    loss, tokens, losses = changed_losses(model, orders, batches, pad_id, lambda *_: advance(), lambda _: maps)
    usefulness = fmean(linear > USEFUL * loss for linear in losses)
    return LinearReplacement(model.name, tokens, loss, fit_tokens, losses, usefulness)


@torch.no_grad()
def fit_linear(
    model: ModelAdapter, layer: int, batches: Sequence[Batch], pad_id: int | None = None
) -> Callable[[Tensor], Tensor]:
    """Return the function x + W x + b that is nearest to a block, as in `block_functions`, in least squares.

    Raises:
        UserError: there are no more tokens than the hidden size, so that the fit would be exact for any block.
    """

    def pairs() -> Generator[tuple[Tensor, Tensor]]:
        for tokens, mask in iter_batches(model, batches, pad_id):
            inputs, blocks = model.block_functions(tokens, mask)
            x, y = (states[mask].double() for states in (inputs[layer - 1], blocks[layer - 1](inputs[layer - 1])))
            yield F.pad(x, (0, 1), value=1.0), y - x

    solution = fit_map(model, pairs()).to(torch.promote_types(model.head_weight.dtype, torch.float32))
    return lambda x: x + F.linear(at_least_fp32(x), solution[:-1].T, solution[-1]).to(x.dtype)


def fit_map(model: ModelAdapter, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The matrix W [inputs, outputs] that minimises |X W - Y| over pairs X and Y of matrices [tokens, ...] in float64.

    Directions without inputs are ignored: few different tokens make few different inputs of the first layer.

    Raises:
        UserError: there are no more tokens than the hidden size, or a value is not finite.
    """
    gram = cross = torch.zeros((), dtype=torch.float64, device="cpu")
    count = 0
    for x, y in pairs:
        gram, cross, count = gram + x.T @ x, cross + x.T @ y, count + len(x)
    if count <= model.hidden:
        raise UserError(
            f"{model.name}: a linear map needs more tokens than the hidden size {model.hidden}, not {count}"
        )
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise UserError(f"{model.name}: a linear map needs finite hidden states, but some are NaN or infinite")
    # Scale to a unit diagonal, as channels differ by orders of magnitude.
    scale = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    solution = torch.linalg.pinv(gram / scale / scale[:, None], hermitian=True) @ (cross / scale[:, None])
    return solution / scale[:, None]


@torch.no_grad()
def fold_linear_map(
    model: ModelAdapter,
    first: int,
    last: int,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
) -> ModelAdapter:
    """A copy of the model without the blocks `first` to `last`, and with a linear map in their place.

    That is ReplaceMe (arXiv 2505.02819). The first block of a model cannot be replaced.

    The map T acts on the output m of the FFN before the blocks: x - m + T m is the nearest in least squares to the
    residual stream after them, where x is the stream before them. It is multiplied into the FFN's last projection, so
    that the copy has no other parts than the model.

    Raises:
        UserError: the FFN does not end in a projection that is known, or there are no more tokens than the hidden size.
    """
    previous = first - 1
    masked_batches = list(iter_batches(model, batches, pad_id))
    advance = step_counter(progress, len(masked_batches))

    def pairs() -> Generator[tuple[Tensor, Tensor]]:
        for batch, mask in masked_batches:
            m, x, y = states_around(model, batch, mask, previous, last)
            yield m, y - x
            advance()

    change = fit_map(model, pairs()).T  # T - I
    smaller = remove_blocks(model, range(first, last + 1))
    ffn = find_site(smaller, previous, "ffn")
    output, learned = ffn.output, getattr(getattr(ffn.block, "ffn_residual", None), "branch_scale", None)
    in_projection = change
    if learned is not None and len(learned) > 1:  # a scale of each channel after the projection
        if not learned.all():
            raise UserError(f"{model.name}: a scale of zero hides channels of the FFN; use replace=layer")
        in_projection = change * learned.double() / learned.double()[:, None]
    for tensor in () if output is None else (linear_weights(output)[""], output.bias):
        if tensor is not None:
            tensor.copy_(tensor + in_projection @ tensor.double())
    m, mapped = (states_around(each, *masked_batches[-1], previous, previous)[0] for each in (model, smaller))
    dtype = model.head_weight.dtype
    if differs(mapped.to(dtype), (m + m @ change.T).to(dtype)):
        raise UserError(
            f"{model.name}: the FFN of {family(model.model)} does not end in a known projection, so it cannot hold a "
            "linear map; use replace=layer"
        )
    return smaller


def states_around(
    model: ModelAdapter, batch: Batch, mask: Tensor, previous: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The contribution of the FFN of block `previous`, the stream after that block, and the stream after block `last`.

    Each is [kept tokens, hidden] in float64, for a mask [batch, length].
    """
    seen: dict[tuple[str, int], Tensor] = {}

    def hook(name: str, layer: int, x: Tensor) -> None:
        if layer in (previous, last):
            seen[name, layer] = x[mask].double()

    model.run(batch, hook, mask)
    return seen["ffn", previous], seen["residual", previous], seen["residual", last]
