"""A check that a run can fit into the memory of this machine."""

from __future__ import annotations

from cod_lightning.config.schema import Config
from cod_lightning.errors import UserError
from cod_lightning.memory import host_memory
from cod_lightning.train.devices import accelerator, precision


def check_memory(config: Config) -> None:
    """Check the least memory that training takes, before any is allocated; `estimate` predicts what it really takes.

    On a CPU these are weights, gradients, Adam's two moments, and the input of every block; with a GPU, only the
    weights, which the CPU initialises, and with FSDP not even these; with `trainer.offload` all but the inputs.

    Raises:
        UserError: this machine has less.
    """
    settings, data = config.trainer, config.data
    fsdp, cpu = settings.strategy == "fsdp", accelerator(settings) == "cpu"
    ranks = 1 if fsdp else settings.devices
    nodes = settings.num_nodes if fsdp and not settings.hybrid else 1
    trained = cpu or settings.offload
    copies = 4 if trained else 0 if fsdp else 1  # FSDP builds its shards on the GPU
    weight = 2 if trained and precision(settings) == "bf16-true" else 4
    parameters, length = config.num_parameters(vocab_size=1), config.sequence_length
    model = parameters * weight * copies * ranks // nodes
    blocks = config.model.num_hidden_layers * config.model.hidden_size * data.micro_batch_size * length * weight
    batch = 8 * data.batch_size * length // settings.num_nodes
    needed = model + batch + (blocks * settings.devices if cpu else 0)
    if needed > (memory := host_memory()):
        raise UserError(
            f"out of memory: {parameters:,} parameters and micro-batches of {data.micro_batch_size} x {length} "
            f"tokens take at least {needed / 1e9:,.0f} GB, and this machine has {memory / 1e9:,.0f} GB: choose a "
            "smaller model, data.micro_batch_size or data.seq_len"
        )
