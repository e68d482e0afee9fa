"""What the guides quote is what the source says, and their commands are ones that it takes."""

import re
import shlex
from pathlib import Path

import pytest

from cod_lightning.cli import parser
from cod_lightning.config import compose

TOP = Path(__file__).parents[1]
SOURCE = re.sub(r'"\s*\n\s*f?"', "", "\n".join(p.read_text() for p in (TOP / "src").rglob("*.py")))
"""All modules, strings that go on in the next line joined."""

FOREIGN = ("error:", "operator torchvision::nms does not exist", "Connection refused", "address already in use")
"""Quoted, but of other libraries."""


def test_every_quoted_message_is_one_of_ours():
    text = (TOP / "docs" / "troubleshooting.md").read_text()
    quoted = [found for found in re.findall(r"^- `([^`]+)`", text, re.MULTILINE) if found not in FOREIGN]
    assert len(quoted) > 20
    assert [message for message in quoted if message not in SOURCE] == []


def commands():
    text = "\n".join((TOP / "docs" / name).read_text() for name in ("scaling.md", "troubleshooting.md"))
    lines = re.findall(r"^    python -m cod_lightning (.+)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one_that_the_command_line_takes(words):
    if "..." in words[-1]:
        words = [*words[:-1], "folder"]
    arguments = vars(parser().parse_args(words))
    own = ("hardware", "mfu", "gpus", "strategy", "checkpointing", "shard", "merge")
    if words[0] in ("fit", "prepare", "estimate"):
        overrides = [word.replace("1,2,4,8", "1") for word in arguments["overrides"]]
        compose([word for word in overrides if word.partition("=")[0] not in own])


@pytest.mark.parametrize("name", ["scaling.md", "troubleshooting.md", "audit.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)", (TOP / "docs" / name).read_text()):
        assert target.startswith("http") or (TOP / "docs" / target).exists(), target
