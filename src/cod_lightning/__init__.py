"""Reproduce, measure and extend "The Curse of Depth in Large Language Models" (NeurIPS 2025) with PyTorch Lightning."""

__version__ = "0.1.0"
