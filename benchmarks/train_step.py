"""A whole training step: tokens per second, MFU and memory, ours beside other trainers' of the same shape.

    python benchmarks/train_step.py [--models quickstart toy llama_130m ...] [--threads 1 2] [--no-compile] [--save]
    PYTHONPATH=FOLDER python benchmarks/train_step.py --released modeling_llama.py

A step is the forward pass, the loss, the backward pass and the optimizer's step, on random tokens, without data or
logging. Contestants, each with the optimizer that its trainer takes by default:

- ours, LNS, with norms by Triton (on a GPU) and by torch;
- `released norms`: the same decoder with the norm written out as in the code released with the paper;
- `transformers`: `LlamaForCausalLM` (Pre-LN);
- `litgpt`, where it can be imported: its `GPT` (Pre-LN) with the loss of its pretraining script, which compiles the
  model, and takes AdamW fused on CUDA alone; `fused AdamW` is for comparison;
- `released`, with `--released FILE`: the LLaMA of the released code (Pre-LN, one product less in every norm than LNS).

On a CPU all take turns within each round, and `over_...` is the median over the rounds of the ratio to the first.

MFU counts operations as `cod_lightning.train.estimate.flops_per_token` does, over the hardware's peak: the data
sheet's for dense bfloat16 where it is known, else that of a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from _results import milliseconds, rounds, save, show, versions
from torch import Tensor, nn

from cod_lightning.config.compose import compose
from cod_lightning.config.schema import OptimConfig
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn import decoder as decoder_module
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.estimate import GPUS, flops_per_token, matmul_rate
from cod_lightning.train.optim import build_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = Path(__file__).parents[1] / "configs" / "model"
TOY = DecoderConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=4096)

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Step = Callable[[], None]


def shape_of(name: str) -> tuple[DecoderConfig, int, int]:
    """The decoder, the rows of a step and their length."""
    if name == "quickstart":
        config = compose(["experiments=quickstart"])
        return (
            replace(config.model, vocab_size=config.data.vocab_size),
            config.data.micro_batch_size,
            config.data.seq_len,
        )
    if name == "toy":
        return TOY, 8, 256
    return DecoderConfig(**yaml.safe_load((SHAPES / f"{name}.yaml").read_text())), 128, 256


def released_norm(x: Tensor, weight: Tensor, branch: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """The released code's operations: add, upcast, square, mean, scale, downcast, times weight, times 1/sqrt(l)."""
    stream = x if branch is None else x + branch
    wide = stream.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + settings["eps"])
    return stream, weight * normed.to(stream.dtype) * settings["gain"]


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], tokens: Tensor, autocast: bool
) -> Step:
    """One step of `model` on `tokens`; `loss` is that of tokens [rows, length], 0-dimensional."""

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    step.parameters = sum(p.numel() for p in model.parameters())
    return step


def ours(
    config: DecoderConfig, *, dtype: torch.dtype, compiled: bool, backend: str, released: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], Tensor]]:
    config = replace(config, norm_backend=backend)
    model = build_decoder(config, build_all({"name": "lns"}, config.num_hidden_layers), seed=1, device=DEVICE).to(dtype)
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    add_norm = decoder_module.add_norm

    def loss(tokens: Tensor) -> Tensor:
        decoder_module.add_norm = released_norm if released else add_norm
        try:
            found = model(tokens, next_tokens(tokens))
        finally:
            decoder_module.add_norm = add_norm
        return found.total / found.counts.sum()

    return model, build_optimizer(model, OptimConfig(), max_steps=1000)[0], loss


def llama_config(config: DecoderConfig) -> Any:
    import transformers

    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        pad_token_id=None,
        use_cache=False,
    )


def transformers_llama(
    config: DecoderConfig, *, dtype: torch.dtype, compiled: bool
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], Tensor]]:
    import transformers

    model = transformers.LlamaForCausalLM(llama_config(config)).to(DEVICE, dtype)
    if compiled:
        for block in model.model.layers:
            block.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return model, optimizer, lambda tokens: model(tokens, labels=tokens).loss


def released_llama(
    config: DecoderConfig, *, dtype: torch.dtype, compiled: bool, file: Path
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], Tensor]]:
    os.environ["NORM_TYPE"] = "pre"  # read in every forward pass; its LNS is compared with a lower-cased name
    spec = importlib.util.spec_from_file_location("released_llama", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(None):  # a line for every block
        model = module.LlamaForCausalLM(llama_config(config)).to(DEVICE, dtype)
    if compiled:
        for block in model.model.layers:
            block.compile()
    return model, torch.optim.Adam(model.parameters(), lr=1e-4), lambda tokens: model(tokens, labels=tokens).loss


def litgpt_llama(
    config: DecoderConfig, *, dtype: torch.dtype, compiled: bool, length: int, fused: bool = DEVICE == "cuda"
) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[Tensor], Tensor]]:
    import litgpt
    from litgpt.utils import chunked_cross_entropy

    model = litgpt.GPT(
        litgpt.Config(
            block_size=length,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_embd=config.hidden_size,
            intermediate_size=config.intermediate_size,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=config.norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    ).to(DEVICE, dtype)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    return model, optimizer, lambda tokens: chunked_cross_entropy(forward(tokens), next_tokens(tokens))


def contestants(length: int, released: Path | None, compile: bool) -> dict[str, Callable[..., Any]]:
    """What makes each; the first is what others are compared with."""
    kinds: dict[str, Callable[..., Any]] = {
        f"{backend} norms": partial(ours, backend=backend)
        for backend in (("triton", "torch") if DEVICE == "cuda" else ("torch",))
    }
    kinds["released norms"] = partial(ours, backend="torch", released=True)
    if importlib.util.find_spec("transformers"):
        kinds["transformers"] = transformers_llama
    if importlib.util.find_spec("litgpt"):
        kinds["litgpt"] = partial(litgpt_llama, length=length)
    if released is not None:
        kinds["released"] = partial(released_llama, file=released)
    makers = {}
    for label, make in kinds.items():
        makers[label] = partial(make, compiled=False)
        if compile:
            makers[f"{label}, compiled"] = partial(make, compiled=True)
    if "litgpt" in kinds and DEVICE == "cpu":
        makers["litgpt, fused AdamW"] = partial(kinds["litgpt"], compiled=False, fused=True)
    return makers


def peak_flops() -> tuple[float, str]:
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name().lower()
        known = next((gpu.bf16 for chip, gpu in GPUS.items() if chip in name), None)
        if known is not None:
            return known, "data sheet"
        return matmul_rate(DEVICE, torch.bfloat16, size=8192), "measured"
    return matmul_rate(DEVICE, torch.float32), "measured"


def measure(name: str, options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    torch._dynamo.reset()
    config, rows, length = shape_of(name)
    rows, length = options.rows or rows, options.length or length
    tokens = torch.randint(config.vocab_size or 0, (rows, length), device=DEVICE)
    dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32

    def build(make: Callable[..., Any]) -> Step:
        return trained(*make(config, dtype=dtype), tokens, options.precision == "bf16-mixed")

    makers = contestants(length, options.released, options.compile)
    first = next(iter(makers))
    memory: dict[str, float | str] = dict.fromkeys(makers, "")
    if DEVICE == "cuda":  # one after another: each has the memory to itself
        times, over = {}, {}
        for label, make in makers.items():
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            step = build(make)
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                step()
            memory[label] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            times |= milliseconds({label: step}, options.seconds)
            over[label] = times[label] / times[first]
            del step
    else:
        steps = {label: build(make) for label, make in makers.items()}
        sizes = {label: step.parameters for label, step in steps.items()}
        if len(set(sizes.values())) > 1:
            raise SystemExit(f"these are not of one size: {sizes}")
        taken = rounds(steps, options.seconds, CLOCKS[options.clock])
        times = {label: statistics.median(values) for label, values in taken.items()}
        over = {
            label: statistics.median(a / b for a, b in zip(values, taken[first], strict=True))
            for label, values in taken.items()
        }
    peak, source = peak_flops()
    return [
        {
            "model": name,
            "precision": options.precision,
            "rows": rows,
            "length": length,
            "threads": threads,
            "clock": options.clock,
            "variant": label,
            "ms": round(times[label], 2),
            f"over_{first.replace(' ', '_')}": round(over[label], 3),
            "tokens_per_s": round(tokens.numel() / times[label] * 1000),
            "mfu": round(flops_per_token(config, length) * tokens.numel() / times[label] * 1000 / peak, 4),
            "peak": source,
            "gib": memory[label],
        }
        for label in makers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE == "cuda"
    parser.add_argument(
        "--models",
        nargs="+",
        default=["llama_130m", "llama_350m", "llama_1b"] if on_gpu else ["quickstart", "toy"],
        help="quickstart, toy, or files of configs/model",
    )
    parser.add_argument("--rows", type=int, help="default: the shape's")
    parser.add_argument("--length", type=int, help="default: the shape's")
    parser.add_argument(
        "--precision", default="bf16-true" if on_gpu else "32", choices=["32", "bf16-mixed", "bf16-true"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count()])
    parser.add_argument("--seconds", type=float, default=5, help="for each variant")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: processor time, which other programs disturb little; with several threads it counts their waiting",
    )
    parser.add_argument("--released", type=Path, metavar="FILE", help="peft_pretraining/modeling_llama.py")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what is compiled")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_train_step.csv")
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for threads in options.threads:
            found = measure(name, options, threads)
            show(found)
            rows += found
    if options.save:
        save("train_step", rows, **versions("transformers", "litgpt"))


if __name__ == "__main__":
    main()
