"""The environment of every test; what is set here must be set before the libraries that read it are imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # sums of one thread are reproducible, and two 2-thread workers on 2 cores collapse
os.environ["HF_HUB_OFFLINE"] = "1"  # without network a name on the hub takes 23-51 s to fail, with this no time at all
os.environ["MPLBACKEND"] = "Agg"

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and when a kernel is decorated


def pytest_collection_modifyitems(items):
    """Begin with the longest file (80 s, most of it pip), which would else keep one worker busy alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_packaging.py")
