"""Wrap a model for training: activation checkpointing, torch.compile and FSDP2, in this order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cod_lightning.nn.decoder import Decoder, Rope, set_step
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.nn.weights import state_dict

Model = Decoder | VisionTransformer

aten = torch.ops.aten
SAVED = {
    *(aten.mm.default, aten.bmm.default, aten.addmm.default),
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results checkpointing="selective" saves: the most expensive ones to recompute."""


def parallelise(
    model: Model,
    *,
    checkpointing: str = "none",
    backend: str | None = None,
    mesh: DeviceMesh | None = None,
    dtype: torch.dtype | None = None,
    offload: bool = False,
) -> None:
    """Wrap `model` in place; parameter names and results do not change.

    Args:
        model: may be on the meta device.
        checkpointing: activations that the backward pass recomputes: `none`; `full`, all of a block but its input;
            `selective`, all but the results of matrix products and attention.
        backend: compiles each block as one graph, such as "inductor"; code that was compiled before is forgotten. None:
            no compilation.
        mesh: shards parameters, gradients and optimizer states: [shards] or [replicas, shards]; None: no sharding.
        dtype: dtype of the gathered linear layers of blocks; None: that of the parameters. Gradients are reduced in
            float32.
        offload: keep the shards in CPU memory.
    """
    if backend is not None:
        torch.compiler.reset()  # a process compiles one function for eight inputs or models at most, then fails
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, save_matmuls)}
    options = selective if checkpointing == "selective" else {}
    for block in model.blocks:
        if checkpointing != "none":
            forward: Any = partial(checkpointed, block.forward, options)  # a deep copy gets its own
            block.forward = forward
        if backend is not None:
            block.compile(fullgraph=True, backend=backend)
    if mesh is None:
        return
    matrices = {
        parameter
        for block in model.blocks
        for module in block.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters()
    }

    def shard(module: nn.Module, dtype: torch.dtype | None, ignored: set[nn.Parameter]) -> None:
        # `cast_forward_inputs` would round the residual stream.
        policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload_policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload_policy, ignored_params=ignored)

    # Autocast rounds the weights of linear layers only: norms and scales keep their dtype, so they are gathered with
    # the embeddings. The model comes first, because it does not reach into blocks that are sharded already.
    shard(model, None, ignored=matrices)
    for block in model.blocks:
        shard(block, dtype, ignored=set(block.parameters()) - matrices)


def checkpointed(
    forward: Callable[..., Any], options: dict[str, Any], x: Tensor, rope: Rope | None, hook: Any = None, *shared: Any
) -> Any:
    """Call the `forward` of a block with activation checkpointing, which a call with a hook skips."""
    if hook is not None or not torch.is_grad_enabled():
        return forward(x, rope, hook, *shared)
    return checkpoint(forward, x, rope, None, *shared, use_reentrant=False, preserve_rng_state=False, **options)


def save_matmuls(context: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of checkpointing="selective": save the results of `SAVED`, recompute all others."""
    return CheckpointPolicy.MUST_SAVE if operation in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def unwrapped_copy(model: Model) -> Model:
    """A model with the weights of `model` and without the changes of `parallelise`, for transforms and hooks.

    It shares unsharded weights and gathers sharded ones, which all ranks must do together.
    """
    with torch.device("meta"):
        copy = model.empty_like()
    weights = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state_dict(model).items()}
    copy.load_state_dict(weights, assign=True)
    if isinstance(copy, Decoder):
        copy.tie()
    set_step(copy, model.step)
    return copy
