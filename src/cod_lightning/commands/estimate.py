"""`estimate`: predict the memory, data and hours of a run."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence

from cod_lightning.commands.overrides import add_overrides, pop_options
from cod_lightning.commands.processes import sweep_labels
from cod_lightning.errors import UserError

HELP = "Predict what a run needs: parameters, memory, data, hours."
EPILOG = """\
Besides overrides it takes hardware=a100|h100|h200|cpu (default: h100), mfu=, gpus=, strategy=single|ddp|fsdp and
checkpointing=none|selective|full; several values make several columns. Examples:
  estimate experiments=table1_350m norm=lns gpus=4
  estimate experiments=table1_130m,table1_1b hardware=a100,h200 mfu=0.35 trainer.precision=bf16-mixed
  estimate experiments=quickstart hardware=cpu --json
"""
OPTIONS = {"hardware": str, "mfu": float, "gpus": int, "strategy": str, "checkpointing": str}
REPLACED = {
    "gpus": ("trainer.devices", "trainer.num_nodes"),
    "strategy": ("trainer", "trainer.strategy"),
    "checkpointing": ("trainer.checkpointing",),
}
"""The overrides that an option would replace."""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", dest="as_json", action="store_true", help="print a JSON list, one entry for each run")
    add_overrides(parser)


def run(overrides: Sequence[str], as_json: bool) -> None:
    from cod_lightning.config.compose import compose, sweep

    check_not_replaced(overrides)
    runs = list(sweep(overrides))
    split = [pop_options(words, OPTIONS, "estimate") for words in runs]
    configs = [compose(words) for _, words in split]
    from cod_lightning.commands.terminal import estimate_table, show
    from cod_lightning.train.estimate import estimate

    estimates = [estimate(config, **options) for config, (options, _) in zip(configs, split, strict=True)]
    if as_json:
        entries = [{"overrides": words} | values.plain() for words, values in zip(runs, estimates, strict=True)]
        print(json.dumps(entries, indent=1))
    else:
        show(estimate_table(list(zip(sweep_labels(runs), estimates, strict=True))))


def check_not_replaced(words: Sequence[str]) -> None:
    """Check that no option replaces an override.

    Raises:
        UserError: names every pair of both.
    """
    given = {word.lstrip("+").partition("=")[0]: word for word in words}
    pairs = [(option, field) for option, fields in REPLACED.items() for field in fields]
    if "trainer.hybrid" in given:  # it shards over the devices of a node, of which there may be many
        pairs.remove(("gpus", "trainer.devices"))
    both = [f"{given[a]} and {given[b]} are both given: keep one" for a, b in pairs if a in given and b in given]
    if both:
        raise UserError("\n".join(both))
