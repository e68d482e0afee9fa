"""`prepare`: tokenize the data of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cod_lightning.commands.overrides import OVERRIDES, add_overrides, pop_options
from cod_lightning.errors import Stopped, UserError, shorten

HELP = "Tokenize the data of a run into litdata chunks."
EPILOG = f"""{OVERRIDES}
Several machines can prepare one shard of the files each, in any order. The merge then builds the same set that one
machine would build. Shards are numbered from 0; each of them can be repeated:
  prepare OVERRIDES shard=0/64     ...     prepare OVERRIDES shard=63/64
  prepare OVERRIDES merge=64
"""
OPTIONS = {"shard": str, "merge": int}
MAX_SHARDS = 10_000

add_arguments = add_overrides


def shard_of(text: str) -> tuple[int, int]:
    """Parse "K/N", shard K of N, counted from 0; raise a UserError unless K < N <= `MAX_SHARDS`."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
        raise UserError(
            f"shard={shorten(text)}: must be K/N, where N shards are numbered from 0, such as shard=0/4 to shard=3/4"
        )
    return int(match[1]), int(match[2])


def run(overrides: Sequence[str]) -> None:
    from cod_lightning.config.compose import compose
    from cod_lightning.data import shards
    from cod_lightning.data.prepare import prepare

    options, overrides = pop_options(overrides, OPTIONS, "prepare")
    if len(options) == 2:
        raise UserError(f"shard={options['shard']} and merge={options['merge']}: merge after all shards are finished")
    shard = shard_of(options["shard"]) if "shard" in options else None
    count = options.get("merge")
    if count is not None and not 1 <= count <= MAX_SHARDS:
        raise UserError(
            f"merge={count}: must be the number of shards, at most {MAX_SHARDS:,}, such as merge=4 after shard=0/4 to "
            "shard=3/4"
        )
    config = compose(overrides)
    if config.task != "language":
        raise UserError(f"task={config.task} needs no preparation: train it with fit")
    try:
        if shard is not None:
            print(shards.prepare_shard(config.data, *shard))
        elif count is not None:
            print(shards.merge_shards(config.data, count))
        else:
            print(prepare(config.data))
    except KeyboardInterrupt as error:
        raise Stopped("interrupted by SIGINT") from error
