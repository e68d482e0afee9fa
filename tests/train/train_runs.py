"""A program that trains runs one after the other in one process group. Its argument is a JSON file with a list.

An entry is a list of overrides, or the arguments of `copy_checkpoints`, with which a run can resume another one.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from run_files import copy_checkpoints

from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose

for entry in json.loads(Path(sys.argv[1]).read_text()):
    if isinstance(entry, list):
        train_run(compose(entry))
    else:
        if dist.get_rank() == 0:
            copy_checkpoints(Path(entry["source"]), Path(entry["target"]), entry["until"])
        dist.barrier()
