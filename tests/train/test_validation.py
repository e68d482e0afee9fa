"""The metrics of a validation, of modules whose model is a function."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cod_lightning.config.compose import compose
from cod_lightning.kernels.loss import IGNORE, linear_cross_entropy
from cod_lightning.train.module import DecoderModule
from cod_lightning.train.vision import VisionModule


@torch.no_grad()
def validated(module, *batches):
    """The metrics of one validation for each batch."""
    metrics = []
    module.log_val_metrics = metrics.append
    for batch in batches:
        module.validation_step(batch, 0)
        module.on_validation_epoch_end()
    return metrics


def test_each_validation_has_the_accuracy_of_its_images_alone():
    module: Any = VisionModule(compose(["task=vision", "model=vit_tiny"]), classes=3, val_images=5)
    module.vit = lambda images: images  # the images are the logits
    labels, index = torch.tensor([0, 0, 0, 0, 1, IGNORE]), torch.tensor([0, 1, 2, 3, 4, -1])
    logits = [4 * torch.eye(3)[predicted] for predicted in ([0, 0, 1, 0, 1, 0], [1, 2, 1, 0, 2, 0])]
    first, second = validated(module, *((part, labels, index) for part in logits))
    assert (first["accuracy"], second["accuracy"]) == (pytest.approx(80), pytest.approx(20))
    for metrics, part in zip((first, second), logits, strict=True):
        assert metrics["val_images"] == 5
        assert metrics["val_loss"] == pytest.approx(F.cross_entropy(part[:5], labels[:5]).item())


def test_each_validation_has_the_loss_and_the_accuracy_of_its_answers_alone():
    words = ["data.seq_len=3", "data.vocab_size=300", "data.val_tokens=300"]
    module: Any = DecoderModule(compose(words), pad_id=0, val_rows=2)
    # A token predicts itself.
    module.decoder = lambda tokens, targets: linear_cross_entropy(4 * torch.eye(5)[tokens], torch.eye(5), targets)
    right, wrong = [1, 1, 1, 1], [1, 1, 2, 1]  # the last number is the length of the prompt
    first, second = validated(module, *((torch.tensor([row, wrong]), torch.arange(2)) for row in (right, wrong)))
    assert (first["accuracy"], second["accuracy"]) == (50, 0)
    hit, miss = F.cross_entropy(4 * torch.eye(5)[[1, 1]], torch.tensor([1, 2]), reduction="none").tolist()
    assert first["val_loss"] == pytest.approx((3 * hit + miss) / 4)
    assert second["val_loss"] == pytest.approx((2 * hit + 2 * miss) / 4)
