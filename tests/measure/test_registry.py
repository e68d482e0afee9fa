import json
import math

import numpy as np
import pytest
import torch
from builders import PAD, decoder, tokens

import cod_lightning as cod
from cod_lightning.errors import UserError
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.registry import MEASURES, measures_of, options_for
from cod_lightning.nn.layouts import hidden_output
from command_words import run_python

BATCHES = [tokens(2, 8, seed) for seed in (0, 1)]
every_measure = pytest.mark.parametrize("name", MEASURES)


def take(name, model, batches, progress=None):
    """All batches measured, also where the command uses the first only."""
    return MEASURES[name].measure(model, batches, PAD, progress)


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ("ours-lns", "gpt2", "olmo2", "qwen2_5_vl") for name in MEASURES]
    + [
        (bert, name)
        for bert in ("bert", "bert_encoder")
        for name in MEASURES
        if "why_no_loss" not in MEASURES[name].refusals
    ],
)
def test_every_measure_gives_a_table(causal_lm, family, name):
    result = MEASURES[name](causal_lm(family, depth=3), BATCHES, PAD, None)
    assert type(result) is MEASURES[name].result_type
    assert result.rows()


@pytest.mark.parametrize("name", [name for name in MEASURES if "why_no_loss" in MEASURES[name].refusals])
def test_a_measure_of_next_tokens_refuses_bert(causal_lm, name):
    with pytest.raises(UserError, match="bert: bert does not predict the next token"):
        MEASURES[name](causal_lm("bert", depth=3), BATCHES, PAD, None)


@every_measure
@pytest.mark.usefixtures("without_images")
def test_the_result_of_every_measure_is_saved_and_its_figure_laid_out(causal_lm, name, tmp_path):
    result = MEASURES[name](causal_lm("ours", depth=3), BATCHES, PAD, None)
    assert all(path.stat().st_size for path in result.save(tmp_path, name))


STEPS = dict.fromkeys(MEASURES, 2)
STEPS |= {
    "jacobian": 6,
    "gain": 6,
    "jacobian_map": 6,
    "theory": 3,
    "removal": 8,
    "run_removal": 12,
    "longest_run": 3,
    "sublayer_removal": 14,
    "swaps": 6,
    "linear_replacement": 11,
    "importance": 16,
}
"""Calls of progress for two batches and three blocks; there are eight coalitions of three blocks."""


@every_measure
def test_progress_counts_to_the_end(causal_lm, name):
    calls = []
    take(name, causal_lm("ours", depth=3), BATCHES, lambda *call: calls.append(call))
    assert calls == [(done, STEPS[name]) for done in range(1, STEPS[name] + 1)]


def test_progress_over_a_generator_counts_to_its_end(causal_lm):
    calls = []
    cod.measure.variance(causal_lm("ours", depth=2), iter(BATCHES), PAD, lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


@every_measure
@pytest.mark.parametrize("batches", [[], [torch.full((2, 3), PAD)]], ids=["no batch", "only padding"])
def test_no_tokens_are_an_error(causal_lm, name, batches):
    with pytest.raises(UserError, match="ours: no tokens to measure on"):
        take(name, causal_lm("ours", depth=2), batches)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("ours", "gpt2", "bert")
        for name, measure in MEASURES.items()
        if measure.study not in ("jacobian", "theory") and not (family == "bert" and "why_no_loss" in measure.refusals)
    ],
)
def test_padding_and_batch_size_do_not_matter(causal_lm, family, name):
    model, batch = causal_lm(family), tokens(6, 9)
    padded = torch.cat([batch, torch.full((6, 3), PAD)], dim=1)
    whole = take(name, model, [batch])
    for batches in (batch.split(1), [*padded.split(4), torch.full((2, 4), PAD)]):
        result = take(name, model, batches)
        assert result.tokens == whole.tokens
        for column, values in whole.series().items():
            assert numbers(result.series()[column]) == pytest.approx(
                numbers(values), rel=1e-5, abs=2e-6, nan_ok=True
            ), column


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("variance", "residual_variance"),
        ("angular", "distance"),
        ("removal", "loss"),
        ("linear_replacement", "loss"),
        ("causal", "score"),
    ],
)
def test_a_model_in_bfloat16_is_measured(causal_lm, name, column):
    model, batch = causal_lm("llama"), tokens(6, 9)
    exact = take(name, model, [batch]).series()[column]
    model.model.bfloat16()
    assert numbers(take(name, model, [batch]).series()[column]) == pytest.approx(
        numbers(exact), rel=0.1, abs=0.02, nan_ok=True
    )


def numbers(values):
    """A copy of a column that pytest compares: NaN, which equals itself there, in place of None."""
    return [math.nan if value is None else value for value in values]


@pytest.mark.parametrize(("name", "least"), [("theory", 3), ("swaps", 2)])
def test_a_model_with_too_few_blocks_is_an_error_before_it_runs(causal_lm, name, least):
    with pytest.raises(UserError, match=f"^ours: it needs at least {least} blocks, but the model has {least - 1}$"):
        MEASURES[name](causal_lm("ours", depth=least - 1), None, PAD, None)


@every_measure
def test_no_batches_are_an_error_of_the_api(causal_lm, name):
    with pytest.raises(UserError, match="Decoder: no tokens to measure on"):
        getattr(cod.measure, name)(causal_lm("ours", depth=3).model, [])


def test_names_are_known_without_torch():
    run_python("import sys; from cod_lightning.measure.registry import MEASURES; assert 'torch' not in sys.modules")


def test_a_study_has_its_measures():
    assert measures_of("removal", 16) == [
        "removal",
        "run_removal",
        "longest_run",
        "swaps",
        "linear_replacement",
        "sublayer_removal",
        "causal",
    ]


def test_all_has_every_measure():
    assert measures_of("all", 16) == list(MEASURES)


def test_whole_jacobians_of_a_large_hidden_size_must_be_selected():
    assert "jacobian_map" not in measures_of("all", 4096)
    assert measures_of("all", 4096, only=["jacobian_map", "angular"]) == ["jacobian_map", "angular"]


def test_an_unknown_study_is_an_error():
    with pytest.raises(UserError, match="'varianc' is not a study: did you mean 'variance'"):
        measures_of("varianc", 16)


def test_an_unknown_measure_of_a_study_is_an_error():
    with pytest.raises(UserError, match="'removl' is not a measure of removal: did you mean 'removal'"):
        measures_of("removal", only=["removl"])


def test_an_option_of_several_studies_is_not_offered():
    assert {"tokens", "probes"} <= options_for(measures_of("jacobian", 16)).keys()
    assert "tokens" not in options_for(MEASURES)


@pytest.mark.parametrize("layers", [np.array([3, 1]), list(np.array([3, 1])), torch.tensor([3, 1]), iter([3, 1])])
def test_numbers_of_numpy_and_torch_are_options(layers):
    result = MEASURES["jacobian"](decoder("lns"), [tokens(1, 3)], None, None, layers=layers, probes=np.int64(2))
    saved = json.loads(json.dumps(result.to_dict()))
    assert (saved["layers"], saved["probes"]) == ([3, 1], 2)


@pytest.mark.parametrize("size", [1, 18])
def test_expensive_measures_take_few_sequences_whatever_the_micro_batch(causal_lm, size):
    model, batches = causal_lm("ours", depth=2), tokens(18, 8).split(size)
    assert MEASURES["gain"](model, batches, None, None).sequences == 2
    assert MEASURES["importance"](model, batches, None, None, permutations=1).tokens == 16 * 7


@pytest.mark.parametrize(("name", "reason"), [("x0_mix", "read the embeddings"), ("value_residual", "read the values")])
@pytest.mark.parametrize("measure", ["gain", "theory"])
def test_jacobians_of_blocks_that_read_more_than_the_stream_are_not_multiplied(name, reason, measure):
    with pytest.raises(UserError, match=f"{reason}.*do not multiply"):
        MEASURES[measure](decoder(name), BATCHES, PAD, None)


def test_adapters_must_be_merged_before_weights_are_measured(causal_lm):
    peft = pytest.importorskip("peft")
    model = causal_lm("llama")
    config = peft.LoraConfig(target_modules=["q_proj"])
    adapted = ModelAdapter(peft.inject_adapter_in_model(config, model.model))
    with pytest.raises(UserError, match="adapters: merge them first"):
        MEASURES["sparsity"](adapted, BATCHES, PAD, None)
    assert MEASURES["theory"](adapted, BATCHES, PAD, None).shape_constants == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens_are_refused(causal_lm, kind):
    """Virtual tokens were left out without a word."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(causal_lm("llama").model, config)
    with pytest.raises(UserError, match="PeftModelForCausalLM has virtual tokens"):
        cod.measure.variance(torch.nn.Sequential(tuned), BATCHES)
    assert cod.measure.variance(tuned.get_base_model(), BATCHES).series()


NEEDS_GRADIENTS = ("jacobian", "gain", "jacobian_map", "theory")


@pytest.mark.parametrize("family", ["ours", "llama"])
@pytest.mark.parametrize("name", [name for name in MEASURES if name not in NEEDS_GRADIENTS])
def test_a_measure_without_gradients_builds_no_graph(causal_lm, family, name):
    model, graphs = causal_lm(family, depth=2), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, y: graphs.append(hidden_output(y).requires_grad))
    MEASURES[name](model, BATCHES, PAD, None)
    assert graphs
    assert not any(graphs)
