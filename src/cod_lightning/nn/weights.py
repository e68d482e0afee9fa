"""The weights of models, whose parameters may be sharded (`DTensor`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from cod_lightning.errors import UserError


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is sharded; those of FSDP2 also while they are whole, between two passes."""
    sharded_by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    return sharded_by_fsdp or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def refuse_fsdp1(model: nn.Module) -> None:
    """Check that a model is not sharded by FSDP1, whose weights only exist while its own forward runs.

    Raises:
        UserError: it is, or is inside such a model.
    """
    # The flag is of FSDP1 alone: FSDP2 marks its modules in the same way, and has no DTensors between two passes.
    if any(getattr(parameter, "_fsdp_flattened", False) for parameter in model.parameters()):
        raise UserError(
            f"{type(model).__name__} is sharded by FSDP1 (FullyShardedDataParallel), which is not supported: pass the "
            "model before it is wrapped, or shard it by FSDP2 (fully_shard)"
        )


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model, without the names of `torch.compile`'s wrappers around it or its blocks."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}


def to_local(tensor: Tensor) -> Tensor:
    """The shard of `tensor` that this rank holds; `tensor` itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """Shard `values`, which all ranks hold whole, as `like` is sharded; return them unchanged if there is no need."""
    if not isinstance(like, DTensor) or isinstance(values, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_(parameter: Tensor, values: Tensor) -> None:
    """`parameter.copy_(values)` for a parameter that may be sharded and values that all ranks hold."""
    to_local(parameter).copy_(to_local(shard_like(values, parameter)))


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy `weights` into all parameters of `model`, sharded or not, by name.

    Raises:
        UserError: names or shapes differ; the message starts with `source`.
    """
    if mismatches := shape_mismatches(model, weights):
        raise UserError(f"{source}: {len(mismatches)} parameters have another shape than this run's: {mismatches[0]}")
    for name, parameter in model.named_parameters():
        copy_(parameter, weights[name])


def why_not_dense(tensor: Tensor) -> str:
    """Why a tensor of a file is not a plain array of numbers; empty if it is."""
    if tensor.is_meta:
        return "without values"
    return "" if tensor.layout == torch.strided else str(tensor.layout)


def require_finite(weights: Iterable[tuple[str, Tensor]], source: str, remedy: str = "use another checkpoint") -> None:
    """Check that no weight holds NaN or Inf.

    Raises:
        UserError: names `source`, the first such weight and their number.
    """
    if broken := [name for name, tensor in weights if not tensor.isfinite().all()]:
        raise UserError(f"{source}: {broken[0]} holds NaN or Inf ({len(broken)} weights do): {remedy}")


def shape_mismatches(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """One line for every name in `model` or in `weights` whose shapes differ; empty if all match."""
    expected, loaded = ({n: list(t.shape) for n, t in state.items()} for state in (model.state_dict(), weights))
    return [
        f"{name} is {loaded.get(name, 'missing')} in the checkpoint, {expected.get(name, 'missing')} in this run"
        for name in sorted(expected.keys() | loaded.keys())
        if expected.get(name) != loaded.get(name)
    ]
