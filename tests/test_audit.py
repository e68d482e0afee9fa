"""docs/audit.md against this package: what it computes, the commands it gives, the settings it names."""

import doctest
import re
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cod_lightning.cli import parser
from cod_lightning.config.compose import choices, compose, sweep
from cod_lightning.config.schema import Config, flatten

PATH = Path(__file__).parents[1] / "docs" / "audit.md"
TEXT = PATH.read_text()
SECTIONS = dict(re.findall(r"^#{2,3} (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE))
ROWS = re.findall(r"^\| (\d+) \| \[.*?\]\(#(.*?)\) \| (.*?) \| (.*?) \|$", TEXT, re.MULTILINE)
TOY = re.search(r'^    TOY="(.*?)"$', TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^    python -m cod_lightning (.*)$", TEXT, re.MULTILINE)


def anchor(title):
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def numbers(text):
    return {float(number.replace(",", "")) for number in re.findall(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", text)}


def test_every_example_gives_what_is_written_behind_it():
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        failed, attempted = doctest.testfile(str(PATH), module_relative=False)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert failed == 0
    assert attempted > 60


def test_the_table_leads_to_every_difference_and_gives_its_numbers():
    numbered = {anchor(title): body for title, body in SECTIONS.items() if title[0].isdigit()}
    assert [target for _, target, _, _ in ROWS] == list(numbered)
    assert [int(number) for number, *_ in ROWS] == list(range(1, len(numbered) + 1))
    for _, target, size, _ in ROWS:
        assert numbers(size) <= numbers(numbered[target]), target


def test_every_setting_exists():
    fields = flatten(asdict(Config())).keys() | {f"norm.{option}" for option in ("init", "base", "position")}
    named = re.findall(r"`((?:model|data|optim|trainer|eval|norm)\.\w+)\b", TEXT)
    assert len(named) > 15
    assert set(named) <= fields, set(named) - fields
    for group, choice in re.findall(r"`(norm|protocol)=(\w+)`", TEXT):
        assert choice in choices(group) or (group, choice) == ("norm", "LNS")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    assert TOY
    words = shlex.split(command.replace("$TOY", TOY[1].replace("\\\n", " ")))
    arguments = parser().parse_args(words)
    for run in sweep(arguments.overrides):
        assert compose(run).trainer.max_steps == 128
