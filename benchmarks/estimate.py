"""Memory and time of a training step as `estimate` predicts them, beside the measured ones.

    python benchmarks/estimate.py [--models deep_narrow llama_130m] [--norms pre_ln gpas] [--rows 16] [--save]

A step is two micro-batches of random tokens or images and the optimizer's update, without data loading or logging. The
default is the quickstart's model. Memory is the peak of all tensors: torch's count on a GPU, the profiler's sum of
allocations on a CPU. The predicted time depends on the assumed MFU; the measured MFU stands beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
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
    report,
    state_bytes,
    training_step,
)

from cod_lightning.config.schema import Config, OptimConfig, TrainerConfig
from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder, build_model
from cod_lightning.nn.strategies import BlockSpec, build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.train.estimate import GPUS, estimate
from cod_lightning.train.optim import build_optimizer

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens or images, and their targets."""
IMAGES = {
    "vit_tiny": ImageConfig(),
    "vit_s": ImageConfig(source="folder", classes=1000, size=224, patch_size=16),
}
"""Input of the Vision Transformers in configs/model; all other models are decoders."""


def build(
    shape: DecoderConfig, specs: list[BlockSpec], images: ImageConfig | None, batch_size: int, seq_len: int
) -> tuple[torch.nn.Module, list[Batch]]:
    """The model, and two micro-batches for it."""
    if images is None:
        tokens = torch.randint(shape.vocab_size or 0, (2, batch_size, seq_len), device=DEVICE)
        return build_decoder(shape, specs, seed=1, device=DEVICE), [(batch, next_tokens(batch)) for batch in tokens]
    classes, size = images.known_classes or 0, images.size
    vit = build_model(lambda: VisionTransformer(shape, specs, size, images.patch_size, classes), seed=1, device=DEVICE)
    pixels = torch.randn(2, batch_size, 3, size, size, device=DEVICE)
    return vit, list(zip(pixels, torch.randint(classes, (2, batch_size), device=DEVICE), strict=True))


def measure(name: str, norm: str, args: argparse.Namespace) -> dict[str, Any]:
    """The table row of one model with one strategy."""
    shape, images = load_shape(name), IMAGES.get(name)
    shape.vocab_size = shape.vocab_size or args.vocabulary
    data = DataConfig(seq_len=args.length, micro_batch_size=args.rows, batch_size=2 * args.rows)
    trainer = TrainerConfig(max_steps=1, precision=args.precision)
    gpu = known_gpu() if ON_GPU else "cpu"
    if gpu is None:
        sys.exit(f"{torch.cuda.get_device_name()} is unknown to estimate; known GPUs: {', '.join(GPUS)}")
    config = Config(model=shape, norm={"name": norm}, data=data, trainer=trainer)
    if images is not None:
        config.task, config.images = "vision", images
    expected = estimate(config, hardware=gpu, mfu=args.mfu)
    expected_ms = 3.6e6 * expected.hours

    model, batches = build(shape, build_all({"name": norm}, shape.num_hidden_layers), images, args.rows, args.length)
    if args.precision == "bf16-true":
        model.bfloat16()
    optimizer, _ = build_optimizer(model, OptimConfig(), max_steps=100)
    step = partial(training_step, partial(mean_loss, model), optimizer, batches, args.precision == "bf16-mixed")
    step()  # allocates the optimizer's state
    memory = state_bytes(model, optimizer) + peak_bytes(step)
    ms = milliseconds({"step": step}, args.seconds)["step"]
    return {
        "model": name,
        "norm": norm,
        "precision": args.precision,
        "rows": args.rows,
        "length": args.length if images is None else images.patches + 1,
        "estimated_mb": round(expected.memory.total / 1e6, 1),
        "measured_mb": round(memory / 1e6, 1),
        "memory_ratio": round(expected.memory.total / memory, 3),
        "estimated_ms": round(expected_ms, 1),
        "measured_ms": round(ms, 1),
        "time_ratio": round(expected_ms / ms, 3),
        "assumed_mfu": args.mfu,
        "measured_mfu": round(args.mfu * expected_ms / ms, 3),
    }


def main() -> None:
    parser = argument_parser(__doc__, "estimate", seconds=5, threads=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["llama_130m", "llama_350m"] if ON_GPU else ["deep_narrow"])
    parser.add_argument("--norms", nargs="+", default=["pre_ln", "lns", "post_ln"])
    parser.add_argument("--rows", type=int, default=64 if ON_GPU else 16, help="micro-batch size")
    parser.add_argument("--length", type=int, default=256 if ON_GPU else 128, help="sequence length in tokens")
    parser.add_argument("--vocabulary", type=int, default=4096, help="for models without a fixed vocabulary")
    parser.add_argument(
        "--precision", default="bf16-true" if ON_GPU else "32-true", choices=["32-true", "bf16-mixed", "bf16-true"]
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed MFU, 0 to 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [measure(name, norm, args) for name in args.models for norm in args.norms]
    report(args, rows, threads=args.threads)


if __name__ == "__main__":
    main()
