"""What a run will need, before anything is spent: parameters, operations, memory, data and hours. Nothing is built."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch

from cod_lightning.config.schema import TrainerConfig
from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import chunk_size
from cod_lightning.nn.config import DecoderConfig, num_vit_parameters
from cod_lightning.nn.strategies import BlockSpec, build_all
from cod_lightning.settings import choice_errors

STRATEGIES = ("single", "ddp", "fsdp")
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Gpu:
    """What one rank runs on."""

    memory: int
    """Bytes."""
    bf16: float
    """Dense matrix products in bfloat16, operations per second."""
    fp32: float
    """The same in float32, without TF32."""


GPUS = {
    "a100": Gpu(80 * 10**9, 312e12, 19.5e12),
    "h100": Gpu(80 * 10**9, 989.4e12, 66.9e12),
    "h200": Gpu(141 * 10**9, 989.4e12, 66.9e12),
}
"""From the data sheets (SXM). A gigabyte counts as 1e9 bytes here and is 2^30: what is left is for CUDA's context."""

C4_DOCUMENTS, C4_TOKENS = 364_868_892, 156e9
"""Of the split `en`, training; tokens of T5's tokenizer."""
C4_TEXT, C4_DOWNLOAD = 828_589_180_707 / C4_DOCUMENTS, 326_778_635_540 / C4_DOCUMENTS
"""Bytes of a document with its URL and date, as text and as the .json.gz that is read (data card of allenai/c4)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they hold; `total` has all of them at once.

    That is the moment of the loss in all micro-batches of a step but the first, before which there are no gradients.
    What CUDA and the allocator take for themselves comes on top.
    """

    weights: int
    gradients: int
    moments: int
    """Adam's two."""
    copies: int
    """Of weights and biases in bfloat16, which autocast keeps until a step's end."""
    communication: int
    """DDP's buckets; what FSDP has gathered of the others' weights and not yet shared out of its gradients."""
    activations: int
    """What a forward pass saves for the backward pass."""
    work: int
    """The loss: logits of a chunk of tokens and the gradients made of them. Or, where that is more, the gradients
    inside the last block of a Vision Transformer, or with checkpointing a block that is computed again."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

    hardware: str
    gpus: int
    mfu: float
    precision: str
    strategy: str
    checkpointing: str
    micro_batch_size: int
    parameters: int
    non_embedding: int
    """Parameters that are neither in the embeddings, of tokens or of patches and their positions, nor in the head."""
    positions: int
    """Tokens of all rows of all steps, padding included; of images the patches."""
    published_tokens: float | None
    """The paper's count for the run."""
    flops_per_token: int
    flops: int
    """Of all training steps; validation is not counted."""
    memory: Memory
    device_memory: int
    """Bytes that a device has."""
    max_micro_batch_size: int
    """Most rows per forward pass that fit into it; 0: not one does."""
    token_bytes: int | None
    """Of prepared rows for all positions; fewer rows are read again and again. None for images, which are not
    prepared."""
    documents: int | None
    """Of C4 that make up these rows (`data.max_documents`), None for other sources."""
    text_bytes: int | None
    """These documents as JSON lines."""
    download_bytes: int | None
    """The same as the compressed files of the hub."""
    hours: float

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    def plain(self) -> dict[str, Any]:
        """Every figure under its name, `memory` by part and in total."""
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | {"memory": memory, "gpu_hours": self.gpu_hours}


def estimate(
    model: DecoderConfig,
    norm: Mapping[str, Any],
    data: DataConfig,
    trainer: TrainerConfig,
    images: ImageConfig | None = None,
    *,
    hardware: str = "h100",
    mfu: float = 0.4,
    gpus: int | None = None,
    strategy: str | None = None,
    checkpointing: str | None = None,
    published_tokens: float | None = None,
) -> Estimate:
    """What a run of these sections will need; a few milliseconds, but for `cpu`, whose speed is measured once.

    Args:
        model: shape.
        norm: the strategy's `name` and options.
        data: rows, batch and source.
        trainer: steps, precision, ranks and threads.
        images: of a Vision Transformer, with `classes` filled in where the source leaves them open; None: a decoder.
        hardware: of `GPUS`, or `cpu`: this machine, at the rate of a matrix product in `trainer.threads`.
        mfu: model FLOPs utilisation, the share of the hardware's dense peak in the run's precision.
        gpus: ranks; None: those of `trainer`.
        strategy: `single`, `ddp`, or `fsdp` (FSDP2 over blocks, bfloat16 by its policy instead of autocast); None: by
            that of `trainer`, or where it is `auto` by the number of ranks.
        checkpointing: of activations: `none`; `selective` keeps what matrix products and attention return; `full`
            keeps the input of every block. None: that of `trainer`. Utilisation does not count what is computed twice.
        published_tokens: handed on.

    Raises:
        UserError: names every argument that is wrong, and what would be right.
    """
    gpus = trainer.world_size if gpus is None else gpus
    automatic = "single" if gpus == 1 else "ddp"
    strategy = strategy or (automatic if trainer.strategy == "auto" else trainer.strategy)
    checkpointing = checkpointing or trainer.checkpointing
    vocabulary = model.vocab_size or (data.vocab_size if data.tokenizer == "bpe" else 0)
    found = choice_errors("hardware", hardware, (*GPUS, "cpu"))
    found += choice_errors("strategy", strategy, STRATEGIES)
    found += choice_errors("checkpointing", checkpointing, CHECKPOINTING)
    if images is not None:
        images = replace(images, classes=images.known_classes)
        if not images.classes:
            found.append(f"images.classes is open, and images.folder={images.folder!r} is not read here: set it")
    elif not vocabulary:
        found.append(f"model.vocab_size is open, and data.tokenizer={data.tokenizer!r} is not read here: set it")
    if not 0 < mfu <= 1:
        found.append(f"mfu={mfu} must lie in (0, 1]: the share of the hardware's peak that is reached")
    if gpus < 1:
        found.append(f"gpus={gpus} must be at least 1")
    elif data.batch_size % gpus:
        found.append(f"gpus={gpus} does not divide data.batch_size={data.batch_size}")
    elif data.batch_size // gpus % data.micro_batch_size:
        found.append(
            f"data.micro_batch_size={data.micro_batch_size} does not divide the {data.batch_size // gpus} rows that "
            f"each of gpus={gpus} has of data.batch_size={data.batch_size}"
        )
    if gpus > 1 and hardware == "cpu":
        found.append(f"gpus={gpus}: hardware='cpu' is this one machine")
    if gpus > 1 and strategy == "single":
        found.append(f"gpus={gpus}: strategy='single' is one rank; ddp and fsdp take several")
    if found:
        raise UserError("\n".join(found))

    model, specs = replace(model, vocab_size=vocabulary or None), build_all(norm, model.num_hidden_layers)
    precision = trainer.precision
    if precision == "auto":
        precision = "32-true" if hardware == "cpu" else trainer.auto_cuda
    device_memory, peak = device(hardware, precision, trainer.threads)
    needs = partial(
        memory, model, specs, length=data.seq_len if images is None else images.patches + 1, images=images,
        precision=precision, strategy=strategy, ranks=gpus, checkpointing=checkpointing, cpu=hardware == "cpu",
    )  # fmt: skip
    rows, tokens = trainer.max_steps * data.batch_size, data.seq_len if images is None else images.patches
    per_row = tokens * flops_per_token(model, tokens) if images is None else flops_per_image(model, images)
    flops, positions = rows * per_row, rows * tokens
    total = parameters(model, specs, images)
    return Estimate(
        hardware=hardware,
        gpus=gpus,
        mfu=mfu,
        precision=precision,
        strategy=strategy,
        checkpointing=checkpointing,
        micro_batch_size=data.micro_batch_size,
        parameters=total,
        non_embedding=total - outer_parameters(model, images),
        positions=positions,
        published_tokens=published_tokens,
        flops_per_token=round(per_row / tokens),
        flops=flops,
        memory=needs(rows=data.micro_batch_size),
        device_memory=device_memory,
        max_micro_batch_size=most(lambda rows: needs(rows=rows).total <= device_memory),
        hours=flops / (peak * mfu * gpus) / 3600,
        **data_needed(data, positions, vocabulary, images),
    )


def most(fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits`, which grow ever harder, is true; 0 if it is false for 1."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# Parameters and operations -------------------------------------------------------------------------------------------


def parameters(model: DecoderConfig, specs: list[BlockSpec], images: ImageConfig | None = None) -> int:
    """Parameters of the model, a Vision Transformer where there are images, with what the strategy adds or takes."""
    d, norm = model.hidden_size, model.hidden_size if model.norm_affine else 0
    total = model.num_parameters() if images is None else vit_parameters(model, images)
    for spec in specs:
        total += spec.entry_norm * norm + any(s.gate != "no" for s in spec.sublayers)
        for s in spec.sublayers:
            total += (s.pre_norm + s.branch_norm + s.sum_norm - 1) * norm
            total += {"no": 0, "scalar": 1, "channel": d}[s.learned_branch_scale] + s.learned_skip * d
    return total


def vit_parameters(model: DecoderConfig, images: ImageConfig) -> int:
    """Parameters of the Vision Transformer under Pre-LN."""
    return num_vit_parameters(model, images.size, images.patch_size, images.classes or 0)


def outer_parameters(model: DecoderConfig, images: ImageConfig | None = None) -> int:
    """Parameters of the embeddings and of the head: all but the blocks and the final norm."""
    if images is None:
        return (model.vocab_size or 0) * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return vit_parameters(replace(model, num_hidden_layers=0), images) - model.norm_affine * model.hidden_size


def flops_per_token(model: DecoderConfig, length: int) -> int:
    """Operations per token of a training step, forward and backward.

    6 for each parameter but the token embeddings, which are looked up, and 12 * layers * hidden * length for the two
    products of attention: all of the square, as is usual (PaLM, appendix B), though causality needs half of it. Norms
    and activation functions are not counted.
    """
    lookup = 0 if model.tie_word_embeddings else (model.vocab_size or 0) * model.hidden_size
    weights = model.num_parameters() - lookup
    return 6 * weights + 12 * model.num_hidden_layers * model.hidden_size * length


def flops_per_image(model: DecoderConfig, images: ImageConfig) -> int:
    """Operations per image of a training step of the Vision Transformer, counted as those of the decoder.

    The blocks and the final norm see the patches and the class token, the head one position. The projection of the
    patches takes 4 for each weight, not 6: no gradient of the pixels is needed.
    """
    d, length = model.hidden_size, images.patches + 1
    inside = vit_parameters(model, images) - outer_parameters(model, images)
    ends = 4 * images.patches * 3 * images.patch_size**2 * d + 6 * d * (images.classes or 0)
    return length * (6 * inside + 12 * model.num_hidden_layers * d * length) + ends


# Memory --------------------------------------------------------------------------------------------------------------


def memory(
    model: DecoderConfig,
    specs: list[BlockSpec],
    *,
    rows: int,
    length: int,
    precision: str,
    images: ImageConfig | None = None,
    strategy: str = "single",
    ranks: int = 1,
    checkpointing: str = "none",
    cpu: bool = False,
) -> Memory:
    """Memory of a training step on one of `ranks` devices, with the fused norms of a GPU or those of torch on a CPU.

    Rows and length are those of a micro-batch, where there are images that of the patches and the class token.
    `bf16-mixed` is float32 weights under autocast, and under `bf16-true` Adam's moments are in bfloat16 too. Attention
    is taken to keep no scores: not so in float32 with grouped heads.
    """
    total, outer = parameters(model, specs, images), outer_parameters(model, images)
    block = (total - outer) // model.num_hidden_layers
    held = 2 if precision == "bf16-true" else 4
    compute = 4 if precision == "32-true" else 2
    sharded = strategy == "fsdp"
    stream = compute if sharded else held
    tokens = rows * length
    inside = [block_bytes(model, spec, stream, compute, cpu, images is not None) for spec in specs]
    kept, again = checkpointed(model, inside, stream, compute, checkpointing, images is not None)
    communication = 0
    if strategy == "ddp":
        communication = total * held
    elif sharded:
        # Embeddings and head, the block at work and the next one; their gradients wait in the same dtype.
        communication = 2 * (outer + 2 * block) * compute
    share = total * held // (ranks if sharded else 1)
    final = norm_bytes(model, stream, cpu)
    if images is None:
        ends, loss = 8 * tokens, loss_bytes(model, tokens, compute, cpu)  # the ids of tokens
    else:
        # The patches, and what the final norm returns, of which the head reads one position.
        ends = (rows * images.patches * 3 * images.patch_size**2 + tokens * model.hidden_size) * compute
        loss = image_loss_bytes(model, images, rows, tokens, stream, compute, final)
    return Memory(
        weights=share,
        gradients=share,
        moments=2 * share,
        copies=2 * cast(model, images) if stream > compute else 0,
        communication=communication,
        activations=tokens * (kept + final) + ends,
        work=max(loss, tokens * again),
    )


def cast(model: DecoderConfig, images: ImageConfig | None) -> int:
    """Elements of the weights and biases of all products that autocast makes copies of: the decoder's head is none."""
    d, kv, ffn = model.hidden_size, model.key_value_heads * model.head_dim, model.intermediate_size
    attention = 2 * d * d + 2 * d * kv + (d + 2 * kv if model.qkv_bias else 0)
    if images is None:
        return model.num_hidden_layers * (attention + 3 * d * ffn)
    ends = (3 * images.patch_size**2 + 1) * d + (d + 1) * (images.classes or 0)
    return model.num_hidden_layers * (attention + d + 2 * d * ffn + ffn + d) + ends


def checkpointed(
    model: DecoderConfig, inside: list[int], stream: int, compute: int, checkpointing: str, vision: bool = False
) -> tuple[int, int]:
    """Bytes per token that all blocks keep, and that one block takes as it is computed again.

    Args:
        model: shape.
        inside: bytes per token that each block saves.
        stream: bytes of an element of the residual stream.
        compute: bytes of an element in matrix products.
        checkpointing: as for `estimate`.
        vision: whether they are blocks of a Vision Transformer.
    """
    d, kv, ffn = model.hidden_size, model.key_value_heads * model.head_dim, model.intermediate_size
    if checkpointing == "none":
        return sum(inside), 0
    inputs = len(inside) * d * stream
    if checkpointing == "full":
        # With it, the gradients of the block's output and of what its last product read.
        return inputs, max(inside) + (d + ffn) * compute
    # Of what products and attention return, the block itself saves values, attention's result, gate and up; but not
    # queries and keys, which are rotated first, nor what is added to the stream. Nothing is rotated in images.
    if vision:
        shared = (2 * d + 2 * kv + ffn) * compute + 4 * model.num_attention_heads
        kept = shared + 2 * d * compute
        # With the two gradients; those of the decoder's loss take more than these.
        return inputs + len(inside) * kept, max(inside) - shared + (d + ffn) * compute
    shared = (d + kv + 2 * ffn) * compute + 4 * model.num_attention_heads
    kept = shared + (3 * d + kv) * compute
    return inputs + len(inside) * kept, max(inside) - shared


def block_bytes(
    model: DecoderConfig, spec: BlockSpec, stream: int, compute: int, cpu: bool, vision: bool = False
) -> int:
    """Bytes per token that a block, of the decoder or of a Vision Transformer, saves for its backward pass.

    A norm saves what it reads, a learned factor what it multiplies, matrix products what they read, once for all that
    read the same. `stream` and `compute` are the bytes of an element of the residual stream and in matrix products;
    where they differ, under autocast, the products that read the stream itself, 3 and 2 or 1, save a cast of it each.
    """
    d, kv, ffn = model.hidden_size, model.key_value_heads * model.head_dim, model.intermediate_size
    autocast = stream > compute
    total = norm_bytes(model, stream, cpu) if spec.entry_norm else 0
    for s, products in ((spec.attention, 3), (spec.ffn, 1 if vision else 2)):
        scales_stream = s.learned_skip + (s.gate == "input")
        if s.pre_norm:
            total += norm_bytes(model, stream, cpu, s.groups) + d * compute
        elif autocast:
            total += products * d * compute + (scales_stream > 0) * d * stream
        else:
            total += d * compute
        total += (scales_stream == 2) * d * stream  # one scales the stream, the other what the first makes of it
        total += (s.gate == "output") * d * stream + (s.learned_branch_scale != "no") * d * compute
        total += s.branch_norm * norm_bytes(model, compute, cpu) + s.sum_norm * norm_bytes(model, stream, cpu)
    # Queries, keys, values and the result of attention, with one logarithm per head; in the feed-forward network the
    # gate, its silu, the other factor and their product, or what GELU reads and returns.
    return total + (2 * d + 2 * kv + (2 if vision else 4) * ffn) * compute + 4 * model.num_attention_heads


def norm_bytes(model: DecoderConfig, element: int, cpu: bool, groups: int = 1) -> int:
    """Bytes per token that a norm saves of an input with elements of `element` bytes; statistics are in float32."""
    d, statistics = model.hidden_size, 4 * groups * (2 if model.norm == "layer" else 1)
    if not cpu:
        return d * element + statistics
    # There torch's RMSNorm is single operations in float32, and its product with the weight saves the other factor;
    # with groups that product is taken outside of it.
    wide = max(element, 4) if model.norm == "rms" else element
    product = 0 if not model.norm_affine else element if groups > 1 else wide if model.norm == "rms" else 0
    return d * (wide + product) + statistics


def loss_bytes(model: DecoderConfig, tokens: int, compute: int, cpu: bool) -> int:
    """Bytes of `kernels.loss.LinearCrossEntropy` where they are most: as it takes the logarithms of a chunk's softmax.

    Then there are the hidden states and their gradient; the head's gradient in float32; of the chunk, the logits, in
    half precision their float32 copy, and the logarithms; and of the chunk before, the gradient of its logits and, in
    half precision, its logarithms.
    """
    vocabulary, d = model.vocab_size or 0, model.hidden_size
    chunk = chunk_size(torch.device("cpu" if cpu else "cuda"), vocabulary)
    half = compute < 4
    logits = (10 if half else 8) + ((6 if half else 4) if tokens > chunk else 0)
    return 2 * tokens * d * compute + vocabulary * d * 4 + min(tokens, chunk) * vocabulary * logits


def image_loss_bytes(
    model: DecoderConfig, images: ImageConfig, rows: int, tokens: int, stream: int, compute: int, final: int
) -> int:
    """Bytes that come on top of what a Vision Transformer has saved, where they are most as its backward pass begins.

    First the logarithms of the softmax and two gradients of as many elements, and the gradients on either side of the
    final norm. Or, in the last block, when the final norm's `final` bytes per token and its result are gone: the
    gradient of the stream, under autocast its cast, the one of what GELU returns, and that of the last weight.
    """
    d, ffn = model.hidden_size, model.intermediate_size
    logits = 12 * rows * (images.classes or 0)
    last = d * stream + (stream > compute) * d * compute + ffn * compute - final - d * compute
    return logits + max(tokens * d * (compute + stream), tokens * last + d * ffn * compute)


# Data and time -------------------------------------------------------------------------------------------------------


def data_needed(data: DataConfig, positions: int, vocabulary: int, images: ImageConfig | None) -> dict[str, Any]:
    """The fields of `Estimate` on data."""
    item = 2 if vocabulary <= 2**16 else 4
    if data.source != "c4" or images is not None:
        token_bytes = positions * item if images is None else None
        return {"token_bytes": token_bytes, "documents": None, "text_bytes": None, "download_bytes": None}
    per_document = data.seq_len if data.layout == "document" else C4_TOKENS / C4_DOCUMENTS
    documents = min(math.ceil(positions / per_document), data.max_documents or C4_DOCUMENTS, C4_DOCUMENTS)
    return {
        "token_bytes": round(min(positions, documents * per_document)) * item,
        "documents": documents,
        "text_bytes": round(documents * C4_TEXT),
        "download_bytes": round(documents * C4_DOWNLOAD),
    }


def device(hardware: str, precision: str, threads: int = 0) -> tuple[int, float]:
    """Memory in bytes and operations per second of `hardware`; `threads` as in the trainer's section."""
    half = precision != "32-true"
    if hardware == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return memory, matmul_rate("cpu", torch.bfloat16 if half else torch.float32, threads=threads)
    gpu = GPUS[hardware]
    return gpu.memory, gpu.bf16 if half else gpu.fp32


@lru_cache
def matmul_rate(device: str, dtype: torch.dtype, size: int = 512, threads: int = 0) -> float:
    """Operations per second of a product of two square matrices on `device`, the best of 50.

    At 512 a product takes 4 ms of a core: short enough to find the core free among other processes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / min(seconds(a, b) for _ in range(50))
    finally:
        torch.set_num_threads(before)


def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds that a product takes."""
    finish = torch.cuda.synchronize if a.is_cuda else lambda: None
    finish()
    start = time.perf_counter()
    _ = a @ b
    finish()
    return time.perf_counter() - start
