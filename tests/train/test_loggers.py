"""Loggers alone; `test_callbacks.py` reads what a run logs.

The tests that log with wandb and mlflow are marked `extended`, because `.[dev]` does not install these large packages.
To run them: `pip install -e '.[wandb,mlflow]'`, then `pytest -m extended tests/train/test_loggers.py`.
"""

import errno
from dataclasses import asdict

import pytest
from run_files import read_events
from tensorboard.summary.writer.record_writer import RecordWriter

from cod_lightning.config.compose import compose
from cod_lightning.errors import UserError
from cod_lightning.train import loggers


@pytest.mark.parametrize("name", loggers.EXTRAS)
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(name, train, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "package_version", lambda package: None)
    with pytest.raises(UserError) as error:
        train(f"logger=[csv,{name}]", f"data.root={tmp_path / 'data'}")
    assert str(error.value) == f"logger={name} needs {name}: pip install 'cod_lightning[{name}]'"
    assert list(tmp_path.iterdir()) == []


def test_rows_of_csv_are_written_at_once(tmp_path):
    config = compose(["logger=csv"])
    (logger,) = loggers.build_loggers(config, tmp_path, None)
    logger.log_metrics({"Loss/train": 1.0}, step=10)
    assert (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[1:] == ["1.0,10"]


def test_events_after_the_checkpoint_of_a_resumed_run_are_replaced(tmp_path):
    config = compose(["logger=tensorboard"])
    for checkpoint, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        (logger,) = loggers.build_loggers(config, tmp_path, checkpoint)
        for step in steps:
            logger.log_metrics({"Loss/train": 1.0}, step=step)
        logger.finalize("success")
        if checkpoint is None:  # the names of later files sort after this one, whatever the clock says
            (file,) = tmp_path.glob("events.*")
            file.rename(file.with_name("events.out.tfevents.0"))
    assert [event.step for event in read_events(tmp_path).Scalars("Loss/train")] == [1, 2, 3, 4]


def fill_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_events_of_tensorboard_is_one_error(train, monkeypatch):
    monkeypatch.setattr(RecordWriter, "write", fill_disk)
    with pytest.raises(UserError, match=r"^\S+/run: No space left on device$"):
        train("logger=tensorboard", "name=run")


def test_a_full_disk_is_not_called_a_wrong_metric(tmp_path, monkeypatch):
    (logger,) = loggers.build_loggers(compose(["logger=tensorboard"]), tmp_path, None)
    monkeypatch.setattr(logger.experiment, "add_scalar", fill_disk)
    with pytest.raises(OSError, match="No space left on device"):
        logger.log_metrics({"Loss/train": 1.0}, step=10)


def test_hyperparameters_tell_the_options_of_a_strategy_and_the_data_apart():
    words = ("norm=lns", "norm.position=only_ffn", "data.batch_size=32", "trainer.max_steps=7", "seed=5")
    fields = loggers.hyperparameters(asdict(compose(words)))
    expected = {"norm.name": "lns", "norm.position": "only_ffn", "data.batch_size": 32, "max_steps": 7, "seed": 5}
    assert fields.items() >= expected.items()


@pytest.fixture
def logged(train, monkeypatch):
    """`logged(name)` trains two steps with that logger, without the user's settings of it, and returns the folder."""

    def run(name):
        for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            monkeypatch.delenv(variable, raising=False)
        return train(f"logger={name}", "trainer.max_steps=2", "trainer.measures={jacobian: 2, influence: 2}")

    return run


@pytest.mark.extended
def test_wandb_keeps_a_run_offline_in_its_run_folder(logged):
    pytest.importorskip("wandb", reason="wandb is not installed")
    record, folder = logged("wandb")
    (stored,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for name in ("Loss/train", "val/ppl", "variance/layer_03", "jacobian_distance/layer_01", "model.hidden_size"):
        assert name.encode() in content, name
    assert list((folder / "wandb").glob("offline-run-*/files/media/images/influence*.png"))
    assert record["config"]["logger"] == "wandb"


@pytest.mark.extended
@pytest.mark.filterwarnings("default")  # mlflow uses what sqlalchemy has deprecated
def test_mlflow_has_the_numbers_the_settings_and_the_figures(logged, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    record, _ = logged("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("cod_lightning").experiment_id])
    assert run.data.metrics["Loss/val"] == pytest.approx(record["val_loss"])
    assert run.data.metrics["variance/layer_03"] == pytest.approx(record["history"]["layers"]["variance"][-1][-1])
    assert run.data.params["norm.name"] == "lns"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        *("config.yaml", "influence", "variance by layer"),
    }
    assert run.info.status == "FINISHED"
