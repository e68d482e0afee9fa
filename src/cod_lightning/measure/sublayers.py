"""Attention and FFN of each block: what they add to the residual stream, and the loss without one of them.

Contributions are relative to the stream (Csordas et al., arXiv 2505.13898).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import RunningMean, at_least_fp32, iter_batches
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.reordering import LOSS_INCREASE, AblationResult, Blocks, changed_losses
from cod_lightning.measure.result import Progress, Result
from cod_lightning.nn.layouts import Site, find_sites, zero_output
from cod_lightning.nn.norms import Norm

COLUMNS = ("attention", "ffn", "block", "attention_cosine", "ffn_cosine", "block_cosine")


@dataclass(frozen=True)
class Contribution(Result):
    """Norms and directions of the contributions of each layer, with x + a also where the FFN reads a norm of it."""

    tokens: int
    attention: list[float]
    """|a| / |x|, mean over tokens."""
    ffn: list[float]
    """|m| / |x + a|."""
    block: list[float]
    """|y - x| / |x|."""
    attention_cosine: list[float]
    """cos(a, x)."""
    ffn_cosine: list[float]
    """cos(m, x + a)."""
    block_cosine: list[float]
    """cos(y - x, x)."""
    errors: dict[str, list[float]]
    """Standard error of each of the above, as if tokens were independent."""

    def panels(self) -> list[Panel]:
        def lines(ylabel: str, suffix: str, log: bool) -> Lines:
            names = {"attention": "attention", "FFN": "ffn", "block": "block"}
            values = {label: getattr(self, name + suffix) for label, name in names.items()}
            return Lines(ylabel, values, log, errors={label: self.errors[names[label] + suffix] for label in names})

        return [
            lines("norm of the contribution / norm of the stream", "", log=True),
            lines("cosine of the contribution and the stream", "_cosine", log=False),
        ]


@torch.no_grad()
def contribution(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> Contribution:
    """Compare what attention, FFN and the whole block add with the stream that they add it to (Csordas et al.).

    arXiv 2505.13898: with x the stream that a block adds to, y its output, a what its attention adds and m what its FFN
    adds, the norms |a| / |x|, |m| / |x + a| and |y - x| / |x|, and the cosines of the same pairs; means over tokens. A
    negative cosine means that a sub-layer erases a part of the stream. x is the block's input, except after a norm of
    it (Peri-LN) or a mix with the embeddings (x0_mix).
    """
    means = [RunningMean() for _ in range(model.depth)]
    for batch, mask in iter_batches(model, batches, pad_id, progress):
        seen: dict[str, Tensor] = {}

        def hook(name: str, layer: int, x: Tensor, mask: Tensor = mask, seen: dict[str, Tensor] = seen) -> None:
            y = at_least_fp32(x[mask])
            seen.setdefault("embedding", y)
            if name == "residual":
                x, a, m = model.stream_at(layer, seen["stream"], seen["embedding"]), seen["attention"], seen["ffn"]
                pairs = [(a, x), (m, x + a), (y - x, x)]
                norms = [added.norm(dim=-1) / stream.norm(dim=-1).clamp(min=1e-6) for added, stream in pairs]
                cosines = [F.cosine_similarity(*pair, dim=-1) for pair in pairs]
                means[layer - 1].add(torch.stack([*norms, *cosines], dim=1))
            seen["stream" if name in ("embedding", "residual") else name] = y

        model.run(batch, hook, mask)
    values = torch.stack([mean.mean for mean in means], dim=1).tolist()
    errors = torch.stack([mean.error for mean in means], dim=1).tolist()
    return Contribution(model.name, means[0].count, *values, errors=dict(zip(COLUMNS, errors, strict=True)))


@dataclass(frozen=True)
class SublayerRemoval(AblationResult):
    """Loss with attention alone, or the FFN alone, of each block adding nothing to the residual stream."""

    attention: list[float]
    """Loss without the attention of block l at [l - 1]."""
    ffn: list[float]
    """Loss without the FFN of block l at [l - 1]."""

    def series(self) -> dict[str, Sequence[Any]]:
        columns = {"attention": self.attention, "ffn": self.ffn}
        changes = {f"{name}_delta_loss": [loss - self.loss for loss in losses] for name, losses in columns.items()}
        return {"layer": range(1, len(self.ffn) + 1), **columns, **changes}

    def panels(self) -> list[Panel]:
        columns = self.series()
        return [Lines(LOSS_INCREASE, {"attention": columns["attention_delta_loss"], "FFN": columns["ffn_delta_loss"]})]


def sublayer_removal(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> SublayerRemoval:
    """Remove the attention or the FFN of each block alone, with the norm of its branch; norms of sums remain.

    It costs twice as much as `removal`: only the blocks from the changed one on run again.
    """
    sites = find_sites(model.model, model.layout)
    layers = range(1, model.depth + 1)
    orders = [
        [model.depth + number if layer == site.layer else layer for layer in layers]
        for number, site in enumerate(sites, start=1)
    ]

    def changed(blocks: Blocks) -> Blocks:
        return [partial(run_without, site, blocks[site.layer - 1]) for site in sites]

    loss, tokens, losses = changed_losses(model, orders, batches, pad_id, progress, changed)
    parts = {
        part: [loss for site, loss in zip(sites, losses, strict=True) if site.part == part]
        for part in ("attention", "ffn")
    }
    return SublayerRemoval(model.name, tokens, loss, **parts)


def run_without(site: Site, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run the block of a sub-layer, which adds nothing."""
    with last_of_branch(site).register_forward_hook(zero_output):
        return block(x)


def last_of_branch(site: Site) -> nn.Module:
    """The module whose output is added to the stream, in our blocks the branch's norm if there is one.

    Some norms have a bias, so that they add something to the stream even if their input is zero.
    """
    residual = getattr(site.block, f"{site.part}_residual", None)
    norm = getattr(residual, "branch_norm", None)
    return norm if isinstance(norm, Norm) else site.branch
