"""Every measure by name, and the study that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError, nearest
from cod_lightning.measure.ablation import (
    RunRemoval,
    causal_score,
    linear_replacement,
    removal,
    run_removal,
    swaps,
)
from cod_lightning.measure.activation_stats import moments
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.angular import angular_distance
from cod_lightning.measure.batches import iter_batches
from cod_lightning.measure.importance import block_influence, layer_importance, readout
from cod_lightning.measure.jacobian import MeanJacobian, end_to_end_gain, jacobian, mean_jacobian
from cod_lightning.measure.layers import token_variances
from cod_lightning.measure.options import options_of
from cod_lightning.measure.result import Progress
from cod_lightning.measure.sparsity import layer_sparsity, matrices
from cod_lightning.measure.theory import Shapes, Theory, theory
from cod_lightning.nn.decoder import Decoder

GAIN_ROWS = 2
"""Rows that the gain up to every layer is taken on: its time grows with the square of the depth."""
WIDEST_MAP = 256
"""Up to this hidden size the Jacobians are taken whole, with one backward pass for each of their rows."""

Batches = Sequence[Batch]
"""Tokens [rows, length] each, or images."""
Measure = Callable[..., Any]
"""(model in evaluation mode, batches, pad_id, progress, *, options) -> result."""


def first_rows(measure: Callable[..., Any], rows: int | None = None) -> Measure:
    """The measure, with its options, on so many rows of the first batch alone; None: all of that batch."""

    @wraps(measure)
    def taken(model: ModelAdapter, batches: Batches, *rest: Any, **options: Any) -> Any:
        return measure(model, [batches[0][:rows]], *rest, **options)

    return taken


def mean_jacobians(
    model: ModelAdapter,
    batches: Batches,
    pad_id: int | None,
    progress: Progress,
    *,
    layers: Sequence[int] | None = None,
    tokens: int = 1,
    seed: int = 0,
    widest: int = WIDEST_MAP,
) -> MeanJacobian:
    """Of `layers`, or of five from the first to the last, as in Figure 5; the options are those of `mean_jacobian`."""
    chosen = model.evenly_spaced(5) if layers is None else layers
    return mean_jacobian(model, batches, chosen, pad_id, progress, tokens=tokens, seed=seed, widest=widest)


def runs_of_blocks(
    model: ModelAdapter,
    batches: Batches,
    pad_id: int | None,
    progress: Progress,
    *,
    sizes: Sequence[int] | None = None,
) -> RunRemoval:
    """Of `sizes` blocks, or of 1, 2 and 4 where the model has more."""
    chosen = [size for size in (1, 2, 4) if size < model.depth] or [1]
    return run_removal(model, batches, pad_id, progress, sizes=chosen if sizes is None else sizes)


def measured_theory(
    model: ModelAdapter, batches: Sequence[Tensor], pad_id: int | None, progress: Progress, *, lns: bool | None = None
) -> Theory:
    """The paper's lemma and theorem, of Pre-LN or of LNS, over what is measured of a model.

    Whether it has LNS can be seen of ours; an exported model, which has it folded, needs `lns`.
    """
    behind = moments(model, batches, pad_id).residual.variance
    return theory(
        [embedding_variance(model, batches, pad_id), *behind],
        lns=scaled(model) if lns is None else lns,
        shapes=shapes(model, batches[0].shape[1]),
        gains=end_to_end_gain(model, [batches[0][:GAIN_ROWS]], pad_id, progress).spectral,
        model=model.name,
    )


MEASURES: dict[str, tuple[str, Measure]] = {
    "variance": ("variance", moments),
    "jacobian": ("jacobian", first_rows(jacobian)),
    "gain": ("jacobian", first_rows(end_to_end_gain, GAIN_ROWS)),
    "jacobian_map": ("jacobian", first_rows(mean_jacobians)),
    "angular": ("angular", angular_distance),
    "removal": ("removal", removal),
    "run_removal": ("removal", runs_of_blocks),
    "swaps": ("removal", swaps),
    "linear_replacement": ("removal", linear_replacement),
    "causal": ("removal", causal_score),
    "influence": ("influence", block_influence),
    "readout": ("influence", readout),
    "importance": ("influence", first_rows(layer_importance)),
    "sparsity": ("influence", layer_sparsity),
    "theory": ("theory", measured_theory),
}
"""Study and function of each measure. The costly ones take the first batch alone."""
NOT_OF_IMAGES = {
    "linear_replacement": "its map would be fitted to patches, and what is read is the class token",
    "theory": "the paper's lemmas and theorems are about decoders",
}
"""Measures that would mean nothing, and why."""


def measures_of(study: str, hidden: int = 0, widest: int = WIDEST_MAP, only: Sequence[str] = ()) -> list[str]:
    """The names of the measures of a study, or of `all`, for a model of this hidden size.

    Args:
        study: its name.
        hidden: the model's.
        widest: up to which Jacobians are taken whole.
        only: of these measures no others, and these whatever the size.

    Raises:
        UserError: there is no such study, or it has no such measure.
    """
    studies = list(dict.fromkeys(of for of, _ in MEASURES.values()))
    if study != "all" and study not in studies:
        raise UserError(f"{study!r} is not a study: {nearest(study, [*studies, 'all', 'compare', 'prune'])}")
    names = [name for name, (of, _) in MEASURES.items() if study in (of, "all")]
    if wrong := next((name for name in only if name not in names), None):
        raise UserError(f"only={wrong!r} is not a measure of {study}: {nearest(wrong, names)}")
    return [name for name in names if name in only or (not only and (name != "jacobian_map" or hidden <= widest))]


def options_for(names: Iterable[str]) -> dict[str, Any]:
    """The options of measures, with their types.

    Left out are those that more than one study has: `tokens` is not the same to jacobian and to angular.
    """
    studies: dict[str, dict[str, Any]] = {}
    for name in names:
        study, measure = MEASURES[name]
        studies.setdefault(study, {}).update(options_of(measure))
    found = [option for options in studies.values() for option in options]
    return {name: kind for options in studies.values() for name, kind in options.items() if found.count(name) == 1}


@torch.no_grad()
def embedding_variance(model: ModelAdapter, batches: Sequence[Tensor], pad_id: int | None) -> float:
    """Variance of what enters the first block, as `moments` defines it."""
    total, count = 0.0, 0

    for tokens, keep in iter_batches(model, batches, pad_id):
        found: list[Tensor] = []
        model.logits(tokens, lambda what, layer, x, found=found: what == "embedding" and found.append(x))
        total += float(token_variances(found[0])[keep].sum())
        count += int(keep.sum())
    return total / count


def scaled(model: ModelAdapter) -> bool:
    """Whether the pre-norms are scaled by layer (LayerNorm Scaling)."""
    blocks = model.model.blocks if isinstance(model.model, Decoder) else []
    return any(sublayer.gain != 1 for block in blocks for sublayer in block.spec.sublayers)


def shapes(model: ModelAdapter, length: int) -> Shapes:
    """What the theorems' constants are computed from; `std` is that of all weights of the blocks' matrices."""
    config = model.config
    hidden = model.hidden
    weights = [weight.detach().float().flatten() for block in model.blocks for _, weight in matrices(block).values()]
    return Shapes(
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        heads=config.num_attention_heads,
        length=length,
        std=float(torch.cat(weights).std()),
    )
