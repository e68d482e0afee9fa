import math
from copy import deepcopy

import pytest
import torch
from builders import PAD, decoder, padded_batches, tiny_model, tokens

from cod_lightning.errors import UserError
from cod_lightning.measure.ablation import removal
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.block_removal import remove_blocks, train_replacement
from cod_lightning.measure.layer_importance import block_influence
from cod_lightning.measure.linear_maps import fold_linear_map
from cod_lightning.measure.pruning import prune
from cod_lightning.measure.reordering import mean_loss
from cod_lightning.measure.weight_sparsity import (
    arithmetic_sparsities,
    input_norms,
    largest_difference,
    layer_sparsity,
    linear_weights,
    sparsify,
    sparsify_sequentially,
)
from cod_lightning.nn.apply import apply
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.huggingface import export

OURS = ("ours", "ours-lns")
HF = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt2", "qwen2_5_vl")


@torch.no_grad()
def logits(model):
    return model.logits(padded_batches()[1])


def loss(model):
    return mean_loss(model, padded_batches(), PAD)[0]


@torch.no_grad()
def activations(model, batch):
    """What a hook sees of the tokens that are not padding, in float64, by name and layer."""
    seen = {}
    model.logits(batch, lambda name, layer, x: seen.update({(name, layer): x[batch != PAD].double()}))
    return seen


def save_hf(model, folder):
    model.save_pretrained(folder)


def load_hf(folder):
    transformers = pytest.importorskip("transformers")
    has_vision = hasattr(transformers.AutoConfig.from_pretrained(folder), "vision_config")
    kind = transformers.AutoModelForImageTextToText if has_vision else transformers.AutoModelForCausalLM
    return ModelAdapter(kind.from_pretrained(folder).eval())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "small"


@pytest.fixture
def pruned(folder):
    """`pruned(model, **options)`: the result of `prune`, without an exported model."""
    return lambda model, **options: prune(
        model, padded_batches(), PAD, folder=folder, export=lambda *_: None, **options
    )


class TestRemoveBlocks:
    @pytest.fixture(params=[*OURS, *HF, "bert"])
    def model(self, request, causal_lm):
        return causal_lm(request.param)

    def test_the_other_blocks_remain(self, model):
        whole, blocks, smaller = logits(model), model.blocks, remove_blocks(model, [1, 3, 3])
        with model.with_blocks([blocks[1], blocks[3]]):
            assert torch.equal(logits(smaller), logits(model))
        assert not torch.equal(logits(smaller), whole)

    def test_the_config_has_the_new_depth(self, model):
        smaller = remove_blocks(model, [1, 3])
        assert (smaller.depth, smaller.config.num_hidden_layers) == (2, 2)
        assert (model.depth, model.config.num_hidden_layers) == (4, 4)

    def test_the_model_is_copied(self, model):
        before, smaller = logits(model), remove_blocks(model, [])
        with torch.no_grad():
            for parameter in smaller.model.parameters():
                parameter.zero_()
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("family", OURS)
    def test_blocks_keep_their_specs(self, causal_lm, family):
        model = causal_lm(family)
        smaller = remove_blocks(model, [2])
        specs = [block.spec for block in smaller.blocks]
        assert specs == [model.blocks[index].spec for index in (0, 2, 3)]
        rebuilt = Decoder(smaller.model.config, specs).eval()
        rebuilt.load_state_dict(smaller.model.state_dict())
        assert torch.equal(logits(ModelAdapter(rebuilt)), logits(smaller))

    def test_blocks_keep_their_gain(self, causal_lm):
        specs = [block.spec for block in remove_blocks(causal_lm("ours-lns"), [2]).blocks]
        assert [spec.attention.gain for spec in specs] == pytest.approx([1, 3**-0.5, 4**-0.5])

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([1, 2, 3, 4], r"layers=\[1, 2, 3, 4\] are all layers of ours: keep at least one"),
            ([0, 1, 5], r"layers=\[0, 5\] do not exist: ours has 1 to 4"),
        ],
    )
    def test_bad_layers_are_errors(self, causal_lm, layers, message):
        with pytest.raises(UserError, match=message):
            remove_blocks(causal_lm("ours"), layers)

    def test_the_block_whose_values_the_others_read_stays(self):
        model = decoder("value_residual", form="mean")
        with pytest.raises(UserError, match=r"ours: its blocks read the values of block 1 .*: keep block 1"):
            remove_blocks(model, [1, 3])
        assert remove_blocks(model, [2, 3]).depth == 2

    def test_attention_that_depends_on_the_layer_number_is_an_error(self, causal_lm):
        model = causal_lm("gpt2")
        model.model.config.scale_attn_by_inverse_layer_idx = True
        with pytest.raises(UserError, match="scale_attn_by_inverse_layer_idx divides attention"):
            remove_blocks(model, [1])


@pytest.mark.parametrize("family", HF)
def test_a_pruned_checkpoint_loads(causal_lm, family, folder):
    model = causal_lm(family)
    result = prune(model, padded_batches(), PAD, layers=[2], folder=folder, export=save_hf)
    loaded, smaller = load_hf(folder), remove_blocks(model, [2])
    assert loaded.config.num_hidden_layers == 3
    assert torch.equal(logits(loaded), logits(smaller))
    assert (result.removed, result.layers_before, result.layers_after) == ([2], 4, 3)
    assert result.loss_before == pytest.approx(loss(model))
    assert result.loss_after == pytest.approx(loss(loaded))


@pytest.mark.parametrize("family", HF)
def test_a_pruned_model_generates_with_its_cache(causal_lm, family):
    """The key/value cache has a place for each remaining layer."""
    model, tokens = remove_blocks(causal_lm(family), [2]).model, padded_batches()[1][:, :4]
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), min_new_tokens=5, max_new_tokens=5, **settings
    )
    with torch.no_grad():
        expected = model(input_ids=output.sequences, use_cache=False).logits[:, 3:-1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OURS)
def test_ours_is_exported_for_transformers(causal_lm, family, folder):
    pytest.importorskip("transformers")
    model = causal_lm(family)
    result = prune(model, padded_batches(), PAD, layers=[3], folder=folder, export=export)
    loaded = load_hf(folder)
    torch.testing.assert_close(logits(loaded), logits(remove_blocks(model, [3])), rtol=1e-5, atol=1e-5)
    assert result.loss_after == pytest.approx(loss(loaded), rel=1e-6)


def test_an_applied_strategy_is_folded_into_the_pruned_checkpoint(causal_lm, folder):
    model = ModelAdapter(apply(deepcopy(causal_lm("llama").model), "lns"))
    blocks = model.blocks
    prune(model, padded_batches(), PAD, layers=[2], folder=folder, export=save_hf)
    with model.with_blocks([blocks[0], *blocks[2:]]):
        torch.testing.assert_close(logits(load_hf(folder)), logits(model))


def test_progress_counts_both_evaluations(causal_lm, pruned):
    calls = []
    pruned(causal_lm("ours"), layers=[3], progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_table_compares_before_and_after(causal_lm, pruned):
    result = pruned(causal_lm("ours"), layers=[3])
    assert [(row["layers"], row["zeros"]) for row in result.rows()] == [(4, 0), (3, 0)]
    assert result.ppl_after == pytest.approx(math.exp(result.loss_after))


class TestSignals:
    @pytest.fixture(params=["ours", "gpt2"])
    def model(self, request, causal_lm):
        return causal_lm(request.param, depth=5)

    def test_influence_selects_the_lowest(self, model, pruned):
        influence = block_influence(model, padded_batches(), PAD).influence
        result = pruned(model, by="influence", blocks=2)
        assert result.removed == sorted(sorted(range(1, 6), key=lambda layer: influence[layer - 1])[:2])
        assert result.signal == influence

    def test_streamline_selects_the_contiguous_blocks_with_the_smallest_distance(self, model, pruned):
        influence = block_influence(model, padded_batches(), PAD)
        first, last = influence.best[2]
        result = pruned(model, by="streamline", blocks=3)
        assert result.removed == [first, first + 1, last]
        assert result.signal == [value for value in influence.distance[2] if value is not None]

    def test_removal_selects_the_blocks_that_cost_least(self, model, pruned):
        losses = removal(model, padded_batches(), PAD).losses
        result = pruned(model, by="removal", blocks=3)
        assert sorted(losses)[:3] == sorted(losses[layer - 1] for layer in result.removed)
        assert result.loss_after == pytest.approx(loss(remove_blocks(model, result.removed)))
        assert (result.layers_after, result.how) == (2, "removal")

    def test_the_result_is_saved(self, causal_lm, pruned, tmp_path):
        result = pruned(causal_lm("ours"), by="streamline", blocks=2)
        assert all(path.stat().st_size for path in result.save(tmp_path, "prune"))


@pytest.mark.parametrize("family", ["ours-lns", "qwen3"])
@pytest.mark.parametrize(
    ("method", "allocation"),
    [(None, None), ("wanda", "uniform"), ("magnitude", "owl"), ("magnitude", "alpha_pruning")],
)
def test_weights_are_pruned_by_method_and_allocation(causal_lm, family, method, allocation, folder):
    model = causal_lm(family)
    options = {"method": method, "allocation": allocation, "export": export if family in OURS else save_hf}
    result = prune(model, padded_batches(), PAD, sparsity=0.5, folder=folder, **options)
    known = layer_sparsity(model, padded_batches(), PAD, sparsity=0.5)
    shares = {"alpha_pruning": known.alpha_pruning, "uniform": [0.5] * 4}.get(allocation, known.owl)
    assert result.signal == pytest.approx(shares)
    expected = sparsify(model, shares, method or "wanda", input_norms(model, padded_batches(), PAD))
    loaded = load_hf(folder)
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-5, atol=1e-5)
    assert result.loss_after == pytest.approx(loss(loaded), rel=1e-5)
    for block, share in zip(loaded.blocks, shares, strict=True):
        for weight in linear_weights(block).values():
            assert float((weight == 0).float().mean()) == pytest.approx(share, abs=0.5 / min(weight.shape))
    assert result.zeros_before == 0
    assert result.zeros_after == pytest.approx(0.5, abs=0.02)
    assert (result.layers_after, result.removed) == (4, [])


def test_weights_are_pruned_with_sequential_calibration(causal_lm, pruned):
    model = causal_lm("ours")
    result = pruned(model, sparsity=0.5, allocation="uniform", calibration="sequential")
    assert result.loss_after == pytest.approx(loss(sparsify_sequentially(model, [0.5] * 4, padded_batches(), PAD)))
    assert result.how == "wanda, uniform, sequential"


@pytest.mark.parametrize("family", ["ours-lns", "llama", "gpt2"])
def test_a_trained_block_comes_close_to_the_run_that_it_replaces(causal_lm, family):
    model = causal_lm(family)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    trained = train_replacement(model, 2, 3, padded_batches(), PAD, steps=60, lr=3e-3)
    assert trained.depth == 3
    batch = padded_batches()[1]
    goal, without = model.block_functions(batch)[0][3], remove_blocks(model, [2, 3]).block_functions(batch)[0][1]
    reached = trained.block_functions(batch)[0][2]
    assert (reached - goal).norm() < 0.5 * (without - goal).norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())


@pytest.mark.parametrize("family", ["ours-lns", "gpt2"])
def test_a_trained_ffn_comes_close_to_the_run_without_attention(causal_lm, family):
    model, batch = causal_lm(family), padded_batches()[1]
    trained = train_replacement(model, 2, 3, padded_batches(), PAD, steps=60, lr=3e-3, attention=False)
    before, after = activations(model, batch), activations(trained, batch)
    goal, without = before["residual", 3], before["residual", 1]
    assert (after["residual", 2] - goal).norm() < 0.7 * (without - goal).norm()
    assert not after["attention", 2].any()


def test_a_replacement_whose_training_diverges_is_not_written(folder):
    options = {"by": "streamline", "blocks": 1, "replace": "layer", "replace_steps": 5, "replace_lr": 1e30}
    with pytest.raises(UserError, match=r"its training diverged, nothing is written: lower replace_lr=1e\+30"):
        prune(decoder("pre_ln"), padded_batches(), PAD, folder=folder, export=export, **options)
    assert not folder.exists()


def test_a_linear_map_is_taken_before_the_scale_of_channels():
    model = decoder("layer_scale", init=0.5)
    with torch.no_grad():
        model.blocks[0].ffn_residual.branch_scale.uniform_(0.5, 1.5)
    mapped = fold_linear_map(model, 2, 3, padded_batches(), PAD)
    before, after = (activations(each, padded_batches()[0]) for each in (model, mapped))
    goal, without = before["residual", 3], before["residual", 1]
    assert (after["residual", 1] - goal).norm() < 0.9 * (without - goal).norm()
    model.blocks[0].ffn_residual.branch_scale.data[3] = 0
    with pytest.raises(UserError, match="a scale of zero hides channels of the FFN"):
        fold_linear_map(model, 2, 3, padded_batches(), PAD)


@pytest.mark.parametrize("family", ["ours-lns", "llama", "gpt2"])
def test_a_linear_map_is_the_nearest_to_the_run_that_it_replaces(causal_lm, family):
    """In least squares what is missing is orthogonal to the inputs, the outputs of the FFN before the run."""
    model = causal_lm(family)
    mapped = fold_linear_map(model, 2, 3, padded_batches(), PAD)
    missing, inputs = [], []
    for batch in padded_batches():
        before, after = activations(model, batch), activations(mapped, batch)
        missing.append(before["residual", 3] - after["residual", 1])
        inputs.append(before["ffn", 1])
    missing, inputs = torch.cat(missing), torch.cat(inputs)
    assert (inputs.T @ missing).norm() < 1e-4 * inputs.norm() * missing.norm()


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_an_ffn_that_ends_in_a_norm_cannot_hold_a_linear_map(family):
    model = ModelAdapter(tiny_model(family, vocab_size=37), family)
    with pytest.raises(UserError, match=f"the FFN of {family} does not end in a known projection"):
        fold_linear_map(model, 2, 3, padded_batches(), PAD)


def test_a_linear_map_needs_more_tokens_than_channels(causal_lm):
    with pytest.raises(UserError, match="a linear map needs more tokens than the hidden size 16, not 7"):
        fold_linear_map(causal_lm("ours"), 2, 3, [padded_batches()[0][:1]], PAD)


def test_a_linear_map_takes_the_place_of_its_blocks(causal_lm, folder):
    model = causal_lm("ours-lns")
    training, measured = tokens(seed=2), padded_batches()[1]
    options = {"by": "streamline", "blocks": 2, "replace": "linear", "folder": folder}
    result = prune(model, [training, measured], PAD, export=export, **options)
    mapped = fold_linear_map(model, *result.removed, [training], PAD)
    assert result.loss_after == pytest.approx(mean_loss(mapped, [measured], PAD)[0])
    torch.testing.assert_close(logits(load_hf(folder)), logits(mapped), rtol=1e-4, atol=1e-4)
    assert [row["layers"] for row in result.rows()] == [4, 2, 2]


def test_a_single_batch_is_split_into_training_and_measured_sequences(causal_lm, folder):
    batch = tokens()
    options = {"by": "streamline", "blocks": 1, "replace": "layer", "replace_steps": 1, "export": lambda *_: None}
    result = prune(causal_lm("ours"), [batch], PAD, folder=folder, **options)
    assert result.loss_before == pytest.approx(mean_loss(causal_lm("ours"), [batch[1::2]], PAD)[0])
    with pytest.raises(UserError, match="replace= trains on one sequence and measures on another: give at least two"):
        prune(causal_lm("ours"), [batch[:1]], PAD, folder=folder.with_name("other"), **options)


@pytest.mark.parametrize("replace", ["layer", "ffn"])
def test_a_trained_block_is_measured_on_other_batches_than_it_was_trained_on(causal_lm, folder, replace):
    model = causal_lm("ours")
    training, measured = padded_batches()
    options = {"by": "streamline", "blocks": 1, "replace": replace, "replace_steps": 3, "folder": folder}
    result = prune(model, [training, measured], PAD, export=export, **options)
    first, last = result.removed
    trained = train_replacement(model, first, last, [training], PAD, steps=3, lr=3e-4, attention=replace == "layer")
    assert result.loss_after == pytest.approx(mean_loss(trained, [measured], PAD)[0])
    assert result.loss_without == pytest.approx(mean_loss(remove_blocks(model, [first, last]), [measured], PAD)[0])
    torch.testing.assert_close(logits(load_hf(folder)), logits(trained), rtol=1e-5, atol=1e-5)
    assert [row["layers"] for row in result.rows()] == [4, 2, 3]


def test_the_arithmetic_sparsities_rise_by_the_difference_around_their_mean():
    assert arithmetic_sparsities(5, 0.7, 0.1) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert arithmetic_sparsities(5, 0.7, largest_difference(5, 0.7))[-1] == pytest.approx(1)
    assert arithmetic_sparsities(3, 0.2, largest_difference(3, 0.2))[0] == pytest.approx(0)


def test_the_difference_with_the_lowest_loss_is_selected(causal_lm, pruned):
    model = causal_lm("ours")
    norms = input_norms(model, padded_batches(), PAD)
    result = pruned(model, sparsity=0.5, allocation="arithmetic")
    tried = [arithmetic_sparsities(4, 0.5, step / 27) for step in range(1, 10)]
    losses = {loss(sparsify(model, sparsities, "wanda", norms)): sparsities for sparsities in tried}
    assert result.signal == pytest.approx(losses[min(losses)])
    given = pruned(model, sparsity=0.5, allocation="arithmetic", difference=0.1)
    assert given.signal == pytest.approx([0.35, 0.45, 0.55, 0.65])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"one of layers=, by= with blocks=, and sparsity=; none is given"),
        ({"layers": [1], "sparsity": 0.5}, "given: layers, sparsity"),
        ({"by": "influence"}, "by= selects blocks and blocks= is their number"),
        ({"layers": [1], "blocks": 2}, "by= selects blocks and blocks= is their number"),
        ({"by": "influenc", "blocks": 1}, "by='influenc' does not exist: did you mean 'influence'"),
        ({"by": "removal", "blocks": 4}, "blocks=4: expected 1 to 3 of the 4 of ours"),
        ({"by": "streamline", "blocks": 0}, "blocks=0: expected 1 to 3"),
        (
            {"layers": [1], "allocation": "owl", "method": "wanda"},
            "allocation= needs sparsity=\nmethod= needs sparsity=$",
        ),
        ({"sparsity": 0.5, "difference": 0.1}, "difference= needs allocation=arithmetic"),
        ({"sparsity": 0.5, "allocation": "uniform", "owl_lambda": 0.3}, "owl_lambda= needs allocation=owl"),
        ({"sparsity": 0.5, "epsilon": 0.1}, "epsilon= needs allocation=alpha_pruning"),
        ({"layers": [2], "replace_steps": 7}, "replace_steps= needs replace=layer or ffn"),
        ({"by": "streamline", "blocks": 1, "replace": "linear", "replace_lr": 1.0}, "replace_lr= needs replace=layer"),
        ({"by": "influence", "blocks": 1, "threshold": 3.0}, "threshold= needs allocation=owl"),
        ({"by": "removal", "blocks": 1, "replace": "layer"}, "replace= needs by=streamline"),
        ({"by": "streamline", "blocks": 3, "replace": "layer"}, "blocks=3 with replace=: expected 1 to 2"),
        (
            {"by": "streamline", "blocks": 1, "replace": "layer", "replace_steps": 0},
            "^replace_steps=0 must be at least 1$",
        ),
        *(
            (
                {"by": "streamline", "blocks": 1, "replace": "ffn", "replace_lr": lr},
                f"^replace_lr={lr} must be {limit}$",
            )
            for lr, limit in ((math.nan, "a finite number"), (math.inf, "a finite number"), (-1.0, "greater than 0"))
        ),
        *(
            ({"sparsity": 0.5, "allocation": allocation, name: value}, f"^{name}={value} must be {limit}$")
            for allocation, name, value, limit in (
                ("owl", "threshold", math.nan, "a finite number"),
                ("owl", "threshold", -1.0, "greater than 0"),
                ("owl", "owl_lambda", math.nan, "a finite number"),
                ("owl", "owl_lambda", -0.1, "at least 0"),
                ("alpha_pruning", "epsilon", math.inf, "a finite number"),
                ("alpha_pruning", "epsilon", 1.5, "at most 1"),
                ("arithmetic", "difference", math.nan, "a finite number"),
            )
        ),
        *(
            ({"sparsity": value}, f"^sparsity={value} must be {limit}$")
            for value, limit in ((math.nan, "a finite number"), (-0.1, "at least 0"), (1.5, "at most 1"))
        ),
        *(
            (
                {"sparsity": value, "allocation": allocation},
                rf"^layer \d would lose \S+ of its weights: bring {option}= nearer to 0, or {change} sparsity=$",
            )
            for allocation, option in (("owl", "owl_lambda"), ("alpha_pruning", "epsilon"))
            for value, change in ((0.0, "raise"), (0.99, "lower"), (1.0, "lower"))
            if value or allocation == "owl"
        ),
        ({"by": "streamline", "blocks": 1, "replace": "lin"}, "replace='lin'"),
        ({"by": "streamline", "blocks": 4, "replace": "linear"}, "blocks=4: expected 1 to 3 of the 4 of ours"),
        (
            {"sparsity": 0.5, "allocation": "even"},
            "allocation='even' does not exist: .*known: alpha_pruning, arithmetic",
        ),
        (
            {"sparsity": 0.5, "allocation": "arithmetic", "difference": 0.4},
            r"layer [14] would lose (-0.1|1.1) of its weights: bring difference= nearer to 0, or ",
        ),
        (
            {"sparsity": 0.1, "allocation": "arithmetic", "difference": 0.2},
            "layer 1 would lose -0.2 of its weights: bring difference= nearer to 0, or raise sparsity=",
        ),
        ({"sparsity": 0.5, "method": "magnitude", "calibration": "once"}, "calibration= needs .* method=wanda"),
        ({"layers": [1], "calibration": "sequential"}, "calibration= needs sparsity="),
        (
            {"sparsity": 0.5, "calibration": "sequentially"},
            "calibration='sequentially' does not exist: did you mean 'sequential'",
        ),
        ({"sparsity": 0.5, "method": "wand"}, "method='wand' does not exist: did you mean 'wanda'"),
    ],
)
def test_bad_options_are_errors(causal_lm, options, message, pruned, tmp_path):
    with pytest.raises(UserError, match=message):
        pruned(causal_lm("ours"), **options)
    assert not list(tmp_path.iterdir())


def test_no_tokens_are_an_error(causal_lm, folder):
    with pytest.raises(UserError, match="no tokens to measure on"):
        prune(causal_lm("ours"), [], layers=[1], folder=folder, export=export)


def test_a_folder_in_use_is_an_error(causal_lm, folder, pruned):
    folder.write_text("")
    with pytest.raises(UserError, match="exists"):
        pruned(causal_lm("ours"), layers=[1])


def test_a_failed_export_leaves_nothing(causal_lm, folder):
    def fail(model, folder):
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        prune(causal_lm("ours"), padded_batches(), layers=[1], folder=folder, export=fail)
    assert not list(folder.parent.iterdir())


def test_a_strategy_without_export_is_an_error_before_anything_is_computed(folder):
    model = decoder("sandwich_ln", depth=3, name="sandwich")

    def unread():
        raise AssertionError
        yield

    with pytest.raises(UserError, match=r"sandwich cannot be written .*\nbranch_norm=True"):
        prune(model, unread(), by="removal", blocks=1, folder=folder, export=export)
    assert not folder.exists()
