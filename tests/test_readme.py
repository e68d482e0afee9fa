"""What the README says can be typed."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest

from cod_lightning.cli import parser
from cod_lightning.commands import estimate as estimate_command
from cod_lightning.config.compose import choices, compose, groups, sweep
from cod_lightning.nn.strategies import STRATEGIES

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = re.findall(r"^    python -m cod_lightning (.*?)(?:  +#.*)?$", README, flags=re.MULTILINE)


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The strategy that the README defines, importable under the name it is given there."""
    code = re.search(r"^    # my_package/norms\.py\n(.*?)\n    python", README, flags=re.DOTALL | re.MULTILINE)
    assert code
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "norms.py").write_text(textwrap.dedent(code[1]))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("example")
def test_every_command_is_understood(command):
    arguments = parser().parse_args(shlex.split(command))
    known = {"tasks", "shard", "merge", *(estimate_command.OPTIONS if arguments.command == "estimate" else ())}
    words = [word for word in getattr(arguments, "overrides", []) if word.partition("=")[0] not in known]
    if arguments.command == "prepare":
        words = [word for word in words if not word.startswith("data.files")] + ["data.files=texts/a.txt"]
    for run in sweep(words):
        compose(run)


def test_there_is_a_command_of_every_kind():
    known = {"fit", "prepare", "evaluate", "generate", "export", "import", "report"}
    known |= {"measure", "reproduce", "estimate", "experiments", "consolidate", "launch"}
    assert {command.split()[0] for command in COMMANDS} == known


def test_every_group_and_choice_is_listed():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert set(groups()) == set(rows)
    for group in groups():
        if group != "model":
            assert all(f"`{name}`" in rows[group] for name in choices(group)), group
    assert all(f"`{name}`" in rows["norm"] for name in STRATEGIES)
