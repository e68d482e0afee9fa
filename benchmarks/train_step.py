"""A training step: tokens per second, MFU and memory, ours beside other trainers' models of the same shape.

    python benchmarks/train_step.py [--models quickstart toy llama_130m ...] [--threads 1 2] [--no-compile] [--save]
    PYTHONPATH=FOLDER python benchmarks/train_step.py --released modeling_llama.py

A step is the forward pass, the loss, the backward pass and the optimizer's update on random tokens, without data
loading or logging. Each variant uses the default optimizer of its trainer:

- ours, LNS, with norms by Triton (on a GPU) and by torch;
- `released norms`: our decoder with the norm written as in the code released with the paper;
- `transformers`: `LlamaForCausalLM` (Pre-LN);
- `litgpt`, if installed: its `GPT` (Pre-LN) with the loss of its pretraining script. It compiles the whole model, and
  its AdamW is fused on CUDA only; `fused AdamW` is for comparison;
- `released`, with `--released FILE`: the LLaMA of the released code (Pre-LN: one product less per norm than LNS).
  Its Adam is not fused; `fused Adam` is for comparison.

On a CPU all variants take turns in each round, and `over_...` is the median over rounds of the ratio to the first.
`gib` is the peak memory of parameters, optimizer state and a step, as counted by torch.

MFU is `cod_lightning.train.cost.training_flops` over the peak of the hardware: that of the data sheet for dense
bfloat16 if the GPU is known, else that of a large matrix product in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _results import (
    DEVICE,
    ON_GPU,
    argument_parser,
    known_gpu,
    load_shape,
    mean_loss,
    milliseconds,
    peak_bytes,
    rounds,
    save,
    show,
    state_bytes,
    training_step,
)
from torch import Tensor, nn

from cod_lightning.config.schema import OptimConfig
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn import norms
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.cost import Architecture, training_flops
from cod_lightning.train.estimate import GPUS, matmul_rate
from cod_lightning.train.optim import build_optimizer

TOY = DecoderConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=4096)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Variant = tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], Tensor]]
"""Model, optimizer, and the mean loss of tokens [batch, length]."""


def load_case(name: str) -> tuple[DecoderConfig, int, int]:
    """Shape, batch size and sequence length."""
    if name == "quickstart":
        from cod_lightning.config.compose import compose  # needs hydra, which other cases do not

        config = compose(["experiments=quickstart"])
        shape = replace(config.model, vocab_size=config.data.vocab_size)
        return shape, config.data.micro_batch_size, config.data.seq_len
    return (TOY, 8, 256) if name == "toy" else (load_shape(name), 128, 256)


def compile_blocks(blocks: Iterable[nn.Module], compiled: bool, **options: Any) -> None:
    for block in blocks if compiled else ():
        block.compile(**options)


def released_norm(
    x: Tensor, weight: Tensor, branch: Tensor | None = None, *, eps: float, gain: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """The released code's operations: add, upcast, square, mean, scale, downcast, times weight, times 1/sqrt(l)."""
    stream = x if branch is None else x + branch
    fp32 = stream.to(torch.float32)
    normed = fp32 * torch.rsqrt(fp32.pow(2).mean(-1, keepdim=True) + eps)
    return stream, weight * normed.to(stream.dtype) * gain


def ours(shape: DecoderConfig, *, dtype: torch.dtype, compiled: bool, backend: str, released: bool = False) -> Variant:
    specs = build_all({"name": "lns"}, shape.num_hidden_layers)
    model = build_decoder(replace(shape, norm_backend=backend), specs, seed=1, device=DEVICE).to(dtype)
    compile_blocks(model.blocks, compiled, fullgraph=True)
    add_norm = norms.add_norm

    def loss(tokens: Tensor) -> Tensor:
        norms.add_norm = released_norm if released else add_norm
        try:
            return mean_loss(model, tokens, next_tokens(tokens))
        finally:
            norms.add_norm = add_norm

    return model, build_optimizer(model, OptimConfig(), max_steps=1000)[0], loss


def llama_config(shape: DecoderConfig) -> Any:
    import transformers

    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    options = {name: getattr(shape, name) for name in fields}
    return transformers.LlamaConfig(**options, pad_token_id=None, use_cache=False)


def transformers_llama(shape: DecoderConfig, *, dtype: torch.dtype, compiled: bool) -> Variant:
    import transformers

    model = transformers.LlamaForCausalLM(llama_config(shape)).to(DEVICE, dtype)
    compile_blocks(model.model.layers, compiled, fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, optimizer, lambda tokens: model(tokens, labels=tokens).loss


def released_llama(
    shape: DecoderConfig, *, dtype: torch.dtype, compiled: bool, file: Path, fused: bool | None = None
) -> Variant:
    os.environ["NORM_TYPE"] = "pre"  # read in every forward pass; `LNS` never matches because of its capitals
    spec = importlib.util.spec_from_file_location("released_llama", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):  # it prints a line for each block
        model = module.LlamaForCausalLM(llama_config(shape)).to(DEVICE, dtype)
    compile_blocks(model.model.layers, compiled)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)
    return model, optimizer, lambda tokens: model(tokens, labels=tokens).loss


def litgpt_llama(
    shape: DecoderConfig, *, dtype: torch.dtype, compiled: bool, length: int, fused: bool = ON_GPU
) -> Variant:
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    model = litgpt.GPT(
        litgpt.Config(
            block_size=length,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.num_hidden_layers,
            n_head=shape.num_attention_heads,
            n_embd=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=shape.norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    ).to(DEVICE, dtype)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    return model, optimizer, lambda tokens: chunked_cross_entropy(forward(tokens), next_tokens(tokens))


def variants(length: int, released: Path | None, compiled: bool) -> dict[str, Callable[..., Variant]]:
    """Builders by label; the first is the reference of the ratios."""
    eager: dict[str, Callable[..., Variant]] = {
        f"{backend} norms": partial(ours, backend=backend)
        for backend in (("triton", "torch") if ON_GPU else ("torch",))
    }
    eager["released norms"] = partial(ours, backend="torch", released=True)
    if find_spec("transformers"):
        eager["transformers"] = transformers_llama
    if find_spec("litgpt"):
        eager["litgpt"] = partial(litgpt_llama, length=length)
    if released is not None:
        eager["released"] = partial(released_llama, file=released)
    builders = {}
    for label, build in eager.items():
        builders[label] = partial(build, compiled=False)
        if compiled:
            builders[f"{label}, compiled"] = partial(build, compiled=True)
    if "litgpt" in eager and not ON_GPU:
        builders["litgpt, fused AdamW"] = partial(eager["litgpt"], compiled=False, fused=True)
    if "released" in eager:
        builders["released, fused Adam"] = partial(eager["released"], compiled=False, fused=True)
    return builders


def peak_flops() -> tuple[float, str]:
    """FLOP/s of the device in bfloat16 (GPU) or float32 (CPU), and the source of the number."""
    if not ON_GPU:
        return matmul_rate(DEVICE, torch.float32), "measured"
    if gpu := known_gpu():
        return GPUS[gpu].bf16, "data sheet"
    return matmul_rate(DEVICE, torch.bfloat16, size=8192), "measured"


def measure(name: str, args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """One table row for each variant of a model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch._dynamo.reset()
    shape, batch_size, length = load_case(name)
    batch_size, length = args.rows or batch_size, args.length or length
    tokens = torch.randint(shape.vocab_size or 0, (batch_size, length), device=DEVICE)
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    builders = variants(length, args.released, args.compile)
    first = next(iter(builders))
    memory: dict[str, float | str] = dict.fromkeys(builders, "")

    def step_of(variant: Variant) -> Callable[[], None]:
        _, optimizer, loss = variant
        return partial(training_step, loss, optimizer, [(tokens,)], args.precision == "bf16-mixed")

    if ON_GPU:  # one variant at a time, so that each has all the memory
        times, over = {}, {}
        for label, build in builders.items():
            torch._dynamo.reset()
            gc.collect()  # compiled blocks are in reference cycles
            torch.cuda.empty_cache()
            step = step_of(build(shape, dtype=dtype))
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                step()
            memory[label] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            times |= milliseconds({label: step}, args.seconds)
            over[label] = times[label] / times[first]
            del step
    else:
        built = {label: build(shape, dtype=dtype) for label, build in builders.items()}
        sizes = {label: sum(p.numel() for p in model.parameters()) for label, (model, *_) in built.items()}
        if len(set(sizes.values())) > 1:
            raise SystemExit(f"the variants differ in their number of parameters: {sizes}")
        for label, variant in built.items():
            step_of(variant)()  # allocates the optimizer's state
            memory[label] = round((state_bytes(*variant[:2]) + peak_bytes(step_of(variant))) / 2**30, 2)
        series = rounds({label: step_of(variant) for label, variant in built.items()}, args.seconds, CLOCKS[args.clock])
        times = {label: statistics.median(values) for label, values in series.items()}
        over = {
            label: statistics.median(a / b for a, b in zip(values, series[first], strict=True))
            for label, values in series.items()
        }
    peak, source = peak_flops()
    flops_per_token = training_flops(Architecture(shape, {"name": "pre_ln"}, length)) / length
    return [
        {
            "model": name,
            "precision": args.precision,
            "rows": batch_size,
            "length": length,
            "threads": threads,
            "clock": args.clock,
            "variant": label,
            "ms": round(times[label], 2),
            f"over_{first.replace(' ', '_')}": round(over[label], 3),
            "tokens_per_s": round(tokens.numel() / times[label] * 1000),
            "mfu": round(flops_per_token * tokens.numel() / times[label] * 1000 / peak, 4),
            "peak": source,
            "gib": memory[label],
        }
        for label in builders
    ]


def main() -> None:
    parser = argument_parser(__doc__, "train_step", seconds=5)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["llama_130m", "llama_350m", "llama_1b"] if ON_GPU else ["quickstart", "toy"],
        help="quickstart, toy, or names of configs/model",
    )
    parser.add_argument("--rows", type=int, help="batch size (default: depends on the model)")
    parser.add_argument("--length", type=int, help="sequence length (default: depends on the model)")
    parser.add_argument(
        "--precision", default="bf16-true" if ON_GPU else "32", choices=["32", "bf16-mixed", "bf16-true"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count()])
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: processor time, which other programs disturb less; it includes the waiting of threads",
    )
    parser.add_argument("--released", type=Path, metavar="FILE", help="peft_pretraining/modeling_llama.py")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="omit the compiled variants")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for threads in args.threads:
            rows += (table := measure(name, args, threads))
            show(table)
    if args.save:
        save(
            "train_step",
            rows,
            **{name: version(name) if find_spec(name) else "" for name in ("transformers", "litgpt")},
        )


if __name__ == "__main__":
    main()
