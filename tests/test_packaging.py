"""What `pip install` gives a user: the built wheel, installed elsewhere, trains from any folder."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cod_lightning import __version__

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run(*command, **options) -> str:
    """Run a command, return what it printed, and show all of that if it fails."""
    done = subprocess.run(
        [str(word) for word in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\nexit status {done.returncode}\n{done.stdout}"
    return done.stdout


def build(*options):
    """Build with the hatchling of this environment, which needs no network."""
    run(sys.executable, "-m", "build", "--no-isolation", *options, ROOT, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel as a release makes it: built from the sdist, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build("--outdir", folder)
    assert (folder / f"cod_lightning-{__version__}.tar.gz").is_file()
    return folder / f"cod_lightning-{__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_every_config(wheel, tmp_path):
    names = set(zipfile.ZipFile(wheel).namelist())
    build("--wheel", "--outdir", tmp_path)
    assert names == set(zipfile.ZipFile(tmp_path / wheel.name).namelist()), "the checkout gives another wheel"
    wanted = {f"cod_lightning/{path.relative_to(ROOT / 'src/cod_lightning')}" for path in (ROOT / "src").rglob("*.py")}
    wanted |= {"cod_lightning/py.typed", f"cod_lightning-{__version__}.dist-info/licenses/LICENSE"}
    for folder, place in (("configs", "_configs"), ("experiments", "_configs/experiments")):
        files = sorted((ROOT / folder).rglob("*.yaml"))
        assert files, f"{folder}/ has no YAML file"
        wanted |= {f"cod_lightning/{place}/{path.relative_to(ROOT / folder)}" for path in files}
    assert wanted <= names, f"missing: {sorted(wanted - names)}"
    assert {name.split("/")[0] for name in names} == {"cod_lightning", f"cod_lightning-{__version__}.dist-info"}


def test_the_wheel_trains_from_any_folder(wheel, tmp_path):
    """The environment has the packages of this one: `make setup` shows that those which are declared install."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    (site_packages,) = environment.glob("lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, env=ENVIRONMENT)
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    (elsewhere / "text.txt").write_text("The norm of a deep block grows with depth. " * 3000)
    data = ["data=files", "data.files=text.txt", "data.vocab_size=300", "data.seq_len=32", "data.batch_size=16"]
    fit = ["-m", "cod_lightning", "fit", "trainer.max_steps=2", "model=tiny", *data]
    clean = {"PATH": os.defpath, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    printed = run(python, *fit, cwd=elsewhere, env=clean)

    records = sorted((elsewhere / "runs").rglob("record.json"))
    assert len(records) == 1, f"records: {records}\n{printed}"
    json.loads(records[0].read_text())
    where = run(python, "-c", "import cod_lightning; print(cod_lightning.__file__)", cwd=elsewhere, env=clean)
    assert where.strip() == str(site_packages / "cod_lightning/__init__.py")
    run(environment / "bin/cod_lightning", "--help", cwd=elsewhere, env=clean)


def imported_modules(path):
    """First names of the modules that a file imports, at its top or in a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"cod_lightning"}


def required(package, extras):
    """Names of the packages that an installed one requires."""
    found = [Requirement(line) for line in metadata.requires(package) or ()]
    chosen = [r for r in found if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return {canonicalize_name(requirement.name) for requirement in chosen}


def test_every_imported_package_is_declared_or_comes_with_one():
    installed = {canonicalize_name(distribution.name) for distribution in metadata.distributions()}
    extras = metadata.metadata("cod_lightning").get_all("Provides-Extra")
    needed, new = set(), required("cod_lightning", ["", *extras])
    while new:
        needed |= new
        new = set().union(*(required(name, [""]) for name in new & installed)) - needed
    providers = metadata.packages_distributions()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for module in imported_modules(path):
            packages = {canonicalize_name(name) for name in providers.get(module, [module])}
            assert packages & needed, f"{path.name} imports {module}, which pyproject.toml does not bring"
