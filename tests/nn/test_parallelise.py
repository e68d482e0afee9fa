"""Activation checkpointing and compilation do not change results."""

import dataclasses
import pickle
from copy import deepcopy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh

from cod_lightning.errors import UserError
from cod_lightning.kernels.loss import next_tokens
from cod_lightning.measure.training import probe_statistics
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import set_step
from cod_lightning.nn.huggingface import to_llama_state_dict
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.parallel import parallelise, unwrapped_copy
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.surgery import convert
from cod_lightning.nn.weights import load_weights

CONFIG = DecoderConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=37)
TOKENS = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))


def build(norm="lns", wrap=lambda decoder: None, **changes):
    decoder = build_decoder(dataclasses.replace(CONFIG, **changes), build_all({"name": norm}, 2), seed=1, wrap=wrap)
    set_step(decoder, 700)  # in the middle of the schedule of pro_res
    return decoder


def step(decoder):
    """Loss and gradients by name."""
    loss = decoder(TOKENS, next_tokens(TOKENS, None)).total
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in decoder.named_parameters()}


compiles = pytest.mark.filterwarnings("default")  # Dynamo trips over warnings that it provokes itself


@compiles
@pytest.mark.parametrize(
    ("norm", "checkpointing", "backend"),
    [
        ("lns", "none", "aot_eager"),
        ("lns", "selective", None),
        ("lns", "full", "aot_eager"),
        ("admin", "full", None),
        ("admin", "selective", "aot_eager"),
        ("gpas", "selective", None),
        ("gpas", "full", "aot_eager"),
        ("pro_res", "full", "aot_eager"),
        ("x0_mix", "full", "aot_eager"),
        ("value_residual", "full", "aot_eager"),
    ],
)
def test_a_wrapped_model_has_the_same_loss_and_gradients(norm, checkpointing, backend):
    expected, gradients = step(build(norm))
    wrapped = build(norm, lambda decoder: parallelise(decoder, checkpointing=checkpointing, backend=backend))
    loss, wrapped_gradients = step(wrapped)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert wrapped_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(wrapped_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_with_checkpoints_computes_with_its_own_weights(copy):
    wrapped = build(wrap=lambda decoder: parallelise(decoder, checkpointing="selective"))
    expected = wrapped(TOKENS)
    copied = copy(wrapped)
    torch.nn.init.zeros_(wrapped.blocks[0].mlp.down_proj.weight)
    assert torch.equal(copied(TOKENS), expected)


@compiles
def test_one_process_compiles_many_models():
    for norm in ("lns", "post_ln", "gpas", "value_residual", "x0_mix", "pro_res"):  # two compilations each
        step(build(norm, lambda decoder: parallelise(decoder, backend="eager")))


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper], ids=lambda wrap: wrap.__name__)
def test_wrapped_blocks_run(decoder, wrap):
    model, tokens = decoder(), torch.arange(12)[None]
    expected = model(tokens)
    model.model.layers = torch.nn.ModuleList(wrap(block) for block in model.blocks)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_decoder_is_copied_converted_and_exported(decoder, whole):
    plain = decoder("lns")
    compiled = deepcopy(plain)
    compiled.model.layers = torch.nn.ModuleList(map(torch.compile, compiled.blocks))
    compiled = torch.compile(compiled) if whole else compiled
    results = [
        (
            unwrapped_copy(model).state_dict(),
            convert(model, {"name": "pre_ln"}).state_dict(),
            to_llama_state_dict(model),
        )
        for model in (plain, compiled)
    ]
    for expected, found in zip(*results, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_checkpointing_saves_fewer_activations():
    def saved(checkpointing):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        wrapped = build(wrap=lambda decoder: parallelise(decoder, checkpointing=checkpointing))
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            wrapped(TOKENS, next_tokens(TOKENS, None))
        return total

    assert saved("full") < saved("none")


@compiles
def test_an_unwrapped_copy_shares_the_weights_and_takes_hooks_and_transforms():
    wrapped = build(
        wrap=lambda decoder: parallelise(decoder, checkpointing="selective", backend="aot_eager"),
        tie_word_embeddings=True,
    )
    step(wrapped)
    copy = unwrapped_copy(wrapped)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert copy.lm_head.weight.data_ptr() == wrapped.lm_head.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in copy.parameters())
    expected = probe_statistics(build(tie_word_embeddings=True), TOKENS, None)
    assert probe_statistics(copy, TOKENS, None) == expected
    torch.func.jacrev(lambda x: copy.blocks[0](x, None)[0][0, -1])(torch.ones(1, 3, 16))


@pytest.mark.parametrize(
    "norm", ["lns", "peri_ln", "admin", "layer_scale", "gpas", "hybrid_norm", "x0_mix", "derf", "pro_res"]
)
def test_sharding_in_mixed_precision_rounds_what_autocast_rounds(tmp_path, norm):
    def gains(decoder):
        """Set the parameters outside of matrices to values that bfloat16 would round."""
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.detach().fill_(1.001)

    def mixed_step(decoder):
        with torch.autocast("cpu", torch.bfloat16):
            return step(decoder)

    one = build(norm)
    gains(one)
    expected, gradients = mixed_step(one)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = build(norm, lambda decoder: parallelise(decoder, mesh=mesh, dtype=torch.bfloat16))
        gains(sharded)
        loss, sharded_gradients = mixed_step(sharded)
        assert loss == expected
        for name, gradient in gradients.items():
            torch.testing.assert_close(sharded_gradients[name].full_tensor(), gradient, rtol=1e-6, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_a_missing_weight_is_named():
    weights = build().state_dict()
    with pytest.raises(UserError, match=r"here: 1 parameters .*: lm_head.weight is missing in the checkpoint"):
        load_weights(build(), {name: weight for name, weight in weights.items() if name != "lm_head.weight"}, "here")
