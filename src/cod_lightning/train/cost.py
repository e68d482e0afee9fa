"""Parameters, FLOPs and memory of a model's training step, counted on a model of fake tensors.

Fake tensors have shapes but no data. The model has one block of every kind that the norm strategy builds: what is
counted in it is multiplied by the number of such blocks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cod_lightning.config.schema import Config
from cod_lightning.data.config import ImageConfig
from cod_lightning.kernels.loss import chunk_size
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.norms import Norm
from cod_lightning.nn.parallel import parallelise
from cod_lightning.nn.spec import BLOCK_COEFFICIENTS, Rates, Schedule
from cod_lightning.nn.strategies import BlockSpec, build_all
from cod_lightning.nn.vit import VisionTransformer


@dataclass(frozen=True)
class Memory:
    """Peak bytes on one device, by use; CUDA's context and the allocator's fragmentation come on top.

    The peak is at the loss, in all micro-batches of a step but the first, which has no gradients yet.
    """

    weights: int
    gradients: int
    moments: int
    """Adam's two."""
    copies: int
    """bfloat16 copies of weights and biases, which autocast keeps until the end of a step."""
    communication: int
    """DDP's buckets; weights that FSDP has gathered and gradients that it has not yet reduced."""
    activations: int
    """Saved by a forward pass for its backward pass."""
    work: int
    """Logits and gradients of the loss, or of a block in its backward pass and recomputation if that is more."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    parameters: int
    outer: int
    """In the embeddings, of tokens or of patches and their positions, and in the head."""
    cast: int
    """In the linear layers that autocast runs in bfloat16; the loss casts the decoder's head by itself."""


@dataclass(frozen=True)
class Architecture:
    """A decoder, or a Vision Transformer if there are `images`, and the length of its sequences."""

    model: DecoderConfig
    norm: Mapping[str, Any]
    seq_len: int
    images: ImageConfig | None = None

    def __hash__(self) -> int:
        return hash(repr(self))

    @classmethod
    def of(cls, config: Config) -> Architecture:
        """The architecture of a run, with the vocabulary of its tokenizer or the classes of its images filled in."""
        if config.task == "vision":
            images = replace(config.images, classes=config.images.known_classes)
            return cls(config.model, config.norm, config.data.seq_len, images)
        return cls(replace(config.model, vocab_size=config.vocab_size), config.norm, config.data.seq_len)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence, or patches of an image."""
        return self.seq_len if self.images is None else self.images.patches

    @cached_property
    def kinds(self) -> Counter[BlockSpec]:
        """One spec for every kind of block, and the number of such blocks."""
        specs = build_all(self.norm, self.model.num_hidden_layers)
        firsts: dict[str, BlockSpec] = {}
        return Counter(firsts.setdefault(wiring(spec), spec) for spec in specs)

    def build(self, specs: list[BlockSpec], dtype: torch.dtype = torch.float32) -> Any:
        """A model with these blocks; inside a `FakeTensorMode` it takes no memory."""
        model = replace(self.model, num_hidden_layers=len(specs), norm_backend="torch")
        images = self.images
        if images is None:
            network = Decoder(model, specs)
        else:
            network = VisionTransformer(model, specs, images.size, images.patch_size, images.classes or 0)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        return network

    def batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Sequences or images, and their targets."""
        if self.images is None:
            tokens = torch.empty((batch_size, self.seq_len), dtype=torch.long)
            return tokens, tokens
        labels = torch.empty(batch_size, dtype=torch.long)
        return torch.empty((batch_size, 3, self.images.size, self.images.size)), labels

    @cached_property
    def sizes(self) -> Sizes:
        with FakeTensorMode():
            network = self.build(list(self.kinds))
        repeats = {
            parameter: count
            for block, count in zip(network.blocks, self.kinds.values(), strict=True)
            for parameter in block.parameters()
        }

        def numel(modules: Iterable[nn.Module]) -> int:
            parameters = {parameter for module in modules for parameter in module.parameters()}
            return sum(repeats.get(parameter, 1) * parameter.numel() for parameter in parameters)

        decoder = isinstance(network, Decoder)
        ends = (network.model.embed_tokens, network.lm_head) if decoder else (network.embedding, network.head)
        linear = (module for module in network.modules() if isinstance(module, nn.Linear))
        return Sizes(numel([network]), numel(ends), numel(m for m in linear if not (decoder and m is network.lm_head)))

    def memory_model(
        self,
        precision: str,
        batch_size: int = 1,
        *,
        strategy: str = "single",
        ranks: int = 1,
        checkpointing: str = "none",
        offload: bool = False,
        cpu: bool = False,
    ) -> Callable[[int], Memory]:
        """The memory of a training step on one of `ranks` devices, as a function of the micro-batch size.

        Args:
            precision: `bf16-mixed`: float32 weights under autocast; `bf16-true`: all bfloat16, Adam's moments too.
            batch_size: micro-batch size at which the memory is counted; for other sizes it is extrapolated.
            strategy: `single`, `ddp` or `fsdp`.
            ranks: number of devices; under hybrid sharding those of one node.
            checkpointing: `none`, `selective` or `full`.
            offload: under `fsdp`, keep weights, gradients and Adam's moments in CPU memory. FSDP2 copies the shard of a
                block to the device before it gathers the block, and the shard of its gradient back.
            cpu: use torch's norms on a CPU instead of the fused ones of a GPU.
        """
        sizes = self.sizes
        sharded = strategy == "fsdp"
        autocast = precision == "bf16-mixed" and not sharded
        weight = 2 if precision == "bf16-true" else 4
        compute = 4 if precision == "32-true" else 2
        dtype = torch.float32 if autocast or precision == "32-true" else torch.bfloat16
        saved, work = count_bytes(self, batch_size, dtype, autocast, checkpointing, cpu)
        more_saved, more_work = count_bytes(self, 2 * batch_size, dtype, autocast, checkpointing, cpu)
        block = (sizes.parameters - sizes.outer) // self.model.num_hidden_layers
        communication = 0
        if strategy == "ddp":
            communication = sizes.parameters * weight
        elif sharded:
            # Embeddings and head, this block and the next one, and the same of their gradients.
            communication = 2 * (sizes.outer + 2 * block) * compute
        offload = offload and sharded
        shard = (block if offload else sizes.parameters) * weight // (ranks if sharded else 1)

        def at(count: int) -> Memory:
            head = compute if sharded else weight  # FSDP gathers weights in the dtype of the computation
            loss = 0 if self.images is not None else self.loss_bytes(count * self.seq_len, head, compute, cpu)
            return Memory(
                weights=shard,
                gradients=shard,
                moments=0 if offload else 2 * shard,
                copies=2 * sizes.cast if autocast else 0,
                communication=communication,
                activations=count * (more_saved - saved) // batch_size,
                work=max(loss, work + (count - batch_size) * (more_work - work) // batch_size),
            )

        return at

    def loss_bytes(self, tokens: int, weight: int, compute: int, cpu: bool) -> int:
        """Bytes of `LinearCrossEntropy` at its peak.

        The gradients of the hidden states and, in float32, of the head are there all the time. The rest is the most of
        three moments:
        - the log-softmax of a chunk of tokens: its logits, a float32 copy of them in half precision, their
          log-softmax, and the rest of the previous chunk;
        - the sum of the head's gradient in half precision: that of the chunk, on a CPU also in float32, the log-softmax
          and its copy;
        - the backward pass: both gradients times the upstream one, in float32 and in half precision.

        Under autocast the first two also have a copy of the head.

        Args:
            tokens: of a micro-batch.
            weight: bytes of a number of the head.
            compute: bytes of a number of the hidden states.
            cpu: the loss runs on a CPU.
        """
        vocab_size, hidden, half = self.model.vocab_size or 0, self.model.hidden_size, compute < 4
        chunk = chunk_size(torch.device("cpu" if cpu else "cuda"), vocab_size)
        logits, head, states = min(tokens, chunk) * vocab_size, vocab_size * hidden, tokens * hidden
        softmax = logits * ((10 if half else 8) + ((6 if half else 4) if tokens > chunk else 0))
        product = head * (6 if cpu else 2) + 6 * logits if half else 0
        backward = states * compute + head * (4 + (2 if weight < 4 else 0))
        copy = compute * head if compute < weight else 0
        return states * compute + 4 * head + max(copy + softmax, copy + product, backward)


def training_flops(architecture: Architecture) -> int:
    """FLOPs of a training step per sequence or image, forward and backward.

    Matrix products only, as is usual (PaLM, appendix B): attention is the full square, although causality needs
    half of it. The products do not depend on the norm strategy, so that one count serves all rows of a table.
    """
    one, two = (flops_under_pre_ln(replace(architecture, norm={}), blocks) for blocks in (1, 2))
    return one + (architecture.model.num_hidden_layers - 1) * (two - one)


@lru_cache(maxsize=128)
def flops_under_pre_ln(architecture: Architecture, blocks: int) -> int:
    with (
        FakeTensorMode(),
        sdpa_kernel(SDPBackend.MATH),  # whose products are counted on every device
        FlopCounterMode(display=False) as counter,
    ):
        # In bfloat16 the loss takes no product in place, which the counter would miss.
        network = architecture.build(build_all({"name": "pre_ln"}, blocks), torch.bfloat16)
        network(*architecture.batch(1)).total.backward()
    return counter.get_total_flops()


@lru_cache(maxsize=256)
def count_bytes(
    architecture: Architecture, batch_size: int, dtype: torch.dtype, autocast: bool, checkpointing: str, cpu: bool
) -> tuple[int, int]:
    """Bytes that a forward pass saves, and the peak of its backward pass beyond them; without a decoder's head.

    The saved bytes have a constant part, such as autocast's copies of weights.
    """
    with FakeTensorMode():
        network = architecture.build(list(architecture.kinds), dtype)
        for module in network.modules():
            if isinstance(module, Norm) and not cpu:
                module.__class__ = FusedNorm
        decoder = isinstance(network, Decoder)
        if decoder:
            network.lm_head = nn.Identity()
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        parallelise(network, checkpointing=checkpointing)
        with LiveBytes(network) as live:
            entries: list[int] = []
            for module in (*network.blocks, network.model.norm if decoder else network.norm):
                module.register_forward_pre_hook(lambda *_: entries.append(live.now))
            inputs, targets = architecture.batch(batch_size)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = network(inputs) if decoder else network(inputs, targets).total
            saved = live.now
            loss = output.sum()
            del output
            live.peak = live.now
            loss.backward()
    blocks = [after - before for before, after in pairwise(entries)]
    repeated = sum((count - 1) * size for count, size in zip(architecture.kinds.values(), blocks, strict=True))
    return saved + repeated, max(live.peak - saved, 0)


def wiring(spec: BlockSpec) -> str:
    """The fields of a spec that decide which tensors its block has: all except scales and rates."""
    values = [value for sublayer in spec.sublayers for value in vars(sublayer).values()]
    fields = [value for value in values if not isinstance(value, float | Schedule | Rates | None)]
    return str([*(getattr(spec, name) for name in BLOCK_COEFFICIENTS), *fields])


class FusedNorm(Norm):
    """Saves the tensors that the fused kernels save, its input and statistics; its values do not matter."""

    def fused_add_norm(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x if branch is None else x + branch
        weight = None if self.weight is None else self.weight.to(x.dtype)
        y = F.layer_norm(x, x.shape[-1:], weight)
        cast = self.before_matmul and torch.is_autocast_enabled("cpu")
        return x, y.to(torch.get_autocast_dtype("cpu")) if cast else y


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive and were created inside, except the parameters of `network`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {parameter.untyped_storage()._cdata for parameter in network.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return outputs

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
