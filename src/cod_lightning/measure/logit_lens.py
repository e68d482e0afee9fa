"""The logit lens: predictions that the final norm and the head read from every layer, with DoLa's divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cod_lightning.kernels.loss import IGNORE, jensen_shannon
from cod_lightning.measure.adapter import Batch, ModelAdapter
from cod_lightning.measure.batches import RunningMean, hidden_states, iter_targets, log_probabilities, token_chunks
from cod_lightning.measure.panels import Lines, Panel
from cod_lightning.measure.result import Progress, Result


@dataclass(frozen=True)
class LogitLens(Result):
    """Predictions read from the output of each block, averaged over targets; in nats."""

    tokens: int
    """Number of targets."""
    loss: list[float]
    """Cross-entropy of the next token (the logit lens)."""
    kl: list[float]
    """KL(final || layer) of the next-token distributions."""
    js: list[float]
    """Jensen-Shannon divergence between layer and final (DoLa); at most log 2."""

    def panels(self) -> list[Panel]:
        lines = {"KL(last || layer)": self.kl[:-1], "Jensen-Shannon": self.js[:-1]}
        return [
            Lines("loss read from the layer (nats)", {"loss": self.loss}),
            Lines("divergence from the last layer (nats)", lines, log=True),
        ]


@torch.no_grad()
def logit_lens(
    model: ModelAdapter, batches: Sequence[Batch], pad_id: int | None = None, progress: Progress | None = None
) -> LogitLens:
    """Apply the final norm and the head to the output of every block."""
    means = RunningMean()
    for tokens, targets in iter_targets(model, batches, pad_id, progress):
        mask = targets != IGNORE
        outputs, labels = hidden_states(model, tokens, mask)[1:], targets[mask]
        for chunk in token_chunks(model, len(labels)):
            final = log_probabilities(model, outputs[-1][chunk])
            layers = [divergences(final, log_probabilities(model, x[chunk]), labels[chunk]) for x in outputs]
            means.add(torch.stack(layers, dim=1))
    return LogitLens(model.name, means.count, *means.mean.T.tolist())


def divergences(final: Tensor, layer: Tensor, targets: Tensor) -> Tensor:
    """Return loss, KL(final || layer) and Jensen-Shannon divergence of each token [tokens, 3], in nats.

    Args:
        final: log-probabilities of the last layer [tokens, vocabulary].
        layer: log-probabilities of a layer [tokens, vocabulary].
        targets: [tokens].
    """
    kl = (final.exp() * (final - layer)).sum(-1)
    loss = -layer.gather(1, targets[:, None])[:, 0]
    return torch.stack((loss, kl, jensen_shannon(final, layer)), dim=-1)
