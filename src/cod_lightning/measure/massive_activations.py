"""Massive activations: single entries of the residual stream far above all others (Sun et al., arXiv 2402.17762).

An entry is massive if its magnitude is above 100 and above 1,000 times the median magnitude of its hidden state, which
is that of a sequence after a block. They lie in a few channels and on a few tokens, often the first, and may carry
most of the mean variance of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from cod_lightning.measure.adapter import Batch
from cod_lightning.nn.vit import Images

MAGNITUDE = 100
RATIO = 1000
MAX_CHANNELS = 10
"""Channels that a result lists."""


@dataclass(frozen=True)
class MassiveActivation:
    """A channel of the residual stream with massive activations, and the largest of them."""

    channel: int
    """Counts from 0."""
    layer: int
    """The block after which it is largest, counting from 1."""
    row: int
    """Its sequence, counting from 0."""
    position: int
    """Its token in the sequence, counting from 0."""
    token: int | None
    """The token's id; None for a patch of an image."""
    text: str | None
    """The token's text, if the tokenizer is known."""
    value: float
    tokens: int
    """The number of tokens with a massive activation in this channel after this block."""
    layers: list[int]
    """All blocks after which the channel has massive activations."""


class MassiveActivationFinder:
    """Collects the largest massive activation of every channel after every block."""

    def __init__(self) -> None:
        self.rows = 0
        """Sequences of earlier batches."""
        self.found: dict[int, dict[int, MassiveActivation]] = {}
        """The largest by channel and layer."""

    def add(self, layer: int, x: Tensor, mask: Tensor, batch: Batch) -> None:
        """Search the output of a block [batch, length, hidden] at the positions of a mask [batch, length]."""
        for row, (states, kept) in enumerate(zip(x, mask, strict=True)):
            magnitude = states[kept].abs()
            if not len(magnitude) or not magnitude.max() > MAGNITUDE:
                continue
            massive = magnitude > max(MAGNITUDE, RATIO * float(magnitude.median()))
            positions = kept.nonzero()[:, 0]
            for channel in massive.any(0).nonzero()[:, 0].tolist():
                position = int(positions[magnitude[:, channel].argmax()])
                token = None if isinstance(batch, Images) else int(batch[row, position])
                value, tokens = float(states[position, channel]), int(massive[:, channel].sum())
                new = MassiveActivation(channel, layer, self.rows + row, position, token, None, value, tokens, [layer])
                by_layer = self.found.setdefault(channel, {})
                if (old := by_layer.get(layer)) is not None:
                    new = replace(max(old, new, key=magnitude_of), tokens=old.tokens + new.tokens)
                by_layer[layer] = new

    def largest_channels(self, decode: Callable[[int], str] | None) -> tuple[list[MassiveActivation], int]:
        """The channels with the largest massive activations, largest first, and the number of all such channels."""
        result = []
        for _, by_layer in sorted(self.found.items()):
            layers = sorted(by_layer)
            top = max((by_layer[layer] for layer in layers), key=magnitude_of)
            text = None if decode is None or top.token is None else decode(top.token)
            result.append(replace(top, text=text, layers=layers))
        result.sort(key=magnitude_of, reverse=True)
        return result[:MAX_CHANNELS], len(result)


def magnitude_of(activation: MassiveActivation) -> float:
    return abs(activation.value)
