"""`verify`: measure the factors of a norm strategy in every block of a model."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cod_lightning.commands.models import is_run, read_run, require_model, require_paths
from cod_lightning.commands.options import add_model
from cod_lightning.commands.overrides import compose_norm

HELP = (
    "Run a model and check that every block applies a norm strategy: as loaded, in bfloat16, built on the meta device, "
    "with reloaded weights, and compiled."
)
EPILOG = """\
  verify runs/quickstart/lns-seed1-...                 # against the strategy of the run
  verify path/to/llama norm=lns                        # a model of transformers
  verify path/to/llama norm=lns norm.position=only_ffn
"""


def add_arguments(parser: ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("overrides", nargs="*", metavar="norm=...", help="the strategy and its options")


def run(model: str, checkpoint: str, trust_code: bool, overrides: Sequence[str]) -> None:
    norm = compose_norm(overrides, "verify") if overrides else {}
    network = open_network(model, checkpoint, trust_code)
    from cod_lightning.commands.terminal import result_table, show
    from cod_lightning.nn.verify import verify

    factors = verify(network, norm.pop("name", None), **norm)
    rows = list(map(asdict, factors))
    show(result_table(f"{model}: every factor holds", rows, len(rows)))


def open_network(model: str, checkpoint: str, trust_code: bool) -> Any:
    """The decoder of a run folder, with its strategy where `verify` looks for it, or a model of `transformers`."""
    require_paths([model], checkpoint, trust_code)
    if is_run(model):
        config, network, _ = read_run(Path(model), checkpoint, trust_code)
        from cod_lightning.nn.apply import CONFIG_KEY

        setattr(network, CONFIG_KEY, dict(config.norm))
        return network
    require_model(model, "pass the folder of a run or of a model")
    from cod_lightning.measure.adapter import ModelAdapter
    from cod_lightning.measure.open_model import check_layout
    from cod_lightning.nn.pretrained import load_checkpoint

    network = load_checkpoint(model).model
    check_layout(ModelAdapter(network, Path(model).name))
    return network
