"""The Vision Transformer of Table 5: the decoder's blocks, under any strategy, on the patches of an image.

Unlike the decoder it has bidirectional attention, learned position embeddings, a GELU feed-forward network with biases,
and a class token whose output the head classifies. As in the decoder, LayerNorm has no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.kernels.loss import IGNORE, TokenLoss
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import ActivationHook, Attention, Block, run_blocks, set_step
from cod_lightning.nn.norms import final_norm, with_norm_kind
from cod_lightning.nn.strategies import BlockSpec


@dataclass(frozen=True)
class Images:
    """A batch of images with labels, for a Vision Transformer.

    Patches count as tokens, the class token does not. The target is the label, predicted from the class token, so
    losses are in nats per image.
    """

    pixels: Tensor
    """[batch, 3, size, size]."""
    labels: Tensor
    """[batch]; an image with label `IGNORE` does not count."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def split(self, size: int) -> list[Images]:
        """Parts of `size` images; the last may have fewer."""
        return [self[first : first + size] for first in range(0, len(self), size)]


class Mlp(nn.Module):
    """down(gelu(up x)), with biases."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class PatchEmbedding(nn.Module):
    """The class token and a projection of each patch, plus position embeddings: [B, 1 + patches, D]."""

    def __init__(self, hidden_size: int, image_size: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.projection = nn.Linear(3 * patch_size**2, hidden_size)
        self.class_token = nn.Parameter(torch.empty(hidden_size))
        self.positions = nn.Parameter(torch.empty(1 + (image_size // patch_size) ** 2, hidden_size))

    def forward(self, images: Tensor) -> Tensor:
        x = self.projection(patches(images, self.patch_size).to(self.positions.dtype))
        return torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1) + self.positions


class VisionTransformer(nn.Module):
    """A classifier of square images.

    Args:
        config: the configuration of the blocks; fields about tokens (`vocab_size`, `rope_theta`, ...) are ignored.
        specs: one `BlockSpec` for each block, from `strategies.build_all`.
        image_size, patch_size: sides in pixels.
        classes: their number.

    Raises:
        ValueError: `config` is invalid, or the number of specs is not the number of blocks.
    """

    step: int
    """Optimizer steps done so far, as of `set_step`."""

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec], image_size: int, patch_size: int, classes: int):
        super().__init__()
        problems = config.problems(rotary=False)
        if len(specs) != config.num_hidden_layers:
            problems.append(f"{len(specs)} block specs for model.num_hidden_layers={config.num_hidden_layers}")
        if image_size % patch_size:
            problems.append(f"patches of {patch_size} pixels do not fill an image of {image_size}")
        if problems:
            raise ValueError("; ".join(problems))
        self.config, self.image_size, self.patch_size = config, image_size, patch_size
        self.embedding = PatchEmbedding(config.hidden_size, image_size, patch_size)
        self.layers = nn.ModuleList(
            Block(
                config, spec, Attention(with_norm_kind(config, spec), spec, causal=False, output_bias=True), Mlp(config)
            )
            for spec in specs
        )
        self.norm = final_norm(config, specs)
        self.head = nn.Linear(config.hidden_size, classes)
        set_step(self, 0)

    def empty_like(self) -> VisionTransformer:
        """An uninitialised model of the same configuration, on the default device."""
        specs = [block.spec for block in self.blocks]
        return VisionTransformer(self.config, specs, self.image_size, self.patch_size, self.head.out_features)

    @property
    def blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.layers))

    def forward(
        self, images: Tensor, labels: Tensor | None = None, hook: ActivationHook | None = None
    ) -> Tensor | TokenLoss:
        """Logits of `images`, or the loss against `labels`.

        Args:
            images: [B, 3, size, size], in any floating dtype.
            labels: [B], or None.
            hook: called with the activations of every layer; token 0 is the class token.

        Returns:
            Logits [B, classes]; with labels, a `TokenLoss` with one target per image.
        """
        x_BTD = self.norm(run_blocks(self.blocks, self.embedding(images), None, hook))
        logits = self.head(x_BTD[:, 0])
        return logits if labels is None else label_loss(logits, labels)


def patches(images: Tensor, side: int) -> Tensor:
    """Split images [B, 3, height, width] into patches [B, patches, 3 * side * side], in the order of reading."""
    return F.unfold(images, side, stride=side).mT


def label_loss(logits: Tensor, labels: Tensor) -> TokenLoss:
    """Cross-entropy of logits [B, classes] against labels [B]; `IGNORE` is no label."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return TokenLoss(losses.sum(), losses.detach(), (labels != IGNORE).long())
