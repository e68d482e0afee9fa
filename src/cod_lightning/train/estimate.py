"""Parameters, FLOPs, memory, data and hours of a run, before it starts."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from cod_lightning.config.schema import CHECKPOINTING, Config
from cod_lightning.config.validate import size_errors
from cod_lightning.data.config import DataConfig
from cod_lightning.errors import UserError
from cod_lightning.memory import host_memory
from cod_lightning.settings import choice_errors
from cod_lightning.train.cost import Architecture, Memory, training_flops

STRATEGIES = ("single", "ddp", "fsdp")
MIN_MFU = 1e-6
MFU = 0.4
"""Model FLOPs utilisation that is assumed, as no run has measured it."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU (SXM)."""

    memory: int
    """Bytes. A gigabyte counts as 1e9 bytes here and is 2^30: the difference is left to CUDA's context."""
    bf16: float
    """FLOP/s of dense matrix products in bfloat16."""
    fp32: float
    """The same in float32, without TF32."""


GPUS = {
    "a100": Gpu(80 * 10**9, 312e12, 19.5e12),
    "h100": Gpu(80 * 10**9, 989.4e12, 66.9e12),
    "h200": Gpu(141 * 10**9, 989.4e12, 66.9e12),
}

C4_DOCUMENTS, C4_TOKENS = 364_868_892, 156e9
"""Training split of `en`; tokens of T5's tokenizer."""
C4_TEXT, C4_DOWNLOAD = 828_589_180_707 / C4_DOCUMENTS, 326_778_635_540 / C4_DOCUMENTS
"""Bytes of a document with its URL and date, as text and as .json.gz (data card of allenai/c4)."""


@dataclass(frozen=True)
class Estimate:
    """Resources of a run; the fields are the keys of `estimate --json`."""

    hardware: str
    gpus: int
    mfu: float
    precision: str
    strategy: str
    checkpointing: str
    micro_batch_size: int
    parameters: int
    non_embedding: int
    """Parameters outside of the embeddings and the head."""
    positions: int
    """Tokens of all steps, padding included; for images patches."""
    published_tokens: float | None
    """The paper's number of tokens of the run."""
    flops_per_token: int
    flops: int
    """FLOPs of all training steps, without validation."""
    memory: Memory
    device_memory: int
    """Bytes of a device."""
    max_micro_batch_size: int
    """Largest micro-batch that fits into it; 0 if none does."""
    token_bytes: int | None
    """Size of the prepared tokens of C4, without repetitions; None for other sources, whose size is not known here."""
    documents: int | None
    """Documents of C4 that contain these tokens (`data.max_documents`); None for other sources."""
    text_bytes: int | None
    """Their size as JSON lines."""
    download_bytes: int | None
    """Their size as compressed files of the hub."""
    hours: float

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    def plain(self) -> dict[str, Any]:
        """Every field by name, `memory` by part and in total."""
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | {"memory": memory, "gpu_hours": self.gpu_hours}


def estimate(
    config: Config,
    *,
    hardware: str = "h100",
    mfu: float = MFU,
    gpus: int | None = None,
    strategy: str | None = None,
    checkpointing: str | None = None,
) -> Estimate:
    """Estimate the resources of a run. Takes about a second, and on `cpu` measures the rate of a matrix product.

    Args:
        config: the run.
        hardware: a name of `GPUS`, or `cpu` for this machine.
        mfu: model FLOPs utilisation, the share of the hardware's dense peak in the run's precision.
        gpus: number of ranks; None: the trainer's. `trainer.hybrid` shards over those of one node.
        strategy: `single`, `ddp`, or `fsdp` (bfloat16 by FSDP2's policy instead of autocast); None: the trainer's.
        checkpointing: `none`, `selective` or `full`; None: the trainer's. MFU does not count recomputation.

    Raises:
        UserError: names every argument that is wrong, and the alternatives.
    """
    data, trainer = config.data, config.trainer
    gpus = trainer.world_size if gpus is None else gpus
    automatic = "single" if gpus == 1 else "ddp"
    strategy = strategy or (automatic if trainer.strategy == "auto" else trainer.strategy)
    checkpointing = checkpointing or trainer.checkpointing
    architecture = Architecture.of(config)
    if errors := [*size_errors(config), *argument_errors(data, hardware, mfu, gpus, strategy, checkpointing)]:
        raise UserError("\n".join(errors))

    precision = trainer.precision
    if precision == "auto":
        precision = "32-true" if hardware == "cpu" else trainer.auto_cuda
    device_memory, peak = memory_and_peak(hardware, precision, trainer.threads)
    memory_model = partial(
        architecture.memory_model,
        precision,
        strategy=strategy,
        ranks=min(gpus, trainer.devices) if trainer.hybrid else gpus,
        checkpointing=checkpointing,
        offload=trainer.offload,
        cpu=hardware == "cpu",
    )
    memory = memory_model(data.micro_batch_size)
    largest = largest_batch(memory, device_memory)
    if largest > data.micro_batch_size:  # extrapolated from a small batch, where gradients of weights take the most
        largest = largest_batch(memory_model(largest), device_memory)
    sizes = architecture.sizes
    flops = trainer.max_steps * data.batch_size * training_flops(architecture)
    positions = config.training_tokens
    return Estimate(
        hardware=hardware,
        gpus=gpus,
        mfu=mfu,
        precision=precision,
        strategy=strategy,
        checkpointing=checkpointing,
        micro_batch_size=data.micro_batch_size,
        parameters=sizes.parameters,
        non_embedding=sizes.parameters - sizes.outer,
        positions=positions,
        published_tokens=config.paper.get("tokens") if config.scale == "paper" else None,
        flops_per_token=round(training_flops(architecture) / architecture.sequence_length),
        flops=flops,
        memory=memory(data.micro_batch_size),
        device_memory=device_memory,
        max_micro_batch_size=largest,
        hours=flops / (peak * mfu * gpus) / 3600,
        **data_needed(data, positions, architecture),
    )


def argument_errors(
    data: DataConfig, hardware: str, mfu: float, gpus: int, strategy: str, checkpointing: str
) -> Iterator[str]:
    """One error for each wrong argument of `estimate`."""
    yield from choice_errors("hardware", hardware, (*GPUS, "cpu"))
    yield from choice_errors("strategy", strategy, STRATEGIES)
    yield from choice_errors("checkpointing", checkpointing, CHECKPOINTING)
    if not MIN_MFU <= mfu <= 1:
        yield f"mfu={mfu} must lie between {MIN_MFU} and 1: it is the share of the hardware's peak"
    if gpus < 1:
        yield f"gpus={gpus} must be at least 1"
    elif data.batch_size % gpus:
        yield f"gpus={gpus} does not divide data.batch_size={data.batch_size}"
    elif data.batch_size // gpus % data.micro_batch_size:
        yield (
            f"data.micro_batch_size={data.micro_batch_size} does not divide data.batch_size / gpus = "
            f"{data.batch_size} / {gpus}"
        )
    if gpus > 1 and hardware == "cpu":
        yield f"gpus={gpus}: hardware='cpu' is this one machine"
    if gpus > 1 and strategy == "single":
        yield f"gpus={gpus}: strategy='single' is one rank; use ddp or fsdp"


def gpu_hours(config: Config) -> float | None:
    """GPU-hours of a run in the precision that it has on CUDA; `estimate` with its defaults, without the memory.

    None if the size of the model is not in the configuration.
    """
    if size_errors(config):
        return None
    architecture, trainer = Architecture.of(config), config.trainer
    precision = trainer.auto_cuda if trainer.precision == "auto" else trainer.precision
    flops = trainer.max_steps * config.data.batch_size * training_flops(architecture)
    return flops / (memory_and_peak("h100", precision)[1] * MFU) / 3600


def largest_batch(memory: Callable[[int], Memory], limit: int) -> int:
    """The largest micro-batch with at most `limit` bytes; 0 if there is none."""
    return bisect_right(range(1, 2**40), limit, key=lambda batch_size: memory(batch_size).total)


def data_needed(data: DataConfig, positions: int, architecture: Architecture) -> dict[str, Any]:
    """The fields of `Estimate` on data."""
    if data.source != "c4" or architecture.images is not None:
        return dict.fromkeys(("token_bytes", "documents", "text_bytes", "download_bytes"))
    itemsize = 2 if (architecture.model.vocab_size or 0) <= 2**16 else 4
    per_document = data.seq_len if data.layout == "document" else C4_TOKENS / C4_DOCUMENTS
    documents = min(math.ceil(positions / per_document), data.max_documents or C4_DOCUMENTS, C4_DOCUMENTS)
    return {
        "token_bytes": round(min(positions, documents * per_document)) * itemsize,
        "documents": documents,
        "text_bytes": round(documents * C4_TEXT),
        "download_bytes": round(documents * C4_DOWNLOAD),
    }


def memory_and_peak(hardware: str, precision: str, threads: int = 0) -> tuple[int, float]:
    """Memory in bytes and peak FLOP/s of `hardware`; `threads` as in the trainer's section."""
    half = precision != "32-true"
    if hardware == "cpu":
        return host_memory(), matmul_rate("cpu", torch.bfloat16 if half else torch.float32, threads=threads)
    gpu = GPUS[hardware]
    return gpu.memory, gpu.bf16 if half else gpu.fp32


@lru_cache
def matmul_rate(device: str, dtype: torch.dtype, size: int = 512, threads: int = 0) -> float:
    """FLOP/s of a product of two square matrices on `device`, the best of 0.2 s.

    At 512 a product takes 4 ms of a core: short enough to run uninterrupted on a machine with other load.
    """
    from torch.utils.benchmark import Timer  # takes 0.25 s

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads or torch.get_num_threads())
    return 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.2).times)
