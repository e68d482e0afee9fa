"""Lightning's loggers of a run, and what they hold besides numbers: configuration, layout and figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from cod_lightning.config.saved import to_yaml
from cod_lightning.config.schema import Config, TrainerConfig
from cod_lightning.errors import UserError
from cod_lightning.files import locked
from cod_lightning.measure.registry import MEASURES
from cod_lightning.train.record import package_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "cod_lightning"
"""Project of wandb and experiment of MLflow, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set."""
EXTRAS = ("wandb", "mlflow")
"""Loggers whose package is an extra of the same name."""


def check_loggers(names: Iterable[str]) -> None:
    """Check that the packages of loggers are installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name in EXTRAS and package_version(name) is None:
            raise UserError(f"logger={name} needs {name}: pip install 'cod_lightning[{name}]'")


def build_loggers(config: Config, folder: Path, step: int | None) -> list[Logger]:
    """The loggers of a run that resumes from `step`, after which TensorBoard's events are purged; None: a new run."""
    builders = {
        # In the run folder itself, so that TensorBoard names the run as its folder.
        "tensorboard": lambda: EventLogger(folder, name="", version="", purge_step=None if step is None else step + 1),
        "csv": lambda: CSVLogger(folder, name="csv", flush_logs_every_n_steps=1),
        "wandb": lambda: wandb_logger(config, folder),
        "mlflow": lambda: mlflow_logger(config),
    }
    return [builders[name]() for name in config.loggers]


class EventLogger(TensorBoardLogger):
    """A TensorBoardLogger that raises the OSError of its writer thread, such as a full disk.

    Lightning raises a ValueError.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        try:
            super().log_metrics(metrics, step)
        except ValueError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise


def wandb_logger(config: Config, folder: Path) -> WandbLogger:
    """A wandb run inside the run folder, offline unless WANDB_MODE is set; an interrupted run keeps its id."""
    return WandbLogger(
        config.label,
        folder,
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=config.experiment,
        mode=os.environ.get("WANDB_MODE", "offline"),
        resume="auto",
    )


def mlflow_logger(config: Config) -> MLFlowLogger:
    """An MLflow run in `mlflow.db` of the output folder, or where MLFLOW_TRACKING_URI says."""
    root = Path(config.output).resolve()
    root.mkdir(parents=True, exist_ok=True)  # this rank may be the first
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    with locked(root / ".mlflow.lock"):  # parallel runs of a sweep would create the same experiment
        logger = MLFlowLogger(
            os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=config.label,
            tracking_uri=uri or f"sqlite:///{root / 'mlflow.db'}",
            artifact_location=None if uri else (root / "mlartifacts").as_uri(),
        )
        _ = logger.experiment
    return logger


def log_config(trainer: Trainer, config: Config) -> None:
    """Log the configuration as text and, except to TensorBoard, as hyperparameters; lay out TensorBoard's charts.

    TensorBoard's table of hyperparameters needs the final loss.
    """
    values = asdict(config)
    text = to_yaml(config)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))
            logger.experiment.add_custom_scalars(custom_scalars(config.task, config.trainer))
            continue
        logger.log_hyperparams(hyperparameters(values))
        if isinstance(logger, WandbLogger):
            logger.log_text("config", columns=["yaml"], data=[[text]])
        if isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, "config.yaml")


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that distinguish runs."""
    fields = {name: config[name] for name in ("seed", "protocol", "init_from")}
    fields |= {"max_steps": config["trainer"]["max_steps"]}
    for section in ("norm", "model", "optim", "data", *(["images"] if config["task"] == "vision" else [])):
        fields |= {f"{section}.{key}": value for key, value in config[section].items()}
    return fields


def layer_scalars(series: Mapping[str, Sequence[Any]], prefix: str = "") -> dict[str, float]:
    """The numbers of series by layer, named such as `variance/layer_01`; None is left out.

    Args:
        series: values by name; `layer`, where there is one, says which layers they are, otherwise 1, 2, ....
        prefix: of every name.
    """
    return {
        f"{prefix}{name}/layer_{layer:02d}": value
        for name, values in series.items()
        if name != "layer"
        for layer, value in zip(series.get("layer") or count(1), values, strict=False)
        if value is not None
    }


def custom_scalars(task: str, settings: TrainerConfig) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's Custom Scalars tab: the losses first, then one chart a measure with all of its layers."""
    groups: dict[str, list[str]] = {}
    if settings.stats_every:
        groups["layers"] = ["variance", "attention_variance", "ffn_variance", "gradient_norm"]
    for name, every in settings.measures.items():
        if every:
            groups[name] = [f"{name}_{column}" for column in MEASURES[name].series if column != "layer"]
    metric, tag = ("accuracy", "val/accuracy") if task == "vision" else ("perplexity", "val/ppl")
    losses = {"loss": ["Multiline", ["Loss/train", "Loss/val"]], metric: ["Multiline", [tag]]}
    return {"loss": losses} | {
        group: {chart: ["Multiline", [f"^{chart}/layer_"]] for chart in charts} for group, charts in groups.items()
    }


def log_figure(trainer: Trainer, name: str, plot: Callable[[], Figure]) -> None:
    """Draw a figure for the loggers that hold images."""
    loggers = [logger for logger in trainer.loggers if not isinstance(logger, CSVLogger)]
    if not loggers:
        return
    figure, step = plot(), trainer.global_step
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, global_step=step)
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [figure], step=step)
        if isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, f"{name}/step-{step:08d}.png")


def finish_loggers(trainer: Trainer, config: Mapping[str, Any], val_loss: float) -> None:
    """Log the hyperparameters with the validation loss for TensorBoard's hparams table, and end the run of wandb."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(hyperparameters(config), metrics={"hp/val_loss": val_loss})
            logger.experiment.flush()  # Lightning flushes at the end of training, which is over
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
