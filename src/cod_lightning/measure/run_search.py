"""The longest run of contiguous blocks that a model can do without, within limits of its perplexity.

Trying every run of every length costs a number of losses that grows with the square of the depth. Here a run of n + 1
blocks is tried if it extends one of the `width` cheapest runs of n blocks by a neighbour, as long as one of them is
within the largest limit. So a longer run may exist, if a part of it costs more than the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import iter_targets, step_counter
from cod_lightning.measure.options import Positive
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.reordering import AblationResult, changed_losses, loss_columns
from cod_lightning.measure.result import Progress, table_rows

PERPLEXITY_RISES = (1.0, 5.0, 10.0)
"""Limits of `longest_run`, in percent."""


@dataclass(frozen=True)
class LongestRun(AblationResult):
    """The cheapest run of n contiguous blocks that was found, for n = 1, 2, ... until none is within the limits."""

    first: list[int]
    """First block of the cheapest run of n blocks at [n - 1]."""
    losses: list[float]
    """Loss without it."""
    limits: list[float]
    """Largest allowed rises of the perplexity in percent."""
    blocks: list[int]
    """Number of blocks in the longest run within each limit; 0 if no block can go."""
    removable: list[int]
    """For every block the number of limits whose longest run it is in."""

    def series(self) -> dict[str, Sequence[Any]]:
        return {"layer": range(1, len(self.removable) + 1), "removable": self.removable}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each number of removed blocks."""
        columns = {"n": range(1, len(self.first) + 1), "first": self.first, **loss_columns(self.losses, self.loss)}
        return table_rows(columns)

    def panels(self) -> list[Panel]:
        rises = [perplexity_rise(loss, self.loss) for loss in self.losses]
        return [Lines("rise of the perplexity (%)", {"cheapest run": rises}, log=True, xlabel="blocks removed")]


def perplexity_rise(loss: float, whole: float) -> float:
    """The rise of the perplexity in percent from a loss in nats to another; infinite above a factor of e^700."""
    return 100 * math.expm1(loss - whole) if loss - whole < 700 else math.inf


def longest_run(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    limits: Annotated[Sequence[float], ("above", 0)] = PERPLEXITY_RISES,
    width: Positive = 2,
    removal: Mapping[str, Any] | None = None,
) -> LongestRun:
    """Search the longest run of contiguous blocks that can be removed within each limit.

    Options:
        limits: rises of the perplexity in percent.
        width: number of runs of each length that are extended.
        removal: the fields of `removal` on the same batches, which then is not measured again.
    """
    depth, batches = model.depth, [batch for batch, _ in iter_targets(model, batches, pad_id)]
    advance = step_counter(progress, depth)
    first: list[int] = []
    losses: list[float] = []
    starts, whole, tokens = list(range(1, depth + 1)), math.nan, 0
    for n in range(1, depth + 1):
        if not starts:
            advance()
            continue
        if n == 1 and removal is not None:
            whole, *changed = (math.nan if loss is None else loss for loss in (removal["loss"], *removal["losses"]))
            tokens = removal["tokens"]
        else:
            orders = [[*range(1, start), *range(start + n, depth + 1)] for start in starts]
            whole, tokens, changed = changed_losses(model, orders, batches, pad_id)
        advance()
        cheapest = sorted(zip(changed, starts, strict=True), key=lambda pair: (math.isnan(pair[0]), pair))[:width]
        losses.append(cheapest[0][0])
        first.append(cheapest[0][1])
        extended = [start for loss, start in cheapest if perplexity_rise(loss, whole) <= max(limits)]
        starts = sorted({new for old in extended for new in (old - 1, old) if 1 <= new <= depth - n})
    rises = [perplexity_rise(loss, whole) for loss in losses]
    blocks = [max((n for n, rise in enumerate(rises, start=1) if rise <= limit), default=0) for limit in limits]
    removable = [
        sum(n > 0 and first[n - 1] <= layer < first[n - 1] + n for n in blocks) for layer in range(1, depth + 1)
    ]
    return LongestRun(model.name, tokens, whole, first, losses, list(limits), blocks, removable)
