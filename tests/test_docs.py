"""docs/scaling.md and docs/troubleshooting.md: commands that compose, messages that the source still has, links."""

import ast
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest

from cod_lightning.cli import parser
from cod_lightning.commands import estimate as estimate_command
from cod_lightning.config.compose import compose, sweep
from cod_lightning.train.estimate import estimate

ROOT = Path(__file__).parents[1]
SCALING, TROUBLE = ((ROOT / "docs" / name).read_text() for name in ("scaling.md", "troubleshooting.md"))
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^ {4}.*-m cod_lightning (.*?)'?(?:  +#.*)?$", SCALING.replace("\\\n", ""), flags=re.MULTILINE)
HEADLINES = re.findall(r"^\*\*(.*?)\*\*( \([\w ]+\))?:", TROUBLE, flags=re.MULTILINE)
OURS = [message for headline, origin in HEADLINES if not origin for message in re.findall(r"`(.*?)`", headline)]


def texts():
    """Every string of the package, with line breaks where values are filled in."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    arguments = parser().parse_args(shlex.split(command))
    known = {"shard", "merge", *(estimate_command.OPTIONS if arguments.command == "estimate" else ())}
    words = [word for word in getattr(arguments, "overrides", []) if word.partition("=")[0] not in known]
    if arguments.command == "prepare":
        words = [word for word in words if not word.startswith("data.files")] + ["data.files=texts/a.txt"]
        words = words if "data=files" in words else words[:-1]
    for run in sweep(words):
        compose(run)


def test_there_are_commands_of_every_step():
    assert {command.split()[0] for command in COMMANDS} == {"fit", "prepare", "estimate", "consolidate"}


def test_every_message_of_ours_is_one():
    assert len(OURS) > 25
    found = list(texts())
    for message in OURS:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
        assert any(pattern.search(text) for text in found), message


COLUMNS = [
    *(("single", 1, "none"), ("ddp", 8, "none"), ("fsdp", 8, "none")),
    *(("fsdp", 8, "selective"), ("fsdp", 8, "full")),
]
"""Strategy, ranks and checkpointing of the tables' columns."""
composed = lru_cache(lambda *words: compose(words))


def rows_of(width):
    """Rows of the guide's tables of so many cells, a name that is left out filled in."""
    name = ""
    for line in re.findall(r"^\|(.*)\|$", SCALING, flags=re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) != width or not re.fullmatch(r"[\d.]+", cells[-1]):
            continue
        if named := re.match(r"`(\w+)`", cells[0]):
            name = named[1]
        yield name, *cells[1:]


def needs(words, strategy, gpus, checkpointing, hardware="h100"):
    return estimate(composed(*words), strategy=strategy, gpus=gpus, checkpointing=checkpointing, hardware=hardware)


def test_the_tables_are_what_estimate_says():
    memory, fits = list(rows_of(7)), list(rows_of(8))
    assert (len(memory), len(fits)) == (10, 12)
    for name, size, *figures in memory:
        words = [f"experiments={name}", f"data.micro_batch_size={size}"]
        assert [f"{needs(words, *column).memory.total / 1e9:.1f}" for column in COLUMNS] == figures, (name, size)
    for name, hardware, *figures, hours in fits:
        words = [f"experiments={name}", "data.micro_batch_size=1"]
        found = [needs(words, *column, hardware.lower()) for column in COLUMNS]
        assert [str(one.max_micro_batch_size) for one in found] == figures, (name, hardware)
        assert f"{found[0].gpu_hours:.1f}" == hours


@pytest.mark.parametrize("name", ["README.md", "docs/scaling.md", "docs/troubleshooting.md"])
def test_every_link_leads_somewhere(name):
    text = (ROOT / name).read_text()
    titles = {
        re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if target.startswith("#"):
            assert target[1:] in titles, target
        elif not target.startswith("http"):
            assert ((ROOT / name).parent / target.partition("#")[0]).exists(), target


def test_the_guides_name_existing_settings_and_the_readme_leads_to_them():
    from dataclasses import asdict

    from cod_lightning.config.schema import Config, flatten

    fields = flatten(asdict(Config())).keys() | {"trainer.measures.jacobian"}
    named = set(re.findall(r"\b((?:model|data|optim|trainer)\.[a-z_]+(?:\.[a-z]+)?)=", SCALING + TROUBLE))
    assert named <= fields, named - fields
    for guide in ("docs/scaling.md", "docs/troubleshooting.md"):
        assert f"({guide})" in README
