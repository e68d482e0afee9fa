"""Packages that training does not use are not imported before the first step, and can be imported later."""

import pytest

from command_words import run_python

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
    run_python(PROGRAM)
