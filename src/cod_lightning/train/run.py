"""Train a run or validate a checkpoint: data, module, callbacks, trainer, fit, record."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from cod_lightning.config.schema import CHECKPOINTS, TOKENIZER, Config, run_folder_of
from cod_lightning.data.datamodule import TokenDataModule
from cod_lightning.data.images import ImageDataModule
from cod_lightning.errors import UserError
from cod_lightning.measure.result import finite_or_none
from cod_lightning.nn.spec import check_schedules
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.callbacks import Checkpoints, ProgressBar, ProgressLines, Recorder, StopOnSignal
from cod_lightning.train.checkpoint import newest_checkpoint, read_resumable, step_of
from cod_lightning.train.devices import accelerator, check_norm_backend, set_threads
from cod_lightning.train.load import (
    InitialWeights,
    describe_other_settings,
    load_initial_weights,
    read_run_weights,
    require_own_classes,
    require_own_tokenizer,
)
from cod_lightning.train.loggers import build_loggers, finish_loggers, log_config
from cod_lightning.train.memory import check_memory
from cod_lightning.train.module import DecoderModule, StepModule
from cod_lightning.train.probes import probe_callbacks
from cod_lightning.train.record import RECORD, environment, write_json
from cod_lightning.train.trainer import build_trainer, quiet_lightning, translate_rank_failures
from cod_lightning.train.vision import VisionModule

Data = TokenDataModule | ImageDataModule


def fit(config: Config, folder: Path, before_writing: Callable[[], object]) -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint in `folder` or from the start, and write `record.json`.

    Args:
        config: the run.
        folder: the run folder: checkpoints, logs, the tokenizer and the record.
        before_writing: called after all checks, before the first file is written.

    Returns:
        The run's record.

    Raises:
        UserError: data, a checkpoint or a device is missing or unusable, or the memory is too small.
        Diverged: the loss is not finite.
        Stopped: a signal interrupted the run, or another rank is gone.
    """
    settings = config.trainer
    check_memory(config)
    check_norm_backend(config)
    check_schedules(build_all(config.norm, config.model.num_hidden_layers), settings.max_steps)
    with quiet_lightning():
        checkpoint = newest_checkpoint(folder / CHECKPOINTS) if config.resume else None
        data_state = None if checkpoint is None else resumed_data_state(config, checkpoint)
        initial = None
        if checkpoint is None and config.init_from is not None:
            initial = load_initial_weights(config, Path(config.init_from))

        data, module = build_data_and_module(config)
        if isinstance(data, TokenDataModule):
            check_repetition(config, data.manifest.train.rows)
        module.initial_weights = initial
        if data_state is not None:
            data.load_state_dict(data_state)

        recorder = Recorder(settings.log_every, config.protocol)
        callbacks = [recorder, StopOnSignal(), *probe_callbacks(settings, data, recorder)]
        if settings.progress:
            callbacks.append(ProgressBar(leave=True) if sys.stderr.isatty() else ProgressLines(recorder))
        saver = Checkpoints(folder / CHECKPOINTS, settings.checkpoint_every, settings.keep_last, config.eval.every)

        trainer = build_trainer(config, [*callbacks, saver], saver.io)
        before_writing()
        trainer.loggers = build_loggers(config, folder, None if checkpoint is None else step_of(checkpoint))
        if isinstance(data, TokenDataModule) and trainer.is_global_zero:
            data.tokenizer.save(folder / TOKENIZER)
        log_config(trainer, config)

        env = environment()
        with translate_rank_failures(settings):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
            if recorder.last_validation != trainer.global_step:
                trainer.validate(module, data, verbose=False)

        record = finite_or_none(build_record(config, env, recorder, trainer, module, data))
        finish_loggers(trainer, record["config"], record["val_loss"])
        if trainer.is_global_zero:
            write_json(folder / RECORD, record)
    return record


def resumed_data_state(config: Config, checkpoint: Path) -> dict[str, Any]:
    """The state of the data module in a checkpoint from which this run can resume.

    Raises:
        UserError: the checkpoint is unreadable, holds weights only, or is of a run with other settings.
    """
    # No variable of the caller holds the content: its memory map would keep the file on the disk after it is replaced.
    content = read_resumable(checkpoint)
    if differing := describe_other_settings(config, content):
        raise UserError(
            f"{checkpoint} is of a run with other settings ({differing}): choose another name=, or pass resume=false "
            "to retrain"
        )
    return content.get("ImageDataModule" if config.task == "vision" else "TokenDataModule", {"fingerprint": None})


def validate_checkpoint(config: Config, checkpoint: Path) -> dict[str, float]:
    """The validation metrics of a checkpoint on the data of `config`.

    Raises:
        UserError: the checkpoint is unreadable or not finite, or the data or its tokenizer does not fit it.
        Stopped: a signal interrupted the validation, or another rank is gone.
    """
    with quiet_lightning():
        weights, _, step = read_run_weights(config, checkpoint)  # before hours of preparation
        data, module = build_data_and_module(config)
        if isinstance(data, TokenDataModule):
            require_own_tokenizer(run_folder_of(checkpoint), data)
        else:
            require_own_classes(checkpoint, data)
        module.initial_weights = InitialWeights(weights, str(checkpoint), step)
        trainer = build_trainer(config)
        with translate_rank_failures(config.trainer):
            trainer.validate(module, data, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


def build_data_and_module(config: Config) -> tuple[Data, StepModule]:
    """The data and the module of a run; text is prepared if it is not yet.

    Raises:
        UserError: data is missing, damaged or prepared with other settings, the vocabulary is too small for it, or the
            device is missing.
    """
    accelerator(config.trainer)  # raises before text is prepared for hours
    set_threads(config.trainer)
    if config.task == "vision":
        images = ImageDataModule(config.images, config.data, config.seed)
        images.setup("fit")
        return images, VisionModule(config, classes=len(images.classes), val_images=images.val_count)
    tokens = TokenDataModule(config.data, config.seed)
    tokens.prepare_data()
    tokens.setup("fit")
    model = replace(config.model, vocab_size=checked_vocab_size(config, tokens))
    return tokens, DecoderModule(
        replace(config, model=model), pad_id=tokens.tokenizer.pad_id, val_rows=tokens.val_count
    )


def check_repetition(config: Config, sequences: int) -> None:
    """With `data.repeat=false`, check that training reads no sequence twice.

    Raises:
        UserError: training reads more than the set's `sequences`.
    """
    steps, batch_size, seq_len = config.trainer.max_steps, config.data.batch_size, config.data.seq_len
    if not config.data.repeat and steps * batch_size > sequences:
        raise UserError(
            f"data.repeat=false: trainer.max_steps={steps} reads {steps * batch_size * seq_len:,} training tokens, but "
            f"the set has {sequences * seq_len:,}: use fewer steps or more text, or pass data.repeat=true"
        )


def checked_vocab_size(config: Config, data: TokenDataModule) -> int:
    """`model.vocab_size`, or the tokenizer's.

    Raises:
        UserError: a token of the data is not smaller.
    """
    tokenizer = data.tokenizer
    size = config.model.vocab_size or tokenizer.vocab_size
    max_id = max(data.manifest.train.max_id, data.manifest.val.max_id)
    if data.manifest.layout != "packed":
        max_id = max(max_id, tokenizer.pad_id)
    if size <= max_id:
        raise UserError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer.vocab_size}: token {max_id} "
            f"({tokenizer.backend.id_to_token(max_id)!r}) occurs in the data; set model.vocab_size="
            f"{tokenizer.vocab_size} or null to train a model, and use its own tokenizer to evaluate one"
        )
    return size


def build_record(
    config: Config, env: dict[str, Any], recorder: Recorder, trainer: Trainer, module: StepModule, data: Data
) -> dict[str, Any]:
    """The record of a finished run."""
    return {
        **recorder.final(),
        "steps": config.trainer.max_steps,
        "parameters": sum(parameter.numel() for parameter in module.network.parameters()),
        "precision": trainer.precision,
        "world_size": trainer.world_size,
        "seed": config.seed,
        "data_fingerprint": data.fingerprint,
        "init_from": module.origin,
        **env,
        "config": asdict(config),
        "history": recorder.history,
    }
