"""Every experiment of the paper: what it publishes, composes to, builds and trains; and `reproduce`."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from lightning.pytorch import Callback

from cod_lightning.cli import main
from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import choices, compose
from cod_lightning.config.groups import config_folder
from cod_lightning.config.paper_block import AXES
from cod_lightning.config.saved import load_config, save_config
from cod_lightning.config.schema import flatten
from cod_lightning.errors import UserError
from cod_lightning.evaluate import PAPER_TASKS, lm_eval
from cod_lightning.measure.registry import MEASURES
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.strategies import STRATEGIES, build_all
from cod_lightning.paper.experiments import (
    experiment_rows,
    find_experiments,
    format_tokens,
    remaining_tasks,
    reproducible_experiments,
)
from cod_lightning.train import run
from command_words import last_of_each

# The published figures, copied from the paper independently of the experiments.
BASELINES = ("post_ln", "deep_norm", "mix_ln", "pre_ln", "lns")
SCALING = ("pre_ln", "layer_scale", "skip_init", "ds_init", "scaled_init", "lns", "lns_scaled_init")
NORMS = ("pre_ln", "admin", "group_ln", "sandwich_ln", "mix_ln", "lns")
TABLE_1 = ("post_ln", "deep_norm", "deep_norm_deepnet", "mix_ln", "pre_ln", "lns")
"""Table 1's rows, and DeepNorm with the constants it was published with, which the paper does not have."""
POSITIONS = ("pre_ln", "before_ln", "after_branch", "after_residual", "only_attention", "only_ffn", "lns")
TASKS = ("mmlu", "boolq", "arc_easy", "piqa", "hellaswag", "openbookqa", "winogrande", "average")
TABLE_2_250M = [
    [22.95, 37.83, 26.94, 52.72, 26.17, 11.60, 49.56, 32.54],
    [23.60, 37.86, 36.62, 61.10, 25.69, 15.00, 49.57, 35.63],
    [26.53, 56.12, 41.68, 66.34, 30.16, 18.00, 50.56, 41.34],
    [24.93, 38.35, 40.15, 63.55, 26.34, 16.20, 49.01, 36.93],
    [27.08, 58.17, 45.24, 67.38, 32.81, 18.80, 52.49, 43.14],
]
TABLE_2_1B = [
    [22.95, 37.82, 25.08, 49.51, 25.04, 13.80, 49.57, 31.96],
    [23.35, 37.83, 27.06, 52.94, 26.19, 11.80, 49.49, 32.67],
    [23.19, 37.83, 25.08, 49.51, 25.04, 11.80, 49.57, 31.72],
    [26.54, 62.20, 45.70, 67.79, 30.96, 17.40, 50.51, 43.01],
    [28.69, 61.80, 48.85, 67.92, 33.94, 18.60, 54.30, 44.87],
]
TABLES = {
    "table1_130m": (TABLE_1, [26.95, 27.17, None, 26.07, 26.73, 25.76]),
    "table1_250m": (TABLE_1, [1409.79, 22.77, None, 21.39, 21.92, 20.35]),
    "table1_350m": (TABLE_1, [1368.33, 1362.59, None, 1363.21, 19.58, 18.20]),
    "table1_1b": (TABLE_1, [1390.75, 1409.08, None, 1414.78, 17.02, 15.71]),
    "table2_250m": (BASELINES, [dict(zip(TASKS, row, strict=True)) for row in TABLE_2_250M]),
    "table2_1b": (BASELINES, [dict(zip(TASKS, row, strict=True)) for row in TABLE_2_1B]),
    "table3_olmo_1b": (("scaled_init", "lns"), [{"val_loss": 2.96, "ppl": 19.30}, {"val_loss": 2.85, "ppl": 17.28}]),
    "table4_qwen2_5_0_5b": (("pre_ln", "lns"), [20.62, 19.57]),
    "table5_vit_s": (("pre_ln", "after_ln", "after_branch"), [67.91, 66.43, 68.75]),
    "table6_130m": (SCALING, [26.73, 27.93, 27.41, 26.95, 26.04, 25.76, 25.80]),
    "table6_250m": (SCALING, [21.92, 23.45, 22.29, 21.50, 20.98, 20.35, 20.79]),
    "table7_130m": (NORMS, [26.73, 27.91, 28.01, 26.51, 26.07, 25.76]),
    "table8_130m": (POSITIONS, [26.73, 26.97, 26.53, 1358.11, 26.89, 26.43, 25.76]),
    "figure1_60m": (("pre_ln", "lns"), [3.67, 3.56]),
    "figure1_150m": (("pre_ln", "lns"), [3.44, 3.24]),
    "figure1_300m": (("pre_ln", "lns"), [3.29, 3.14]),
    "figure1_1b": (("pre_ln", "lns"), [3.15, 2.85]),
    "figure1_7b": (("pre_ln", "lns"), [2.69, 2.50]),
}
WITHOUT_FIGURES = {
    "figure2_bert_large": ("post_ln",),
    "figure2_deepseek_7b": ("pre_ln",),
    "figure2_llama2_13b": ("pre_ln",),
    "figure2_qwen3_8b": ("pre_ln",),
    "figure3": ("post_ln", "pre_ln"),
    "figure4": ("pre_ln", "scaled_init", "lns"),
    "figure5": ("pre_ln",),
    "figure6": ("pre_ln", "lns"),
    "figure7": ("pre_ln", "lns"),
    "figure8": ("pre_ln", "after_branch"),
    "figure9": ("pre_ln",),
    "figure10": ("language",),
    "theory": ("pre_ln", "lns"),
}
SHARED_ROWS = {"post_ln", "mix_ln", "pre_ln", "lns", "layer_scale", "scaled_init", "lns_scaled_init", "before_ln"}
"""Rows of experiments beyond the paper that are rows of its tables too."""
ADDITIONS = ("scaled_init", "gpas", "value_residual", "peri_ln", "qk_norm", "x0_mix")
LEFT_OUT = {"lns_as_rates", "lns_as_norm_weights", "deep_norm_released"}  # the last is the row deep_norm, as in Table 1
LEAGUE = sorted(STRATEGIES.keys() - LEFT_OUT | {"deep_norm_deepnet", "lns_scaled_init"})
BEYOND = {
    **{f"embedding_{std}": TABLE_1 for std in ("0_02", "0_632", "1")},
    **{f"depth_{blocks}": ("pre_ln", "lns") for blocks in (6, 12, 24, 48)},
    **{f"length_{part}": ("pre_ln", "lns", "mix_ln", "layer_scale") for part in ("eighth", "half", "full", "fourfold")},
    **{f"league_{factor}": LEAGUE for factor in ("half", "same", "double", "fourfold")},
    "why_lns": ("pre_ln", "lns_init_only", "lns_rate_only", "lns_as_rates", "lns"),
    "interactions": ("pre_ln", "before_ln", "lns", *(row for name in ADDITIONS for row in (name, f"lns_{name}"))),
}
"""Experiments that the paper does not have, and their rows."""
STEPS = [3100, 5000, 10000, 15000, 20000, 25000, 30000, 35000, 38000]
CURVES = {
    "figure6": {
        "pre_ln": [STEPS, [3.43, 3.25, 3.01, 2.91, 2.83, 2.77, 2.72, 2.685, 2.665]],
        "lns": [STEPS, [3.48, 3.28, 3.03, 2.89, 2.79, 2.72, 2.65, 2.60, 2.57]],
    },
    "figure9": {"pre_ln": [[1000, 3000, 6000], [5, 85, 175]]},
}
EXPERIMENTS = [*TABLES, *WITHOUT_FIGURES]
VISION = ("table5_vit_s", "figure8")
LANGUAGE = [name for name in EXPERIMENTS if name not in VISION]
SCALES = ("paper", "mini", "small", "toy")


@cache
def rows_of(experiment, scale="paper"):
    """The rows of an experiment by name, composed once."""
    return {row.name: row for row in experiment_rows([experiment], scale)}


def composed(name, scale="paper"):
    """The configuration of the first row of an experiment."""
    return next(iter(rows_of(name, scale).values())).config


def test_every_experiment_is_tested_here():
    assert set(choices("experiments")) == {"quickstart", *EXPERIMENTS, *BEYOND}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_published_figures_are_those_of_the_paper(name):
    claims = composed(name).paper
    names, figures = TABLES.get(name) or (WITHOUT_FIGURES[name], [None] * len(WITHOUT_FIGURES[name]))
    assert list(claims["rows"]) == list(names)
    assert [row.get("published") for row in claims["rows"].values()] == figures
    curves = {row: [list(points) for points in zip(*curve, strict=True)] for row, curve in CURVES.get(name, {}).items()}
    assert claims.get("published_curves", {}) == curves


@pytest.mark.parametrize("name", BEYOND)
def test_only_the_likely_embeddings_have_published_figures_beyond_the_paper(name):
    paper = composed(name).paper
    rows = list(paper["rows"])
    assert (sorted(rows) if name.startswith("league") else rows) == list(BEYOND[name])
    assert paper["source"].startswith("not in the paper")
    assert any("published" in row for row in paper["rows"].values()) == (name == "embedding_0_632")


def test_the_embeddings_of_the_published_runs_are_compared_with_table_1():
    """Most likely they had 0.632; the other rows are of the Mix-LN paper, whose code had 0.02 (docs/audit.md, 3)."""
    table1, embedding = (composed(name).paper["rows"] for name in ("table1_130m", "embedding_0_632"))
    assert {name: row["published"] for name, row in embedding.items() if "published" in row} == {
        name: table1[name]["published"] for name in ("pre_ln", "lns")
    }


def test_rows_of_the_mix_ln_paper_are_corrected_with_its_number_of_batches():
    """docs/audit.md, 16."""
    counts = []
    for name in ("table1_130m", "table1_250m", "table6_250m", "table7_130m"):
        rows = composed(name).paper["rows"].values()
        corrected = [row for row in rows if row.get("evaluation_batches") == 182]
        assert corrected == [row for row in rows if "the Mix-LN paper" in row.get("note", "")]
        counts.append(len(corrected))
    assert counts == [3, 4, 1, 1]


@pytest.mark.parametrize("name", ["length_full", "league_same", "depth_24", "why_lns", "interactions"])
def test_an_experiment_beyond_the_paper_shares_its_middle_with_the_tables(name):
    tables = [rows_of(f"table{number}_130m", "small").values() for number in (1, 6, 8)]
    ids = {row.config.id for rows in tables for row in rows}
    for row in rows_of(name, "small").values():
        assert row.name not in SHARED_ROWS or row.config.id in ids, row.name


@pytest.mark.parametrize(
    ("family", "field", "values"),
    [
        ("length", "trainer.max_steps", [256, 1024, 2048, 8192]),
        ("league", "optim.lr", [1.5e-3, 3e-3, 6e-3, 1.2e-2]),
        ("depth", "model.num_hidden_layers", [6, 12, 24, 48]),
    ],
)
def test_a_family_varies_one_field_at_scale_small(family, field, values):
    configs = [compose([f"experiments={name}", "scale=small", "row=lns"]) for name in find_experiments([family])]
    assert sorted(flatten(asdict(config))[field] for config in configs) == values


KEYS = {
    *("target", "column", "source", "metric", "tokens", "evaluation_batches", "rows", "start", "measures", "finding"),
    *("published_curves", "fractions", "settings", "unknown", "tasks"),
}


def test_a_varied_setting_has_the_value_of_the_run():
    words = ["trainer.max_steps=7", "data.batch_size=4", "data.micro_batch_size=4", "data.seq_len=10"]
    words += ["model.num_hidden_layers=3", "model.embedding_std=0.632", "optim.lr=0.003"]
    config = compose(words)
    assert {name: value(config) for name, value in AXES.items()} == {
        "tokens": 280,
        "blocks": 3,
        "lr": 0.003,
        "embedding_std": 0.632,
    }


@pytest.mark.parametrize(("tokens", "words"), [(4_194_304, "4.19M"), (99_000_000, "99.00M"), (2.2e9, "2.20B")])
def test_tokens_are_in_millions_or_billions(tokens, words):
    assert format_tokens(tokens) == words


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_states_the_source_of_every_setting(name):
    config = composed(name)
    paper, values = config.paper, asdict(config)
    assert config.experiment == name
    assert config.description
    assert paper.keys() <= KEYS
    assert paper["source"].startswith("The Curse of Depth in Large Language Models, arXiv 2502.05795v5")
    assert config.description.startswith(paper["target"])
    assert paper["settings"].keys() <= {*flatten(values), *values}
    assert paper["settings"].keys() >= {"model", "images" if name in VISION else "data"}
    assert all(isinstance(text, str) and text for text in [*paper["settings"].values(), *paper["unknown"]])
    assert set(paper.get("measures", ())) <= MEASURES.keys()
    assert (paper.get("metric") is None) == (name in WITHOUT_FIGURES)
    for row in paper["rows"].values():
        assert row.keys() <= {"label", "set", "published", "evaluation_batches", "note", "subject"}
        assert row["label"]
        assert "norm" in row["set"]


@pytest.mark.parametrize("name", ["quickstart", "table1_130m", "table4_qwen2_5_0_5b", "figure1_60m", "figure5"])
def test_an_experiment_of_every_recipe_composes_under_both_protocols(name):
    for protocol in choices("protocol"):
        config = compose([f"experiments={name}", f"protocol={protocol}"])
        assert config.protocol == protocol
        paper = protocol == "paper"
        assert config.data.layout == ("document" if paper else "packed")
        assert config.optim.weighting == ("micro_batches" if paper else "tokens")


@pytest.mark.parametrize(("name", "scale"), list(zip(EXPERIMENTS, itertools.cycle(SCALES))))
def test_a_row_equals_its_composed_overrides(name, scale):
    row = list(rows_of(name, scale).values())[-1]
    assert compose(row.overrides) == row.config
    assert row.config.scale == scale


# Peak rate, steps, warm-up of the released run scripts.
RELEASED = {
    "table1_130m": (1e-3, 20_000, 2_000),
    "table1_250m": (1e-3, 40_000, 4_000),
    "table1_350m": (5e-4, 60_000, 6_000),
    "table1_1b": (5e-4, 100_000, 1_000),
}


@pytest.mark.parametrize("name", RELEASED)
def test_table_1_has_the_released_hyperparameters(name):
    config = composed(name)
    lr, steps, warmup = RELEASED[name]
    assert (config.optim.lr, config.trainer.max_steps, config.optim.warmup(steps)) == (lr, steps, warmup)
    assert (config.data.batch_size, config.data.seq_len, config.optim.clip) == (512, 256, 0)
    assert (config.optim.name, config.optim.weight_decay, config.optim.betas) == ("adam", 0, [0.9, 0.999])
    assert (config.data.source, config.data.tokenizer, config.model.vocab_size) == ("c4", "t5-base", 32000)
    assert config.protocol == "paper"
    assert rows_of(name)["deep_norm"].config.norm["name"] == "deep_norm_released"


# Width, heads, blocks; width of the SwiGLU, half of mlp_ratio 8 or of mlp_hidden_size; rate, warm-up.
OLMO = {
    "figure1_60m": (512, 8, 8, 512 * 8 // 2, 6e-4, 5000),
    "figure1_150m": (768, 12, 12, 768 * 8 // 2, 6e-4, 5000),
    "figure1_300m": (1024, 16, 16, 1024 * 8 // 2, 6e-4, 5000),
    "figure1_1b": (2048, 16, 16, 2048 * 8 // 2, 4e-4, 2000),
    "figure1_7b": (4096, 32, 32, 22016 // 2, 3e-4, 5000),
}


@pytest.mark.parametrize("name", OLMO)
def test_the_olmo_ladder_has_the_official_shapes_and_sees_20b_tokens(name):
    config = composed(name)
    model, optim = config.model, config.optim
    shape = (model.hidden_size, model.num_attention_heads, model.num_hidden_layers, model.intermediate_size)
    assert (*shape, optim.lr, optim.warmup_steps) == OLMO[name]
    large = name in ("figure1_1b", "figure1_7b")
    assert (model.norm, model.norm_affine) == (("layer", False) if large else ("rms", True))
    assert (model.norm_eps, optim.eps) == ((1e-5, 1e-5) if large else (1e-6, 1e-8))
    assert (model.vocab_size, model.tie_word_embeddings) == (50280, name == "figure1_1b")
    assert "pii-special" in config.data.tokenizer if large else "dolma-v1_5" in config.data.tokenizer
    assert config.data.seq_len == (2048 if large else 4096)
    per_step = config.data.batch_size * config.data.seq_len
    assert per_step == 524_288
    assert 20e9 <= config.trainer.max_steps * per_step < 20e9 + per_step
    assert (optim.name, optim.weight_decay, optim.betas, optim.clip) == ("adamw", 0.1, [0.9, 0.95], 1)
    assert (optim.decay_embeddings, optim.warmup_start_ratio) == ((False, 0.1) if large else (True, 0.0))
    assert optim.schedule == ("linear" if name == "figure1_7b" else "cosine")
    assert (model.init, model.init_std, model.embedding_std, model.init_cutoff) == ("normal", 0.02, 0.02, 3)
    assert config.protocol == "strict"


SIZES = {
    **{"figure1_60m": 60e6, "figure1_150m": 150e6, "figure1_300m": 300e6, "figure1_1b": 1e9, "figure1_7b": 7e9},
    **{"figure2_deepseek_7b": 7e9, "figure2_qwen3_8b": 8e9, "figure2_llama2_13b": 13e9, "figure5": 7e9},
    **{"table4_qwen2_5_0_5b": 0.5e9, "figure10": 7e9, "figure2_bert_large": 0.34e9},
}


@pytest.mark.parametrize("name", SIZES)
def test_every_model_has_the_size_in_its_name(name):
    """Sizes agree within 20 %; OLMo counts one of two embeddings."""
    model = composed(name).model
    uncounted = name in OLMO and not model.tie_word_embeddings
    size = model.num_parameters() - uncounted * model.vocab_size * model.hidden_size
    assert size == pytest.approx(SIZES[name], rel=0.2)


def own_parameters(config, specs):
    """Parameters of a strategy beyond two pre-norms in every block."""
    d, weights = config.hidden_size, config.norm_affine * config.hidden_size
    learned = {"no": 0, "scalar": 1, "channel": d}
    total = 0
    for spec in specs:
        total += spec.entry_norm * weights + any(s.gate != "no" for s in spec.sublayers)
        for s in spec.sublayers:
            total += (s.pre_norm + s.branch_norm + s.sum_norm - 1) * weights
            total += learned[s.learned_branch_scale] + s.learned_skip * d
    return total


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_row_builds_with_the_parameters_that_are_counted(name):
    for row in rows_of(name).values():
        config = row.config.model
        specs = build_all(row.config.norm, config.num_hidden_layers)
        with torch.device("meta"):
            decoder = Decoder(config, specs)
        count = sum(parameter.numel() for parameter in decoder.parameters())
        assert count == config.num_parameters() + own_parameters(config, specs), row.name


SHARED = {
    **dict.fromkeys(("figure3", "figure7", "figure9", "theory"), ("table1_130m",)),
    **dict.fromkeys(("table6_130m", "table7_130m", "table8_130m"), ("table1_130m",)),
    **{"figure4": ("table1_130m", "table6_130m"), "figure6": ("figure1_7b",), "figure8": ("table5_vit_s",)},
}
"""Experiments, and those that train their rows of the same name."""


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experiment", SHARED)
def test_rows_that_compute_the_same_are_one_run(experiment, scale):
    for name, row in rows_of(experiment, scale).items():
        shared = [rows[name] for other in SHARED[experiment] if name in (rows := rows_of(other, scale))]
        assert shared or experiment.startswith("table"), name
        for other in shared:
            assert row.config_for(2).folder == other.config_for(2).folder, name
            assert row.config_for(2).id != other.config_for(1).id


@pytest.mark.parametrize("scale", SCALES)
def test_table_3_and_figure_1_share_only_the_run_with_lns(scale):
    olmo, figure = rows_of("table3_olmo_1b", scale), rows_of("figure1_1b", scale)
    assert olmo["lns"].config.id == figure["lns"].config.id
    assert olmo["scaled_init"].config.id != figure["pre_ln"].config.id


@pytest.mark.parametrize("scale", SCALES)
def test_fine_tuning_starts_from_the_run_of_the_same_row_and_seed(scale):
    row, source = rows_of("table2_250m", scale)["mix_ln"], rows_of("table1_250m", scale)["mix_ln"].config_for(2)
    config = row.config_for(2)
    assert config.init_from == str(source.folder)
    assert config.data.tokenizer == str(source.folder / "tokenizer")
    # Its overrides are equal, but name a run folder that must exist.
    assert f"init_from={source.folder}" in row.cli_args(2)
    assert row.tasks == ("paper" if scale == "paper" else None)
    assert [task.config.id for task in remaining_tasks([row], [2], {})] == [source.id, config.id]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "name", [*(name for name in WITHOUT_FIGURES if name.startswith("figure2_")), "figure5", "figure10"]
)
def test_a_stand_in_for_a_pretrained_model_is_a_run_of_table_1(name, scale):
    (row,) = rows_of(name, scale).values()
    assert (row.pretrained_model is not None) == (scale == "paper")
    if scale != "paper":
        assert row.config.id == rows_of("table1_130m", scale)[row.config.norm["name"]].config.id


@pytest.mark.parametrize("scale", SCALES)
def test_the_sizes_of_figure_1_grow_and_smaller_scales_vary_nothing_else(scale):
    configs = [rows_of(name, scale)["lns"].config for name in OLMO]
    widths = [config.model.hidden_size for config in configs]
    assert widths == sorted(set(widths))
    others = {(c.model.num_hidden_layers, c.optim.lr, c.optim.schedule, c.trainer.max_steps) for c in configs}
    assert scale == "paper" or len(others) == 1


SMALL = {
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 2,
    "data.source": "files",
    "trainer.max_steps": 2,
    "trainer.stats_every": 0,
    "eval.every": 2,
}


@pytest.fixture
def small(toy, tmp_path):
    """Overrides that shorten a run of any experiment at toy scale to a few seconds."""
    own = [word for word in toy if "." in word.partition("=")[0] or word == "logger=none"]
    values = dict(word.split("=", 1) for word in own) | {key: str(value) for key, value in SMALL.items()}
    return [f"{key}={value}" for key, value in values.items()] + [f"output={tmp_path}"]


def test_every_language_experiment_of_the_paper_trains(small):
    """Its first row and those that change more than the norm train two steps of the smallest model, equal runs once."""
    rows = []
    for name in LANGUAGE:
        first, *others = rows_of(name, "toy").values()
        rows += [first, *(row for row in others if row.entry["set"].keys() != {"norm"})]
    configs = {config.id: config for row in rows if (config := compose([*row.overrides, *small]))}
    assert len(configs) >= 14
    for config in configs.values():
        record, folder = train_run(config)
        assert (record["steps"], folder) == (2, config.folder)
        assert record["history"]["train"]["loss"][0] == pytest.approx(5.7, abs=0.9), config.experiment


# Reproducing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reproduce(capfd):
    """`reproduce(*words)` returns the exit status and the output."""

    def reproduce(*words):
        capfd.readouterr()
        status = main(last_of_each(["reproduce", *words]))
        return status, capfd.readouterr().err

    return reproduce


@pytest.mark.usefixtures("commands_in_process")
def test_a_failed_reproduction_resumes_and_repeats_nothing(small, tmp_path, reproduce, monkeypatch):
    results, runs = tmp_path / "results", []
    words = ["table1_130m", "table7_130m", "row=pre_ln,lns", "scale=toy", "--results", str(results), *small]
    words += ["trainer.max_steps=40", "trainer.checkpoint_every=2", "eval.every=40", "trainer.progress=true"]

    class FailsInSecondRun(Callback):
        def on_train_start(self, trainer, module):
            runs.append(trainer)

        def on_train_batch_end(self, trainer, *arguments):
            if len(runs) == 2 and trainer.global_step == 4:
                raise RuntimeError("fails")

    with monkeypatch.context() as patch:
        patch.setattr(run, "probe_callbacks", lambda *arguments: [FailsInSecondRun()])
        with pytest.raises(RuntimeError, match="fails"):
            reproduce(*words)
    (first,) = results.rglob("record.json")
    written = first.stat().st_mtime_ns

    status, printed = reproduce(*words)
    assert status == 0, printed
    assert "1 of 2 runs remaining" in printed
    steps = [int(line.split()[1].split("/")[0]) for line in printed.splitlines() if line.startswith("step ")]
    assert min(steps) > 2
    assert max(steps) == 40
    assert first.stat().st_mtime_ns == written
    records = {path.parent.name: json.loads(path.read_text()) for path in results.rglob("record.json")}
    assert {record["config"]["norm"]["name"] for record in records.values()} == {"pre_ln", "lns"}
    for label, record in records.items():
        assert record["history"]["train"]["step"] == list(range(1, 41))
        assert record["config"]["name"] == f"toy/{label}"


@pytest.mark.usefixtures("commands_in_process")
def test_a_fine_tuned_row_of_the_paper_is_scored(small, tmp_path, reproduce, monkeypatch):
    scores = {task: {"acc": 0.25} for task in PAPER_TASKS}
    monkeypatch.setattr(lm_eval, "task_manager", lambda tasks, folder: None)
    monkeypatch.setattr(lm_eval, "score_tasks", lambda *_, **__: scores)
    words = ["table2_250m", "row=lns", *small, "optim.warmup_steps=1", "data.sha256=null", "data.tokenizer=bpe"]
    words += ["data.repeat=true", "--results", str(tmp_path / "results")]
    status, printed = reproduce(*words)
    assert status == 0, printed
    (path,) = (tmp_path / "results").rglob("tasks.json")
    saved = json.loads(path.read_text())
    assert {task: metrics["acc"] for task, metrics in saved.items()} == dict.fromkeys(PAPER_TASKS, 0.25)


@pytest.mark.usefixtures("commands_in_process")
def test_a_pretrained_model_is_measured_and_not_trained(tiny_llama, corpus, tmp_path, reproduce):
    results, model = tmp_path / "results", tiny_llama(tmp_path / "Public-Model")
    words = ["figure2_llama2_13b", f"paper.rows.pre_ln.subject={model}", "data=files", f"data.files={corpus}/*.jsonl"]
    words += ["data.seq_len=16", "trainer.accelerator=cpu", f"output={tmp_path / 'runs'}", "--results", results]
    status, printed = reproduce(*words)
    assert status == 0, printed
    assert {path.name for path in (results / "paper/Public-Model").iterdir()} == {"angular.json", "removal.json"}
    removal = json.loads((results / "paper/Public-Model/removal.json").read_text())
    assert len(removal["losses"]) == 3
    assert not list(tmp_path.rglob("record.json"))
    assert reproduce(*words) == (0, "0 of 1 runs remaining\n")


@pytest.mark.usefixtures("commands_in_process")
def test_an_unavailable_pretrained_model_is_named(tmp_path, reproduce, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, printed = reproduce("figure5")
    assert status == 2
    assert "meta-llama/Llama-2-7b-hf is not a folder here, so it needs the Hugging Face hub" in printed
    assert not list(tmp_path.iterdir())


def test_a_model_is_measured_once_for_all_seeds_and_a_run_for_each():
    requested = experiment_rows(["figure5"], "paper")
    (task,) = remaining_tasks(requested, [1, 2, 3], {})
    assert (task.label, task.measures) == ("Llama-2-7b-hf", {"jacobian"})
    tasks = remaining_tasks(experiment_rows(["figure5", "figure9"], "toy"), [1, 2, 3], {})
    assert [task.config.seed for task in tasks] == [1, 2, 3]
    assert all(task.measures == {"jacobian", "jacobian_map", "variance"} for task in tasks)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["table1_350"], ["did you mean 'table1_350m'"]),
        (["quickstart"], ["quickstart has no rows"]),
        (["theory", "row=lns,ln"], ["row='ln' does not exist", "did you mean 'lns'"]),
        (["theory", "seeds=0"], ["seeds=0 must lie between 1 and 1,000"]),
        (["theory", "images.size=64"], ["images.size=64 has no effect without task=vision"]),
        (["theory", "images.nonsense=1"], ["images.nonsense is not a field"]),
        (["table5", "data.seq_len=64"], ["data.seq_len=64 has no effect with task=vision"]),
        (
            ["table5", "theory", "row=lns", "images.size=64"],
            ["images.size=64 has no effect on the chosen rows: remove it"],
        ),
        (["table5", "theory", "scale=toy", "images.nonsense=1"], ["images.nonsense is not a field"]),
        (["table5", "theory", "scale=toy", "data.nonsense=1"], ["data.nonsense is not a field"]),
    ],
)
def test_a_name_or_option_that_cannot_be_reproduced_is_an_error(names, words, reproduce):
    status, printed = reproduce(*names)
    assert status == 2
    assert all(word in printed for word in words), printed


def test_a_prefix_names_all_of_a_table_or_figure():
    assert find_experiments(["figure1"]) == ["figure1_150m", "figure1_1b", "figure1_300m", "figure1_60m", "figure1_7b"]
    assert find_experiments(["table1", "table1_130m"]) == ["table1_130m", "table1_1b", "table1_250m", "table1_350m"]


@pytest.mark.parametrize(
    "word", ["experiments=table1_130m", "init_from=runs/x", "norm=lns", "row=lns", "seed=2", "name=mine"]
)
def test_settings_chosen_by_rows_and_seeds_cannot_be_overridden(word):
    with pytest.raises(UserError, match=f"{word}: the rows of an experiment choose {word.split('=')[0]}"):
        experiment_rows(["theory"], "toy", [word])


def test_an_option_that_the_norm_of_a_row_lacks_is_an_error():
    with pytest.raises(UserError, match=r"norm\.position is not an option of 'pre_ln'"):
        experiment_rows(["theory"], "toy", ["norm.position=before_ln"])


@pytest.fixture
def own_experiment(tmp_path, monkeypatch):
    """`own_experiment(text)` writes experiments/mine.yaml into a copy of configs/."""
    folder = tmp_path / "configs"
    shutil.copytree(config_folder(), folder, ignore=shutil.ignore_patterns("results"))
    for module in ("groups", "compose"):
        monkeypatch.setattr(f"cod_lightning.config.{module}.config_folder", lambda: folder)
    return (folder / "experiments/mine.yaml").write_text


@pytest.mark.parametrize("words", [["experiments"], ["fit", "--cfg", "experiments=mine"]])
def test_an_experiment_that_is_not_yaml_is_one_error(words, own_experiment, capsys):
    own_experiment("experiment: mine\n description: indented\n")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "experiments/mine.yaml" in error
    assert "line 2, column 13" in error


def test_an_experiment_without_a_description_is_listed(own_experiment, capsys):
    own_experiment("# @package _global_\nexperiment: mine\n")
    assert main(["experiments"]) == 0
    assert "mine" in capsys.readouterr().out


def test_an_experiment_that_is_no_mapping_is_one_error(own_experiment, capsys):
    own_experiment("- mine\n")
    assert main(["experiments"]) == 2
    assert "experiments/mine.yaml: not a mapping of fields" in capsys.readouterr().err


FIELDS_OF_ROWS = "evaluation_batches, label, note, published, set, subject"
BLOCKS = [
    ("metrc: ppl", "paper.metrc is not a field: did you mean 'metric'? known: axis, column, "),
    ("metric: bleu", "paper.metric='bleu' does not exist: did you mean 'mmlu'? known: accuracy, "),
    ("target: 7", "paper.target=7 must be text: write a number in quotes"),
    ("finding: [a]", "paper.finding=['a'] must be text"),
    ("column: [1]", "paper.column=[1] must be text or a number"),
    ("tokens: 2.2B", "paper.tokens='2.2B' must be a number >= 0, such as 2.2e9"),
    ("tokens: .nan", "paper.tokens=nan must be a number >= 0"),
    ("evaluation_batches: 0", "paper.evaluation_batches=0 must be a whole number of at least 1"),
    ("measures: angular", "paper.measures='angular' must be a list, as in [angular, removal]"),
    ("measures: [angulr]", "paper.measures[0]='angulr' does not exist: did you mean 'angular'?"),
    ("unknown: seeds", "paper.unknown='seeds' must be a list"),
    ("fractions: [2]", "paper.fractions[0]=2 must be a number in [0, 1]"),
    ("axis: rate", "paper.axis='rate' does not exist: known: blocks, embedding_std, lr, tokens"),
    ("start: table1_130", "paper.start='table1_130' does not exist: did you mean 'table1_130m'?"),
    ("tasks: [piqa]", "paper.tasks=['piqa'] must be text"),
    ("settings: {optim.lrr: inferred}", "paper.settings.optim.lrr is not a field: did you mean 'optim.lr'?"),
    ("settings: {optim.lr: 3}", "paper.settings.optim.lr=3 must be text"),
    ("published_curves: {lns: [1, 2]}", "paper.published_curves.lns=[1, 2] must be a list of [step, value]"),
    ("published_curves: {lsn: [[1, 2]]}", "paper.published_curves.lsn is not a row: "),
    ("rows: [lns, pre_ln]", "paper.rows=['lns', 'pre_ln'] must hold a mapping for each row"),
    ("rows: {lns: }", f"paper.rows.lns=None must be a mapping of {FIELDS_OF_ROWS}"),
    ("rows: {12: {label: a}, 24: {label: b}}", "paper.rows: the name 12 must be text: write '12' in quotes"),
    ("rows: {'null': {label: a}}", "paper.rows: 'null' cannot be read back from row=null: rename it"),
    ("rows: {'a,b': {label: a}}", "paper.rows: 'a,b' cannot be read back from row=a,b: rename it"),
    (
        "rows: {lns: {sett: {norm: lns}}}",
        f"paper.rows.lns.sett is not a field: did you mean 'set'? known: {FIELDS_OF_ROWS}",
    ),
    ("rows: {lns: {7: x}}", "paper.rows.lns.7 is not a field"),
    ("rows: {lns: {label: 5}}", "paper.rows.lns.label=5 must be text"),
    ("rows: {lns: {set: [norm]}}", "paper.rows.lns.set=['norm'] must be a mapping of overrides"),
    ("rows: {lns: {set: {paper.metric: ppl}}}", "paper.rows.lns.set.paper.metric: a row does not change its exp"),
    ("rows: {lns: {published: '18.2'}}", "paper.rows.lns.published='18.2' must be a number >= 0 without quotes"),
    ("rows: {lns: {published: true}}", "paper.rows.lns.published=True must be a number"),
    ("rows: {lns: {published: {ppl: null}}}", "paper.rows.lns.published={'ppl': None} must be a number"),
    ("rows: {lns: {published: {pll: 3}}}", "paper.rows.lns.published.pll is not a metric: did you mean 'ppl'?"),
    ("rows: {lns: {published: 0}}", "paper.rows.lns.published=0: a perplexity is greater than 0"),
    ("{metric: null, rows: {lns: {published: 3}}}", "paper.rows.lns.published=3 has no metric: name it"),
]
"""Wrong `paper:` blocks, and the beginning of their errors."""


@pytest.mark.parametrize(("block", "expected"), BLOCKS, ids=[block for block, _ in BLOCKS])
def test_a_wrong_field_of_a_paper_block_is_an_error_of_every_command(
    block, expected, own_experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    own_experiment(f"# @package _global_\nexperiment: mine\npaper:\n  {block}\n")
    before = set(tmp_path.iterdir())
    of_a_row = ["experiments=mine", "row=lns"]
    for words in (["fit", *of_a_row], ["estimate", *of_a_row], ["experiments", "mine"], ["reproduce", "mine"]):
        assert main(words) == 2
        errors = capsys.readouterr().err.splitlines()
        assert any(error.startswith(f"error: mine: {expected}") for error in errors), errors
    assert set(tmp_path.iterdir()) == before


def test_an_experiment_whose_rows_are_all_of_a_recipe_is_reported(own_experiment):
    own_experiment("# @package _global_\ndefaults: [recipes/llama_130m, recipes/league]\nexperiment: mine\n")
    assert {"mine", "table1_130m"} <= set(reproducible_experiments())
    assert "quickstart" not in reproducible_experiments()


def test_the_list_of_experiments_names_the_file_of_wrong_fields(own_experiment, capsys):
    own_experiment("experiment: mine\npaper: {rows: {lns: {published: '18.2', lable: LNS}}}\n")
    assert main(["experiments"]) == 2
    errors = capsys.readouterr().err.splitlines()
    names = ("lable is not a field: did you mean 'label'?", "published='18.2' must be a number")
    for error, name in zip(errors, names, strict=True):
        assert error.startswith(f"error: experiments/mine.yaml: paper.rows.lns.{name}")


def test_an_experiment_whose_paper_is_no_mapping_is_one_error(own_experiment, capsys):
    own_experiment("# @package _global_\nexperiment: mine\npaper: 3\n")
    for words, expected in (["experiments"], "paper=3 must be a mapping of"), (["experiments", "mine"], "key: paper"):
        assert main(words) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{start: mine, rows: {lns: {}}}", "mine: paper.start=mine starts from this experiment itself"),
        ("{start: table1_130m, rows: {lsn: {}}}", "mine: paper.start=table1_130m has no row 'lsn': did you mean 'lns'"),
        (
            "{rows: {lns: {set: {optim.lrr: 1}}}}",
            r"mine: paper.rows.lns.set: optim.lrr is not a field: did you mean 'lr'",
        ),
    ],
)
def test_a_row_that_cannot_be_composed_names_its_experiment(block, expected, own_experiment):
    own_experiment(f"# @package _global_\nexperiment: mine\npaper: {block}\n")
    with pytest.raises(UserError, match=expected):
        experiment_rows(["mine"], "toy")


def test_the_command_line_changes_what_a_row_and_a_scale_set():
    words = ["experiments=table1_130m", "row=lns", "scale=toy"]
    config = compose([*words, "paper.rows.lns.set={norm: pre_ln}", "scales={toy: {optim.eps: 1e-3}}"])
    assert config.norm["name"] == "pre_ln"
    assert config.optim.eps == 1e-3


def test_a_finished_run_shows_the_published_figure_of_the_file(monkeypatch, capsys):
    older = {"paper": {"rows": {"lns": {"published": "18.2"}}}, "row": "lns"}
    record = dict.fromkeys(("seed", "steps", "tokens", "tokens_per_second", "wall_seconds", "parameters"), 1)
    record |= {"history": {}, "config": older}
    monkeypatch.setattr("cod_lightning.commands.fit.train_run", lambda config: (record, config.folder))
    assert main(["fit", "experiments=table1_350m", "row=lns"]) == 0
    assert "18.20" in capsys.readouterr().out


def test_a_saved_run_of_an_older_version_loads_whatever_its_paper_block_holds(tmp_path):
    paper = {"sizes": 7, "rows": {"lns": {"published": "18.2", "colour": "red"}}}
    save_config(replace(compose(), paper=paper, scales={"tiny": 3}), tmp_path)
    assert load_config(tmp_path).paper == paper
