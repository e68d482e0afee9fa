"""`experiments`: list the experiments of the paper."""

from __future__ import annotations

from argparse import ArgumentParser

HELP = "List the experiments: size, tokens, what they reproduce, published figures."


def add_arguments(parser: ArgumentParser) -> None:
    """It has none."""


def run() -> int:
    from cod_lightning.commands.terminal import experiments_table, show
    from cod_lightning.config.compose import choices, compose
    from cod_lightning.paper.experiments import format_tokens, num_parameters, training_tokens

    rows = []
    for experiment in choices("experiments"):
        config = compose([f"experiments={experiment}"])
        model, paper_rows = config.model, config.paper.get("rows", {})
        published = [
            f"{name} {figure}" for name, row in paper_rows.items() for figure in format_published(row.get("published"))
        ]
        measured = any("subject" in row for row in paper_rows.values())
        rows.append(
            {
                "experiment": experiment,
                "reproduces": config.description,
                "model": f"{model.num_hidden_layers} x {model.hidden_size}",
                "parameters": f"{num_parameters(config) / 1e6:,.1f}M",
                "token positions": "none, measured" if measured else format_tokens(training_tokens(config)),
                "published": "\n".join(published) or "none",
            }
        )
    show(experiments_table(rows))
    return 0


def format_published(published: float | dict[str, float] | None) -> list[str]:
    """Published figures of a row: one number, or several by name, of which `average` stands for all."""
    if published is None:
        return []
    if not isinstance(published, dict):
        return [f"{published:.2f}"]
    if "average" in published:
        published = {"average": published["average"]}
    return [f"{name} {value:.2f}" for name, value in published.items()]
