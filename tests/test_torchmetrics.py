"""Packages that training does not use are not imported before the first step, and can be imported later."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from cod_lightning._torchmetrics import UNUSED, import_torchmetrics
import_torchmetrics()
import torchmetrics
from cod_lightning.train import run
assert not {*UNUSED} & {*sys.modules}, {*UNUSED} & {*sys.modules}
from importlib import metadata
from lightning_utilities.core.imports import package_available
assert package_available("transformers")
assert metadata.version("transformers")
import transformers
import_torchmetrics()
assert sys.modules["transformers"] is transformers
"""


def test_torchmetrics_is_imported_without_scipy_and_transformers():
    pytest.importorskip("transformers")
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
