"""Measures for use during training: of runs on their probe, and of a `DepthMonitor`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import IGNORE, next_tokens
from cod_lightning.measure.activation_stats import token_variance
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import iter_targets, joined, token_mask
from cod_lightning.measure.jacobians import Jacobian, jacobian
from cod_lightning.measure.registry import MEASURES, PLACES
from cod_lightning.measure.result import Progress
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.vit import Images, VisionTransformer
from cod_lightning.nn.weights import is_sharded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Series = dict[str, list[Any]]
"""Values by layer; a series `layer` holds the numbers of the layers if they are not 1, 2, ...."""


@dataclass(frozen=True)
class ProbeStatistics:
    """Statistics of every block that a training run records, first block first."""

    residual: list[float]
    """Variance of the block's output."""
    attention: list[float]
    """Variance of the attention branch."""
    ffn: list[float]
    """Variance of the FFN branch."""
    gradient_norm: list[float]
    """L2 norm of the gradient of the mean loss with respect to the block's parameters."""


def probe_statistics(
    model: Decoder | VisionTransformer,
    batch: Batch,
    pad_id: int | None = None,
    *,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> ProbeStatistics:
    """Measure every block in one forward and one backward pass; `.grad` of the parameters stays unchanged.

    Args:
        model: in any dtype.
        batch: tokens [batch, length] or images; on several ranks, a part of the batch each.
        pad_id: padding token, which follows the others, does not count, and need not be in the model's vocabulary.
        sum_over_ranks: adds up a tensor over the ranks, so that all get the statistics of the whole batch.
    """
    if isinstance(batch, Images):
        inputs, targets = batch.pixels, batch.labels
    else:
        inputs, targets = batch, next_tokens(batch, pad_id)
        if pad_id is not None:
            inputs = batch.masked_fill(batch == pad_id, 0)
    weight = token_mask(ModelAdapter(model), batch, pad_id).float()
    variances: dict[str, list[Tensor]] = {place: [] for place in PLACES}

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name in variances:
            variances[name].append(token_variance(x))

    blocks = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    with torch.compiler.set_stance("force_eager"), torch.enable_grad():
        loss = model(inputs, targets, hook)
        mean = loss.total / sum_over_ranks(loss.counts.sum())
        grads = iter(torch.autograd.grad(mean, [p for block in blocks for p in block]))
    zero = weight.new_zeros(1)  # the gradient of a frozen block
    flat = [torch.cat([zero, *(next(grads).float().flatten() for _ in block)]) for block in blocks]
    norms = torch.stack([sum_over_ranks(gradient).norm() for gradient in flat]).tolist()
    values = torch.stack([torch.stack(layers) for layers in variances.values()])
    means = sum_over_ranks((values * weight).sum((2, 3))) / sum_over_ranks(weight.sum())
    return ProbeStatistics(**dict(zip(variances, means.tolist(), strict=True)), gradient_norm=norms)


def first_bad_layer(model: Decoder | VisionTransformer, inputs: Tensor, targets: Tensor) -> str | None:
    """Locate the first NaN or infinity in a forward pass, such as "layer 3 attention"; None without one."""
    bad: list[str] = []

    def hook(name: str, layer: int, x: Tensor) -> None:
        if not bad and not torch.isfinite(x).all():
            bad.append("embedding" if layer == 0 else f"layer {layer} {name}")

    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        loss = model(inputs, targets, hook)
    if not bad and not torch.isfinite(loss.total):
        bad = [name for name, _ in model.named_children()][-1:]
    return bad[0] if bad else None


def plot_variance(steps: Sequence[int], residual: Sequence[Sequence[float]]) -> Figure:
    """Variance of the residual stream over steps, one line per layer coloured by depth (Figure 4).

    Args:
        steps: optimizer steps [measurements].
        residual: variances [measurements][layers].
    """
    from cod_lightning import plots

    with plots.style():
        figure, axes = plots.grid_figure(6.4, 4)
        colours = plots.lines_by_depth(axes[0][0], steps, residual)
        axes[0][0].set_ylabel("variance of the residual stream")
        plots.depth_bar(figure, colours, axes)
    return figure


def training_jacobian(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None, progress: Progress
) -> Jacobian:
    """Jacobians of eight layers at one token of four sequences or images.

    Tokens and probe vectors are the same at every step. Two iterations underestimate the largest singular value by 1 to
    2%, and by up to 12% in the first layer.
    """
    sequences = joined(batches)[:4]
    return jacobian(
        model, [sequences], pad_id, progress, layers=model.evenly_spaced(8), tokens=1, probes=4, iterations=2
    )


TRAINING_MEASURES: dict[str, Callable[..., Any]] = {**MEASURES, "jacobian": training_jacobian}
"""The measures by name, with cheaper versions for use during training."""


@torch.no_grad()
def variance(model: ModelAdapter, tokens: Tensor, pad_id: int | None) -> Series:
    """Variance of the residual stream after every block: mean and median over tokens."""
    mask, means, medians = token_mask(model, tokens, pad_id), [], []

    def hook(name: str, layer: int, x: Tensor) -> None:
        if name == "residual":
            values = token_variance(x)[mask]
            means.append(values.mean())
            medians.append(values.quantile(0.5))

    model.run(tokens, hook, mask)
    return {"variance": torch.stack(means).tolist(), "variance_median": torch.stack(medians).tolist()}


def gradient_norm(model: ModelAdapter, tokens: Tensor, pad_id: int | None) -> Series:
    """L2 norm of the gradient of the mean loss with respect to every block's parameters; `.grad` stays as it is.

    Raises:
        UserError: the model does not predict the next token or has no head, its parameters are sharded, no token has a
            next one, or a block is checkpointed with `use_reentrant=True`, which gives gradients to `.grad` alone.
    """
    if reason := model.why_no_loss:
        raise UserError(f"measures: leave out gradient_norm, because {reason}")
    parameters = [[p for p in block.parameters() if p.requires_grad] for block in model.blocks]
    if is_sharded(model.model):
        raise UserError("measures: gradient_norm does not support sharded parameters (FSDP): leave it out")
    [(_, targets)] = iter_targets(model, [tokens], pad_id)
    with torch.enable_grad():
        logits = model.logits(tokens).float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE)
        flat = [parameter for block in parameters for parameter in block]
        if not flat:  # all blocks are frozen
            return {"gradient_norm": [0.0] * len(parameters)}
        if not loss.requires_grad or is_in_graph(loss, "CheckpointFunctionBackward"):  # it would be 0
            raise UserError(
                "measures: gradient_norm does not support checkpoints of blocks with use_reentrant=True: leave it out"
            )
        with without_tensor_hooks(flat):
            gradients = iter(torch.autograd.grad(loss, flat, materialize_grads=True))
    norms = [torch.stack([next(gradients).float().norm() for _ in block] or [loss * 0]).norm() for block in parameters]
    return {"gradient_norm": torch.stack(norms).tolist()}


@contextmanager
def without_tensor_hooks(tensors: Sequence[Tensor]) -> Generator[None]:
    """Without the user's hooks of these tensors, such as those that scale or count gradients, inside the `with`."""
    hooks = [tensor._backward_hooks for tensor in tensors]
    for tensor in tensors:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, own in zip(tensors, hooks, strict=True):
            tensor._backward_hooks = own


def is_in_graph(x: Tensor, operation: str) -> bool:
    """Whether an operation is in the graph of autograd that leads to x."""
    seen: set[Any] = set()
    stack: list[Any] = [x.grad_fn]
    while stack:
        if (node := stack.pop()) is None or node in seen:
            continue
        if node.name() == operation:
            return True
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


def registered(name: str) -> Callable[[ModelAdapter, Tensor, int | None], Series]:
    """A measure of the registry as a function of a monitor."""

    def measure(model: ModelAdapter, tokens: Tensor, pad_id: int | None) -> Series:
        result = TRAINING_MEASURES[name](model, [tokens], pad_id, None)
        series = MEASURES[name].recorded(result)
        return {column if column == "layer" else f"{name}_{column}": values for column, values in series.items()}

    return measure


MONITORED: dict[str, Callable[[ModelAdapter, Tensor, int | None], Series]] = {
    **{name: registered(name) for name in MEASURES},
    "variance": variance,
    "gradient_norm": gradient_norm,
}
"""The measures of a `DepthMonitor`, by name."""
