"""The LightningModule of images: a Vision Transformer that names the class of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from cod_lightning.evaluate.perplexity import Perplexity
from cod_lightning.kernels.loss import IGNORE
from cod_lightning.measure.layers import LayerStatistics, image_statistics
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_vit
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import VisionTransformer, label_loss
from cod_lightning.train.module import StepModule


class VisionModule(StepModule):
    """Trains a Vision Transformer on images and labels; a step's tokens are the patches of its images.

    Args:
        model: shape of the blocks.
        image_size, patch_size: sides in pixels.
        classes: their number.
        val_images: number of validation images over all ranks.
        settings: of `StepModule`.
    """

    vit: VisionTransformer

    def __init__(
        self, model: DecoderConfig, *, image_size: int, patch_size: int, classes: int, val_images: int, **settings: Any
    ):
        super().__init__(model, **settings)
        self.shape = {"image_size": image_size, "patch_size": patch_size, "classes": classes}
        # For its exact sum of losses; what it makes of them beyond their mean is for text.
        self.losses = Perplexity(val_images, paper_batch=val_images)
        self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE, validate_args=False)

    def build(self, device: torch.device, wrap: Callable[[VisionTransformer], None]) -> None:
        specs = build_all(self.norm, self.model_config.num_hidden_layers)
        self.vit = build_vit(self.model_config, specs, self.seed, **self.shape, device=device, wrap=wrap)

    @property
    def network(self) -> VisionTransformer:
        return self.vit

    def rows_and_targets(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images, labels

    def count_tokens(self, rows: Tensor) -> Tensor:
        return torch.tensor(len(rows) * (self.shape["image_size"] // self.shape["patch_size"]) ** 2, device=rows.device)

    def statistics(self, network: VisionTransformer, probe: tuple[Tensor, Tensor]) -> LayerStatistics:
        images, labels = self.share(probe[0], 0), self.share(probe[1], IGNORE)
        return image_statistics(network, images, labels, self.total)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, index = batch
        logits = self.vit(images)
        found = label_loss(logits, labels)
        self.losses.update(found.rows, found.counts, index)
        self.accuracy.update(logits.argmax(-1), labels)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` in nats per image, `accuracy`, the percentage of images named rightly, and `val_images`."""
        losses = self.losses.compute()
        figures = {
            "val_loss": losses["val_loss"],
            "accuracy": 100 * float(self.accuracy.compute()),
            "val_images": float(losses["val_tokens"]),
        }
        self.losses.reset()
        self.accuracy.reset()
        self.log_dict(figures, logger=False)
