"""The device, its norm backend and the precision of a run; without lightning, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cod_lightning.config.schema import Config, TrainerConfig
from cod_lightning.errors import UserError
from cod_lightning.kernels.norm import checked_backend, triton_norm
from cod_lightning.nn.norms import with_norm_kind
from cod_lightning.nn.spec import BlockSpec


def accelerator(settings: TrainerConfig) -> str:
    """`cuda` or `cpu`; Lightning's "auto" could choose an Apple GPU, which does not support float64.

    Raises:
        UserError: `trainer.accelerator=gpu` without a CUDA device.
    """
    if settings.accelerator == "cpu":
        return "cpu"
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator='gpu', but torch has no CUDA device: pass trainer.accelerator=cpu")
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_norm_backend(config: Config) -> None:
    """Check that `model.norm_backend=triton` can run where the run trains.

    Raises:
        UserError: it needs a GPU, and the run has none.
    """
    interpreted = triton_norm is not None and triton_norm.INTERPRETED
    if config.model.norm_backend == "triton" and accelerator(config.trainer) == "cpu" and not interpreted:
        raise UserError(
            "model.norm_backend='triton' needs a GPU (TRITON_INTERPRET=1 runs slowly on the CPU): pass "
            "model.norm_backend=auto"
        )


def usable_norm_backend(config: Config, specs: Sequence[BlockSpec], device: torch.device) -> str:
    """`model.norm_backend`, or torch's norms if the Triton kernels are wrong for a norm of the model on a device.

    Raises:
        UserError: the kernels are wrong, and norm_backend is `triton`.
    """
    model, precision_name = config.model, precision(config.trainer)
    stream = torch.bfloat16 if precision_name == "bf16-true" else torch.float32
    branch = torch.float32 if precision_name == "32-true" else torch.bfloat16
    norms = {(with_norm_kind(model, specs[-1]).norm, model.hidden_size, 1)}
    for spec in specs:
        kind = with_norm_kind(model, spec).norm
        norms |= {(kind, model.hidden_size, sublayer.groups) for sublayer in spec.sublayers}
        norms |= {(kind, model.head_dim, 1)} if spec.head_norm != "no" else set()
    backend = model.norm_backend
    for kind, size, groups in sorted(norms):
        backend = checked_backend(backend, device, kind, size, groups, stream, branch)
    return backend


def compile_backend(settings: TrainerConfig) -> str | None:
    """The torch.compile backend of the blocks, None for eager mode; `trainer.compile=null` compiles on CUDA only."""
    wanted = accelerator(settings) == "cuda" if settings.compile is None else settings.compile
    return "inductor" if wanted else None


def set_threads(settings: TrainerConfig) -> None:
    """Use `trainer.threads` CPU threads in this process."""
    if settings.threads:
        torch.set_num_threads(settings.threads)


def precision(settings: TrainerConfig) -> Any:
    """Lightning's precision; `auto` is `auto_cuda` on a CUDA device whose hardware has bfloat16, float32 otherwise."""
    if settings.precision != "auto":
        return settings.precision
    cuda = accelerator(settings) == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return settings.auto_cuda if cuda else "32-true"
