"""What `estimate` says of a training step's memory and time, beside what is measured.

    python benchmarks/estimate.py [--models deep_narrow llama_130m] [--norms pre_ln gpas] [--rows 16] [--save]

A step is two micro-batches and the optimizer's update, on random tokens or images, without data or logging; the default
is the quickstart's. Memory is the most that tensors take at one time: on a GPU what torch counts, on a CPU the
allocations and deallocations that its profiler sees. Time depends on the assumed MFU; the measured one stands beside
it.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from _results import milliseconds, peak_bytes, save, show

from cod_lightning.config.schema import OptimConfig, TrainerConfig
from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder, build_vit
from cod_lightning.nn.strategies import BlockSpec, build_all
from cod_lightning.train.estimate import GPUS, estimate
from cod_lightning.train.optim import build_optimizer

Batch = tuple[torch.Tensor, torch.Tensor]
"""Rows of tokens or images, and their targets."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES = {
    "vit_tiny": ImageConfig(),
    "vit_s": ImageConfig(source="folder", classes=1000, size=224, patch_size=16),
}
"""What the shapes of Vision Transformers see; all others are decoders."""
SHAPES = Path(__file__).parents[1] / "configs" / "model"


def hardware() -> str:
    """What `estimate` calls this device."""
    if DEVICE == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name()
    known = next((chip for chip in GPUS if chip in name.lower()), None)
    return known or exit(f"{name} is not among the GPUs that estimate knows: {', '.join(GPUS)}")


def step(network: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch], autocast: bool) -> None:
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        for rows, targets in batches:
            found = network(rows, targets)
            (found.total / found.counts.sum()).backward()
            del found
    optimizer.step()
    optimizer.zero_grad()


def built(
    model: DecoderConfig, specs: list[BlockSpec], images: ImageConfig | None, rows: int, length: int
) -> tuple[torch.nn.Module, list[Batch]]:
    """The model, and two micro-batches for it."""
    if images is None:
        tokens = torch.randint(model.vocab_size or 0, (2, rows, length), device=DEVICE)
        return build_decoder(model, specs, seed=1, device=DEVICE), [(part, next_tokens(part)) for part in tokens]
    classes = images.known_classes or 0
    sides = {"image_size": images.size, "patch_size": images.patch_size}
    network = build_vit(model, specs, seed=1, **sides, classes=classes, device=DEVICE)
    pixels = torch.randn(2, rows, 3, images.size, images.size, device=DEVICE)
    return network, list(zip(pixels, torch.randint(classes, (2, rows), device=DEVICE), strict=True))


def measure(name: str, norm: str, options: argparse.Namespace) -> dict[str, Any]:
    model = DecoderConfig(**yaml.safe_load((SHAPES / f"{name}.yaml").read_text()))
    model.vocab_size = model.vocab_size or options.vocabulary
    data = DataConfig(seq_len=options.length, micro_batch_size=options.rows, batch_size=2 * options.rows)
    trainer = TrainerConfig(max_steps=1, precision=options.precision)
    images = IMAGES.get(name)
    expected = estimate(model, {"name": norm}, data, trainer, images, hardware=hardware(), mfu=options.mfu)

    specs = build_all({"name": norm}, model.num_hidden_layers)
    network, batches = built(model, specs, images, options.rows, options.length)
    if options.precision == "bf16-true":
        network.bfloat16()
    optimizer, _ = build_optimizer(network, OptimConfig(), max_steps=100)
    run = partial(step, network, optimizer, batches, options.precision == "bf16-mixed")
    run()  # makes the moments
    state = [*network.parameters(), *(t for moments in optimizer.state.values() for t in moments.values())]
    memory = sum(tensor.nbytes for tensor in state) + peak_bytes(run)
    ms = milliseconds({"step": run}, options.seconds)["step"]
    return {
        "model": name,
        "norm": norm,
        "precision": options.precision,
        "rows": options.rows,
        "length": options.length if images is None else images.patches + 1,
        "estimated_mb": round(expected.memory.total / 1e6, 1),
        "measured_mb": round(memory / 1e6, 1),
        "memory_ratio": round(expected.memory.total / memory, 3),
        "estimated_ms": round(3.6e6 * expected.hours, 1),
        "measured_ms": round(ms, 1),
        "time_ratio": round(3.6e6 * expected.hours / ms, 3),
        "assumed_mfu": options.mfu,
        "measured_mfu": round(options.mfu * 3.6e6 * expected.hours / ms, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = DEVICE == "cuda"
    parser.add_argument("--models", nargs="+", default=["llama_130m", "llama_350m"] if on_gpu else ["deep_narrow"])
    parser.add_argument("--norms", nargs="+", default=["pre_ln", "lns", "post_ln"])
    parser.add_argument("--rows", type=int, default=64 if on_gpu else 16, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=256 if on_gpu else 128)
    parser.add_argument("--vocabulary", type=int, default=4096, help="of shapes that leave it open")
    parser.add_argument(
        "--precision", default="bf16-true" if on_gpu else "32-true", choices=["32-true", "bf16-mixed", "bf16-true"]
    )
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5, help="for each model and norm")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/[hardware]_[date]_estimate.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [measure(name, norm, options) for name in options.models for norm in options.norms]
    show(rows)
    if options.save:
        save("estimate", rows, threads=options.threads)


if __name__ == "__main__":
    main()
