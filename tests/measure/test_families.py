"""Families of `transformers`: which can be measured, and that blocks keep the masks and positions of their layers."""

import re
from contextlib import ExitStack
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from builders import decoder, loss_of_logits, replaced, tiny_model, tokens
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import removal, run_removal, swaps
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.block_removal import remove_blocks
from cod_lightning.measure.layer_importance import layer_importance
from cod_lightning.measure.open_model import check_layout
from cod_lightning.measure.pruning import prune
from cod_lightning.measure.registry import MEASURES
from cod_lightning.measure.reordering import mean_loss
from cod_lightning.nn.apply import apply, fold
from cod_lightning.nn.layouts import Layout, known_layout
from cod_lightning.nn.pretrained import quiet_transformers
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.verify import measure_factors

transformers = pytest.importorskip("transformers")

LIST = Path(__file__).parents[2] / "docs" / "models.md"
LISTED = set(re.findall(r"`([\w-]+)`[,.]", LIST.read_text().split("`model_type`:")[1].split("\n\n")[1]))
BATCHES = [tokens(3, 9) % 32]


def adapter(family, **fields):
    with quiet_transformers():
        return ModelAdapter(tiny_model(family, **fields), family)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_mixture_of_experts_has_no_sparsity(family, tmp_path):
    model = adapter(family, depth=2)
    for measure in (
        lambda: MEASURES["sparsity"](model, BATCHES, None, None),
        lambda: prune(model, BATCHES, sparsity=0.5, folder=tmp_path / "pruned", export=None),
    ):
        with pytest.raises(UserError, match=f"^{family}: its experts are not linear layers; sparsity does not support"):
            measure()


FAMILIES = [
    *("bert", "cohere", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss"),
    *("granite", "llama", "llama4_text", "mistral", "mixtral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3"),
]
"""Families with different wiring, heads or multipliers."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_of_a_family_holds(family):
    check_layout(adapter(family, depth=2))
    assert family in LISTED


WIRING = [
    *((family, {}) for family in ("afmoe", "axk2", "deepseek_v3", "doge", "gemma2", "glm4", "gpt_oss", "granite")),
    *((family, {}) for family in ("kolibri1", "llama4_text", "minicpm3", "mixtral", "nemotron", "phi3", "qwen3_moe")),
    *(("hyperclovax", {"use_post_norm": on}) for on in (True, False)),
    ("afmoe", {"num_dense_layers": 2}),
]
"""Families with norms or branches that others do not have, with fields of their configuration."""


def lost_factors(model, norm):
    specs = [sublayer for spec in build_all({"name": norm}, depth=2) for sublayer in spec.sublayers]
    return [factor for factor in measure_factors(model, specs, None, BATCHES[0]) if not factor.holds]


@pytest.mark.parametrize("norm", ["lns", "minicpm"])
@pytest.mark.parametrize(("family", "fields"), WIRING)
def test_the_factors_of_a_family_hold(family, fields, norm):
    with quiet_transformers():
        model = apply(tiny_model(family, depth=2, **fields), norm, trained="change")
    assert lost_factors(model, norm) == []


@torch.no_grad()
def model_logits(model):
    return model(BATCHES[0]).logits


@pytest.mark.parametrize("family", ["doge", "gemma2", "glm4", "hyperclovax", "qwen3"])
def test_a_trained_family_keeps_its_function(family):
    with quiet_transformers():
        model = tiny_model(family, depth=2)
    before = model_logits(model)
    torch.testing.assert_close(model_logits(apply(model, "lns", trained="preserve")), before)


def test_a_branch_norm_that_is_switched_off_takes_no_factor():
    with quiet_transformers():
        model = apply(tiny_model("hyperclovax", depth=2, use_post_norm=False), "minicpm")
    before = model_logits(model)
    torch.testing.assert_close(model_logits(fold(model)), before)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("beam", {}, "BeamDecoderLayer is no Pre-LN block: it multiplies its residual stream"),
        ("dory", {}, "DoryDecoderLayer is no Pre-LN block"),
        ("minimax", {}, "MiniMaxDecoderLayer is no Pre-LN block: it starts its skips after its norms"),
        ("deepseek_v4", {}, "its blocks have other modules than Pre-LN: attn_hc, ffn_hc"),
        ("inkling_text", {}, "its blocks have other modules than Pre-LN: attn_sconv, mlp_sconv"),
        ("gpt2", {"add_cross_attention": True}, "other modules than Pre-LN: crossattention, ln_cross_attn"),
    ],
)
def test_a_family_of_other_blocks_takes_no_strategy(family, fields, message):
    with torch.device("meta"), quiet_transformers():
        model = tiny_model(family, depth=2, **fields)
    with pytest.raises(UserError, match=message):
        apply(model, "lns", trained="change")


def of_a_subclass(block):
    block.__class__ = type("FSDPBlock", (type(block),), {})  # as `fully_shard` renames the class
    return block


@pytest.mark.parametrize("wrap", [torch.compile, of_a_subclass], ids=lambda wrap: wrap.__name__)
def test_wrapped_blocks_of_another_equation_take_no_strategy(wrap):
    with torch.device("meta"), quiet_transformers():
        model = tiny_model("minimax", depth=1)
    model.model.layers[0] = wrap(model.model.layers[0])
    with pytest.raises(UserError, match="is no Pre-LN block: it starts its skips after its norms"):
        apply(model, "lns", trained="change")


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")
def test_the_factors_of_every_family_hold_or_it_takes_no_strategy():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wrong, held = [], 0
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with quiet_transformers():
                with torch.device("meta"):
                    assert sum(parameter.numel() for parameter in tiny_model(family, depth=2).parameters()) < 5e6
                model = tiny_model(family, depth=2)
                model.config.use_cache = False
                model(BATCHES[0])
        except Exception:  # a configuration that needs other fields
            continue
        try:
            apply(model, "lns", trained="change")
        except UserError:
            continue
        held += 1
        wrong += [family] * bool(lost_factors(model, "lns"))
    assert not wrong
    assert held > 50


@pytest.mark.extended
@pytest.mark.filterwarnings("ignore")
def test_the_list_in_the_docs_is_of_the_families_that_hold():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    built, hold = set(), set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            with torch.device("meta"), quiet_transformers():
                model = tiny_model(family, depth=2)
        except Exception:  # a configuration that needs other fields
            continue
        if sum(parameter.numel() for parameter in model.parameters()) > 5e6:
            continue
        built.add(family)
        if known_layout(model) is None:
            continue
        try:
            check_layout(adapter(family, depth=2))
            hold.add(family)
        except UserError:
            continue
    assert hold == LISTED & built


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bloom", "bloom has an unknown layout"),
        ("falcon", "falcon has an unknown layout"),
        ("mamba", "mamba has an unknown layout"),
        ("opt", "opt has an unknown layout"),
        ("minimax", "block 1 adds something else than its attention and FFN to the residual stream"),
    ],
)
def test_another_family_is_refused_by_name(family, message):
    with pytest.raises(UserError, match=f"{family}: .*{message}"):
        check_layout(adapter(family, depth=2))


def test_a_family_that_merges_batch_and_length_is_measured_by_a_layout():
    layout = Layout(
        "model.decoder.layers",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        sublayers=("self_attn", "fc1"),
        branches=("self_attn", "fc2"),
    )
    with quiet_transformers():
        model = tiny_model("opt", vocab_size=37, ffn_dim=24, word_embed_proj_dim=16)
    x, y = (state.detach().flatten(0, 1) for state in model(tokens(), output_hidden_states=True).hidden_states[:2])
    result = cod.measure.contribution(model, tokens(), layout=layout)
    assert result.block[0] == pytest.approx(float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean()), rel=1e-4)


def test_another_head_is_refused():
    model = adapter("llama", depth=2)

    def double(module, args, output):
        output.logits = 2 * output.logits

    model.model.register_forward_hook(double)
    with pytest.raises(UserError, match="llama cannot be measured: its final norm and head do not give its logits"):
        check_layout(model)


def test_a_block_that_does_not_repeat_its_output_is_refused():
    model, factors = adapter("llama", depth=2), chain([1, 1], repeat(2))
    model.blocks[1].register_forward_hook(lambda module, args, y: y * next(factors))
    with pytest.raises(UserError, match="block 2, run alone, does not repeat its output"):
        check_layout(model)


ALTERNATING = ["sliding_attention", "full_attention"] * 2
MIXED = {
    "qwen2": {"use_sliding_window": True, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2},
    **{family: {"layer_types": ALTERNATING} for family in ("gemma2", "gemma3_text", "gpt_oss")},
    "smollm3": {"use_sliding_window": True, "layer_types": ALTERNATING, "no_rope_layers": [1, 0, 0, 1]},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0],
        "attention_chunk_size": 3,
        "moe_layers": [1, 3],
    },
    "mistral": {},
}
"""Windows of three tokens, in some layers or in all; rotary embeddings in some layers; experts in some."""


@pytest.fixture(scope="module", params=MIXED)
def mixed(request):
    return adapter(request.param, sliding_window=3, **MIXED[request.param])


def loss_with_identities(model, *layers):
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(model.blocks[layer - 1], lambda x: x))
        return loss_of_logits(model, BATCHES)


def test_removal_makes_blocks_the_identity(mixed):
    expected = [loss_with_identities(mixed, layer) for layer in (1, 2, 3, 4)]
    result = removal(mixed, BATCHES)
    assert result.losses == pytest.approx(expected, rel=1e-6)
    importance = layer_importance(mixed, BATCHES, permutations=1).leave_one_out
    assert importance == pytest.approx(result.series()["delta_loss"], abs=1e-6)


def test_removal_of_runs_makes_blocks_the_identity(mixed):
    expected = [loss_with_identities(mixed, layer, layer + 1) for layer in (1, 2, 3)]
    assert run_removal(mixed, BATCHES, sizes=[2]).losses[0] == pytest.approx(expected, rel=1e-6)


def test_swapped_blocks_keep_their_kind_of_attention(mixed, monkeypatch):
    result, kinds, expected = swaps(mixed, BATCHES), getattr(mixed.config, "layer_types", None), []
    for order in ([1, 0, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]):
        if kinds:
            monkeypatch.setattr(mixed.config, "layer_types", [kinds[index] for index in order])
        with mixed.with_blocks([mixed.blocks[index] for index in order]):
            expected.append(loss_of_logits(mixed, BATCHES))
    assert result.losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_written_model_computes_the_measured_removal(mixed, layer, tmp_path):
    prune(mixed, BATCHES, layers=[layer], folder=tmp_path / "small", export=lambda model, to: model.save_pretrained(to))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    expected = removal(mixed, BATCHES).losses[layer - 1]
    assert mean_loss(ModelAdapter(loaded.eval()), BATCHES)[0] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_its_configuration_would_not_build_is_refused():
    model = adapter("deepseek_v3", first_k_dense_replace=1)
    with pytest.raises(UserError, match="block 1 of the smaller model is not what its configuration builds"):
        remove_blocks(model, [1])


def test_a_configuration_that_refuses_the_remaining_layers_is_named(monkeypatch):
    model = adapter("llama")

    def refuse(config):
        raise ValueError("layers differ")

    monkeypatch.setattr(type(model.model), "__init__", lambda self, config: refuse(config))
    with pytest.raises(UserError, match=r"llama does not allow layers \[2, 3, 4\] alone: layers differ; remove other"):
        remove_blocks(model, [1])


def test_peri_ln_keeps_the_norm_of_its_embeddings_without_its_first_block():
    model = decoder("peri_ln")
    first = model.blocks[0]
    with replaced(first, first.entry_norm):
        expected = loss_of_logits(model, BATCHES)
    assert removal(model, BATCHES).losses[0] == pytest.approx(expected, rel=1e-6)
    assert mean_loss(remove_blocks(model, [1]), BATCHES)[0] == pytest.approx(expected, rel=1e-6)
    model.model.model.layers = torch.nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    assert mean_loss(remove_blocks(model, [1]), BATCHES)[0] == pytest.approx(expected, rel=1e-6)


def test_a_wrapped_block_is_what_the_configuration_builds():
    model = adapter("llama")
    expected = mean_loss(remove_blocks(model, [2]), BATCHES)
    model.model.model.layers = torch.nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    assert mean_loss(remove_blocks(model, [2]), BATCHES) == expected
