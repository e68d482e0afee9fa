"""The LightningModule of image classification with a Vision Transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from cod_lightning.config.schema import Config
from cod_lightning.evaluate.perplexity import Perplexity
from cod_lightning.kernels.loss import IGNORE
from cod_lightning.nn.init import build_model
from cod_lightning.nn.vit import VisionTransformer, label_loss
from cod_lightning.train.module import StepModule


class VisionModule(StepModule):
    """Trains a Vision Transformer on images and labels; the recorded tokens are image patches.

    Args:
        config: the run.
        classes: number of classes.
        val_images: number of validation images over all ranks.
    """

    vit: VisionTransformer

    def __init__(self, config: Config, *, classes: int, val_images: int):
        super().__init__(config)
        self.shape = {"image_size": config.images.size, "patch_size": config.images.patch_size, "classes": classes}
        # Only its exact mean is used.
        self.losses = Perplexity(val_images, paper_batch=val_images)
        self.accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=IGNORE, validate_args=False)

    def build(self, device: torch.device, wrap: Callable[[VisionTransformer], None]) -> None:
        model = self.model_config()
        self.vit = build_model(
            lambda: VisionTransformer(model, self.specs, **self.shape), self.config.seed, device, wrap
        )

    @property
    def network(self) -> VisionTransformer:
        return self.vit

    def inputs_and_targets(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images, labels

    def count_tokens(self, inputs: Tensor) -> Tensor:
        return torch.tensor(len(inputs) * self.config.sequence_length, device=inputs.device)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, index = batch
        logits = self.vit(images)
        output = label_loss(logits, labels)
        self.losses.update(output.per_sequence, output.counts, index)
        self.accuracy.update(logits.argmax(-1), labels)

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` in nats per image, `accuracy` in percent, and `val_images`."""
        losses = self.losses.compute()
        metrics = {
            "val_loss": losses["val_loss"],
            "accuracy": 100 * float(self.accuracy.compute()),
            "val_images": float(losses["val_tokens"]),
        }
        self.losses.reset()
        self.accuracy.reset()
        self.log_val_metrics(metrics)
