"""Predict the weights of a block between two trained ones: LESA (Yang et al., ACL 2025, arXiv 2502.13794).

The matrices of one name, such as q_proj, are joined side by side and decomposed: [W_1 ... W_L] = U S [V_1 ... V_L]. A
network learns each V_l from V_{l-1} and V_{l+1}, one row at a time. Given the V of two neighbours it predicts that of a
block between them, whose matrix is U S V. The constants are those of the released code (yangyifei729/LESA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.nn.decoder import Block
from cod_lightning.rng import isolate_rng

HIDDEN = 256
"""Width of the two hidden layers."""
EPOCHS = 10
BATCH = 64
LR = 1e-3
"""Learning rate of AdamW, with PyTorch's default weight decay of 0.01."""
NORM_SHARE = 5e-4
"""Share of the norm's squared error in the loss; the rest is the mean squared error."""


@torch.no_grad()
def predict_blocks(
    blocks: Sequence[Block], layers: Sequence[int], progress: Callable[[int, int], object] | None = None
) -> list[Block]:
    """New blocks, one after each of some layers.

    Matrices are predicted; norms, biases, scales and the spec are copies of those of the block before.

    Args:
        blocks: of a trained decoder, at least three; they do not change.
        layers: from 1, at most the last but one.
        progress: called with the number of matrices that are predicted in every new block, and that of all.
    """
    predicted = [deepcopy(blocks[layer - 1]) for layer in layers]
    names = [name for name, parameter in blocks[0].named_parameters() if parameter.ndim == 2]
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names))
        matrices = predict_between([block.get_parameter(name).detach() for block in blocks], layers)
        for block, matrix in zip(predicted, matrices, strict=True):
            block.get_parameter(name).copy_(matrix)
    return predicted


def predict_between(matrices: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Predict a matrix after each of some layers, always with the same random numbers.

    Args:
        matrices: [out, in] of every block, first to last, at least three.
        layers: from 1, at most the last but one.
    """
    joined = torch.cat([matrix.mT for matrix in matrices])  # tall, which LAPACK decomposes many times faster than wide
    v, s, u = torch.linalg.svd(joined.to(torch.promote_types(joined.dtype, torch.float32)), full_matrices=False)
    parts = v.mT.split(matrices[0].shape[1], dim=1)  # [rank, in] each
    neighbours = [torch.cat(pair, dim=1) for pair in zip(parts, parts[2:], strict=False)]
    with isolate_rng(), torch.enable_grad():
        torch.manual_seed(0)
        network = train_network(torch.cat(neighbours), torch.cat(parts[1:-1]))
    with torch.no_grad():
        return [(u.mT * s) @ network(torch.cat(parts[layer - 1 : layer + 1], dim=1)) for layer in layers]


def train_network(inputs: Tensor, targets: Tensor) -> nn.Module:
    """A network from rows [rows, 2 in] to rows [rows, in], trained as in the released code."""
    network = nn.Sequential(
        nn.Linear(inputs.shape[1], HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, targets.shape[1]),
    ).to(inputs)
    optimizer = torch.optim.AdamW(network.parameters(), LR, fused=True)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            outputs, goal = network(inputs[rows]), targets[rows]
            norm_error = (outputs.norm() - goal.norm()).square()
            loss = (1 - NORM_SHARE) * F.mse_loss(outputs, goal) + NORM_SHARE * norm_error
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network
