"""The Vision Transformer of Table 5: the decoder's blocks, under any strategy, over the patches of an image.

What differs from the decoder: attention sees all positions and has no rotary embeddings, positions are learned, the
feed-forward network is GELU with biases, and a class token is read out. As in the decoder, LayerNorm has no bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cod_lightning.kernels.loss import IGNORE, TokenLoss
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import ActivationHook, Attention, Block, Norm, run_blocks
from cod_lightning.nn.strategies import BlockSpec


class Mlp(nn.Module):
    """down(gelu(up x)), with biases."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class PatchEmbedding(nn.Module):
    """The class token and a projection of each patch, plus learned positions: [rows, 1 + patches, hidden]."""

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
        config: the shape of the blocks; what it says of tokens (`vocab_size`, `rope_theta`, ...) is not read.
        specs: one `BlockSpec` per block, from `strategies.build_all`.
        image_size, patch_size: sides in pixels.
        classes: their number.

    Raises:
        ValueError: the shape cannot be built, or the number of specs is not the number of blocks.
    """

    def __init__(self, config: DecoderConfig, specs: list[BlockSpec], image_size: int, patch_size: int, classes: int):
        super().__init__()
        problems = config.problems(len(specs))
        if image_size % patch_size:
            problems.append(f"patches of {patch_size} pixels do not fill an image of {image_size}")
        if problems:
            raise ValueError("; ".join(problems))
        self.config, self.image_size, self.patch_size = config, image_size, patch_size
        self.embedding = PatchEmbedding(config.hidden_size, image_size, patch_size)
        self.layers = nn.ModuleList(
            Block(config, spec, Attention(config, causal=False, output_bias=True), Mlp(config)) for spec in specs
        )
        self.norm = Norm(config, before_matmul=True)
        self.head = nn.Linear(config.hidden_size, classes)

    def empty_like(self) -> VisionTransformer:
        """An uninitialised model of the same shape, on the default device."""
        specs = [block.spec for block in self.blocks]
        return VisionTransformer(self.config, specs, self.image_size, self.patch_size, self.head.out_features)

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]

    def forward(
        self, images: Tensor, labels: Tensor | None = None, hook: ActivationHook | None = None
    ) -> Tensor | TokenLoss:
        """Logits of images [rows, 3, size, size], or their loss against `labels`.

        Args:
            images: [rows, 3, size, size], in any floating dtype.
            labels: [rows], or None.
            hook: called with the activations of every layer; position 0 is the class token.

        Returns:
            Logits [rows, classes]; with labels, a `TokenLoss` with one target per row.
        """
        x_BTD = self.norm(run_blocks(self.blocks, self.embedding(images), None, hook))
        logits = self.head(x_BTD[:, 0])
        return logits if labels is None else label_loss(logits, labels)


def patches(images: Tensor, side: int) -> Tensor:
    """Cut images [rows, 3, height, width] into patches [rows, patches, 3 * side * side], row by row of the image."""
    cut = images.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def label_loss(logits: Tensor, labels: Tensor) -> TokenLoss:
    """Cross-entropy of logits [rows, classes] against labels [rows], `IGNORE` where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return TokenLoss(losses.sum(), losses.detach(), (labels != IGNORE).long())
