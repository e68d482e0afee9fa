"""Measures while a model trains: what they record, what they leave alone, and that ranks agree."""

import json
import socket

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cod_lightning.commands.fit import train_run
from cod_lightning.config.compose import compose
from cod_lightning.config.saved import load
from cod_lightning.errors import UserError
from cod_lightning.measure import registry
from cod_lightning.measure.activation_stats import layer_statistics
from cod_lightning.measure.adapter import ModelAdapter
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.init import build_decoder
from cod_lightning.nn.parallel import unwrapped_copy
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.callbacks import MAX_FIGURES, TRAINING_MEASURES, training_jacobian
from cod_lightning.train.checkpoint import checkpoints, read_checkpoint
from cod_lightning.train.load import checkpoint_of, load_decoder
from cod_lightning.train.module import rank_share
from cod_lightning.train.run import build

DEPTH, PAD = 3, 0
EVERY = [f"trainer.measures.{name}=4" for name in registry.MEASURES]


@pytest.fixture(scope="module")
def measured(toy, tmp_path_factory):
    """Record and folder of a run that takes every measure."""
    return train_run(compose([*toy, *EVERY, "logger=tensorboard", f"output={tmp_path_factory.mktemp('measured')}"]))


def weights(folder):
    return read_checkpoint(checkpoints(folder / "checkpoints")[-1])["state_dict"]


def test_training_is_the_same_to_the_bit_with_and_without_measures(measured, train):
    record, folder = measured
    plain, bare = train("trainer.stats_every=0", "trainer.measures.jacobian=0")
    assert plain["history"].keys() == {"train", "val"}
    assert plain["history"]["train"]["loss"] == record["history"]["train"]["loss"]
    assert plain["val_loss"] == record["val_loss"]
    expected, found = weights(bare), weights(folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert 0 == plain["measure_seconds"] < record["measure_seconds"]


def test_a_measure_that_draws_numbers_or_changes_the_mode_leaves_no_trace(train, monkeypatch):
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


def test_what_is_recorded_last_is_what_the_checkpoint_measures(measured, toy):
    record, folder = measured
    run = load(folder)
    decoder, _ = load_decoder(run, folder, checkpoint_of(folder))
    data, _ = build(run)
    batches, model = [data.probe_batch(4)], ModelAdapter(decoder.eval())
    for name, measure in registry.MEASURES.items():
        result = TRAINING_MEASURES[name](model, batches, data.pad_id, lambda *_: None)
        for column, values in measure.recorded(result).items():
            assert record["history"][name][column][-1] == values, (name, column)


def test_tensorboard_has_scalars_by_layer_and_maps(measured):
    record, folder = measured
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for name in ("jacobian_distance", "angular_distance", "removal_delta_loss", "readout_kl", "variance_ffn_kurtosis"):
        assert {f"{name}/layer_{layer:02d}" for layer in (1, 2, 3)} <= scalars
    assert not [tag for tag in scalars if "_layer/" in tag]
    last = record["history"]["jacobian"]["distance"][-1][-1]
    assert events.Scalars("jacobian_distance/layer_03")[-1].value == pytest.approx(last)
    assert set(events.Tags()["images"]) == {"variance by layer", "jacobian_map", "angular", "causal", "influence"}


def test_layers_that_are_chosen_keep_their_numbers(train):
    record, folder = train("model.num_hidden_layers=11", "trainer.max_steps=1", "logger=tensorboard")
    layers = [1, 2, 3, 5, 6, 8, 9, 11]
    assert record["history"]["jacobian"]["layer"] == [layers, layers]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("jacobian_distance/")]
    assert tags == [f"jacobian_distance/layer_{layer:02d}" for layer in layers]


def test_a_long_run_draws_no_more_figures_than_a_short_one(train):
    words = ["trainer.max_steps=24", "trainer.stats_every=1", "trainer.measures.angular=1", "logger=tensorboard"]
    record, folder = train(*words, "trainer.checkpoint_every=100", "eval.every=100")
    assert len(record["history"]["angular"]["step"]) == 25
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    steps = [24 * part // MAX_FIGURES for part in range(MAX_FIGURES + 1)]
    assert [image.step for image in events.Images("angular")] == steps
    assert [image.step for image in events.Images("variance by layer")] == steps[1:]


def test_what_cannot_be_measured_stops_a_run_before_its_first_step_and_later_is_left_out(train, monkeypatch):
    words = ["trainer.probe_rows=1", "trainer.measures.linear_replacement=2"]
    with pytest.raises(UserError, match=r"linear_replacement: .* needs more tokens than the hidden size 32, not 32"):
        train(*words, "name=refused")

    def once(model, *_):
        if model.name != "step 0":
            raise UserError("no spectrum")
        return registry.MEASURES["sparsity"](model, *_)

    monkeypatch.setitem(TRAINING_MEASURES, "sparsity", once)
    with pytest.warns(UserWarning, match="step 6: sparsity is skipped: no spectrum"):
        record, _ = train("trainer.measures.sparsity=100", "name=warned")
    assert record["history"]["sparsity"]["step"] == [0]


def tiny():
    shape = DecoderConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=DEPTH, num_attention_heads=2, vocab_size=37
    )
    return build_decoder(shape, build_all({"name": "lns"}, DEPTH), seed=0)


def probe(rows):
    tokens = torch.randint(1, 37, (rows, 8), generator=torch.Generator().manual_seed(rows))
    tokens[0, 5:] = PAD
    return tokens


def statistics_of_a_rank(decoder, rows, rank):
    def total(x):
        torch.distributed.all_reduce(x)
        return x

    return layer_statistics(decoder, rank_share(probe(rows), rank, 2, PAD), PAD, sum_over_ranks=total)


def two_ranks(rank, port, folder):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = [statistics_of_a_rank(tiny(), rows, rank) for rows in (1, 2, 5)]
    sharded = tiny()
    for block in sharded.blocks:
        fully_shard(block, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    fully_shard(sharded, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    found.append(statistics_of_a_rank(unwrapped_copy(sharded), 5, rank))
    jacobians = training_jacobian(ModelAdapter(unwrapped_copy(sharded).eval()), [probe(5)], PAD, lambda *_: None)
    torch.save([*map(vars, found), vars(jacobians)], folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_find_what_one_does_also_of_a_sharded_decoder(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_ranks, (port, tmp_path), nprocs=2)
    decoder = tiny()
    expected = [vars(layer_statistics(decoder, probe(rows), PAD)) for rows in (1, 2, 5, 5)]
    jacobians = vars(training_jacobian(ModelAdapter(decoder.eval()), [probe(5)], PAD, lambda *_: None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for one, two in zip(expected, found[:-1], strict=True):
            for name, values in one.items():
                assert two[name] == pytest.approx(values, rel=1e-4), name
        assert found[-1] == jacobians


def test_a_decoder_that_is_not_sharded_is_measured_with_its_own_weights():
    decoder = tiny()
    copy = unwrapped_copy(decoder)
    assert copy.lm_head.weight.data_ptr() == decoder.lm_head.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in copy.parameters())
