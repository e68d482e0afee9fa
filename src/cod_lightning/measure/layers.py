"""Per-layer statistics of a model on a fixed batch: one forward pass, and one backward pass for gradients.

The paper does not define its "output variance"; this is the definition that its authors' later code uses: the unbiased
variance over the hidden dimension for each token, averaged over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cod_lightning.kernels.loss import IGNORE, next_tokens
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.vit import VisionTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerStatistics:
    """One number per block, first block first."""

    residual: list[float]
    """Variance of the block's output, the residual stream (Figures 4 and 9)."""
    attention: list[float]
    """Variance of what attention adds to the stream."""
    ffn: list[float]
    """Variance of what the feed-forward network adds to the stream."""
    gradient_norm: list[float] = field(default_factory=list)
    """L2 norm of the gradient of the mean loss with respect to the block's parameters; empty if not asked for."""


def token_variances(x: Tensor) -> Tensor:
    """Unbiased variance over the hidden dimension of each token, in float32: [..., hidden] -> [...]."""
    return x.detach().float().var(-1)


def layer_statistics(
    decoder: Decoder,
    tokens: Tensor,
    pad_id: int | None = None,
    gradients: bool = True,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> LayerStatistics:
    """Measure every block of `decoder` on `tokens`; its parameters and their `.grad` are left as they are.

    Args:
        decoder: in any dtype; the variances are taken in float32.
        tokens: [rows, length].
        pad_id: tokens that do not count.
        gradients: also run the backward pass.
        total: sums a tensor over the ranks that have parts of the rows each; all of them then find what one would.
    """
    weight = torch.ones_like(tokens, dtype=torch.float32) if pad_id is None else (tokens != pad_id).float()
    return statistics_of(decoder, tokens, next_tokens(tokens, pad_id), weight, gradients, total)


def image_statistics(
    vit: VisionTransformer, images: Tensor, labels: Tensor, total: Callable[[Tensor], Tensor] = lambda x: x
) -> LayerStatistics:
    """`layer_statistics` on images [rows, 3, size, size] that have a label; all tokens but the class token count."""
    weight = torch.ones(len(images), len(vit.embedding.positions), device=images.device)
    weight[:, 0] = 0
    weight[labels == IGNORE] = 0
    return statistics_of(vit, images, labels, weight, True, total)


def statistics_of(
    model: Decoder | VisionTransformer,
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    gradients: bool,
    total: Callable[[Tensor], Tensor],
) -> LayerStatistics:
    """`layer_statistics` on `rows` and their `targets`; a token with weight 0, of [rows, length], does not count."""
    variances: dict[str, list[Tensor]] = {"residual": [], "attention": [], "ffn": []}

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name in variances:
            variances[name].append(token_variances(x))

    blocks = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    norms: list[float] = []
    with torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(gradients):
        loss = model(rows, targets, hook)
        if gradients:
            mean = loss.total / total(loss.counts.sum())
            grads = iter(torch.autograd.grad(mean, [p for block in blocks for p in block]))
            none = weight.new_zeros(1)  # of a frozen block
            wholes = [total(torch.cat([none, *(next(grads).float().flatten() for _ in block)])) for block in blocks]
            norms = torch.stack([whole.norm() for whole in wholes]).tolist()
    assert all(len(values) == len(blocks) for values in variances.values())
    values = torch.stack([torch.stack(values) for values in variances.values()])
    means = total((values * weight).sum((2, 3))) / total(weight.sum())
    return LayerStatistics(**dict(zip(variances, means.tolist(), strict=True)), gradient_norm=norms)


def first_bad_layer(model: Decoder | VisionTransformer, rows: Tensor, targets: Tensor) -> str | None:
    """Where a forward pass first leaves the finite numbers, such as "layer 3 attention"; None if it does not."""
    bad: list[str] = []

    def hook(name: str, layer: int, x: Tensor) -> None:
        if not bad and not torch.isfinite(x).all():
            bad.append("embedding" if layer == 0 else f"layer {layer} {name}")

    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        loss = model(rows, targets, hook)
    head = [name for name, _ in model.named_children()][-1]
    return bad[0] if bad else None if torch.isfinite(loss.total) else head


def plot_variance(steps: Sequence[int], residual: Sequence[Sequence[float]]) -> Figure:
    """Variance of the residual stream over steps, one line per layer coloured by depth (Figure 4).

    Args:
        steps: optimizer steps [measurements].
        residual: variances [measurements][layers].
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    depth = len(residual[0])
    colours, shades = matplotlib.colormaps["viridis"], Normalize(1, max(depth, 2))
    for layer in range(depth):
        values = [row[layer] for row in residual]
        axes.plot(steps, values, color=colours(shades(layer + 1)), lw=1.2, marker="." if len(steps) == 1 else None)
    axes.set(xlabel="step", ylabel="variance of the residual stream", yscale="log")
    figure.colorbar(ScalarMappable(shades, colours), ax=axes, label="layer")
    return figure
