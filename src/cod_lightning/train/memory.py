"""A check that a run can fit into the memory of this machine."""

from __future__ import annotations

from dataclasses import replace

from cod_lightning.config.schema import Config
from cod_lightning.errors import UserError
from cod_lightning.memory import host_memory
from cod_lightning.nn.config import num_vit_parameters
from cod_lightning.train.devices import accelerator, precision


def check_memory(config: Config) -> None:
    """Check the least memory that training takes, before any is allocated; `estimate` predicts what it really takes.

    On a CPU these are weights, gradients, Adam's two moments, and the input of every block; with a GPU, only the
    weights, which the CPU initialises.

    Raises:
        UserError: this machine has less.
    """
    settings, data = config.trainer, config.data
    ranks = 1 if settings.strategy == "fsdp" else settings.devices
    nodes = settings.num_nodes if settings.strategy == "fsdp" and not settings.hybrid else 1
    cpu = accelerator(settings) == "cpu"
    weight = 2 if cpu and precision(settings) == "bf16-true" else 4
    parameters, length = least_parameters(config), config.sequence_length
    model = parameters * weight * (4 if cpu else 1) * ranks // nodes
    blocks = config.model.num_hidden_layers * config.model.hidden_size * data.micro_batch_size * length * weight
    batch = 8 * data.batch_size * length // settings.num_nodes
    needed = model + batch + (blocks * settings.devices if cpu else 0)
    if needed > (memory := host_memory()):
        raise UserError(
            f"out of memory: {parameters:,} parameters and micro-batches of {data.micro_batch_size} x {length} "
            f"tokens take at least {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB: choose a "
            "smaller model, data.micro_batch_size or data.seq_len"
        )


def least_parameters(config: Config) -> int:
    """Parameters of the Pre-LN model; a vocabulary or classes that are not known yet count as one."""
    if config.task == "vision":
        images = config.images
        return num_vit_parameters(config.model, images.size, images.patch_size, images.known_classes or 1)
    return replace(config.model, vocab_size=config.model.vocab_size or 1).num_parameters()
