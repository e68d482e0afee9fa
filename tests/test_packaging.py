"""What `pip install` gives a user: the built wheel, in an empty environment elsewhere, trains from any folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cod_lightning import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

PIP_ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
"""pip's own configuration, proxies and certificates are kept."""


def run(*command, **options) -> str:
    """Run a command, return what it printed, and show all of that if it fails."""
    done = subprocess.run(
        [str(word) for word in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\nexit status {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skip where pip cannot get packages, judged by the one that every build of this package needs."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries=1", "hatchling>=1.25"]
    folder = tmp_path_factory.mktemp("download")
    done = subprocess.run(command, cwd=folder, env=PIP_ENVIRONMENT, text=True, capture_output=True)
    if done.returncode:
        pytest.skip(f"pip cannot get packages here: {(done.stderr.strip() or '?').splitlines()[-1]}")


@pytest.fixture(scope="module")
def wheel(index, tmp_path_factory) -> Path:
    """The wheel as a release makes it: built from the sdist, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, env=PIP_ENVIRONMENT)
    assert (folder / f"cod_lightning-{__version__}.tar.gz").is_file()
    return folder / f"cod_lightning-{__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_every_config(wheel, tmp_path):
    names = set(zipfile.ZipFile(wheel).namelist())
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT, env=PIP_ENVIRONMENT)
    assert names == set(zipfile.ZipFile(tmp_path / wheel.name).namelist()), "the checkout gives another wheel"
    wanted = {f"cod_lightning/{path.relative_to(ROOT / 'src/cod_lightning')}" for path in (ROOT / "src").rglob("*.py")}
    wanted |= {"cod_lightning/py.typed", f"cod_lightning-{__version__}.dist-info/licenses/LICENSE"}
    for folder, place in (("configs", "_configs"), ("experiments", "_configs/experiments")):
        files = sorted((ROOT / folder).rglob("*.yaml"))
        assert files, f"{folder}/ has no YAML file"
        wanted |= {f"cod_lightning/{place}/{path.relative_to(ROOT / folder)}" for path in files}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    assert {name.split("/")[0] for name in names} == {"cod_lightning", f"cod_lightning-{__version__}.dist-info"}


def test_the_wheel_trains_in_an_empty_environment_from_any_folder(wheel, tmp_path):
    """Takes about 80 s on two cores with packages at hand, of which pip takes 60 s.

    With a CPU-only torch pip brings a torchvision here that cannot be imported, and nothing removes it.
    """
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin/python"
    run(python, "-m", "pip", "install", "--no-compile", wheel, env=PIP_ENVIRONMENT)  # compiling all takes 45 s more

    fit = ["-m", "cod_lightning", "fit", "trainer.max_steps=2", "model=tiny", "data.vocab_size=512"]
    clean = {"PATH": os.defpath, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = run(python, *fit, cwd=elsewhere, env=clean)

    records = sorted((elsewhere / "runs").rglob("record.json"))
    assert len(records) == 1, f"records: {records}\n{printed}"
    json.loads(records[0].read_text())
    run(environment / "bin/cod_lightning", "--help", cwd=elsewhere, env=clean)
