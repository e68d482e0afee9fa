"""The estimate against decoders that are really built: their parameters, operations, saved tensors and memory."""

import json
import subprocess
import sys
from dataclasses import make_dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from cod_lightning.cli import main
from cod_lightning.config.compose import choices, compose
from cod_lightning.config.schema import OptimConfig, TrainerConfig
from cod_lightning.data.config import ImageConfig
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.init import build_decoder, build_vit
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.train import estimate as module
from cod_lightning.train.estimate import (
    estimate,
    flops_per_image,
    flops_per_token,
    memory,
    outer_parameters,
    parameters,
)
from cod_lightning.train.optim import build_optimizer

NORMS = [{"name": name} for name in STRATEGIES] + [
    {"name": "gpas", "base": "post_ln"},
    {"name": "gpas", "base": "admin"},
    {"name": "layer_scale", "base": "sandwich_ln"},
    {"name": "peri_ln", "embedding_norm": False},
]
LOOKS = [" ".join(map(str, norm.values())) for norm in NORMS]


def shape(**changes) -> DecoderConfig:
    settings = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 101,
    }
    return DecoderConfig(**(settings | changes))


@lru_cache
def composed(*overrides):
    return compose(overrides)


def of(*overrides, **settings):
    config = composed(*overrides)
    images = config.images if config.task == "vision" else None
    return estimate(config.model, config.norm, config.data, config.trainer, images, **settings)


IMAGES = ImageConfig(source="folder", classes=11, size=20, patch_size=4)


def vit_shape(**changes) -> DecoderConfig:
    return shape(**({"norm": "layer", "qkv_bias": True, "num_key_value_heads": None, "vocab_size": None} | changes))


def vit_of(model: DecoderConfig, norm: dict, images: ImageConfig = IMAGES) -> VisionTransformer:
    sides = {"image_size": images.size, "patch_size": images.patch_size, "classes": images.classes}
    return build_vit(model, build_all(norm, model.num_hidden_layers), 0, **sides)


def drawn(rows: int, images: ImageConfig = IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, images.size, images.size), torch.randint(images.classes, (rows,))


# Parameters and operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS, ids=LOOKS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "num_key_value_heads": None, "tie_word_embeddings": True},
        {"norm": "layer", "norm_affine": False},
    ],
)
def test_parameters_are_those_of_the_decoder(norm, changes):
    model = shape(**changes)
    specs = build_all(norm, model.num_hidden_layers)
    with torch.device("meta"):
        decoder = Decoder(model, specs)
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    assert parameters(model, specs) == sum(sizes.values())
    inside = sum(size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name)
    assert parameters(model, specs) - outer_parameters(model) == inside


@pytest.mark.parametrize("tied", [False, True])
def test_operations_are_those_that_torch_counts(tied):
    model = shape(num_key_value_heads=None, tie_word_embeddings=tied)
    # In bfloat16 no product is taken in place, which the counter does not see.
    decoder = build_decoder(model, build_all({"name": "lns"}, 4), seed=0).bfloat16()
    tokens = torch.randint(101, (2, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(tokens, next_tokens(tokens)).total.backward()
    norms = sum(p.numel() for name, p in decoder.named_parameters() if "norm" in name)
    assert counter.get_total_flops() == 32 * (flops_per_token(model, 16) - 6 * norms)


@pytest.mark.parametrize("norm", NORMS, ids=LOOKS)
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False, "norm_affine": False}])
def test_parameters_are_those_of_the_vision_transformer(norm, changes):
    model = vit_shape(**changes)
    with torch.device("meta"):
        vit = VisionTransformer(model, build_all(norm, 4), IMAGES.size, IMAGES.patch_size, IMAGES.classes)
    sizes = {name: parameter.numel() for name, parameter in vit.named_parameters()}
    assert parameters(model, build_all(norm, 4), IMAGES) == sum(sizes.values())
    outside = sum(size for name, size in sizes.items() if name.startswith(("embedding", "head")))
    assert outer_parameters(model, IMAGES) == outside


def test_operations_of_images_are_those_that_torch_counts():
    model = vit_shape()
    vit = vit_of(model, {"name": "lns"}).bfloat16()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vit(*drawn(3)).total.backward()
    vectors = sum(
        p.numel() for name, p in vit.named_parameters() if p.ndim == 1 and name.startswith(("layers", "norm"))
    )
    assert counter.get_total_flops() == 3 * (flops_per_image(model, IMAGES) - 6 * (IMAGES.patches + 1) * vectors)


# Memory --------------------------------------------------------------------------------------------------------------


def saved_bytes(network: torch.nn.Module, inputs: tuple, autocast: bool) -> int:
    """Bytes of all storages that a forward pass saves for the backward pass and that are not parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        total = network(*inputs).total
    assert total.requires_grad
    return sum(size for place, (_, size) in held.items() if place not in own)


def saved_as_estimated(model: DecoderConfig, norm: dict, rows: int, length: int, precision: str, cpu: bool) -> float:
    """The estimate of what is saved over the bytes that are."""
    specs = build_all(norm, model.num_hidden_layers)
    decoder = build_decoder(model, specs, seed=0)
    if precision == "bf16-true":
        decoder.bfloat16()
    found = memory(model, specs, rows=rows, length=length, precision=precision, cpu=cpu)
    compute, stream = (4 if precision == "32-true" else 2), (2 if precision == "bf16-true" else 4)
    loss = rows * length * model.hidden_size * compute + model.vocab_size * model.hidden_size * 4  # two gradients
    rotary = 2 * length * model.head_dim * stream
    tokens = torch.randint(model.vocab_size, (rows, length))
    saved = saved_bytes(decoder, (tokens, next_tokens(tokens)), precision == "bf16-mixed")
    return (found.activations + found.copies + loss + rotary) / saved


def saved_of_images(model: DecoderConfig, norm: dict, rows: int, precision: str, cpu: bool) -> float:
    """Likewise, of images."""
    vit = vit_of(model, norm)
    if precision == "bf16-true":
        vit.bfloat16()
    found = memory(
        model,
        build_all(norm, model.num_hidden_layers),
        rows=rows,
        length=IMAGES.patches + 1,
        images=IMAGES,
        precision=precision,
        cpu=cpu,
    )
    loss = rows * (IMAGES.classes * 4 + 8) + 4  # logarithms and labels
    # Copies that autocast keeps, but no backward pass reads: biases, and the first weight.
    unread = [p for name, p in vit.named_parameters() if name.endswith("bias") or "projection.weight" in name]
    copies = found.copies and found.copies - 2 * sum(p.numel() for p in unread)
    return (found.activations + copies + loss) / saved_bytes(vit, drawn(rows), precision == "bf16-mixed")


@pytest.mark.parametrize("norm", NORMS, ids=LOOKS)
def test_a_cpu_saves_of_images_what_is_estimated(norm):
    assert saved_of_images(vit_shape(), norm, 3, "32-true", cpu=True) == pytest.approx(1, abs=0.005)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["lns", "gpas admin"])
def test_the_kernels_of_a_gpu_save_of_images_what_is_estimated(name, precision):
    norm = dict(zip(("name", "base"), name.split(), strict=False))
    model = vit_shape(norm_backend="triton", num_hidden_layers=2)
    assert saved_of_images(model, norm, 1, precision, cpu=False) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("norm", NORMS, ids=LOOKS)
@pytest.mark.parametrize(("rows", "length"), [(2, 16), (3, 40)])
def test_a_cpu_saves_what_is_estimated(norm, rows, length):
    assert saved_as_estimated(shape(), norm, rows, length, "32-true", cpu=True) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("norm", ["pre_ln", "group_ln", "sandwich_ln"])
def test_a_cpu_saves_what_is_estimated_with_layer_norm(norm):
    model = shape(norm="layer", num_key_value_heads=None)
    assert saved_as_estimated(model, {"name": norm}, 2, 16, "32-true", cpu=True) == pytest.approx(1, abs=0.005)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["mix_ln", "peri_ln", "group_ln", "gpas admin", "layer_scale deep_norm"])
def test_the_kernels_of_a_gpu_save_what_is_estimated(name, precision):
    norm = dict(zip(("name", "base"), name.split(), strict=False))
    model = shape(norm_backend="triton", num_hidden_layers=2)
    assert saved_as_estimated(model, norm, 1, 8, precision, cpu=False) == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_weights_gradients_and_moments_take_their_tensors_bytes(precision):
    model, specs = shape(), build_all({"name": "gpas"}, 4)
    decoder = build_decoder(model, specs, seed=0)
    if precision == "bf16-true":
        decoder.bfloat16()
    optimizer, _ = build_optimizer(decoder, OptimConfig(), max_steps=10)
    tokens = torch.randint(101, (1, 8))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        decoder(tokens, next_tokens(tokens)).total.backward()
    optimizer.step()
    found = memory(model, specs, rows=1, length=8, precision=precision)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert found.weights == sum(parameter.nbytes for parameter in decoder.parameters())
    assert found.gradients == sum(parameter.grad.nbytes for parameter in decoder.parameters())
    assert found.moments == sum(moment.nbytes for moment in moments)


PRODUCTS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def policy(context, operator, *arguments, **options):
    return CheckpointPolicy.MUST_SAVE if operator in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(network: Decoder | VisionTransformer, checkpointing: str) -> None:
    options = {} if checkpointing == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, policy)}
    if checkpointing != "none":
        for block in network.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


@pytest.mark.parametrize(
    ("precision", "checkpointing", "tolerance"),
    [
        ("32-true", "none", 0.01),
        ("bf16-mixed", "none", 0.03),
        ("bf16-true", "none", 0.03),
        ("32-true", "full", 0.02),
        ("32-true", "selective", 0.02),
    ],
)
def test_the_most_that_a_step_holds_is_what_is_estimated(precision, checkpointing, tolerance, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from _results import peak_bytes

    model = shape(hidden_size=128, intermediate_size=344, num_attention_heads=4, num_key_value_heads=None)
    specs = build_all({"name": "lns"}, 4)
    decoder = build_decoder(model, specs, seed=0)
    if precision == "bf16-true":
        decoder.bfloat16()
    checkpoint_blocks(decoder, checkpointing)
    rows, length = 2, 128
    tokens = torch.randint(101, (2, rows, length))

    def step():
        decoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            for micro_batch in tokens:
                decoder(micro_batch, next_tokens(micro_batch)).total.backward()

    step()
    decoder.zero_grad()
    found = memory(model, specs, rows=rows, length=length, precision=precision, checkpointing=checkpointing, cpu=True)
    expected = found.total - found.weights - found.moments
    assert peak_bytes(step) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    ("precision", "checkpointing", "tolerance"),
    [
        ("32-true", "none", 0.01),
        ("bf16-mixed", "none", 0.03),
        ("bf16-true", "none", 0.03),
        ("32-true", "full", 0.03),
        ("32-true", "selective", 0.03),
    ],
)
def test_the_most_that_a_step_of_images_holds_is_what_is_estimated(precision, checkpointing, tolerance, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from _results import peak_bytes

    model = vit_shape(hidden_size=128, intermediate_size=512, num_attention_heads=4)
    images, rows = ImageConfig(source="folder", classes=10, size=64, patch_size=8), 3
    vit = vit_of(model, {"name": "lns"}, images)
    if precision == "bf16-true":
        vit.bfloat16()
    checkpoint_blocks(vit, checkpointing)
    batches = [drawn(rows, images) for _ in range(2)]

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            for batch in batches:
                vit(*batch).total.backward()

    step()
    vit.zero_grad()
    found = memory(
        model,
        build_all({"name": "lns"}, 4),
        rows=rows,
        length=images.patches + 1,
        images=images,
        precision=precision,
        checkpointing=checkpointing,
        cpu=True,
    )
    expected = found.total - found.weights - found.moments
    assert peak_bytes(step) == pytest.approx(expected, rel=tolerance)


def test_strategies_share_and_add_what_they_should():
    sizes = {"rows": 2, "length": 16, "precision": "32-true"}
    model, specs = shape(), build_all({"name": "lns"}, 4)
    single = memory(model, specs, **sizes)
    ddp = memory(model, specs, strategy="ddp", ranks=4, **sizes)
    fsdp = memory(model, specs, strategy="fsdp", ranks=4, **sizes)
    assert ddp.total - single.total == single.gradients == 4 * parameters(model, specs)
    assert (fsdp.weights, fsdp.gradients, fsdp.moments) == (single.weights // 4,) * 2 + (single.moments // 4,)
    block = (parameters(model, specs) - 2 * 101 * 48) // 4
    assert fsdp.communication == 2 * 4 * (2 * 101 * 48 + 2 * block)
    assert fsdp.activations == ddp.activations == single.activations
    sizes |= {"images": IMAGES, "length": IMAGES.patches + 1}
    model = vit_shape()
    images = memory(model, specs, strategy="fsdp", ranks=4, **sizes)
    whole, outside = parameters(model, specs, IMAGES), outer_parameters(model, IMAGES)
    assert images.weights == images.gradients == images.moments // 2 == whole
    assert images.communication == 2 * 4 * (outside + 2 * ((whole - outside) // 4))


# The whole estimate --------------------------------------------------------------------------------------------------


def test_a_cell_of_table_1():
    found = of("experiments=table1_350m", "norm=lns", hardware="a100", gpus=4, mfu=0.5, published_tokens=6.0e9)
    assert found.parameters == 367_969_280
    assert found.non_embedding == 367_969_280 - 2 * 32000 * 1024
    assert found.positions == 60_000 * 512 * 256 == 7_864_320_000
    assert found.published_tokens == 6.0e9
    assert found.precision == "bf16-true"
    assert found.flops_per_token == 6 * (367_969_280 - 32000 * 1024) + 12 * 24 * 1024 * 256
    assert found.gpu_hours == pytest.approx(found.flops_per_token * 7_864_320_000 / (0.5 * 312e12) / 3600)
    assert found.hours == pytest.approx(found.gpu_hours / 4)
    assert found.documents == 60_000 * 512  # one a row
    assert found.token_bytes == 2 * 7_864_320_000
    assert found.download_bytes == pytest.approx(326.8e9 * found.documents / 364.87e6, rel=1e-3)


def test_a_vision_transformer():
    found = of("experiments=table5_vit_s", gpus=4)
    assert found.positions == 30_000 * 1024 * 196
    assert found.parameters == 64_609_768
    assert found.non_embedding == 64_609_768 - (384 * (3 * 256 + 1) + 198 * 384 + 385 * 1000)
    assert found.flops == 30_000 * 1024 * flops_per_image(composed("experiments=table5_vit_s").model, VIT_S)
    assert found.flops_per_token == round(found.flops / found.positions)
    assert (found.token_bytes, found.documents) == (None, None)
    assert found.gpu_hours == pytest.approx(found.flops / (0.4 * 989.4e12) / 3600)
    small = of("experiments=table5_vit_s", "scale=toy", hardware="cpu")
    assert small.parameters > small.non_embedding
    with pytest.raises(UserError, match=r"images\.classes is open, and images\.folder='data/imagenet'"):
        of("experiments=table5_vit_s", "images.classes=null")


VIT_S = ImageConfig(source="folder", classes=1000, size=224, patch_size=16)


@pytest.mark.parametrize("name", choices("experiments"))
def test_every_experiment_is_estimated_and_every_table_fits_one_gpu(name):
    found = of(f"experiments={name}")
    fits = found.memory.total <= found.device_memory == 80e9
    assert fits == (found.max_micro_batch_size >= found.micro_batch_size)
    assert fits or not name.startswith("table")


def test_packed_rows_take_as_many_documents_as_their_tokens_and_no_more_than_there_are():
    words = ("experiments=table1_130m", "data.layout=packed")
    found = of(*words)
    assert found.documents == pytest.approx(found.positions / (156e9 / 364_868_892), rel=1e-6)
    assert of(*words, "trainer.max_steps=100000000").documents == 364_868_892
    few = of(*words, "data.max_documents=1000")
    assert (few.documents, few.token_bytes) == (1000, 2 * round(1000 * 156e9 / 364_868_892))
    assert of(*words, "model.vocab_size=70000").token_bytes == 2 * found.token_bytes


def test_the_largest_micro_batch_fits_and_one_more_row_does_not():
    config = composed("experiments=table1_1b")
    most = of("experiments=table1_1b").max_micro_batch_size
    sizes = [
        memory(config.model, build_all(config.norm, 24), rows=rows, length=256, precision="bf16-true").total
        for rows in (most, most + 1)
    ]
    assert sizes[0] <= 80e9 < sizes[1]
    large = ("model=llama_7b", "data.micro_batch_size=1")
    assert of(*large).max_micro_batch_size == 0
    assert of(*large, gpus=16, strategy="fsdp").max_micro_batch_size > 0


def test_checkpointing_takes_less_memory_and_keeps_the_count_of_operations():
    none, selective, full = (of("experiments=table1_1b", checkpointing=mode) for mode in ("none", "selective", "full"))
    assert none.memory.activations > selective.memory.activations > 5 * full.memory.activations
    assert none.memory.total > selective.memory.total > full.memory.total
    assert none.flops == selective.flops == full.flops


def test_precision_follows_the_hardware():
    assert of("experiments=quickstart", hardware="h200").precision == "bf16-mixed"
    assert of("experiments=quickstart", hardware="cpu").precision == "32-true"
    slow, fast = (of(f"trainer.precision={p}", hardware="h100").hours for p in ("32-true", "bf16-true"))
    assert slow / fast == pytest.approx(989.4 / 66.9)


def test_this_machine_is_measured():
    assert module.device("cpu", "32-true")[1] > 1e8
    assert module.device("cpu", "32-true")[0] > 2**28
    threads = torch.get_num_threads()
    assert module.matmul_rate("cpu", torch.float32, size=64, threads=1) > 1e6
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hardware": "h1000"}, ["hardware='h1000'", "h100"]),
        ({"mfu": 0.0}, ["mfu=0.0", "(0, 1]"]),
        ({"mfu": 1.5, "gpus": 3}, ["mfu=1.5", "gpus=3 does not divide data.batch_size=16"]),
        ({"mfu": float("nan")}, ["mfu=nan"]),
        ({"gpus": 0}, ["gpus=0"]),
        ({"gpus": 2}, ["data.micro_batch_size=16", "8 rows"]),
        ({"hardware": "cpu", "gpus": 2}, ["hardware='cpu' is this one machine"]),
        ({"strategy": "single", "gpus": 2}, ["strategy='single' is one rank"]),
        ({"strategy": "zero"}, ["strategy='zero'", "fsdp"]),
        ({"checkpointing": "some"}, ["checkpointing='some'", "selective"]),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(UserError) as error:
        of(**settings)
    for word in words:
        assert word in str(error.value)


def test_a_vocabulary_that_only_the_tokenizer_knows_is_asked_for():
    with pytest.raises(UserError, match=r"model\.vocab_size is open, and data\.tokenizer='t5-base'"):
        of("model=tiny", "data=c4")


def test_ranks_are_those_of_the_trainer_unless_given():
    config = composed("data.micro_batch_size=4")
    trainer = TrainerConfig(devices=2, num_nodes=2, strategy="ddp")
    found = estimate(config.model, config.norm, config.data, trainer)
    assert (found.gpus, found.strategy) == (4, "ddp")
    sharded = estimate(config.model, config.norm, config.data, replace(trainer, strategy="fsdp"))
    assert (sharded.strategy, sharded.checkpointing) == ("fsdp", "none")
    saving = make_dataclass("Saving", [("checkpointing", str, "full")], bases=(TrainerConfig,))()
    assert estimate(config.model, config.norm, config.data, saving).checkpointing == "full"
    assert estimate(config.model, config.norm, config.data, trainer, gpus=1, strategy="single").strategy == "single"


# The command line ----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_builds_nothing():
    process = subprocess.run(
        [sys.executable, "-m", "cod_lightning", "estimate", "experiments=table1_350m", "norm=lns", "gpus=4"],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    for word in ("367,969,280", "7,864,320,000", "6,000,000,000", "4 x h100, ddp", "30,720,000", "GPU-hours"):
        assert word in process.stdout


def test_json_has_an_entry_for_each_run_of_a_sweep(capsys):
    assert main(["estimate", "experiments=table1_130m", "norm=pre_ln,gpas", "hardware=a100,h100", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [(entry["hardware"], entry["parameters"]) for entry in entries] == [
        ("a100", 134_105_856),
        ("h100", 134_105_856),
        ("a100", 134_105_868),
        ("h100", 134_105_868),
    ]
    for entry in entries:
        parts = dict(entry["memory"])
        assert parts.pop("total") == sum(parts.values())
        assert entry["gpu_hours"] == entry["hours"]
        assert "hardware=" in entry["overrides"][-1]


def test_a_smaller_scale_has_no_published_count_of_tokens(capsys):
    assert main(["estimate", "experiments=table1_130m", "scale=mini,paper", "--json"]) == 0
    assert [entry["published_tokens"] for entry in json.loads(capsys.readouterr().out)] == [None, 2.2e9]


def test_several_runs_are_columns(capsys):
    assert main(["estimate", "norm=pre_ln,lns", "mfu=0.3"]) == 0
    shown = capsys.readouterr().out
    assert "norm=pre_ln" in shown
    assert "norm=lns" in shown
    assert "tokens, as published" not in shown
    assert "documents of C4" not in shown


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["mfu=half"], "error: mfu='half' must be a number"),
        (["gpus=1.5"], "error: gpus='1.5' must be a whole number"),
        (["mfu=40"], "error: mfu=40.0 must lie in (0, 1]"),
        (["hardwear=h100"], "hardwear"),
        (["experiments=table5_vit_s", "images.classes=null"], "images.classes is open"),
        (["norm=lms"], "lns"),
    ],
)
def test_bad_words_are_one_error(words, complaint, capsys):
    assert main(["estimate", *words]) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert not shown.out
