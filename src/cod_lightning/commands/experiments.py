"""`experiments`: list the experiments of the paper, or the size and the tokens of some."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from cod_lightning.errors import UserError

HELP = "List the experiments: what they reproduce, published figures; with names, also model, parameters and tokens."


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="experiment", help="show these, with model, parameters and tokens")


def run(names: Sequence[str]) -> None:
    from cod_lightning.commands.terminal import rich_table, show
    from cod_lightning.config.groups import choices
    from cod_lightning.page import Table
    from cod_lightning.paper.experiments import find_experiments

    rows = [composed(name) for name in find_experiments(names)] or [listed(name) for name in choices("experiments")]
    head = list(rows[0])
    show(rich_table("", Table(head, [list(row.values()) for row in rows], range(len(head))), show_lines=True))


def listed(name: str) -> dict[str, str]:
    """The table row of an experiment from its file alone; composing all of them would take seconds."""
    from cod_lightning.config.groups import read_yaml
    from cod_lightning.config.paper_block import type_errors

    content = read_yaml(f"experiments/{name}")
    paper = content.get("paper", {})
    if errors := type_errors(paper):
        raise UserError("\n".join(f"experiments/{name}.yaml: {error}" for error in errors))
    return {"experiment": name, "reproduces": content.get("description", ""), "published": published(paper)}


def composed(name: str) -> dict[str, str]:
    """The table row of an experiment from its composed configuration."""
    from cod_lightning.config.compose import compose
    from cod_lightning.paper.experiments import format_tokens

    config = compose([f"experiments={name}"])
    model, measured = config.model, any("subject" in row for row in config.paper.get("rows", {}).values())
    return {
        "experiment": name,
        "reproduces": config.description,
        "model": f"{model.num_hidden_layers} x {model.hidden_size}",
        "parameters": f"{config.num_parameters() / 1e6:,.1f}M",
        "token positions": "none, measured" if measured else format_tokens(config.training_tokens),
        "published": published(config.paper),
    }


def published(paper: Mapping[str, Any]) -> str:
    """The published figures of all rows, one a line."""
    rows = paper.get("rows", {}).items()
    return "\n".join(f"{name} {figure}" for name, row in rows for figure in published_figures(row.get("published")))


def published_figures(published: float | dict[str, float] | None) -> list[str]:
    """The published figures of a row: one number, or several by name, of which `average` stands for all."""
    if published is None:
        return []
    if not isinstance(published, dict):
        return [f"{published:.2f}"]
    if "average" in published:
        published = {"average": published["average"]}
    return [f"{name} {value:.2f}" for name, value in published.items()]
