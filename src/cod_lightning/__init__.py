"""Reproduce, measure and extend "The Curse of Depth in Large Language Models" (NeurIPS 2025) with PyTorch Lightning.

    import cod_lightning as cod

    cod.apply(model, "lns")     # put LayerNorm Scaling onto a model of transformers, before it is trained
    cod.verify(model, "lns")    # prove by running it that every block applies it

The public names stand in `__init__.pyi`; each is imported when it is first used.
"""

import lazy_loader

from cod_lightning._torchvision import hide_if_unusable

__version__ = "0.2.0"

hide_if_unusable()  # here, so that it comes before every import of lightning, also in spawned workers

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
