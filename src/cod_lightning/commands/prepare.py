"""`prepare`: tokenize the data of a run."""

from __future__ import annotations

from collections.abc import Sequence

from cod_lightning.commands.options import OVERRIDES, add_overrides, pop_options
from cod_lightning.errors import Stopped, UserError

HELP = "Tokenize the data of a run into litdata chunks."
EPILOG = f"""{OVERRIDES}
Several machines can prepare one shard of the files each, in any order. The merge then builds the same set that one
machine would build. Shards are numbered from 0; each of them can be repeated:
  prepare OVERRIDES shard=0/64     ...     prepare OVERRIDES shard=63/64
  prepare OVERRIDES merge=64
"""
OPTIONS = {"shard": str, "merge": str}

add_arguments = add_overrides


def run(overrides: Sequence[str]) -> int:
    from cod_lightning.config.compose import compose
    from cod_lightning.data import shards
    from cod_lightning.data.prepare import prepare

    options, overrides = pop_options(overrides, OPTIONS, "prepare")
    if len(options) == 2:
        raise UserError(f"shard={options['shard']} and merge={options['merge']}: merge after all shards are finished")
    shard = shards.shard_of(options["shard"]) if "shard" in options else None
    count = shards.count_of(options["merge"]) if "merge" in options else None
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
    return 0
