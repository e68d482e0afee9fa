"""Who may import whom: the table of rooms and of the libraries that have an owner."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
PACKAGE = "cod_lightning"

COMMON = (
    "__init__",
    "_torchmetrics",
    "_torchvision",
    "errors",
    "files",
    "memory",
    "page",
    "plots",
    "rng",
    "settings",
    "signals",
    "typed_json",
)
"""Top-level modules that everyone may import; they import only each other."""

TOP = ("cli", "hf", "__main__")
"""Top-level modules that make up the last room."""

ROOMS = ("common", "kernels", "nn", "data", "evaluate", "measure", "config", "train", "paper", "commands", "top")
"""A module imports from its own room and from those before it."""

OWNERS = {
    "triton": ("kernels",),
    "litdata": ("data",),
    "lightning": ("data", "train"),
    "PIL": ("data",),
    "pytorch_lightning": (),  # the same code under its old name: a second Trainer class, of which isinstance is false
    "matplotlib": ("common", "measure", "train", "paper"),
    "hydra": ("config",),
    "jinja2": ("common",),
    "markdown_it": ("common",),
    "omegaconf": ("config",),
}
"""Libraries that only these rooms or top-level files import."""


def room_of(module: str) -> str | None:
    """Return the room of a dotted module name such as "cod_lightning.nn.decoder", None if it belongs to none."""
    parts = module.split(".")[1:] or ["__init__"]
    if parts[0] in COMMON:
        return "common"
    if parts[0] in TOP:
        return "top"
    return parts[0] if parts[0] in ROOMS[1:-1] else None


def imports(path: Path, src: Path) -> list[tuple[int, str]]:
    """Return (line, dotted name) of all that a file imports, also inside functions and under TYPE_CHECKING."""
    package = path.relative_to(src).parent.parts  # of a module and of an __init__.py alike
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == PACKAGE:  # `from cod_lightning import nn` names a room, `import __version__` none
                names = [alias.name for alias in node.names]
                found += [
                    (node.lineno, f"{PACKAGE}.{name}" if room_of(f"{PACKAGE}.{name}") else PACKAGE) for name in names
                ]
            else:
                found.append((node.lineno, origin))
    return found


def violations(path: Path, src: Path = SRC) -> list[str]:
    """Return one sentence for each import of a file that the tables do not allow."""
    module = ".".join(path.relative_to(src).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    if room is None:
        return [
            f"{module} is in no room: rooms are {', '.join(ROOMS[1:-1])}, top-level modules {', '.join(COMMON + TOP)}"
        ]
    reach = ROOMS[: ROOMS.index(room) + 1]
    place = path.name if room == "top" else room
    found = []
    for line, name in imports(path, src):
        where = f"{path.relative_to(src)}:{line} ({room}) imports {name}"
        library = name.split(".")[0]
        if library == PACKAGE:
            target = room_of(name)
            if target is None:
                found.append(f"{where}, which is in no room")
            elif target not in reach:
                found.append(f"{where} of the room {target}; {room} may import from {', '.join(reach)}")
        elif library in OWNERS and place not in OWNERS[library]:
            owners = ", ".join(OWNERS[library])
            found.append(f"{where}; {f'only {owners}' if owners else 'nobody'} may import {library}")
    return found


def reached(path: Path, seen: set[str]) -> set[str]:
    """Add to `seen` the names of all that a file imports, directly or through modules of this package."""
    for _, name in imports(path, SRC):
        if name not in seen:
            seen.add(name)
            file = SRC / Path(*name.split(".")).with_suffix(".py")
            if file.is_file():
                reached(file, seen)
    return seen


MODULES = sorted((SRC / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC / PACKAGE)))
def test_a_module_imports_only_what_its_room_may(path):
    found = violations(path)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("room", ["kernels", "nn", "measure"])
def test_a_room_loads_no_torchmetrics(room):
    """Torchmetrics imports scipy and transformers."""
    names = [reached(path, set()) for path in MODULES if path.parent.name == room]
    assert not [name for name in set.union(*names) if name.startswith("torchmetrics")]


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        (
            "nn/decoder.py",
            "from cod_lightning.train.module import Module",
            "of the room train; nn may import from common, k",
        ),
        ("nn/decoder.py", "from cod_lightning import data", "imports cod_lightning.data of the room data"),
        ("nn/decoder.py", "from ..data import order", "imports cod_lightning.data of the room data"),
        ("nn/decoder.py", "from .. import config", "imports cod_lightning.config of the room config"),
        ("nn/__init__.py", "from ..data import order", "imports cod_lightning.data of the room data"),
        ("data/order.py", "def f():\n    import cod_lightning.measure.variance", "order.py:2 (data) imports"),
        ("nn/decoder.py", "import triton.language as tl", "only kernels may import triton"),
        ("train/module.py", "from litdata import StreamingDataset", "only data may import litdata"),
        ("measure/loss.py", "import lightning.pytorch as pl", "only data, train may import lightning"),
        ("train/module.py", "import pytorch_lightning", "nobody may import pytorch_lightning"),
        ("nn/decoder.py", "from matplotlib import pyplot", "only common, measure, train, paper may import matplotlib"),
        ("__main__.py", "import hydra", "only config may import hydra"),
        ("train/config.py", "import omegaconf", "only config may import omegaconf"),
        ("errors.py", "import cod_lightning.nn", "common may import from common"),
        ("utils.py", "", "cod_lightning.utils is in no room"),
        ("nn/decoder.py", "from cod_lightning.utils import x", "imports cod_lightning.utils, which is in no room"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, line, complaint):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    (found,) = violations(path, tmp_path)
    assert complaint in found


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nn/decoder.py", "from . import norm\nfrom .norm import Norm\nfrom cod_lightning.kernels import rmsnorm"),
        ("nn/decoder.py", "from cod_lightning import __version__\nfrom cod_lightning.errors import UserError"),
        ("data/stream.py", "import litdata\nimport lightning\nfrom ..nn import decoder"),
        ("cli.py", "from cod_lightning import config, train, paper"),
        ("__main__.py", "from cod_lightning.cli import main"),
        ("__init__.py", "from cod_lightning._torchvision import hide_if_unusable"),
    ],
)
def test_a_right_import_is_allowed(tmp_path, file, line):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert violations(path, tmp_path) == []
