"""`predict`: variance, gradients and Jacobian of a strategy by layer, before training."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cod_lightning.commands.options import nonempty_path
from cod_lightning.commands.overrides import add_overrides, check_conditions, check_no_ignored_overrides
from cod_lightning.errors import UserError
from cod_lightning.files import check_writable

HELP = "Predict a strategy's variance, gradient and Jacobian by layer in closed form, beside an untrained model."
EPILOG = """\
Builds the untrained decoder on the CPU. Writes JSON, CSV, PNG and PDF. Examples:
  predict norm=lns
  predict norm=keel model=tiny model.num_hidden_layers=24
  predict norm=my_package.my_module:my_strategy norm.power=0.5 model=llama_60m
"""
CHOICES = ("data", "experiments", "model", "norm", "protocol", "scale")
"""The groups that may set the decoder."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", type=nonempty_path, default=Path("predict"), help="folder (default: predict)")
    add_overrides(parser)


def run(overrides: Sequence[str], output: Path) -> None:
    from cod_lightning.config.compose import compose
    from cod_lightning.config.validate import size_errors

    check_no_ignored_overrides(overrides, "predict", CHOICES)
    config = compose(overrides)
    check_conditions(overrides, "predict", config)
    check_writable(output, "--output=")
    if config.task != "language":
        raise UserError(f"predict does not support task={config.task}")
    if errors := size_errors(config):
        raise UserError(*errors)
    from cod_lightning.commands.terminal import result_table, show
    from cod_lightning.measure.prediction import predict

    result = predict(replace(config.model, vocab_size=config.vocab_size), config.norm, config.seed)
    paths = result.save(output, result.model.replace(":", "-"))
    rows = result.rows()
    show(result_table(result.title(), rows, len(rows)))
    print(result.summary())
    print(*paths, sep="\n")
