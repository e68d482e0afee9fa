"""A torchvision that cannot work beside a CPU-only torch is hidden, and no other."""

import importlib
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest
from lightning_utilities.core.imports import RequirementCache

from cod_lightning import _torchvision


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Replace all that is installed by distributions of the given versions; torchvision fails like the real one."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    del sys.modules["torchvision"]  # as in a new process, and put back afterwards
    ours = _torchvision.HidingFinder
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, ours)])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def write(**versions):
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")

    return write


def test_a_cuda_build_beside_a_cpu_torch_is_hidden_from_imports_and_metadata(install):
    install(torch="2.13.0+cpu", torchvision="0.28.0", other="1.0")
    assert RequirementCache("torchvision")  # what torchmetrics asks before it imports torchvision

    assert _torchvision.hide_if_unusable()

    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchvision")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("torchvision")
    assert find_spec("torchvision") is None
    assert not RequirementCache("torchvision")
    assert metadata.version("other") == "1.0"


@pytest.mark.parametrize(
    "versions",
    [
        {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"},
        {"torch": "2.13.0+cu130", "torchvision": "0.28.0+cu130"},
        {"torch": "2.13.0", "torchvision": "0.28.0"},
        {"torch": "2.13.0+cpu"},
        {"torchvision": "0.28.0"},
    ],
    ids=str,
)
def test_every_other_pair_is_left_alone(install, versions):
    install(**versions)
    assert not _torchvision.hide_if_unusable()
    with pytest.raises(RuntimeError, match="nms"):
        importlib.import_module("torchvision")
