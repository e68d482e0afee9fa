"""What a model loses without a block, without a run of blocks, with two exchanged, or with one made linear.

Removal is the paper's ΔP (Figure 2), here of the loss; exchange, linear replacement and causal score follow "When Does
Sparsity Mitigate the Curse of Depth in LLMs" (arXiv 2603.15389). Nothing is trained afterwards, and the blocks that
stay keep their gains.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.errors import UserError
from cod_lightning.evaluate.perplexity import perplexity_of
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import at_least_fp32, evaluate, iter_batches
from cod_lightning.measure.options import require_choice
from cod_lightning.measure.result import Progress, figure, heat_map, layer_lines, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pairs = Literal["neighbours", "all"]
USEFUL = 1.1
"""A layer is useful where its linear replacement raises the loss above this multiple."""
RISE = "rise of the loss when removed (nats)"


@dataclass(frozen=True)
class Removal:
    """Loss in nats per token with each block removed alone."""

    model: str
    tokens: int
    loss: float
    """Of the whole model."""
    losses: list[float]
    """Without block l at [l - 1]."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer."""
        return [{"layer": layer, **cost(loss, self.loss)} for layer, loss in enumerate(self.losses, start=1)]

    def plot(self) -> Figure:
        """Cost of each layer."""
        made, (axes,) = figure(self.model)
        layer_lines(axes, {"removed": [loss - self.loss for loss in self.losses]}, RISE)
        return made


@dataclass(frozen=True)
class RunRemoval:
    """Loss in nats per token with n neighbouring blocks removed."""

    model: str
    tokens: int
    loss: float
    """Of the whole model."""
    sizes: list[int]
    """The n."""
    losses: list[list[float]]
    """Without blocks l to l + n - 1 at [index of n][l - 1]."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each run of blocks."""
        return [
            {"n": n, "first": first, **cost(loss, self.loss)}
            for n, losses in zip(self.sizes, self.losses, strict=True)
            for first, loss in enumerate(losses, start=1)
        ]

    def plot(self) -> Figure:
        """Cost over the first block removed, one line for each n."""
        made, (axes,) = figure(self.model)
        pairs = zip(self.sizes, self.losses, strict=True)
        layer_lines(axes, {f"n = {n}": [loss - self.loss for loss in losses] for n, losses in pairs}, RISE)
        axes.set_xlabel("first layer removed")
        legend(axes, columns=4)
        return made


@dataclass(frozen=True)
class Swaps:
    """Loss in nats per token with two blocks exchanged."""

    model: str
    tokens: int
    loss: float
    """Of the model as it is."""
    pairs: list[tuple[int, int]]
    """The layers exchanged, from 1."""
    losses: list[float]
    """One for each pair."""
    scores: list[float]
    """|loss - loss after| / loss of each pair."""
    score: float
    """The permutation score: mean over pairs."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each pair."""
        return [
            {"layer": pair[0], "with": pair[1], **cost(loss, self.loss), "score": score}
            for pair, loss, score in zip(self.pairs, self.losses, self.scores, strict=True)
        ]

    def plot(self) -> Figure:
        """Score of each pair: a line where all are neighbours, else a map."""
        made, (axes,) = figure(f"{self.model}, permutation score {self.score:.3g}")
        label = "|loss - loss when exchanged| / loss"
        if all(second == first + 1 for first, second in self.pairs):
            layer_lines(axes, {"swapped": self.scores}, label, log=True)
            axes.set_xlabel("layer exchanged with the next")
        else:
            scores = dict(zip(self.pairs, self.scores, strict=True))
            layers = range(1, max(second for _, second in self.pairs) + 1)
            matrix = [[scores.get((first, second)) for first in layers] for second in layers]
            heat_map(axes, matrix, "layer", "exchanged with layer", label, log=True)
        return made


@dataclass(frozen=True)
class LinearReplacement:
    """Loss in nats per token with each block alone replaced by its best linear map."""

    model: str
    tokens: int
    fit_tokens: int
    """Tokens that the maps were fitted to."""
    loss: float
    """Of the model as it is."""
    losses: list[float]
    """With block l replaced at [l - 1]."""
    usefulness: float
    """Share of layers whose replacement raises the loss by more than a tenth."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer."""
        return [
            {"layer": layer, **cost(loss, self.loss), "useful": loss > USEFUL * self.loss}
            for layer, loss in enumerate(self.losses, start=1)
        ]

    def plot(self) -> Figure:
        """Relative cost of each replacement, and where it makes a layer useful."""
        made, (axes,) = figure(f"{self.model}, usefulness {self.usefulness:.3g}")
        axes.axhline(USEFUL, color="black", lw=1, ls=":", label="useful from here")
        layer_lines(axes, {"made linear": [loss / self.loss for loss in self.losses]}, "loss when linear / loss")
        legend(axes)
        return made


@dataclass(frozen=True)
class CausalScore:
    """How much what a layer adds changes when an earlier layer is skipped, relative to what it adds."""

    model: str
    tokens: int
    effects: list[list[float | None]]
    """Of skipping layer s on layer l at [s - 1][l - 1]; None where l <= s, and where l adds nothing to change."""
    scores: list[float | None]
    """Mean effect of skipping layer s at [s - 1]; None where there is no later layer."""
    score: float | None
    """Mean over all pairs."""

    def rows(self) -> list[dict[str, Any]]:
        """One row for each layer skipped: the mean over all later layers, and the effect on each of them."""
        return [
            {"skipped": layer, "score": score, **{f"on_{later}": effect for later, effect in enumerate(row, start=1)}}
            for layer, (score, row) in enumerate(zip(self.scores, self.effects, strict=True), start=1)
        ]

    def plot(self) -> Figure:
        """Effects of all layers on all later ones."""
        made, (axes,) = figure(self.model + ("" if self.score is None else f", causal score {self.score:.3g}"))
        heat_map(axes, self.effects, "later layer", "layer skipped", "relative change of what it adds", log=True)
        return made


def cost(loss: float, whole: float) -> dict[str, float]:
    return {"loss": loss, "delta_loss": loss - whole, "perplexity": perplexity_of(loss)}


def evaluate_arranged(
    model: ModelAdapter,
    batches: list[Batch],
    pad_id: int | None,
    progress: Progress | None,
    arrangements: Sequence[Sequence[int]],
) -> tuple[float, int, list[float]]:
    """Loss and targets of the model as it is, and its loss as each of `arrangements`, which number blocks from 1."""
    blocks = model.blocks
    loss, tokens = evaluate(model, batches, pad_id)
    losses = []
    for done, layers in enumerate(arrangements, start=1):
        with model.with_blocks([blocks[layer - 1] for layer in layers]):
            losses.append(evaluate(model, batches, pad_id)[0])
        if progress is not None:
            progress(done, len(arrangements))
    return loss, tokens, losses


def removal(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Removal:
    """Remove each block alone; one evaluation of `batches` for each, after which `progress` is called.

    Raises:
        UserError: there is no target.
    """
    layers = range(1, model.depth + 1)
    arrangements = [[other for other in layers if other != layer] for layer in layers]
    loss, tokens, losses = evaluate_arranged(model, list(batches), pad_id, progress, arrangements)
    return Removal(model.name, tokens, loss, losses)


def run_removal(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    sizes: Sequence[int] | None = None,
) -> RunRemoval:
    """Remove n neighbouring blocks, from every first block, for every n of `sizes`.

    Without `sizes`, n is 1, 2 and 4 as far as the model has more blocks.

    Raises:
        UserError: an n is no number of blocks of this model, or there is no target.
    """
    depth = model.depth
    if sizes is None:
        sizes = [size for size in (1, 2, 4) if size < depth] or [1]
    for n in sizes:
        if not 1 <= n <= depth:
            raise UserError(f"sizes: {n} neighbouring blocks cannot be removed from {depth}: 1 to {depth} can")
    runs = [(n, first) for n in sizes for first in range(1, depth - n + 2)]
    arrangements = [[*range(1, first), *range(first + n, depth + 1)] for n, first in runs]
    loss, tokens, losses = evaluate_arranged(model, list(batches), pad_id, progress, arrangements)
    remaining = iter(losses)
    return RunRemoval(
        model.name, tokens, loss, list(sizes), [[next(remaining) for _ in range(depth - n + 1)] for n in sizes]
    )


def swaps(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    pairs: Pairs = "neighbours",
) -> Swaps:
    """Exchange two blocks: all "neighbours", or "all" pairs, of which the published permutation score is the mean.

    Raises:
        UserError: `pairs` is unknown, the model has one block only, or there is no target.
    """
    require_choice(Pairs, pairs=pairs)
    layers = range(1, model.depth + 1)
    chosen = [pair for pair in combinations(layers, 2) if pairs == "all" or pair[1] == pair[0] + 1]
    if not chosen:
        raise UserError(f"{model.name}: a model of one block has none to exchange it with")
    arrangements = [[{a: b, b: a}.get(layer, layer) for layer in layers] for a, b in chosen]
    loss, tokens, losses = evaluate_arranged(model, list(batches), pad_id, progress, arrangements)
    scores = [abs(loss - swapped) / loss for swapped in losses]
    return Swaps(model.name, tokens, loss, chosen, losses, scores, fmean(scores))


def linear_replacement(
    model: ModelAdapter,
    batches: Iterable[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    fit: Iterable[Batch] | None = None,
) -> LinearReplacement:
    """Replace each block alone by the linear map that is nearest to it on the tokens of `fit`.

    Both sets are gone through once for each layer, so that the sums of one layer only are held: two matrices
    [hidden + 1, hidden + 1] in float64.

    Args:
        model: in any dtype.
        batches: tokens [rows, length] each, for the loss.
        pad_id: tokens that do not count; they follow the others in a row.
        progress: called after each layer.
        fit: tokens likewise; `batches` if not given, as in the released code, which flatters the maps.

    Raises:
        UserError: `fit` holds no more tokens than the maps have coefficients for each output, or there is no target.
    """
    batches = list(batches)
    fit = batches if fit is None else list(fit)
    loss, tokens = evaluate(model, batches, pad_id)
    losses, fit_tokens = [], 0
    for layer, block in enumerate(model.blocks, start=1):
        update, fit_tokens = fit_linear(model, layer, fit, pad_id)
        with replaced(block, update):
            losses.append(evaluate(model, batches, pad_id)[0])
        if progress is not None:
            progress(layer, model.depth)
    usefulness = fmean(linear > USEFUL * loss for linear in losses)
    return LinearReplacement(model.name, tokens, fit_tokens, loss, losses, usefulness)


@torch.no_grad()
def fit_linear(
    model: ModelAdapter, layer: int, batches: Iterable[Batch], pad_id: int | None = None
) -> tuple[Callable[[Tensor], Tensor], int]:
    """The function x + W x + b nearest to a block in least squares, and the number of tokens that it was fitted to.

    Raises:
        UserError: these are not more than the hidden dimension, so that any block could be met exactly.
    """
    width = model.hidden + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=model.device)
    cross = torch.zeros(width, width - 1, dtype=torch.float64, device=model.device)
    count = 0
    for tokens, keep in iter_batches(model, batches, pad_id):
        ends: list[Tensor] = []

        def hook(name: str, at: int, x: Tensor, keep: Tensor = keep, ends: list[Tensor] = ends) -> None:
            if name in ("embedding", "residual") and at in (layer - 1, layer):
                ends.append(x[keep].double())

        model.logits(tokens, hook)
        x, y = ends
        inputs = F.pad(x, (0, 1), value=1.0)
        gram += inputs.T @ inputs
        cross += inputs.T @ (y - x)
        count += len(x)
    if count < width:
        raise UserError(
            f"{model.name}: a linear map of {width - 1} dimensions needs {width} tokens or more, not {count}"
        )
    # Scaled to a unit diagonal, as channels differ by orders of magnitude. The pseudo-inverse leaves what lies in
    # directions that no input has as it is: few different tokens make few different inputs of the first layer.
    scale = gram.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    solution = torch.linalg.pinv(gram / scale / scale[:, None], hermitian=True) @ (cross / scale[:, None])
    solution = (solution / scale[:, None]).to(torch.promote_types(model.head_weight.dtype, torch.float32))
    return lambda x: x + F.linear(at_least_fp32(x), solution[:-1].T, solution[-1]).to(x.dtype), count


@contextmanager
def replaced(block: nn.Module, function: Callable[[Tensor], Tensor]) -> Generator[None]:
    """Let `function` of a block's input stand for its output inside the `with`.

    A hook and no other block: models ask their blocks for attributes, and a `Decoder` goes by their class.
    """

    def hook(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> Any:
        made = function(args[0] if args else kwargs["hidden_states"])
        return (made, *y[1:]) if isinstance(y, tuple) else made

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def causal_score(
    model: ModelAdapter, batches: Iterable[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> CausalScore:
    """Skip each layer s and see how what every later layer l adds, h_{l+1} - h_l, changes.

    The effect is the mean over tokens of |change of h_{l+1} - h_l| over the mean of |h_{l+1} - h_l|, norms over the
    hidden dimension. The mean of quotients would be ruled by the tokens to which a layer adds least.

    Args:
        model: in any dtype.
        batches: tokens [rows, length] each; the streams behind all layers are held for one batch.
        pad_id: tokens that do not count; they follow the others in a row.
        progress: called after each batch.

    Raises:
        UserError: there is no token.
    """
    depth, count = model.depth, 0
    changes = torch.zeros(depth, depth, dtype=torch.float64, device=model.device)
    sizes = torch.zeros(depth, dtype=torch.float64, device=model.device)
    for tokens, keep in iter_batches(model, batches, pad_id, progress):
        with torch.compiler.set_stance("force_eager"):
            inputs, blocks = model.block_functions(tokens)
            streams = [*inputs, blocks[-1](inputs[-1])]

            def added(before: Tensor, after: Tensor, keep: Tensor = keep) -> Tensor:
                return at_least_fp32(after[keep]) - at_least_fp32(before[keep])

            for later in range(depth):
                sizes[later] += added(streams[later], streams[later + 1]).norm(dim=-1).double().sum()
            for skipped in range(depth - 1):
                x = streams[skipped]
                for later in range(skipped + 1, depth):
                    y = blocks[later](x)
                    change = added(x, y) - added(streams[later], streams[later + 1])
                    changes[skipped, later] += change.norm(dim=-1).double().sum()
                    x = y
        count += int(keep.sum())
    changes, sizes = changes.tolist(), sizes.tolist()
    effects = [
        [changes[s][later] / sizes[later] if later > s and sizes[later] > 0 else None for later in range(depth)]
        for s in range(depth)
    ]
    known = [[effect for effect in row if effect is not None] for row in effects]
    pairs = [effect for row in known for effect in row]
    scores = [fmean(row) if row else None for row in known]
    return CausalScore(model.name, count, effects, scores, fmean(pairs) if pairs else None)
