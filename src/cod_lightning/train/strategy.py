"""Lightning's strategy of a run; FSDP2 with sharded checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from cod_lightning.config.schema import TrainerConfig
from cod_lightning.errors import UserError
from cod_lightning.nn.weights import load_weights, shard_like
from cod_lightning.train.checkpoint import AtomicCheckpointIO, load_file, read_sharded
from cod_lightning.train.devices import accelerator, precision


def build_strategy(settings: TrainerConfig, *, find_unused_parameters: bool = False) -> Any:
    """The strategy for Lightning's Trainer.

    Args:
        settings: the section `trainer`.
        find_unused_parameters: whether some parameters get no gradient in some steps.

    Raises:
        UserError: CPU offload without a GPU.
    """
    if settings.offload and accelerator(settings) == "cpu":
        raise UserError("trainer.offload=true requires a GPU: pass trainer.offload=false")
    if settings.strategy == "fsdp":
        return FSDP2Strategy(settings)
    if settings.strategy == "ddp":
        timeout = timedelta(seconds=settings.timeout)
        return DDPStrategy(timeout=timeout, find_unused_parameters=find_unused_parameters)
    return settings.strategy


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: each rank holds a shard of each parameter, of its gradient and of its optimizer state.

    Checkpoints are folders in which each rank writes its shards. It loads checkpoints of any strategy and any number of
    ranks.
    """

    def __init__(self, settings: TrainerConfig):
        super().__init__(
            data_parallel_size=settings.world_size,
            tensor_parallel_size=1,
            # Offloaded tensors are reduced and gathered on the CPU.
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
    def parameter_device(self) -> torch.device:
        """The device of the sharded parameters: the CPU with offload."""
        return torch.device("cpu") if self.settings.offload else self.root_device

    def model_to_device(self) -> None:
        """Move the module to its device; with offload, only children without parameters, such as metrics."""
        if not self.settings.offload:
            super().model_to_device()
            return
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if not any(True for _ in child.parameters()):
                child.to(self.root_device)

    # The base class's: ModelParallelStrategy would gather the full state on rank zero.
    lightning_module_state_dict = Strategy.lightning_module_state_dict
    optimizer_state = Strategy.optimizer_state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        self.checkpoint_io.save_sharded(checkpoint, Path(self.broadcast(filepath)), self.is_global_zero, self.broadcast)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the parameters, and the optimizer state while fitting; return the checkpoint.

        Raises:
            UserError: the checkpoint is unreadable, or has other parameters.
        """
        path = Path(checkpoint_path)
        module: Any = self.lightning_module
        checkpoint = load_file(path, mmap=True)
        module.check_groups(checkpoint)
        if path.is_dir():
            checkpoint = read_sharded(path, module.state_dict(), self.optimizer_parameters())
        else:
            load_weights(module, checkpoint["state_dict"], str(path))
        module.check_moments(checkpoint)
        states = checkpoint.get("optimizer_states", ())
        for optimizer, parameters, state in zip(self.optimizers, self.optimizer_parameters(), states, strict=False):
            shards = {
                number: {name: sharded_state(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict(state | {"state": shards})
        return checkpoint

    def optimizer_parameters(self) -> list[Mapping[int, Tensor]]:
        """For each optimizer its parameters by number; its state is sharded like them."""
        return [dict(enumerate(p for g in o.param_groups for p in g["params"])) for o in self.optimizers]


def sharded_state(value: Tensor, parameter: Tensor) -> Tensor:
    """A value of an optimizer's state, which a file has whole, sharded like its parameter.

    A scalar, such as Adam's step, is copied: it would keep the file of the checkpoint mapped.
    """
    return shard_like(value, parameter) if value.shape == parameter.shape else value.clone()
