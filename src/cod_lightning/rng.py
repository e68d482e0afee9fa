"""Random states."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolate_rng() -> Generator[None]:
    """Restore the random states of torch, numpy and Python after the `with`, also after an error.

    Those of GPUs are restored only if CUDA is initialised, which a forked process cannot do. Lightning's function of
    this name initialises it, and restores nothing after an error.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
