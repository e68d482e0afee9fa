"""Every measure by name, and the study that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError, nearest
from cod_lightning.measure.angular import angular_distance
from cod_lightning.measure.influence import block_influence, layer_importance, readout
from cod_lightning.measure.jacobian import end_to_end_gain, jacobian, mean_jacobian
from cod_lightning.measure.layered import Layered
from cod_lightning.measure.layers import token_variance
from cod_lightning.measure.moments import moments
from cod_lightning.measure.removal import causal_score, linear_replacement, removal, run_removal, swaps
from cod_lightning.measure.result import Progress, Result
from cod_lightning.measure.sparsity import layer_sparsity, matrices
from cod_lightning.measure.theory import Shapes, Theory, theory
from cod_lightning.measure.tokens import walk
from cod_lightning.nn.decoder import Decoder

GAIN_ROWS = 2
"""Rows that the gain up to every layer is taken on: its time grows with the square of the depth."""

Batches = Sequence[Tensor]
"""Tokens [rows, length] each."""
Measure = Callable[[Layered, Batches, int | None, Progress], Result]
"""(model in evaluation mode, batches, pad_id, progress) -> result."""


def mean_jacobians(model: Layered, batches: Batches, pad_id: int | None, progress: Progress) -> Any:
    """Of five layers from the first to the last, as in Figure 5."""
    depth = model.depth
    layers = sorted({1, (depth + 3) // 4, (depth + 1) // 2, (3 * depth + 3) // 4, depth})
    return mean_jacobian(model, batches[:1], layers, pad_id, progress)


def runs_of_blocks(model: Layered, batches: Batches, pad_id: int | None, progress: Progress) -> Any:
    sizes = [size for size in (1, 2, 4) if size < model.depth] or [1]
    return run_removal(model, batches, pad_id, progress, sizes=sizes)


def measured_theory(model: Layered, batches: Batches, pad_id: int | None, progress: Progress) -> Theory:
    """The paper's lemma and theorem, of Pre-LN or of LNS as the model is, over what is measured of it."""
    behind = moments(model, batches, pad_id).residual.variance
    return theory(
        [embedding_variance(model, batches, pad_id), *behind],
        lns=scaled(model),
        shapes=shapes(model, batches[0].shape[1]),
        gains=end_to_end_gain(model, [batches[0][:GAIN_ROWS]], pad_id, progress).spectral,
        model=model.name,
    )


MEASURES: dict[str, tuple[str, Measure]] = {
    "variance": ("variance", moments),
    "jacobian": ("jacobian", lambda model, batches, *rest: jacobian(model, batches[:1], *rest)),
    "gain": ("jacobian", lambda model, batches, *rest: end_to_end_gain(model, [batches[0][:GAIN_ROWS]], *rest)),
    "jacobian_map": ("jacobian", mean_jacobians),
    "angular": ("angular", angular_distance),
    "removal": ("removal", removal),
    "run_removal": ("removal", runs_of_blocks),
    "swaps": ("removal", swaps),
    "linear_replacement": ("removal", linear_replacement),
    "causal": ("removal", causal_score),
    "influence": ("influence", block_influence),
    "readout": ("influence", readout),
    "importance": ("influence", lambda model, batches, *rest: layer_importance(model, batches[:1], *rest)),
    "sparsity": ("influence", layer_sparsity),
    "theory": ("theory", measured_theory),
}
"""Study and function of each measure. The costly ones take the first batch alone."""

WIDEST_MAP = 256
"""Up to this hidden size a study takes Jacobians whole, with one backward pass for each of their rows."""


def measures_of(study: str, hidden: int, only: Sequence[str] = ()) -> list[str]:
    """The names of the measures of a study, or of `all`, for a model of this hidden size; or `only` some by name.

    Raises:
        UserError: there is no such study, or it has no such measure.
    """
    studies = list(dict.fromkeys(of for of, _ in MEASURES.values()))
    if study != "all" and study not in studies:
        raise UserError(f"{study!r} is not a study: {nearest(study, [*studies, 'all', 'compare'])}")
    names = [name for name, (of, _) in MEASURES.items() if study in (of, "all")]
    if wrong := next((name for name in only if name not in names), None):
        raise UserError(f"--only: {wrong!r} is not a measure of {study}: {nearest(wrong, names)}")
    return [name for name in names if name in only or (not only and (name != "jacobian_map" or hidden <= WIDEST_MAP))]


@torch.no_grad()
def embedding_variance(model: Layered, batches: Sequence[Tensor], pad_id: int | None) -> float:
    """Variance of what enters the first block, as `moments` defines it."""
    total, count = 0.0, 0

    for tokens, keep in walk(model, batches, pad_id):
        found: list[Tensor] = []
        model.logits(tokens, lambda what, layer, x, found=found: what == "embedding" and found.append(x))
        total += float(token_variance(found[0], keep.float())) * int(keep.sum())
        count += int(keep.sum())
    return total / count


def scaled(model: Layered) -> bool:
    """Whether the pre-norms are scaled by layer (LayerNorm Scaling)."""
    blocks = model.model.blocks if isinstance(model.model, Decoder) else []
    return any(sublayer.gain != 1 for block in blocks for sublayer in block.spec.sublayers)


def shapes(model: Layered, length: int) -> Shapes:
    """What the theorems' constants are computed from; `std` is that of all weights of the blocks' matrices."""
    config: Any = model.model.config
    config = getattr(config, "text_config", config)  # that of the language branch
    hidden = model.hidden
    weights = [weight.detach().float().flatten() for block in model.blocks for _, weight in matrices(block).values()]
    return Shapes(
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        heads=config.num_attention_heads,
        length=length,
        std=float(torch.cat(weights).std()),
    )
