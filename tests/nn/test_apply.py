"""Strategies on stock models: `apply` and `fold`."""

import io
import pickle
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from stock_models import (
    OUTER,
    PLAIN,
    SHAPE,
    Outer,
    PlainModel,
    build,
    changed,
    decoder_of,
    gated_llama,
    pruned,
    scaled_llama,
    sharing,
    trained_llama,
    with_child,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.nn.apply import apply, fold, strategy_of
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.layouts import LLAMA, Layout
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.nn.verify import verify

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 60


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "GPT2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_has_the_logits_of_the_applied_one(family):
    model = apply(build(family), "lns")
    applied = logits(model)
    assert not torch.allclose(applied, logits(build(family)), atol=1e-3)
    torch.testing.assert_close(logits(fold(model)), applied)


@torch.no_grad()
@pytest.mark.parametrize("position", ["after_ln", "after_branch"])
def test_biases_are_folded_too(position):
    model = build("GPT2")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.uniform_(-1, 1)
    applied = logits(apply(model, "lns", position=position))
    torch.testing.assert_close(logits(fold(model)), applied)


@pytest.mark.parametrize("norm", ["lns", "scaled_init", "lns_learnable"])
def test_an_applied_llama_has_the_logits_of_our_decoder(norm):
    llama = build("Llama")
    decoder = Decoder(DecoderConfig(**SHAPE, norm_eps=1e-6), build_all({"name": norm}, 3))
    decoder.load_state_dict(apply(llama, norm).state_dict())
    torch.testing.assert_close(logits(llama), decoder(TOKENS))


def test_options_reach_the_strategy():
    scales = [hasattr(block.input_layernorm, "cod_output_scale") for block in only_ffn().model.layers]
    assert not any(scales)


def test_scaled_branches_fold_into_the_last_projection():
    model = apply(build("Llama"), "lns", position="after_branch")
    applied = logits(model)
    torch.testing.assert_close(logits(fold(model)), applied)


def only_ffn():
    return apply(build("Llama"), "lns", position="only_ffn")


def test_parameter_names_do_not_change():
    assert list(apply(build("Llama"), "lns").state_dict()) == list(build("Llama").state_dict())


def test_a_saved_model_names_its_strategy_and_takes_it_again(tmp_path):
    model = apply(build("Llama"), "lns")
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert strategy_of(loaded) == {"name": "lns"}
    torch.testing.assert_close(logits(apply(loaded, "lns")), logits(model))


def test_a_folded_model_is_a_stock_checkpoint(tmp_path):
    model = fold(apply(build("Llama"), "lns"))
    model.save_pretrained(tmp_path)
    assert "cod_lightning" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_copy_keeps_the_factors():
    model = apply(build("Llama"), "lns")
    assert torch.equal(logits(deepcopy(model)), logits(model))


def test_a_model_on_the_meta_device_keeps_the_factors():
    with torch.device("meta"):
        empty = apply(build("Llama"), "lns")
    model = build("Llama")
    empty = empty.to_empty(device="cpu")
    empty.model.rotary_emb = model.model.rotary_emb
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(empty), logits(apply(model, "lns")))


def test_a_sharded_model_keeps_the_factors(shard):
    model = apply(build("Llama"), "lns")
    expected = logits(model)
    torch.testing.assert_close(logits(shard(model, model.model.layers)), expected)


@pytest.mark.parametrize("norm", ["lns", "scaled_init"])
def test_a_sharded_model_takes_no_strategy(shard, norm):
    model = build("Llama")
    with pytest.raises(UserError, match=r"is sharded.*do so before fully_shard"):
        apply(shard(model, model.model.layers), norm)


def test_a_sharded_model_is_not_folded(shard):
    model = apply(build("Llama"), "lns")
    with pytest.raises(UserError, match="is sharded: do so before fully_shard, or in a model with the full state dict"):
        fold(shard(model, model.model.layers))


def with_blocks(model, wrap):
    """A model whose blocks are wrapped in place."""
    layers = model.model.layers
    for index, block in enumerate(layers):
        layers[index] = wrap(block)
    return model


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_model_of_wrapped_blocks_is_applied_and_folded(wrap, wrapped_first):
    expected = logits(apply(build("Llama"), "lns"))
    if wrapped_first:
        model = apply(with_blocks(build("Llama"), wrap), "lns")
    else:
        model = with_blocks(apply(build("Llama"), "lns"), wrap)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits(model), expected)
        torch.testing.assert_close(logits(fold(model)), expected)


def compiled(module):
    return torch.compile(module, backend="eager")


def with_wrapped_parts(model, wrap):
    """A model whose norms and sub-layers are wrapped in place."""
    for layer in model.model.layers:
        for name in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            setattr(layer, name, wrap(getattr(layer, name)))
    return model


@pytest.mark.parametrize("wrap", [compiled, checkpoint_wrapper], ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("wrapped_first", [False, True])
def test_a_model_of_wrapped_norms_and_sublayers_is_copied_verified_and_folded(wrap, wrapped_first):
    expected = logits(apply(build("Llama"), "lns", base="minicpm"))
    if wrapped_first:
        model = apply(with_wrapped_parts(build("Llama"), wrap), "lns", base="minicpm")
    else:
        model = with_wrapped_parts(apply(build("Llama"), "lns", base="minicpm"), wrap)
    torch.testing.assert_close(logits(deepcopy(model)), expected)
    verify(model)
    torch.testing.assert_close(logits(fold(model)), expected)


def named_blocks(blocks):
    return nn.ModuleDict({str(index): block for index, block in enumerate(blocks)})


@pytest.mark.parametrize("container", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks), named_blocks])
def test_any_module_with_named_blocks_takes_a_strategy(container):
    model = PlainModel()
    model.layers = container(model.layers)
    apply(model, "lns", layout=PLAIN)
    x = torch.randn(1, 8)
    second = list(model.layers.children())[1]
    torch.testing.assert_close(second.norm_1(x), nn.functional.layer_norm(x, (8,)) * 0.5**0.5)


def test_a_module_without_configuration_remembers_its_strategy():
    assert strategy_of(apply(PlainModel(), "lns", layout=PLAIN)) == {"name": "lns"}


def test_a_trained_model_keeps_its_function_on_request():
    model = trained_llama()
    before = logits(model)
    torch.testing.assert_close(logits(apply(model, "lns", trained="preserve")), before)


@pytest.mark.parametrize("gain", [0.0, 1e-42])
def test_a_gain_that_finite_weights_cannot_compensate_for_is_refused(gain, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "faint", lambda layer, depth: cod.block(gain=gain))
    with pytest.raises(UserError, match=r"weights divided by gain=.* of layer 1 are not finite"):
        apply(trained_llama(), "faint", trained="preserve")


def test_a_model_with_some_norms_without_weights_is_not_taken_for_trained():
    """ModernBERT's first block has no norm before attention."""
    model = PlainModel()
    model.layers[0].norm_1 = nn.Identity()
    assert strategy_of(apply(model, "lns", layout=PLAIN)) == {"name": "lns"}


def test_layers_without_a_gain_are_left_alone():
    """Integers cannot be divided."""
    model = trained_llama()
    for block in model.model.layers:
        weight = block.self_attn.q_proj.weight
        block.self_attn.q_proj.weight = nn.Parameter(torch.ones_like(weight, dtype=torch.int8), requires_grad=False)
    apply(model, "lns", trained="preserve", position="only_ffn")
    assert [hasattr(block.post_attention_layernorm, "cod_output_scale") for block in model.model.layers] == [0, 1, 1]


def test_a_layout_of_the_user_is_trusted():
    model = changed(build("Llama"), with_child("adapter", nn.Linear(32, 32)))
    assert strategy_of(apply(model, "lns", layout=LLAMA)) == {"name": "lns"}


def test_a_trained_model_changes_its_function_on_request():
    model = trained_llama()
    before = logits(model)
    assert not torch.allclose(logits(apply(model, "lns", trained="change")), before, atol=1e-3)


def test_initial_weights_of_norms_scale_trained_ones():
    model = trained_llama()
    before = [block.input_layernorm.weight.clone() for block in model.model.layers]
    apply(model, "lns_learnable", trained="change")
    for layer, (weight, block) in enumerate(zip(before, model.model.layers, strict=True), start=1):
        torch.testing.assert_close(block.input_layernorm.weight, weight * layer**-0.5)


def compiled_logits(model):
    with torch.no_grad():
        return torch.compile(model, backend="eager")(TOKENS).logits


def test_compiled_code_of_other_models_is_not_run():
    """torch.compile does not look at hooks by default, so that it took the code of a model without them."""
    stock, scaled = build("Llama"), build("Llama")
    before = compiled_logits(stock)
    torch.testing.assert_close(compiled_logits(apply(scaled, "lns")), logits(scaled))
    torch.testing.assert_close(compiled_logits(only_ffn()), logits(only_ffn()))
    assert not torch.allclose(compiled_logits(apply(stock, "lns")), before, atol=1e-3)
    torch.testing.assert_close(compiled_logits(fold(stock)), logits(stock))


def test_an_unpickled_model_keeps_its_factors_when_compiled():
    file = io.BytesIO()
    torch.save(apply(build("Llama", use_cache=False), "lns"), file)  # with a cache, every block has code of its own
    torch._dynamo.reset()
    file.seek(0)
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # torch's default
        model = torch.load(file, weights_only=False)
        expected = logits(model)
        for block in model.model.layers:
            block.compile(backend="eager")
        torch.testing.assert_close(logits(model), expected)


def test_models_of_one_configuration_do_not_share_the_strategy():
    config = build("Llama").config
    baseline, model = (transformers.LlamaForCausalLM(config) for _ in range(2))
    apply(model, "scaled_init")
    assert (strategy_of(baseline), strategy_of(model)) == (None, {"name": "scaled_init"})
    assert model.model.config is model.config
    apply(baseline, "lns")


def test_a_new_model_with_the_configuration_of_an_applied_one_is_folded_alone():
    first = apply(build("Llama"), "lns")
    second = apply(transformers.LlamaForCausalLM(first.config), "lns")
    assert (strategy_of(fold(first)), strategy_of(second)) == (None, {"name": "lns"})
    assert strategy_of(fold(second)) is None


@pytest.mark.parametrize(("initial_weights", "factor"), [("scale", 6**-0.5), ("scaled", 1)])
def test_a_named_strategy_changes_initial_weights_on_request(initial_weights, factor):
    model = transformers.LlamaForCausalLM(apply(build("Llama"), "scaled_init").config)
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.clone()
    apply(model, "scaled_init", initial_weights=initial_weights)
    torch.testing.assert_close(weight, before * factor)


def test_hooks_of_the_user_are_not_run():
    model = build("Llama")
    for block in model.model.layers:
        block.input_layernorm.register_forward_hook(lambda *arguments: pytest.fail("hook of the user"))
    fold(apply(model, "lns"))


def test_the_norms_before_the_sublayers_of_gemma_3_with_images_are_scaled():
    text = {**SHAPE, "head_dim": 8, "pad_token_id": 0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        config = transformers.Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28})
        model = apply(transformers.Gemma3ForConditionalGeneration(config), "lns")
    block = model.model.language_model.layers[2]
    scaled = [name for name, module in block.named_modules() if hasattr(module, "cod_output_scale")]
    assert scaled == ["input_layernorm", "pre_feedforward_layernorm"]


@pytest.mark.parametrize("norm", ["pre_ln", "scaled_init"])
def test_a_strategy_without_factors_is_folded_away(norm):
    assert strategy_of(fold(apply(build("Llama"), norm))) is None


def wrapped(part):
    """As by an adapter of PEFT, whose weights are not those of the layer itself."""
    return lambda block: setattr(block.get_submodule(part), "base_layer", nn.Identity())


def saved_by_peft(part):
    return lambda block: setattr(block.get_submodule(part), "modules_to_save", nn.ModuleDict())


class FusedNorm(nn.RMSNorm):
    """Adds before it norms, as fused kernels do."""

    def forward(self, x, residual):
        return super().forward(x + residual)


def with_fused_norms():
    model = PlainModel()
    for block in model.layers:
        block.norm_2 = FusedNorm(8)
    return model


class GammaNorm(nn.Module):
    """Calls its weight gamma."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return nn.functional.rms_norm(x, (8,)) * self.gamma


def with_gamma_norms():
    model = PlainModel()
    for layer in model.layers:
        layer.norm_1, layer.norm_2 = GammaNorm(), GammaNorm()
    return model


def with_ffn_of_modules():
    """GPT-2 with an FFN in an nn.ModuleDict that is called module by module, as minGPT has."""
    model = build("GPT2")
    for block in model.transformer.h:
        block.mlp = nn.ModuleDict(dict(block.mlp.named_children()))
    return model


GPT2_NORMS = Layout("transformer.h", norms=("ln_1", "ln_2"), sublayers=("attn", "mlp"))
PRESERVE = {"norm": "lns", "trained": "preserve"}
REFUSED = {
    "trained": (
        trained_llama,
        {"norm": "lns"},
        "for weights trained under this strategy call apply before load_state_dict, or pass trained='change'; for "
        "others pass trained='preserve'",
    ),
    "preserve under the strategy of the configuration": (
        lambda: type(m := apply(build("Llama"), "lns"))(m.config),
        PRESERVE,
        "the configuration names this strategy, so the weights are taken as trained under it: delete config.",
    ),
    "trained, initial weights": (
        trained_llama,
        {"norm": "scaled_init"},
        "call apply before load_state_dict, or pass initial_weights='scaled'; for others",
    ),
    "scaled by param_groups": (scaled_llama, {"norm": "lns"}, "param_groups scaled the initial weights: use apply or"),
    "a strategy without initial weights": (
        trained_llama,
        {"norm": "lns", "initial_weights": "scaled"},
        "norm='lns' sets no initial weights: leave out initial_weights='scaled'",
    ),
    "two decisions": (
        trained_llama,
        {"norm": "scaled_init", "base": "lns", "initial_weights": "scaled", "trained": "preserve"},
        "trained='preserve' for others: pass one of them",
    ),
    "applied to a module inside": (
        Outer,
        {"norm": "lns", "layout": OUTER},
        "has a strategy already: module 'core', which has {'name': 'lns'}",
    ),
    "Post-LN": (lambda: build("Bert"), {"norm": "lns"}, "BertForMaskedLM is Post-LN, it norms the sums"),
    "norms of parallel blocks": (
        lambda: build("GPTNeoX"),
        {"norm": "lns"},
        "layout=Layout('gpt_neox.layers', norms=('...', '...'), sublayers=('attention', 'mlp'))",
    ),
    "blocks of another kind": (
        PlainModel,
        {"norm": "lns", "layout": replace(PLAIN, blocks="embedding")},
        "layout.blocks='embedding' is a Embedding of 0 modules; expected an nn.ModuleList, nn.Sequential or",
    ),
    "weights of another name": (
        with_gamma_norms,
        {"norm": "lns", "layout": PLAIN},
        "its norms (GammaNorm) have no parameter 'weight' in memory, which would show",
    ),
    "applied twice": (only_ffn, {"norm": "lns"}, "has a strategy already"),
    "another placement": (lambda: build("Llama"), {"norm": "post_ln"}, "pre_norm=False, sum_norm=True"),
    "norms of heads": (lambda: build("Llama"), {"norm": "qk_norm"}, "head_norm='qk', which an existing"),
    "a schedule": (lambda: build("Llama"), {"norm": "pro_res"}, "branch_schedule=Schedule(end=1000)"),
    "learned branch scales": (lambda: build("Llama"), {"norm": "layer_scale"}, "learned_branch_scale='channel'"),
    "no norms before the sub-layers": (lambda: build("Olmo2"), {"norm": "lns"}, "no norms before its sub-layers"),
    "an unknown layout": (PlainModel, {"norm": "lns"}, "layout=Layout"),
    "a wrapper": (
        lambda: nn.DataParallel(build("Llama")),
        {"norm": "lns"},
        "DataParallel wraps a LlamaForCausalLM: pass its module 'module'",
    ),
    "an unknown module": (PlainModel, {"norm": "lns", "layout": Layout("h", ("a", "b"), ("c", "d"))}, "no module 'h'"),
    "rates of the optimizer": (lambda: build("Llama"), {"norm": "lns_as_rates"}, "param_groups(model, 'lns_as_rates'"),
    "an unknown strategy": (lambda: build("Llama"), {"norm": "lnss"}, "lns"),
    "an unknown option": (lambda: build("Llama"), {"norm": "lns", "positon": "only_ffn"}, "position"),
    "initial weights on meta": (lambda: build("Llama").to("meta"), {"norm": "scaled_init"}, "meta device"),
    "norms without weights": (lambda: build("Olmo"), {"norm": "lns"}, "which would show whether it is trained"),
    "preserving on meta": (
        lambda: build("Llama").to("meta"),
        PRESERVE,
        "layer 2: it is on the meta device, or offloaded",
    ),
    "an adapter": (
        lambda: changed(trained_llama(), wrapped("self_attn.q_proj")),
        PRESERVE,
        "cannot change a weight of layer 2: Linear has an adapter: merge it first",
    ),
    "an adapter of a norm": (
        lambda: changed(build("Llama"), saved_by_peft("input_layernorm")),
        {"norm": "lns"},
        "layer 2, attention: LlamaRMSNorm has an adapter",
    ),
    "another norm": (
        lambda: changed(build("Llama"), with_child("pre_mlp_norm", nn.RMSNorm(32, elementwise_affine=False))),
        {"norm": "lns"},
        "its blocks have other modules than Pre-LN: pre_mlp_norm; name its modules",
    ),
    "norms after the sub-layers": (
        lambda: changed(build("Llama"), lambda block: setattr(block, "norm_after", True)),
        {"norm": "lns"},
        "LlamaDecoderLayer is no Pre-LN block: it norms the outputs of its sub-layers",
    ),
    "another module": (
        lambda: changed(build("Llama"), with_child("adapter", nn.Linear(32, 32))),
        {"norm": "lns"},
        "its blocks have other modules than Pre-LN: adapter; name its modules",
    ),
    "another reader of a norm to preserve": (gated_llama, PRESERVE, "layout.inputs is missing"),
    "pruned weights": (
        lambda: changed(trained_llama(), pruned("mlp.up_proj")),
        PRESERVE,
        "layer 2: Linear has no parameter 'weight' of floating-point numbers",
    ),
    "shared last projections": (
        lambda: changed(build("Llama"), sharing("mlp.down_proj")),
        {"norm": "scaled_init"},
        "layer 1, ffn: another module shares the weight of its Linear",
    ),
    "shared projections to preserve": (
        lambda: changed(trained_llama(), sharing("self_attn.q_proj")),
        PRESERVE,
        "layer 2, attention: another module shares the weight of its Linear",
    ),
    "no decision on initial weights": (
        lambda: transformers.LlamaForCausalLM(apply(build("Llama"), "lns_learnable").config),
        {"norm": "lns_learnable"},
        "pass initial_weights='scaled' after from_pretrained, or 'scale' for a new model",
    ),
    "a norm of two tensors": (
        with_fused_norms,
        {"norm": "lns", "layout": PLAIN},
        "FusedNorm cannot be run on one tensor [batch, length, hidden]",
    ),
    "a layout that is a path": (
        lambda: build("Llama"),
        {"norm": "lns", "layout": "model.layers"},
        "is not a Layout; name",
    ),
    "a shared norm": (
        PlainModel,
        {"norm": "lns", "layout": Layout("layers", norms=("norm_1", "norm_1"), sublayers=("attention", "ffn"))},
        "layer 1, ffn: its norm is also that of layer 1, attention",
    ),
    "a misspelled decision": (
        trained_llama,
        {"norm": "lns", "trained": "preserved"},
        "trained='preserved' does not exist: did you mean 'preserve'?",
    ),
    "an FFN that is never called": (
        with_ffn_of_modules,
        {"norm": "minicpm", "layout": GPT2_NORMS},
        "norm='minicpm': layer 1, ffn: an nn.ModuleDict is never called, and cannot be multiplied: name the module",
    ),
    "a model without its head": (
        lambda: build("Llama").model,
        {"norm": "lns"},
        "LlamaModel has the modules of a language model without its head: pass the model around it, or name its",
    ),
    "an adapter of measures": (
        lambda: cod.ModelAdapter(build("Llama")),
        {"norm": "lns"},
        "model is a ModelAdapter: expected an nn.Module; pass its .model",
    ),
    "a decoder of this package": (lambda: decoder_of("pre_ln"), {"norm": "lns"}, "gets its strategy when it is built"),
    "a decoder of compiled blocks": (
        lambda: with_blocks(decoder_of("pre_ln"), torch.compile),
        {"norm": "lns"},
        "gets its strategy when it is built",
    ),
    "preserving scaled branches": (
        trained_llama,
        {"norm": "lns", "position": "after_branch", "trained": "preserve"},
        "keeps only norms' gains",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_model_or_option_is_refused(case):
    model, arguments, message = REFUSED[case]
    model = model()
    module = getattr(model, "model", model) if isinstance(model, cod.ModelAdapter) else model
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(UserError, match=re.escape(message)):
        apply(model, **arguments)
    assert all(tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path):
    only_ffn().save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="differs from"):
        apply(loaded, "lns")


def test_a_norm_before_modules_that_are_called_one_by_one_is_scaled():
    model = apply(with_ffn_of_modules(), "lns", layout=GPT2_NORMS)
    assert [round(float(block.ln_2.cod_output_scale), 4) for block in model.transformer.h[1:]] == [0.7071, 0.5774]


def test_a_layout_of_one_norm_is_an_error():
    with pytest.raises(UserError, match=r"layout\.norms=\('ln',\): expected two"):
        Layout("layers", norms=("ln",), sublayers=("attn", "ffn"))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"norms": "ln"}, "layout.norms='ln': expected two, for attention and the feed-forward network"),
        ({"inputs": ("attn.qkv", "mlp.fc")}, "layout.inputs=('attn.qkv', 'mlp.fc'): expected two tuples of paths"),
    ],
)
def test_a_text_in_place_of_several_paths_is_an_error(paths, message):
    with pytest.raises(UserError, match=re.escape(message)):
        replace(PLAIN, **paths)


def test_lost_factors_cannot_be_folded(tmp_path):
    only_ffn().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"are lost, as after from_pretrained: call apply again, then fold"):
        fold(transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def mixture_of_experts():
    shape = SHAPE | {"num_local_experts": 2, "pad_token_id": 0}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))


NOT_FOLDED = {
    "an adapter": ("minicpm", wrapped("mlp.down_proj"), "layer 1: the factor of its ffn .*: Linear has an adapter"),
    "an adapter of a norm": ("lns", saved_by_peft("input_layernorm"), "LlamaRMSNorm has an adapter"),
    "pruned weights": ("minicpm", pruned("mlp.down_proj"), "Linear has no parameter 'weight'"),
    "parametrized weights": (
        "minicpm",
        lambda block: parametrizations.weight_norm(block.mlp.down_proj),
        "ParametrizedLinear has no parameter 'weight'",
    ),
    "shared norms": (
        "lns",
        sharing("input_layernorm"),
        "layer 2, attention: another module shares the weight of its Llama",
    ),
    "offloaded weights": ("lns", lambda block: block.to("meta"), "on the meta device, or offloaded"),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_a_factor_without_a_weight_of_its_own_is_not_folded(case):
    norm, change, message = NOT_FOLDED[case]
    model = changed(apply(build("Llama"), norm), change)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        fold(model)
    assert all(tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_factor_of_experts_is_not_folded():
    with pytest.raises(UserError, match=r"the factor of its attention .*: layout\.outputs is missing"):
        fold(apply(mixture_of_experts(), "minicpm"))


def test_only_modules_take_a_strategy():
    with pytest.raises(UserError, match=r"model is a NoneType: expected an nn\.Module"):
        apply(None, "lns")


def test_a_factor_of_a_norm_whose_weight_has_another_name_is_not_folded():
    model = apply(with_gamma_norms(), "lns", layout=PLAIN, trained="change")
    with pytest.raises(UserError, match=r"layer 2: .* GammaNorm has no parameter 'weight', but gamma: a layer that is"):
        fold(model, layout=PLAIN)


def test_a_norm_that_cannot_be_run_alone_leaves_the_model_unchanged():
    model = with_fused_norms()
    before = deepcopy(model.state_dict())
    with pytest.raises(UserError, match="FusedNorm cannot be run on one tensor"):
        apply(model, "lns_learnable", layout=PLAIN, trained="change")
    apply(model, "lns", layout=PLAIN, trained="change")
    with pytest.raises(UserError, match="FusedNorm cannot be run on one tensor"):
        fold(model, layout=PLAIN)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_module_to_fold_is_named():
    with pytest.raises(UserError, match="Outer has no strategy to fold: pass its module 'core', which has"):
        fold(Outer(), layout=OUTER)


def test_a_decoder_is_folded_by_export():
    with pytest.raises(UserError, match="a Decoder has its strategy in its blocks: the command export writes it"):
        fold(decoder_of("lns"))


def test_there_is_nothing_to_fold_in_a_plain_model():
    with pytest.raises(UserError, match="no strategy to fold"):
        fold(build("Llama"))


def test_another_unpickled_model_leaves_compiled_code_alone():
    graphs = []
    model = apply(build("Llama", use_cache=False), "lns")
    pickled = pickle.dumps(model)
    compiled = torch.compile(model, backend=lambda graph, example: graphs.append(graph) or graph.forward)
    compiled(TOKENS)
    pickle.loads(pickled)
    compiled(TOKENS)
    assert len(graphs) == 1
