"""Reproduce, measure and extend "The Curse of Depth in Large Language Models" (NeurIPS 2025) with PyTorch Lightning."""

from cod_lightning._torchvision import hide_if_unusable

__version__ = "0.2.0"

hide_if_unusable()  # here, so that it comes before every import of lightning, also in spawned workers
