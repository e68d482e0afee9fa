"""A whole training step: tokens per second, MFU and memory, norms by Triton and by torch, compiled and not.

    python benchmarks/train_step.py [--models llama_130m llama_350m llama_1b] [--rows 128] [--save]

A step is the forward pass, the loss, the backward pass and AdamW, on random tokens, without data or logging. On a CPU
the default is a toy, and two more contestants: the same decoder with the norm written out as in the code released with
the paper, and `transformers.LlamaForCausalLM` (Pre-LN) of the same shape.

MFU counts operations as `cod_lightning.report.estimate.flops_per_token` does, over the hardware's peak: the data
sheet's for dense bfloat16 where it is known, else that of a large matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from _results import milliseconds, save, show
from torch import Tensor

from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn import decoder as decoder_module
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.report.estimate import GPUS, flops_per_token, matmul_rate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = Path(__file__).parents[1] / "configs" / "model"
TOY = DecoderConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=4096)


def released_norm(
    x: Tensor, weight: Tensor, branch: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor, None]:
    """The released code's operations: add, upcast, square, mean, scale, downcast, times weight, times 1/sqrt(l)."""
    stream = x if branch is None else x + branch
    wide = stream.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + settings["eps"])
    return stream, weight * normed.to(stream.dtype) * settings["gain"], None


def step_of(forward: Callable[[Tensor], Tensor], model: torch.nn.Module, tokens: Tensor, autocast: bool) -> None:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = forward(tokens)
    loss.backward()
    model.optimizer.step()
    model.optimizer.zero_grad()


def ours(
    config: DecoderConfig,
    tokens: Tensor,
    options: argparse.Namespace,
    backend: str,
    compiled: bool,
    released: bool = False,
) -> Callable[[], None]:
    config = DecoderConfig(**{**vars(config), "norm_backend": backend})
    model = build_decoder(config, build_all({"name": "lns"}, config.num_hidden_layers), seed=1, device=DEVICE)
    if options.precision == "bf16-true":
        model.bfloat16()
    if compiled:
        for block in model.blocks:
            block.compile(fullgraph=True)
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    norm = decoder_module.norm

    def forward(tokens: Tensor) -> Tensor:
        decoder_module.norm = released_norm if released else norm
        try:
            found = model(tokens, next_tokens(tokens))
        finally:
            decoder_module.norm = norm
        return found.total / found.counts.sum()

    return partial(step_of, forward, model, tokens, options.precision == "bf16-mixed")


def transformers_llama(
    config: DecoderConfig, tokens: Tensor, options: argparse.Namespace, compiled: bool
) -> Callable[[], None]:
    import transformers

    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            use_cache=False,
        )
    ).to(DEVICE, torch.bfloat16 if options.precision == "bf16-true" else torch.float32)
    if compiled:
        for block in model.model.layers:
            block.compile(fullgraph=True)
    model.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return partial(
        step_of, lambda tokens: model(tokens, labels=tokens).loss, model, tokens, options.precision == "bf16-mixed"
    )


def peak_flops() -> tuple[float, str]:
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name().lower()
        known = next((gpu.bf16 for chip, gpu in GPUS.items() if chip in name), None)
        if known is not None:
            return known, "data sheet"
        return matmul_rate(DEVICE, torch.bfloat16, size=8192), "measured"
    return matmul_rate(DEVICE, torch.float32), "measured"


def measure(name: str, config: DecoderConfig, options: argparse.Namespace) -> list[dict[str, Any]]:
    tokens = torch.randint(config.vocab_size or 0, (options.rows, options.length), device=DEVICE)
    makers: dict[str, Callable[[], Callable[[], None]]] = {}
    for backend in ("triton", "torch") if DEVICE == "cuda" else ("torch",):
        for compiled in (False, True):
            label = f"{backend} norms{', compiled' if compiled else ''}"
            makers[label] = partial(ours, config, tokens, options, backend, compiled)
    for compiled in (False, True):
        makers[f"released norms{', compiled' if compiled else ''}"] = partial(
            ours, config, tokens, options, "torch", compiled, released=True
        )
    if importlib.util.find_spec("transformers"):
        for compiled in (False, True):
            makers[f"transformers{', compiled' if compiled else ''}"] = partial(
                transformers_llama, config, tokens, options, compiled
            )
    memory: dict[str, float | str] = dict.fromkeys(makers, "")
    if DEVICE == "cuda":  # one after another: each has the memory to itself
        times = {}
        for label, make in makers.items():
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            step = make()
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                step()
            memory[label] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            times |= milliseconds({label: step}, options.seconds)
            del step
    else:
        times = milliseconds({label: make() for label, make in makers.items()}, options.seconds)
    peak, source = peak_flops()
    first = next(iter(makers))
    return [
        {
            "model": name,
            "precision": options.precision,
            "rows": options.rows,
            "length": options.length,
            "variant": label,
            "ms": round(times[label], 2),
            f"over_{first.replace(' ', '_')}": round(times[label] / times[first], 3),
            "tokens_per_s": round(tokens.numel() / times[label] * 1000),
            "mfu": round(flops_per_token(config, options.length) * tokens.numel() / times[label] * 1000 / peak, 4),
            "peak": source,
            "gib": memory[label],
        }
        for label in makers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--models", nargs="+", default=["llama_130m", "llama_350m", "llama_1b"] if on_gpu else ["toy"])
    parser.add_argument("--rows", type=int, default=128 if on_gpu else 8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--precision", default="bf16-true" if on_gpu else "32", choices=["32", "bf16-mixed", "bf16-true"]
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5, help="for each variant")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_train_step.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for name in options.models:
        config = TOY if name == "toy" else DecoderConfig(**yaml.safe_load((SHAPES / f"{name}.yaml").read_text()))
        rows += measure(name, config, options)
    show(rows)
    if options.save:
        save("train_step", rows)


if __name__ == "__main__":
    main()
