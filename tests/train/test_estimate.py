"""The estimate against models that are really built: their parameters, FLOPs, saved tensors and peak memory."""

import json
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cod_lightning.cli import main
from cod_lightning.config.compose import choices, compose
from cod_lightning.config.schema import Config, OptimConfig, TrainerConfig
from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder, build_model
from cod_lightning.nn.parallel import parallelise
from cod_lightning.nn.spec import INITIAL, OPTIMIZER
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.train import estimate as module
from cod_lightning.train.cost import Architecture, training_flops
from cod_lightning.train.estimate import estimate
from cod_lightning.train.optim import build_optimizer
from strategy_kinds import covering_strategies, label

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _results import peak_bytes

COMBINED = [
    {"name": "gpas", "base": "post_ln"},
    {"name": "gpas", "base": "admin"},
    {"name": "layer_scale", "base": "sandwich_ln"},
    {"name": "peri_ln", "embedding_norm": False},
]


def for_norms(norms):
    return pytest.mark.parametrize("norm", [*norms, *COMBINED], ids=label)


LNS = {"name": "lns"}
IMAGES = ImageConfig(source="folder", classes=11, size=20, patch_size=4)
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 101,
}
VIT_SHAPE = SHAPE | {"norm": "layer", "qkv_bias": True, "num_key_value_heads": None, "vocab_size": None}


def decoder_like(norm=LNS, seq_len=16, **changes):
    return Architecture(DecoderConfig(**(SHAPE | changes)), norm, seq_len)


def vit_like(norm=LNS, images=IMAGES, **changes):
    return Architecture(DecoderConfig(**(VIT_SHAPE | changes)), norm, 16, images)


def build(architecture, dtype=torch.float32):
    """The model that is estimated."""
    model, images = architecture.model, architecture.images
    specs = build_all(architecture.norm, model.num_hidden_layers)
    if images is None:
        return build_decoder(model, specs, seed=0).to(dtype)
    shape = (images.size, images.patch_size, images.classes)
    return build_model(lambda: VisionTransformer(model, specs, *shape), seed=0).to(dtype)


def batch(architecture, batch_size):
    """Random sequences or images, and their targets."""
    images = architecture.images
    if images is not None:
        return torch.randn(batch_size, 3, images.size, images.size), torch.randint(images.classes, (batch_size,))
    tokens = torch.randint(architecture.model.vocab_size, (batch_size, architecture.seq_len))
    return tokens, next_tokens(tokens)


def autocast(precision):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def dtype_of(precision):
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


@lru_cache
def composed(*overrides):
    return compose(overrides)


def estimated(*overrides, **settings):
    return estimate(composed(*overrides), **settings)


# Parameters and FLOPs ------------------------------------------------------------------------------------------------


def check_parameters(architecture):
    numel = {name: parameter.numel() for name, parameter in build(architecture).named_parameters()}
    ends = ("model.embed_tokens", "lm_head", "embedding", "head")
    assert architecture.sizes.parameters == sum(numel.values())
    assert architecture.sizes.outer == sum(size for name, size in numel.items() if name.startswith(ends))


both_models = pytest.mark.parametrize("like", [decoder_like, vit_like])


@for_norms([{"name": name} for name in STRATEGIES])
@both_models
def test_parameters_of_every_strategy_are_those_of_the_model(like, norm):
    check_parameters(like(norm))


@both_models
@pytest.mark.parametrize(
    "changes", [{"qkv_bias": True, "num_key_value_heads": None, "tie_word_embeddings": True}, {"norm_affine": False}]
)
def test_parameters_of_every_shape_are_those_of_the_model(like, changes):
    check_parameters(like(**changes))


@pytest.mark.parametrize(
    "architecture",
    [
        decoder_like(num_key_value_heads=None),
        decoder_like(num_key_value_heads=None, tie_word_embeddings=True),
        vit_like(),
    ],
    ids=["decoder", "tied", "vit"],
)
def test_flops_are_those_that_torch_counts(architecture):
    model = build(architecture, torch.bfloat16)  # in float32 products are taken in place, which the counter misses
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch(architecture, 3)).total.backward()
    assert counter.get_total_flops() == 3 * training_flops(architecture)


def test_flops_per_token_are_six_per_weight_and_attention():
    model = decoder_like(seq_len=32).model
    weights = sum(p.numel() for n, p in build(decoder_like()).named_parameters() if p.ndim == 2 and "embed" not in n)
    assert training_flops(decoder_like(seq_len=32)) == 32 * (6 * weights + 12 * model.num_hidden_layers * 48 * 32)


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_weights_gradients_and_moments_are_counted_in_bytes(precision):
    architecture = decoder_like({"name": "gpas"})
    model = build(architecture, dtype_of(precision))
    optimizer, _ = build_optimizer(model, OptimConfig(), max_steps=10)
    with autocast(precision):
        model(*batch(architecture, 1)).total.backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    memory = architecture.memory_model(precision)(1)
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert memory.moments == sum(moment.nbytes for moment in moments)


def peak_over_estimate(architecture, batch_size, precision, checkpointing="none"):
    """Peak memory of two micro-batches without weights and moments, over its estimate."""
    model = build(architecture, dtype_of(precision))
    parallelise(model, checkpointing=checkpointing)
    batches = [batch(architecture, batch_size) for _ in range(2)]

    def step():
        model.zero_grad()
        for part in batches:
            with autocast(precision):
                model(*part).total.backward()

    step()
    model.zero_grad()
    memory = architecture.memory_model(precision, batch_size, checkpointing=checkpointing, cpu=True)(batch_size)
    return peak_bytes(step) / (memory.total - memory.weights - memory.moments)


WIDE = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": None}


@pytest.mark.parametrize(
    ("precision", "checkpointing", "tolerance"),
    [
        ("32-true", "none", 0.02),
        ("bf16-mixed", "none", 0.03),
        ("bf16-true", "none", 0.03),
        ("32-true", "full", 0.03),
        ("32-true", "selective", 0.03),
    ],
)
@pytest.mark.parametrize(
    "architecture",
    [
        decoder_like(seq_len=128, **WIDE),
        vit_like(images=ImageConfig(source="folder", classes=10, size=64, patch_size=8), **WIDE),
    ],
    ids=["decoder", "vit"],
)
def test_the_peak_of_a_step_is_estimated(architecture, precision, checkpointing, tolerance):
    assert peak_over_estimate(architecture, 3, precision, checkpointing) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(("vocab_size", "seq_len"), [(4096, 128), (8192, 16), (8192, 64)])
def test_the_peak_with_a_large_vocabulary_is_estimated(precision, vocab_size, seq_len):
    """With few tokens the peak is in the backward pass of the loss, where the head's gradient is copied."""
    architecture = decoder_like(seq_len=seq_len, **(WIDE | {"vocab_size": vocab_size}))
    assert peak_over_estimate(architecture, 3, precision) == pytest.approx(1, abs=0.01)


@for_norms(covering_strategies(ignore=(*INITIAL, *OPTIMIZER)))
def test_the_peak_of_strategies_of_all_coefficients_is_estimated(norm):
    assert peak_over_estimate(decoder_like(norm, 128, **WIDE), 8, "32-true") == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["pre_ln", "post_ln", "group_ln", "admin", "gpas", "derf"])
def test_the_peak_of_a_vision_transformer_is_estimated(name):
    assert peak_over_estimate(vit_like({"name": name}, **WIDE), 8, "32-true") == pytest.approx(1, abs=0.01)


def saved_bytes(model, inputs, precision):
    """Bytes of all storages that a forward pass saves for its backward pass, without parameters."""
    parameters, saved = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = (tensor, tensor.untyped_storage().nbytes())
        return tensor

    with autocast(precision), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(*inputs).total
    assert loss.requires_grad
    return sum(size for place, (_, size) in saved.items() if place not in parameters)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("lns", "32-true"),
        ("lns", "bf16-mixed"),
        ("mix_ln", "bf16-true"),
        ("peri_ln", "bf16-mixed"),
        ("group_ln", "32-true"),
        ("gpas admin", "bf16-mixed"),
        ("layer_scale deep_norm", "bf16-true"),
    ],
)
def test_the_kernels_of_a_gpu_save_the_estimated_bytes(name, precision):
    norm = dict(zip(("name", "base"), name.split(), strict=False))
    architecture = decoder_like(norm, 8, norm_backend="triton", num_hidden_layers=2)
    model = build(architecture, dtype_of(precision))
    one, two = (saved_bytes(model, batch(architecture, size), precision) for size in (1, 2))
    assert architecture.memory_model(precision)(1).activations == pytest.approx(two - one, rel=0.1)


def test_ddp_adds_a_copy_of_the_gradients():
    single, ddp = (decoder_like().memory_model("32-true", strategy=s, ranks=4)(2) for s in ("single", "ddp"))
    assert ddp.total - single.total == single.gradients == 4 * decoder_like().sizes.parameters
    assert ddp.activations == single.activations


@pytest.mark.parametrize("architecture", [decoder_like(), vit_like()], ids=["decoder", "vit"])
def test_fsdp_shards_and_gathers(architecture):
    single, fsdp = (architecture.memory_model("32-true", strategy=s, ranks=4)(2) for s in ("single", "fsdp"))
    sizes = architecture.sizes
    assert (fsdp.weights, fsdp.gradients, fsdp.moments) == (single.weights // 4,) * 2 + (2 * (single.weights // 4),)
    assert fsdp.communication == 2 * 4 * (sizes.outer + 2 * ((sizes.parameters - sizes.outer) // 4))
    assert fsdp.activations == single.activations


def test_fsdp_in_mixed_precision_gathers_and_computes_in_bfloat16():
    architecture = decoder_like(vocab_size=8192)
    full, mixed = (architecture.memory_model(p, strategy="fsdp", ranks=4)(2) for p in ("32-true", "bf16-mixed"))
    half = architecture.memory_model("bf16-true", strategy="fsdp", ranks=4)(2)
    assert (mixed.weights, mixed.copies) == (full.weights, 0)
    assert mixed.communication == half.communication == full.communication // 2
    assert (mixed.activations, mixed.work) == (half.activations, half.work)


@pytest.mark.parametrize("architecture", [decoder_like(), vit_like()], ids=["decoder", "vit"])
def test_offload_leaves_the_shard_of_one_block_on_the_device(architecture):
    sharded, offloaded = (
        architecture.memory_model("32-true", strategy="fsdp", ranks=4, offload=offload)(2) for offload in (False, True)
    )
    sizes = architecture.sizes
    assert offloaded.weights == offloaded.gradients == 4 * ((sizes.parameters - sizes.outer) // 4) // 4
    assert offloaded.moments == 0
    kept = ("copies", "communication", "activations", "work")
    assert [getattr(offloaded, name) for name in kept] == [getattr(sharded, name) for name in kept]


def test_offload_makes_room_for_larger_micro_batches_under_fsdp_only():
    words = ("experiments=table1_1b", "trainer=fsdp", "data.micro_batch_size=8")
    sharded, offloaded = estimated(*words), estimated(*words, "trainer.offload=true")
    assert offloaded.memory.total < sharded.memory.total
    assert offloaded.max_micro_batch_size > sharded.max_micro_batch_size
    assert estimated(*words, "trainer.offload=true", strategy="ddp") == estimated(*words, strategy="ddp")


def test_hybrid_sharding_shards_over_one_node():
    words = ("experiments=quickstart", "trainer.strategy=fsdp", "trainer.devices=2", "data.micro_batch_size=1")
    node = estimated(*words).memory
    assert estimated(*words, "trainer.num_nodes=4", "trainer.hybrid=true").memory == node
    assert estimated(*words, "trainer.num_nodes=4").memory.weights == node.weights // 4


def test_every_kind_of_block_is_counted():
    shallow, deep = (decoder_like({"name": "mix_ln"}, num_hidden_layers=layers) for layers in (4, 8))
    assert set(shallow.kinds.values()) == {1, 3}
    assert set(deep.kinds.values()) == {2, 6}


# The whole estimate --------------------------------------------------------------------------------------------------


def test_the_estimate_of_a_cell_of_table_1_is_that_of_its_formulas():
    result = estimated("experiments=table1_350m", "norm=lns", hardware="a100", gpus=4, mfu=0.5)
    norms = (2 * 24 + 1) * 1024
    assert result.parameters == 367_969_280
    assert result.non_embedding == 367_969_280 - 2 * 32000 * 1024
    assert result.positions == 60_000 * 512 * 256 == 7_864_320_000
    assert result.published_tokens == 6.0e9
    assert result.precision == "bf16-true"
    assert result.flops_per_token == 6 * (367_969_280 - norms - 32000 * 1024) + 12 * 24 * 1024 * 256
    assert result.gpu_hours == pytest.approx(result.flops_per_token * 7_864_320_000 / (0.5 * 312e12) / 3600)
    assert result.hours == pytest.approx(result.gpu_hours / 4)
    assert result.documents == 60_000 * 512  # one per sequence
    assert result.token_bytes == 2 * 7_864_320_000
    assert result.download_bytes == pytest.approx(326.8e9 * result.documents / 364.87e6, rel=1e-3)
    assert result.text_bytes == pytest.approx(828.6e9 * result.documents / 364.87e6, rel=1e-3)


def test_the_estimate_of_a_vision_transformer_counts_its_patches():
    result = estimated("experiments=table5_vit_s", gpus=4)
    assert result.positions == 30_000 * 1024 * 196
    assert result.parameters == 64_609_768
    assert result.non_embedding == 64_609_768 - (384 * (3 * 256 + 1) + 198 * 384 + 385 * 1000)
    assert result.flops == 30_000 * 1024 * training_flops(Architecture.of(composed("experiments=table5_vit_s")))
    assert result.flops_per_token == round(result.flops / result.positions)
    assert (result.token_bytes, result.documents) == (None, None)
    assert result.gpu_hours == pytest.approx(result.flops / (0.4 * 989.4e12) / 3600)


@pytest.mark.parametrize("name", ["table1_130m", "table5_vit_s"])
def test_gpu_hours_are_those_of_the_estimate(name):
    experiment = f"experiments={name}"
    assert module.gpu_hours(composed(experiment)) == pytest.approx(estimated(experiment).gpu_hours)


@pytest.mark.parametrize("name", choices("experiments"))
def test_every_experiment_has_an_estimate_and_every_table_fits_one_gpu(name):
    result = estimated(f"experiments={name}")
    fits = result.memory.total <= result.device_memory == 80e9
    assert fits == (result.max_micro_batch_size >= result.micro_batch_size)
    assert fits or not name.startswith("table")


def test_packed_data_takes_the_documents_of_its_tokens():
    words = ("experiments=table1_130m", "data.layout=packed")
    result = estimated(*words)
    assert result.documents == pytest.approx(result.positions / (156e9 / 364_868_892), rel=1e-6)
    assert estimated(*words, "trainer.max_steps=100000000").documents == 364_868_892
    few = estimated(*words, "data.max_documents=1000")
    assert (few.documents, few.token_bytes) == (1000, 2 * round(1000 * 156e9 / 364_868_892))
    for vocab_size, itemsize in ((65536, 2), (65537, 4)):
        larger = estimated(*words, f"model.vocab_size={vocab_size}")
        assert larger.token_bytes == itemsize / 2 * result.token_bytes


def test_the_size_of_another_source_than_c4_is_not_known():
    result = estimated("experiments=quickstart")
    assert (result.token_bytes, result.documents, result.text_bytes, result.download_bytes) == (None,) * 4


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not():
    config = composed("experiments=table1_1b")
    most = estimated("experiments=table1_1b").max_micro_batch_size
    memory = Architecture.of(config).memory_model("bf16-true", most)
    assert memory(most).total <= 80e9 < memory(most + 1).total
    large = ("model=llama_7b", "data.micro_batch_size=1")
    assert estimated(*large).max_micro_batch_size == 0
    assert estimated(*large, gpus=16, strategy="fsdp").max_micro_batch_size > 0


def test_checkpointing_lowers_memory_but_not_flops():
    none, selective, full = (
        estimated("experiments=table1_1b", checkpointing=mode) for mode in ("none", "selective", "full")
    )
    assert none.memory.activations > selective.memory.activations > 5 * full.memory.activations
    assert none.memory.total > selective.memory.total > full.memory.total
    assert none.flops == selective.flops == full.flops


def test_precision_follows_the_hardware():
    assert estimated("experiments=quickstart", hardware="h200").precision == "bf16-mixed"
    assert estimated("experiments=quickstart", hardware="cpu").precision == "32-true"
    slow, fast = (estimated(f"trainer.precision={p}", hardware="h100").hours for p in ("32-true", "bf16-true"))
    assert slow / fast == pytest.approx(989.4 / 66.9)


def test_the_memory_and_speed_of_this_machine_are_in_bytes_and_operations():
    memory, rate = module.memory_and_peak("cpu", "32-true")
    assert memory > 2**28
    assert rate > 1e8


def test_measuring_this_machine_keeps_the_number_of_threads():
    threads = torch.get_num_threads()
    module.matmul_rate("cpu", torch.float32, size=64, threads=threads + 1)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hardware": "h1000"}, ["hardware='h1000'", "h100"]),
        ({"mfu": 0.0}, ["mfu=0.0", "between 1e-06 and 1"]),
        ({"mfu": 1.5, "gpus": 3}, ["mfu=1.5", "gpus=3 does not divide data.batch_size=16"]),
        ({"mfu": float("nan")}, ["mfu=nan"]),
        ({"gpus": 0}, ["gpus=0"]),
        ({"gpus": 2}, ["data.micro_batch_size=16", "16 / 2"]),
        ({"hardware": "cpu", "gpus": 2}, ["hardware='cpu' is this one machine"]),
        ({"strategy": "single", "gpus": 2}, ["strategy='single' is one rank"]),
        ({"strategy": "zero"}, ["strategy='zero'", "fsdp"]),
        ({"checkpointing": "some"}, ["checkpointing='some'", "selective"]),
    ],
)
def test_wrong_arguments_are_errors(settings, words):
    with pytest.raises(UserError) as error:
        estimated(**settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=tiny", "data=c4"), r"model\.vocab_size is null, and the tokenizer data\.tokenizer='t5-base'"),
        (("experiments=table5_vit_s", "images.classes=null"), r"images\.classes is null, and images\.folder='data/im"),
    ],
)
def test_an_open_size_is_an_error(words, message):
    with pytest.raises(UserError, match=message):
        estimated(*words)


@pytest.mark.parametrize(
    ("changes", "settings", "expected"),
    [
        ({"strategy": "ddp"}, {}, (4, "ddp", "none")),
        ({"strategy": "fsdp", "checkpointing": "full"}, {}, (4, "fsdp", "full")),
        ({"strategy": "ddp"}, {"gpus": 1, "strategy": "single", "checkpointing": "full"}, (1, "single", "full")),
    ],
)
def test_arguments_override_those_of_the_trainer(changes, settings, expected):
    trainer = TrainerConfig(devices=2, num_nodes=2, **changes)
    data = DataConfig(tokenizer="bpe", batch_size=16, micro_batch_size=4)
    result = estimate(Config(norm=LNS, data=data, trainer=trainer), **settings)
    assert (result.gpus, result.strategy, result.checkpointing) == expected


# The command line ----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table(capsys):
    assert main(["estimate", "experiments=table1_350m", "norm=lns", "gpus=4"]) == 0
    shown = capsys.readouterr().out
    for word in ("367,969,280", "7,864,320,000", "6,000,000,000", "4 x h100, ddp", "30,720,000", "GPU-hours"):
        assert word in shown


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


def test_a_smaller_scale_has_no_published_tokens(capsys):
    assert main(["estimate", "experiments=table1_130m", "scale=mini,paper", "--json"]) == 0
    assert [entry["published_tokens"] for entry in json.loads(capsys.readouterr().out)] == [None, 2.2e9]


def test_the_table_has_a_column_for_each_run(capsys):
    assert main(["estimate", "norm=pre_ln,lns", "mfu=0.3"]) == 0
    shown = capsys.readouterr().out
    assert "norm=pre_ln" in shown
    assert "norm=lns" in shown
    assert "tokens, as published" not in shown
    assert "documents of C4" not in shown


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["mfu=half"], "error: mfu=half: expected a number"),
        (["gpus=1.5"], "error: gpus=1.5: expected a whole number"),
        (["mfu=40"], "error: mfu=40.0 must lie between 1e-06 and 1"),
        (["mfu=1e-320"], "error: mfu=1e-320 must lie between 1e-06 and 1"),
        (["hardwear=h100"], "hardwear"),
        (["experiments=table5_vit_s", "images.classes=null"], "images.classes is null"),
        (["norm=lms"], "lns"),
    ],
)
def test_a_wrong_override_is_one_error(words, complaint, capsys):
    assert main(["estimate", *words]) == 2
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert not shown.out
