"""How ranks share a run: Lightning's strategies, and sharded checkpoints under the one that shards."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from cod_lightning.config.schema import TrainerConfig
from cod_lightning.errors import UserError
from cod_lightning.nn.weights import load_weights, shard_like
from cod_lightning.train.checkpoint import AtomicCheckpointIO, read_checkpoint, read_parts


def strategy_of(settings: TrainerConfig, *, unused: bool = False) -> Any:
    """What Lightning's Trainer takes for `trainer.strategy`.

    Args:
        settings: of the trainer.
        unused: some parameters get no gradient in some steps.

    Raises:
        UserError: offloading, and no GPU whose memory it could spare.
    """
    if settings.offload and accelerator(settings) == "cpu":
        raise UserError("trainer.offload=true keeps in the host's memory what GPUs need not hold: it needs GPUs")
    if settings.strategy == "fsdp":
        return Sharded(settings)
    if settings.strategy == "ddp":
        return DDPStrategy(timeout=timedelta(seconds=settings.timeout), find_unused_parameters=unused)
    return settings.strategy


def backend(settings: TrainerConfig) -> str | None:
    """What compiles the blocks, None if nothing does; on CUDA they are unless `trainer.compile` says otherwise."""
    wanted = accelerator(settings) == "cuda" if settings.compile is None else settings.compile
    return "inductor" if wanted else None


def accelerator(settings: TrainerConfig) -> str:
    """Lightning's name for the accelerator; its own "auto" would take an Apple GPU, which has no float64 for sums.

    Raises:
        UserError: torch finds no CUDA device, and one is asked for.
    """
    if settings.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator='gpu', but torch finds no CUDA device here: trainer.accelerator=cpu")
    return {"gpu": "cuda", "cpu": "cpu"}[settings.accelerator]


def precision(settings: TrainerConfig) -> Any:
    """`precision=auto` resolved: `auto_cuda` on a CUDA device that has bfloat16, float32 elsewhere."""
    if settings.precision != "auto":
        return settings.precision
    cuda = accelerator(settings) == "cuda" and torch.cuda.is_bf16_supported()
    return settings.auto_cuda if cuda else "32-true"


class Sharded(ModelParallelStrategy):
    """FSDP2: every rank holds a part of each parameter, its gradient and its moments.

    A checkpoint is a folder, in which each rank writes its part. One is read whatever strategy and number of ranks made
    it: `read_checkpoint` gives a folder as the one file that a single process would have written.
    """

    def __init__(self, settings: TrainerConfig):
        super().__init__(
            data_parallel_size=settings.world_size,
            tensor_parallel_size=1,
            # What is offloaded is summed and gathered where it rests.
            process_group_backend="cuda:nccl,cpu:gloo" if settings.offload else None,
            timeout=timedelta(seconds=settings.timeout),
        )
        self.settings = settings

    def sharding(self) -> dict[str, Any]:
        """The arguments of `parallelise` that shard a model over the ranks."""
        mesh = self.device_mesh["data_parallel"]
        if self.settings.hybrid:
            shape = (self.settings.num_nodes, self.settings.devices)
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicas", "shards"))
        mixed = precision(self.settings) == "bf16-mixed"
        return {"mesh": mesh, "offload": self.settings.offload, "dtype": torch.bfloat16 if mixed else None}

    @property
    def resting_device(self) -> torch.device:
        """Where parameters are between their uses."""
        return torch.device("cpu") if self.settings.offload else self.root_device

    def model_to_device(self) -> None:
        """Move all but parameters that rest elsewhere: then what metrics hold."""
        if not self.settings.offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if not any(True for _ in child.parameters()):
                child.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        self.checkpoint_io.save_parts(checkpoint, Path(self.broadcast(filepath)), self.is_global_zero, self.broadcast)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Set the parameters, and the optimizer's state while fitting; returns the rest of the checkpoint.

        Raises:
            UserError: it cannot be read, or is of another model.
        """
        path, module = Path(checkpoint_path), self.lightning_module
        assert module is not None
        if path.is_dir():
            checkpoint = read_parts(path, module.state_dict(), self.moments())
        else:
            checkpoint = read_checkpoint(path, mmap=True)
            load_weights(module, checkpoint["state_dict"], str(path))
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                # Those of a file are whole; a step is a number of its own.
                number: {
                    name: shard_like(value, parameters[number]) if value.shape == parameters[number].shape else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": moments})
        return checkpoint

    def moments(self) -> list[Mapping[int, Tensor]]:
        """For each optimizer its parameters by number, whose shards its moments share."""
        return [dict(enumerate(p for g in o.param_groups for p in g["params"])) for o in self.optimizers]
