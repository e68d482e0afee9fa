"""Jacobians of blocks (Figure 5): their distance from the identity, and the growth of gradients over the stack.

The Jacobian of a block is that of one token: J = d y_t / d x_t [hidden, hidden], the block's output at token t with
respect to its input at the same token. It is a diagonal token block of the whole derivative and omits the part that
attention carries from earlier tokens. One token of each sequence is perturbed and read at a time, so tokens do not mix,
and all sequences of a batch are processed at once. J stops gradients where the forward pass does (GPAS). Results
are in float64.

`jacobian_products` estimates squares of norms without bias for each token. Square roots are computed after averaging
over tokens, so their bias is of the order of 1 / tokens and does not depend on the number of probes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import RunningMean, iter_batches, step_counter
from cod_lightning.measure.jacobian_products import (
    LinearMap,
    at_token,
    compose,
    differentiable,
    estimate_statistics,
    full_jacobian,
    gaussian,
    jvp_and_vjp,
    largest_singular_value,
    rademacher,
    vjp,
)
from cod_lightning.measure.options import Positive, UpToDepth
from cod_lightning.measure.panels import HeatMap, Lines, Panel
from cod_lightning.measure.result import Progress, Result, table_rows

GROWTH_LAYERS = 8
"""Layers of `jacobian_growth` by default."""
STATISTICS = ("frobenius", "distance", "mean_diagonal", "diagonal_share", "largest_singular_value")


@dataclass(frozen=True)
class Jacobian(Result):
    """Statistics of the token-wise Jacobians J of blocks; d is the hidden size."""

    layers: list[int]
    """The blocks, counting from 1."""
    tokens: int
    """Number of sampled tokens."""
    probes: int | None
    """Random vectors per token; None: every entry of J was computed, as in some older results."""
    frobenius: list[float]
    """||J||_F / sqrt(d), root mean square over tokens; 1 for the identity."""
    distance: list[float]
    """||J - I||_F / sqrt(d), root mean square over tokens."""
    mean_diagonal: list[float]
    """tr(J) / d, mean over tokens."""
    diagonal_share: list[float]
    """sqrt(sum_i J_ii^2) / ||J||_F, from the mean squares over tokens; 1 for a diagonal J."""
    largest_singular_value: list[float]
    """||J||_2, mean over tokens."""
    errors: dict[str, list[float]]
    """Standard error of each of the above, over tokens and probes; NaN for a single token."""

    def rows(self) -> list[dict[str, Any]]:
        return table_rows({**self.series(), **{f"{name}_error": self.errors[name] for name in STATISTICS}})

    def panels(self) -> list[Panel]:
        def lines(ylabel: str, labels: dict[str, str], log: bool = True) -> Lines:
            values = {label: getattr(self, name) for name, label in labels.items()}
            errors = {label: self.errors[name] for name, label in labels.items()}
            return Lines(ylabel, values, log, x=self.layers, errors=errors)

        share = r"share, $(\Sigma J_{ii}^2)^{1/2}/\|J\|_F$"
        # Logarithmic, because the first block of a model with small embeddings lies far above all others.
        return [
            lines(
                "size of the Jacobian J", {"largest_singular_value": r"$\|J\|_2$", "frobenius": r"$\|J\|_F/\sqrt{d}$"}
            ),
            lines("distance from the identity", {"distance": r"$\|J-I\|_F/\sqrt{d}$"}),
            lines("diagonal of J", {"mean_diagonal": r"$\mathrm{tr}(J)/d$", "diagonal_share": share}, log=False),
        ]


@dataclass(frozen=True)
class MeanJacobian(Result):
    """Token-wise Jacobians of blocks, averaged over tokens (Figure 5)."""

    tokens: int
    layers: list[int]
    """The layers, counting from 1."""
    matrices: list[list[list[float]]]
    """[layers, hidden, hidden]; row i holds the derivatives of output i."""

    def series(self) -> dict[str, Sequence[Any]]:
        """Statistics of each averaged matrix; these are not the averages in `Jacobian`."""
        matrices = torch.tensor(self.matrices, dtype=torch.float64, device="cpu")
        identity = torch.eye(matrices.shape[-1], dtype=torch.float64, device="cpu")
        norm = matrices.flatten(1).norm(dim=1)
        diagonal = matrices.diagonal(dim1=1, dim2=2)
        return {
            "layer": self.layers,
            "frobenius": (norm / len(identity) ** 0.5).tolist(),
            "distance": ((matrices - identity).flatten(1).norm(dim=1) / len(identity) ** 0.5).tolist(),
            "mean_diagonal": diagonal.mean(1).tolist(),
            "diagonal_share": (diagonal.norm(dim=1) / norm).tolist(),
        }

    def panels(self) -> list[Panel]:
        return [
            HeatMap(matrix, "input", "output", "mean of dy/dx", first=0, signed=True, title=f"layer {layer}")
            for layer, matrix in zip(self.layers, self.matrices, strict=True)
        ]


@dataclass(frozen=True)
class JacobianGrowth(Result):
    """Norms of d y_l / d x_1, from the first block's input to the output of block l, over all tokens of a sequence."""

    sequences: int
    """Number of measured sequences."""
    layers: list[int]
    """The layers l, counting from 1; the last layer is the left side of Theorems 3.3 and 4.2."""
    spectral: list[float]
    """||d y_l / d x_1||_2, mean over sequences; Lanczos iterations approach it from below."""
    spectral_error: list[float]
    """Standard error over sequences."""
    frobenius: list[float]
    """||d y_l / d x_1||_F / sqrt(n d) for n tokens without padding, root mean square over sequences."""
    frobenius_error: list[float]
    """Standard error over sequences and probes."""

    def panels(self) -> list[Panel]:
        spectral, frobenius = r"$\|\partial y_l/\partial x_1\|_2$", r"$\|\partial y_l/\partial x_1\|_F/\sqrt{nd}$"
        lines = {spectral: self.spectral, frobenius: self.frobenius}
        errors = {spectral: self.spectral_error, frobenius: self.frobenius_error}
        return [Lines("gain from the first block's input", lines, log=True, x=self.layers, errors=errors)]


def jacobian(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    layers: UpToDepth = None,
    probes: Annotated[int, ("at_least", 2)] = 4,
    tokens: Positive = 1,
    iterations: Positive = 3,
    seed: int = 0,
) -> Jacobian:
    """Measure the token-wise Jacobians of blocks.

    A block costs `probes` + 2 `iterations` + 1 backward passes for each batch and sampled position. More `tokens` lower
    the standard errors; three iterations leave the largest singular value 0 to 0.8% low (see `largest_singular_value`).
    `cod.measure` and the command `measure` read the first 16 sequences.

    Options:
        layers: blocks, counting from 1; None: all.
        probes: random vectors per token; the share of the diagonal needs pairs of them.
        tokens: positions sampled in each sequence without replacement. Sequences are weighted by their number of tokens
            without padding, so the mean is one over all tokens.
        iterations: Lanczos iterations for the largest singular value.
        seed: seed of positions and probes.
    """
    chosen = list(layers or range(1, model.depth + 1))
    generator = torch.Generator().manual_seed(seed)
    samples: dict[int, list[Tensor]] = {layer: [] for layer in chosen}
    kept_weights: list[Tensor] = []
    blocks = iter_blocks(model, batches, pad_id, chosen, tokens, generator, progress)
    with differentiable(model.model):
        for layer, function, x, positions, weights in blocks:
            forward, backward = jvp_and_vjp(function, x)
            statistics = []
            for position in positions.T:
                token_vjp = at_token(backward, x, position)
                start = gaussian((len(x), x.shape[-1]), generator, x.device)
                sigma = largest_singular_value(at_token(forward, x, position), token_vjp, start, iterations)
                estimates = estimate_statistics(token_vjp, x, probes, generator)
                statistics.append(torch.cat((estimates, sigma[:, None]), dim=1))
            sampled = weights.flatten() > 0
            samples[layer].append(torch.stack(statistics, dim=1).flatten(0, 1).cpu()[sampled])
            if layer == chosen[0]:
                kept_weights.append(weights.flatten()[sampled])
    weight = torch.cat(kept_weights)
    summaries = [summarise(torch.cat(samples[layer]), weight) for layer in chosen]
    values = {name: [summary[name][0] for summary in summaries] for name in STATISTICS}
    errors = {name: [summary[name][1] for summary in summaries] for name in STATISTICS}
    return Jacobian(model.name, chosen, len(weight), probes, **values, errors=errors)


def mean_jacobian(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    layers: UpToDepth = None,
    tokens: Positive = 1,
    seed: int = 0,
) -> MeanJacobian:
    """Average the token-wise Jacobian over tokens, entry by entry, for the heat maps of Figure 5.

    Each layer costs `tokens` * hidden size backward passes per batch, and hidden size ** 2 numbers. `cod.measure` and
    the command `measure` read the first 16 sequences.

    Options:
        layers: blocks, counting from 1; None: five from the first to the last, as in Figure 5.
        tokens: positions sampled in each sequence, as for `jacobian`.
        seed: seed of the positions.
    """
    chosen = list(layers or model.evenly_spaced(5))
    generator = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(chosen, torch.zeros((), dtype=torch.float64, device="cpu"))
    count, total = 0, 0.0
    blocks = iter_blocks(model, batches, pad_id, chosen, tokens, generator, progress)
    with differentiable(model.model):
        for layer, function, x, positions, weights in blocks:
            backward = vjp(function, x)
            for position, weight in zip(positions.T, weights.T, strict=True):
                matrices = full_jacobian(at_token(backward, x, position), x)
                totals[layer] = totals[layer] + torch.einsum("r,rij->ij", weight.to(x.device), matrices).cpu()
            if layer == chosen[0]:
                count, total = count + int((weights > 0).sum()), total + float(weights.sum())
    return MeanJacobian(model.name, count, chosen, [(totals[layer] / total).tolist() for layer in chosen])


def jacobian_growth(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None = None,
    progress: Progress | None = None,
    *,
    layers: UpToDepth = None,
    probes: Positive = 8,
    iterations: Positive = 12,
    seed: int = 0,
) -> JacobianGrowth:
    """Measure the norms of d y_l / d x_1, the left side of Theorems 3.3 and 4.2, for each sequence.

    Unlike `jacobian` it takes all tokens of a sequence together, including what attention carries between them. Padding
    is neither perturbed nor read. Each layer costs 2 `iterations` backward passes through the blocks up to it: the time
    for eight layers grows linearly with the depth, and for all with its square. The graphs of all blocks are kept for
    one batch: about three times the memory of a training step on it. `cod.measure` and the command `measure` read the
    first two sequences.

    Options:
        layers: the l of d y_l / d x_1, counting from 1; None: `GROWTH_LAYERS`, evenly from the first to the last.
        probes: random vectors per sequence, which estimate the squared Frobenius norm without bias.
        iterations: Lanczos iterations for the largest singular value.
        seed: seed of the probes.
    """
    chosen = list(layers or model.evenly_spaced(GROWTH_LAYERS))
    generator = torch.Generator().manual_seed(seed)
    masked_batches = list(iter_batches(model, batches, pad_id))
    spectral, squares = RunningMean(), RunningMean()
    advance = step_counter(progress, len(masked_batches) * len(chosen))
    with differentiable(model.model):
        for batch, mask in masked_batches:
            batch, mask = batch[mask.any(1)], mask[mask.any(1)]
            inputs, functions = model.block_functions(batch, mask)
            blocks = [jvp_and_vjp(*block) for block in zip(functions[: max(chosen)], inputs, strict=False)]
            kept = mask[:, :, None].double()
            square = torch.zeros(len(batch), len(chosen), dtype=torch.float64, device=model.device)
            for _ in range(probes):
                v = rademacher(inputs[0].shape, generator, model.device) * kept
                for layer, (forward, _) in enumerate(blocks, start=1):
                    v = forward(v)
                    if layer in chosen:
                        square[:, chosen.index(layer)] += (v * kept).square().sum((1, 2)) / probes
            squares.add(square / (mask.sum(1, keepdim=True) * inputs[0].shape[-1]))
            columns = []
            for layer in chosen:
                forward, backward = compose(blocks[:layer], kept)
                start = gaussian(inputs[0].shape, generator, model.device) * kept
                columns.append(largest_singular_value(forward, backward, start, iterations))
                advance()
            spectral.add(torch.stack(columns, dim=1))
    roots = [
        root_and_error(mean, error) for mean, error in zip(squares.mean.tolist(), squares.error.tolist(), strict=True)
    ]
    return JacobianGrowth(
        model=model.name,
        sequences=spectral.count,
        layers=chosen,
        spectral=spectral.mean.tolist(),
        spectral_error=spectral.error.tolist(),
        frobenius=[value for value, _ in roots],
        frobenius_error=[error for _, error in roots],
    )


def iter_blocks(
    model: ModelAdapter,
    batches: Sequence[Batch],
    pad_id: int | None,
    layers: Sequence[int],
    tokens: int,
    generator: torch.Generator,
    progress: Progress | None,
) -> Iterator[tuple[int, LinearMap, Tensor, Tensor, Tensor]]:
    """Yield every layer on every batch: its number, the block as a function, and its input [batch, length, hidden].

    With them come `sample_positions` of the batch, the same for all its layers.
    """
    masked_batches = list(iter_batches(model, batches, pad_id))
    advance = step_counter(progress, len(masked_batches) * len(layers))
    for batch, mask in masked_batches:
        positions, weights = sample_positions(mask.cpu(), tokens, generator)
        inputs, functions = model.block_functions(batch, mask)
        for layer in layers:
            yield layer, functions[layer - 1], inputs[layer - 1], positions, weights
            advance()


def sample_positions(mask: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample positions [batch, count] of a mask [batch, length], with their weights [batch, count] in float64.

    The weights of a sequence add up to its number of kept positions. A sequence with fewer than `count` is filled up
    with positions of weight zero.
    """
    order = torch.rand(mask.shape, generator=generator, device="cpu").masked_fill(~mask, 2.0)
    positions = order.argsort(dim=1)[:, :count]
    kept = mask.gather(1, positions).double()
    return positions, kept * mask.sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)


def summarise(samples: Tensor, weight: Tensor) -> dict[str, tuple[float, float]]:
    """Return each of `STATISTICS` of a block with its standard error.

    Args:
        samples: of each token `estimate_statistics` and the largest singular value [tokens, 5].
        weight: of the tokens [tokens].
    """
    mean, count = weight @ samples / weight.sum(), len(samples)
    share = mean[3] / mean[0]
    # Numerator and denominator of the share come from the same tokens, so their errors mostly cancel.
    deviations = torch.column_stack((samples - mean, (samples[:, 3] - share * samples[:, 0]) / mean[0]))
    spread = (weight[:, None] * deviations).square().sum(0).sqrt() / weight.sum()
    errors = (spread * (count / (count - 1)) ** 0.5).tolist() if count > 1 else [math.nan] * 6
    return {
        "frobenius": root_and_error(float(mean[0]), errors[0]),
        "distance": root_and_error(float(mean[1]), errors[1]),
        "mean_diagonal": (float(mean[2]), errors[2]),
        "diagonal_share": root_and_error(float(share), errors[5]),
        "largest_singular_value": (float(mean[4]), errors[4]),
    }


def root_and_error(square: float, error: float) -> tuple[float, float]:
    """Return the square root of an estimate, zero if it is negative, and its standard error."""
    if square <= 0:
        return 0.0, error**0.5
    return square**0.5, min(error / (2 * square**0.5), error**0.5)
