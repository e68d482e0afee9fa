"""The Vision Transformer against transcriptions of its equations, under every strategy."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from cod_lightning.config.compose import compose
from cod_lightning.kernels.loss import IGNORE
from cod_lightning.nn.config import DecoderConfig, num_vit_parameters
from cod_lightning.nn.init import build_model, seed_of
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.nn.vit import VisionTransformer, label_loss, patches

DEPTH = 3
CONFIG = DecoderConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, norm="layer", qkv_bias=True
)
SHAPE = {"image_size": 12, "patch_size": 4, "classes": 5}


def vit(norm="pre_ln", seed=0, **options) -> VisionTransformer:
    return vit_of(CONFIG, norm, seed, **options)


def vit_of(config, norm="pre_ln", seed=0, **options) -> VisionTransformer:
    specs = build_all({"name": norm, **options}, DEPTH)
    return build_model(lambda: VisionTransformer(config, specs, **SHAPE), seed)


def images(batch=3, seed=0):
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_patches_are_in_the_order_of_reading():
    x = images(2)
    expected = [
        x[:, :, up : up + 4, left : left + 4].reshape(2, -1).unsqueeze(1) for up in (0, 4, 8) for left in (0, 4, 8)
    ]
    assert torch.equal(patches(x, 4), torch.cat(expected, dim=1))


def test_the_embedding_is_a_convolution_after_the_class_token(shaken):
    embedding = shaken(vit().double(), 0.3).embedding
    x = images().double()
    kernel = embedding.projection.weight.view(16, 3, 4, 4)
    patches = F.conv2d(x, kernel, embedding.projection.bias, stride=4).flatten(2).transpose(1, 2)
    y = embedding(x)
    torch.testing.assert_close(y[:, 1:], patches + embedding.positions[1:], rtol=1e-12, atol=1e-12)
    assert torch.equal(y[:, 0], (embedding.class_token + embedding.positions[0]).expand(3, -1))


@pytest.mark.parametrize(("position", "inside", "outside"), [("after_ln", 1, 0), ("after_branch", 0, 1)])
def test_logits_equal_a_transcription(position, inside, outside, shaken):
    """Both LNS rows of Table 5, with torch's own attention: no mask, no rotary embeddings."""
    model = shaken(vit("lns", position=position).double(), 0.3)
    p = dict(model.named_parameters())
    x = model.embedding(images().double())
    for layer in range(1, DEPTH + 1):
        b = {k.removeprefix(f"layers.{layer - 1}."): v for k, v in p.items() if k.startswith(f"layers.{layer - 1}.")}
        s, t = layer ** (-inside / 2), layer ** (-outside / 2)
        y = s * F.layer_norm(x, (16,), b["input_layernorm.weight"], None, 1e-6)
        attention, _ = F.multi_head_attention_forward(
            *[y.transpose(0, 1)] * 3,
            embed_dim_to_check=16,
            num_heads=2,
            in_proj_weight=torch.cat([b[f"self_attn.{n}_proj.weight"] for n in "qkv"]),
            in_proj_bias=torch.cat([b[f"self_attn.{n}_proj.bias"] for n in "qkv"]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=b["self_attn.o_proj.weight"],
            out_proj_bias=b["self_attn.o_proj.bias"],
        )
        x = x + t * attention.transpose(0, 1)
        y = s * F.layer_norm(x, (16,), b["post_attention_layernorm.weight"], None, 1e-6)
        hidden = F.gelu(y @ b["mlp.up_proj.weight"].T + b["mlp.up_proj.bias"])
        x = x + t * (hidden @ b["mlp.down_proj.weight"].T + b["mlp.down_proj.bias"])
    expected = F.layer_norm(x[:, 0], (16,), p["norm.weight"], None, 1e-6) @ p["head.weight"].T + p["head.bias"]
    torch.testing.assert_close(model(images().double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [name for name in STRATEGIES if name not in ("rezero", "pro_res")])
def test_under_every_strategy_every_layer_changes_its_input_and_learns(norm):
    model = vit(norm)
    stream = []
    model(images(), hook=lambda name, layer, x: stream.append(x) if name in ("embedding", "residual") else None)
    assert len(stream) == DEPTH + 1
    for before, after in itertools.pairwise(stream):
        assert after.isfinite().all()
        assert not torch.allclose(before, after, rtol=0, atol=1e-7)
    model(images(), torch.tensor([0, 4, 2])).total.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(any(p.grad.abs().max() > 0 for p in block.parameters()) for block in model.blocks)


def test_initial_weights_depend_only_on_seed_and_name():
    models = [vit(), vit("lns"), vit("sandwich_ln")]
    for name in ("embedding.projection.weight", "embedding.positions", "layers.2.mlp.down_proj.weight", "head.weight"):
        parameter = models[0].get_parameter(name)
        generator = torch.Generator().manual_seed(seed_of(0, name))
        assert torch.equal(parameter, 0.02 * torch.randn(parameter.shape, generator=generator))
        assert all(torch.equal(model.get_parameter(name), parameter) for model in models)
        assert not torch.equal(vit(seed=1).get_parameter(name), parameter)
    for name, parameter in models[0].named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_fan_in_initialises_every_weight_by_its_inputs():
    config = replace(CONFIG, hidden_size=96, init="fan_in", init_std=7.0)
    model = vit_of(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name and not name.endswith("bias"):
            inputs = parameter.shape[-1]  # of an embedding, its width
            assert parameter.std().item() == pytest.approx(inputs**-0.5, rel=0.2), name


@pytest.mark.parametrize("norm", ["pre_ln", "qk_norm"])
def test_heads_may_have_an_odd_width(norm):
    model = vit_of(replace(CONFIG, hidden_size=14), norm)
    assert model(images()).isfinite().all()


def test_admin_is_profiled_on_images():
    model = vit_of(replace(CONFIG, init_std=0.3), "admin")
    skips = [block.ffn_residual.skip for block in model.blocks]
    assert skips[0][0] > 1
    assert all(later[0] > earlier[0] for earlier, later in itertools.pairwise(skips))


@pytest.mark.parametrize("name", ["vit_s", "vit_tiny"])
@pytest.mark.parametrize("change", [{}, {"qkv_bias": False}, {"norm_affine": False}])
def test_parameters_are_counted(name, change):
    config = compose([f"model={name}", *(f"model.{key}={value}" for key, value in change.items())]).model
    shape = {"image_size": 224, "patch_size": 16, "classes": 1000}
    with torch.device("meta"):
        model = VisionTransformer(config, build_all({"name": "lns"}, config.num_hidden_layers), **shape)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == num_vit_parameters(config, **shape)
    if name == "vit_s" and not change:
        # DeiT-S has 22.05M with 12 blocks of 1.77M; this one 24 more, and no biases in its 73 LayerNorms.
        assert count == 22_050_664 + 24 * 1_774_464 - 73 * 384


def test_wrapped_blocks_run():
    model = vit()
    expected = model(images())
    model.layers = torch.nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    assert torch.equal(model(images()), expected)


def test_an_ignored_label_does_not_count():
    logits, labels = torch.randn(4, 5, dtype=torch.bfloat16), torch.tensor([1, IGNORE, 0, 4])
    loss = label_loss(logits, labels)
    assert loss.counts.tolist() == [1, 0, 1, 1]
    assert loss.per_sequence.dtype == torch.float32
    assert loss.per_sequence[1] == 0
    torch.testing.assert_close(loss.total, F.cross_entropy(logits.float(), labels, reduction="sum"))


@pytest.mark.parametrize(
    ("change", "word"), [({"patch_size": 5}, "patches of 5"), ({"depth": 2}, "2 block specs"), ({}, "heads=3")]
)
def test_an_impossible_shape_is_an_error(change, word):
    config = CONFIG if change else DecoderConfig(hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=3)
    shape = SHAPE | change
    with pytest.raises(ValueError, match=word):
        VisionTransformer(config, build_all({"name": "pre_ln"}, shape.pop("depth", DEPTH)), **shape)
