"""Measures during training."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_files import last, losses, read_events, weights
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose
from cod_lightning.config.saved import load_config
from cod_lightning.errors import UserError
from cod_lightning.measure import registry
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.measure.training import TRAINING_MEASURES, probe_statistics
from cod_lightning.nn.vit import Images
from cod_lightning.train.callbacks import Recorder
from cod_lightning.train.load import checkpoint_of, load_decoder
from cod_lightning.train.module import DecoderModule
from cod_lightning.train.probes import is_figure_step
from cod_lightning.train.run import build_data_and_module
from cod_lightning.train.vision import VisionModule
from tiny_models import tiny_decoder

DEPTH, PAD = 3, 0
EVERY = [f"trainer.measures.{name}=4" for name in registry.MEASURES]


@pytest.fixture(scope="module")
def measured(toy, tmp_path_factory):
    """Record and folder of a run that takes every measure."""
    output = tmp_path_factory.mktemp("measured")
    return train_run(compose([*toy, *EVERY, "logger=[tensorboard,csv]", f"output={output}"]))


def test_training_is_bit_identical_without_measures(measured, train):
    record, folder = measured
    quiet, quiet_folder = train("trainer.stats_every=0")
    assert quiet["history"].keys() == {"train", "val"}
    assert losses(quiet) == losses(record)
    expected, actual = weights(last(quiet_folder)), weights(last(folder))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert 0 == quiet["measure_seconds"] < record["measure_seconds"]


class Waiting:
    """A value on a device: reading it takes four seconds."""

    def __init__(self, clock):
        self.clock = clock

    def __float__(self):
        self.clock.append(self.clock[-1] + 4)
        return 8.0


def test_the_seconds_of_a_step_include_the_wait_for_its_values(monkeypatch):
    clock, logged = [0.0], {}
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    recorder, trainer = Recorder(10, "strict"), SimpleNamespace(global_step=3, max_steps=9)
    module: Any = SimpleNamespace(log_dict=lambda values, **_: logged.update(values))
    recorder.on_train_batch_start(trainer, module, None, 3)
    recorder.on_train_batch_end(trainer, module, {"loss": 2.0, "tokens": Waiting(clock)}, None, 3)
    assert (recorder.train_seconds, logged["tokens/s"]) == (4.0, 2.0)


def test_a_measure_changes_neither_random_state_nor_mode(train, monkeypatch):
    modes = []

    def drawing(model, *_):
        modes.append(model.model.training)
        torch.rand(3)
        return registry.MEASURES["influence"](model, *_)

    monkeypatch.setitem(TRAINING_MEASURES, "influence", drawing)
    left = []
    for every in (0, 2):
        torch.manual_seed(0)
        train(f"trainer.measures.influence={every}", f"name=every{every}")
        left.append(torch.rand(3).tolist())
    assert left[0] == left[1]
    assert modes == [False] * 4


def test_every_measure_is_recorded_at_its_steps(measured):
    record, folder = measured
    history = record["history"]
    assert json.loads((folder / "record.json").read_text())["history"] == json.loads(json.dumps(history))
    lengths = {"swaps": DEPTH - 1, "theory": DEPTH + 1}
    for name in registry.MEASURES:
        series = history[name]
        assert series["step"] == [0, 4, 6], name
        for column, entries in series.items():
            if column == "step":
                continue
            expected = DEPTH - 1 if column == "delta_loss_2" else lengths.get(name, DEPTH)
            assert [len(entry) for entry in entries] == [expected] * 3, (name, column)
            assert all(isinstance(number, int | float | None) for entry in entries for number in entry)
    assert history["gain"]["layer"] == [[1, 2, 3]] * 3
    assert history["jacobian"]["distance"][0] != history["jacobian"]["distance"][2]


def test_the_last_record_is_the_measure_of_the_checkpoint(measured, toy):
    record, folder = measured
    run = load_config(folder)
    decoder, _ = load_decoder(run, folder, checkpoint_of(folder))
    data, _ = build_data_and_module(run)
    batches, model = [data.probe_batch(4)], ModelAdapter(decoder.eval())
    for name, measure in registry.MEASURES.items():
        result = TRAINING_MEASURES[name](model, batches, data.tokenizer.pad_id, lambda *_: None)
        for column, values in measure.recorded(result).items():
            assert record["history"][name][column][-1] == values, (name, column)


@pytest.fixture(scope="module")
def events(measured):
    return read_events(measured[1])


def test_tensorboard_has_scalars_by_layer(measured, events):
    measures = ("jacobian_distance", "angular_distance", "removal_delta_loss", "readout_kl", "variance_ffn_kurtosis")
    scalars = events.Tags()["scalars"]
    for name in (*measures, "variance", "attention_variance", "ffn_variance", "gradient_norm"):
        assert {f"{name}/layer_{layer:02d}" for layer in (1, 2, 3)} <= set(scalars)
    assert not [tag for tag in scalars if "_layer/" in tag]
    for name, kind, column in (("jacobian_distance", "jacobian", "distance"), ("variance", "layers", "variance")):
        last_value = measured[0]["history"][kind][column][-1][-1]
        assert events.Scalars(f"{name}/layer_03")[-1].value == pytest.approx(last_value)


def test_tensorboard_has_losses_and_perplexity(measured, events):
    assert [event.step for event in events.Scalars("Loss/train")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("val/ppl")[-1].value == pytest.approx(measured[0]["ppl"])
    assert "val/ppl_paper_protocol" not in events.Tags()["scalars"]  # protocol=strict; the record has it
    assert "ppl_paper_protocol" in measured[0]


def test_tensorboard_opens_on_the_losses(events):
    assert min(events.Tags()["scalars"]).startswith("Loss/")


def test_every_scalar_has_its_chart_in_the_layout(events):
    config = next(tag for tag in events.Tags()["tensors"] if tag.startswith("custom_scalars"))
    groups = Layout.FromString(events.Tensors(config)[0].tensor_proto.string_val[0]).category
    assert groups[0].title == "loss"
    patterns = [tag for group in groups for chart in group.chart for tag in chart.multiline.tag]
    scalars = [tag for tag in events.Tags()["scalars"] if tag.startswith("Loss/") or "/layer_" in tag]
    assert [tag for tag in scalars if not any(re.match(pattern, tag) for pattern in patterns)] == []


def test_every_logger_has_every_scalar(measured, events):
    table = (measured[1] / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert set(table[0].split(",")) - {"step"} == set(events.Tags()["scalars"]) - {"hp/val_loss"}


def test_tensorboard_has_figures(events):
    maps = {"jacobian_map", "angular", "causal", "influence", "longest_run"}
    assert set(events.Tags()["images"]) == {"variance by layer", *maps}


def test_figures_have_the_steps_of_their_measures(events):
    assert [image.step for image in events.Images("influence")] == [0, 4, 6]


def test_tensorboard_has_the_configuration_and_hyperparameters(events):
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_a_selection_of_layers_keeps_their_numbers(train):
    words = ("model.num_hidden_layers=11", "trainer.max_steps=1", "trainer.measures.jacobian=1")
    record, folder = train(*words, "logger=tensorboard")
    layers = [1, 2, 3, 5, 6, 8, 9, 11]
    assert record["history"]["jacobian"]["layer"] == [layers, layers]
    tags = [tag for tag in read_events(folder).Tags()["scalars"] if tag.startswith("jacobian_distance/")]
    assert tags == [f"jacobian_distance/layer_{layer:02d}" for layer in layers]


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [0, 3, 6, 9, 12, 15, 18, 21, 24]),
        (4, [0, 4, 8, 12, 16, 20, 24]),
        (5, [0, 5, 10, 15, 20]),
        (100, [0]),
    ],
)
def test_a_run_draws_at_most_nine_figures(every, expected):
    assert [step for step in range(0, 25, every) if is_figure_step(step, every, max_steps=24)] == expected


def test_a_measure_that_does_not_apply_stops_a_run_before_its_first_step(train):
    with pytest.raises(UserError, match=r"linear_replacement: .* needs more tokens than the hidden size 32, not 32"):
        train("trainer.probe_rows=1", "trainer.measures.linear_replacement=2")


def test_a_measure_that_stops_to_apply_is_skipped(train, monkeypatch):
    def once(model, *_):
        if model.name != "step 0":
            raise UserError("no spectrum")
        return registry.MEASURES["sparsity"](model, *_)

    monkeypatch.setitem(TRAINING_MEASURES, "sparsity", once)
    with pytest.warns(UserWarning, match="step 2: sparsity is skipped: no spectrum"):
        record, _ = train("trainer.measures.sparsity=100", "trainer.max_steps=2")
    assert record["history"]["sparsity"]["step"] == [0]


def probe(sequences):
    tokens = torch.randint(1, 37, (sequences, 8), generator=torch.Generator().manual_seed(sequences))
    tokens[0, 5:] = PAD
    return tokens


def text_module():
    module = DecoderModule(compose(), pad_id=PAD, val_rows=1)
    module.decoder = tiny_decoder()
    return module


def image_module():
    module = VisionModule(compose(["task=vision", "model=vit_tiny"]), classes=5, val_images=1)
    module.build(torch.device("cpu"), lambda vit: None)
    return module


def statistics_of_two_ranks(build_module, probe):
    """The layer statistics of two ranks that are threads; a sum over the ranks waits for both."""
    barrier, values, modules = threading.Barrier(2), [None, None], [build_module(), build_module()]

    def run(rank):
        def total(value):
            values[rank] = value
            barrier.wait(timeout=60)
            result = values[0] + values[1]
            barrier.wait(timeout=60)
            return result

        module = modules[rank]
        module._trainer, module.sum_over_ranks = SimpleNamespace(global_rank=rank, world_size=2), total
        return vars(module.statistics(module.network, probe))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_two_ranks_have_the_layer_statistics_of_one(sequences):
    expected = vars(probe_statistics(tiny_decoder(), probe(sequences), PAD))
    for statistics in statistics_of_two_ranks(text_module, probe(sequences)):
        for name, values in expected.items():
            assert statistics[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("images", [1, 3])
def test_two_ranks_have_the_layer_statistics_of_one_on_images(images):
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(images) + 1
    expected = vars(probe_statistics(image_module().vit, Images(pixels, labels)))
    for statistics in statistics_of_two_ranks(image_module, Images(pixels, labels)):
        for name, values in expected.items():
            assert statistics[name] == pytest.approx(values, rel=1e-4), name
