"""Carry out a run: build the parts, train, validate, record."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed import DistError

from cod_lightning.config.schema import TOKENIZER, EvalConfig, OptimConfig, TrainerConfig, run_of
from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.data.datamodule import TokenDataModule, tokenizer_of
from cod_lightning.data.images import ImageDataModule
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer
from cod_lightning.errors import Stopped, UserError, first_line
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.nn.weights import load_weights, shape_mismatches
from cod_lightning.train.callbacks import (
    LayerStatisticsCallback,
    MeasureCallback,
    ProgressBar,
    Recorder,
    StopSignal,
    progress,
)
from cod_lightning.train.checkpoint import (
    BEST,
    AtomicCheckpointIO,
    Checkpoints,
    checkpoints,
    read_checkpoint,
    resumable,
)
from cod_lightning.train.module import DecoderModule
from cod_lightning.train.record import environment, write_record
from cod_lightning.train.strategy import accelerator, precision, strategy_of
from cod_lightning.train.vision import VisionModule


@dataclass(frozen=True)
class Sections:
    """What a run is made of, section by section; `config` is all of it as plain data, for the record."""

    task: str
    model: DecoderConfig
    norm: Mapping[str, Any]
    data: DataConfig
    images: ImageConfig
    optim: OptimConfig
    evaluation: EvalConfig
    trainer: TrainerConfig
    logger: str
    seed: int
    init_from: str | None
    resume: bool
    config: Mapping[str, Any]


def fit(run: Sections, folder: Path, claim: Callable[[], object]) -> dict[str, Any]:
    """Train to the last step, going on from the newest checkpoint in `folder`, or else starting from `run.init_from`.

    Args:
        run: the settings.
        folder: checkpoints, TensorBoard events, the tokenizer and `record.json` go there.
        claim: called when all is checked, before the first file is written there.

    Returns:
        The run's record, as written to `record.json`.

    Raises:
        UserError: data, checkpoints or a device that cannot be had.
        Diverged: a loss that is not finite.
        Stopped: by a signal, or because another rank is gone.
    """
    with library_chatter_off():
        going_on = run.resume and checkpoints(folder / "checkpoints")
        start = None if run.init_from is None or going_on else initial(run, Path(run.init_from))
        data, module = build(run)
        if going_on:  # what is wrong with it is said before anything is written
            state = resumable(going_on[-1])
            data.load_state_dict(state.get(data.__class__.__qualname__, {"fingerprint": None}))
        if start is not None:
            module.origin, module.initial = start[0], (start[1], start[0]["checkpoint"])
        recorder = Recorder(run.trainer.log_every)
        callbacks: list[Callback] = [recorder, StopSignal(), *probes(run.trainer, data, recorder)]
        if run.trainer.progress:
            callbacks.append(progress(recorder, sys.stderr.isatty()))
        steps = Checkpoints(
            folder / "checkpoints", run.trainer.checkpoint_every, run.trainer.keep_last, run.evaluation.every
        )
        trainer = build_trainer(run, [*callbacks, steps], steps.io)
        claim()
        found = checkpoints(steps.folder)
        if run.logger == "tensorboard":
            # What was logged past the checkpoint will be logged again.
            purge = int(found[-1].stem.removeprefix("step-")) + 1 if found else None
            trainer.logger = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=purge)
        if isinstance(data, TokenDataModule):
            keep_tokenizer(data, folder)
        log_config(trainer, run.config)
        here = environment()
        with others_at_hand(run.trainer):
            trainer.fit(module, data, ckpt_path=found[-1] if found else None, weights_only=True)
            if recorder.history.get("val", {}).get("step", [None])[-1] != trainer.global_step:
                trainer.validate(module, data, verbose=False)
        record = {
            **recorder.final(),
            "steps": run.trainer.max_steps,
            "parameters": sum(p.numel() for p in module.network.parameters()),
            "precision": trainer.precision,
            "world_size": trainer.world_size,
            "seed": run.seed,
            "data_fingerprint": data.fingerprint,
            "init_from": module.origin,
            **here,
            "config": run.config,
            "history": recorder.history,
        }
        log_hyperparameters(trainer, run.config, record)
        if trainer.is_global_zero:
            write_record(folder, record)
    return record


def probes(settings: TrainerConfig, data: TokenDataModule | ImageDataModule, recorder: Recorder) -> list[Callback]:
    """What measures the layers as they train; of images there are layer statistics alone.

    Raises:
        UserError: there are fewer validation rows than `probe_rows`.
    """
    measures = {name: every for name, every in settings.measures.items() if every}
    if not settings.stats_every and not measures:
        return []
    probe = data.probe_batch(settings.probe_rows)
    found: list[Callback] = []
    if settings.stats_every:
        found.append(LayerStatisticsCallback(recorder, probe, settings.stats_every))
    if isinstance(probe, Tensor):
        found += [MeasureCallback(recorder, probe, every, name) for name, every in measures.items()]
    return found


def evaluate(run: Sections, checkpoint: Path) -> dict[str, float]:
    """Validation figures of a checkpoint on the data of `run`.

    Raises:
        UserError: a checkpoint that cannot be read, or data that does not fit it.
    """
    with library_chatter_off():
        data, module = build(run)
        state = read_checkpoint(checkpoint)["state_dict"]
        module.initial = {name.partition(".")[2]: tensor for name, tensor in state.items()}, str(checkpoint)
        trainer = build_trainer(run)
        trainer.validate(module, data, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}


def build(run: Sections) -> tuple[TokenDataModule, DecoderModule] | tuple[ImageDataModule, VisionModule]:
    """The data, prepared where it was not, and the module that fits it, of the run's task.

    Raises:
        UserError: data that cannot be had, is damaged or fits other settings; a vocabulary smaller than it needs; a
            device that is not there.
    """
    accelerator(run.trainer)  # before text is prepared for hours
    if run.trainer.threads:
        torch.set_num_threads(run.trainer.threads)
    settings: dict[str, Any] = {
        "norm": run.norm,
        "optim": run.optim,
        "seed": run.seed,
        "settings": run.trainer,
        "micro_batch_size": run.data.micro_batch_size,
    }
    if run.task == "vision":
        images = ImageDataModule(run.images, run.data, run.seed)
        images.setup("fit")
        return images, VisionModule(
            run.model,
            image_size=run.images.size,
            patch_size=run.images.patch_size,
            classes=len(images.classes),
            val_images=images.val_count,
            **settings,
        )
    data = TokenDataModule(run.data, run.seed)
    data.prepare_data()
    data.setup("fit")
    vocab_size = run.model.vocab_size or data.vocab_size
    max_id = max(data.manifest.train.max_id, data.manifest.val.max_id)
    if vocab_size <= max_id:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's: token {max_id} occurs in the data; "
            f"set model.vocab_size={data.vocab_size} or leave it null"
        )
    check_repetition(run, data.manifest.train.rows)
    module = DecoderModule(
        replace(run.model, vocab_size=vocab_size),
        evaluation=run.evaluation,
        seq_len=run.data.seq_len,
        pad_id=data.pad_id,
        val_rows=data.val_count,
        **settings,
    )
    return data, module


def check_repetition(run: Sections, rows: int) -> None:
    """Compare the rows that a run reads with those of its set, unless `data.repeat`.

    Raises:
        UserError: there are fewer; names both numbers of tokens.
    """
    steps, batch_size, seq_len = run.trainer.max_steps, run.data.batch_size, run.data.seq_len
    if not run.data.repeat and steps * batch_size > rows:
        raise UserError(
            f"data.repeat=false: trainer.max_steps={steps} reads {steps * batch_size * seq_len:,} training tokens, but "
            f"the set has {rows * seq_len:,}: use fewer steps or more text, or pass data.repeat=true"
        )


def initial(run: Sections, source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The weights to start from, and where they are found: `checkpoint` and its `step`.

    Args:
        run: that is to start from them.
        source: a run folder, of which it is the last checkpoint, or a .ckpt file.

    Raises:
        UserError: there is none, it has another shape than the run's decoder, or its run another tokenizer.
    """
    if not source.exists():
        raise UserError(f"init_from={source}: no such run folder or .ckpt file")
    path = source if source.suffix == ".ckpt" else checkpoint_of(source)
    theirs, ours = run_of(source) / TOKENIZER, run.data.tokenizer
    if str(theirs) == ours and not theirs.is_dir():
        raise UserError(f"init_from={source}: there is no tokenizer at {theirs}; name one with data.tokenizer=")
    tokenizer = tokenizer_of(run.data)
    if theirs.is_dir() and load_tokenizer(str(theirs)).sha256 != tokenizer.sha256:
        raise UserError(
            f"data.tokenizer={ours!r} is not the tokenizer of init_from={source}: data.tokenizer={theirs} is"
        )
    checkpoint = read_checkpoint(path, mmap=True)
    weights = network_state(checkpoint, "decoder")
    with torch.device("meta"):
        decoder = decoder_for(run, run.model.vocab_size or tokenizer.vocab_size)
    if found := shape_mismatches(decoder, weights):
        raise UserError(
            f"init_from={source}: {len(found)} parameters have another shape than this run's ({found[0]}): "
            "choose its model= and norm="
        )
    return {"checkpoint": str(path), "step": checkpoint.get("global_step", 0)}, weights


def network_state(checkpoint: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The weights of a run's `decoder` or `vit`."""
    state, prefix = checkpoint["state_dict"], f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def decoder_for(run: Sections, vocab_size: int) -> Decoder:
    """A decoder of the run's shape, not initialised."""
    return Decoder(replace(run.model, vocab_size=vocab_size), build_all(run.norm, run.model.num_hidden_layers))


def load_run(run: Sections, folder: Path, checkpoint: Path) -> tuple[Decoder, DocumentTokenizer]:
    """The decoder of a checkpoint on the CPU, and the run's tokenizer; the data is not needed.

    Raises:
        UserError: a checkpoint that cannot be read, or a run of images.
    """
    if run.task != "language":
        raise UserError(f"{folder} is a run of task={run.task}: only fit, evaluate and measure can read it")
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    state = network_state(read_checkpoint(checkpoint), "decoder")
    head = state.get("lm_head.weight")
    if head is None or head.ndim != 2:
        raise UserError(f"{checkpoint}: holds no decoder: lm_head.weight is missing, or no matrix")
    decoder = decoder_for(run, len(head))
    load_weights(decoder, state, str(checkpoint))
    return decoder, tokenizer


def load_vision_run(run: Sections, checkpoint: Path) -> VisionTransformer:
    """The Vision Transformer of a checkpoint, on the CPU; the images are not needed.

    Raises:
        UserError: a checkpoint that cannot be read.
    """
    state = network_state(read_checkpoint(checkpoint), "vit")
    head = state.get("head.weight")
    if head is None or head.ndim != 2:
        raise UserError(f"{checkpoint}: holds no Vision Transformer: head.weight is missing, or no matrix")
    specs = build_all(run.norm, run.model.num_hidden_layers)
    vit = VisionTransformer(run.model, specs, run.images.size, run.images.patch_size, len(head))
    load_weights(vit, state, str(checkpoint))
    return vit


def checkpoint_of(folder: Path, which: str = "last") -> Path:
    """The checkpoint of a run folder.

    Args:
        folder: of the run.
        which: `last`, or `best` by validation loss.

    Raises:
        UserError: there is none.
    """
    found = checkpoints(folder / "checkpoints") if which == "last" else [folder / "checkpoints" / BEST]
    if not found or not found[-1].exists():
        raise UserError(f"{folder}: no {which} checkpoint below checkpoints/; train it first with fit")
    return found[-1]


def build_trainer(run: Sections, callbacks: Sequence[Callback] = (), io: AtomicCheckpointIO | None = None) -> Trainer:
    """The Trainer of a run; it writes nothing yet.

    Raises:
        UserError: the machine does not have what `trainer.*` asks for.
    """
    settings = run.trainer
    try:
        return Trainer(
            accelerator=accelerator(settings),
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            # Plain DDP waits for the gradients of the blocks that rest.
            strategy=strategy_of(settings, unused=run.optim.lisa_layers > 0),
            precision=precision(settings),
            max_steps=settings.max_steps,
            max_epochs=-1,
            val_check_interval=run.evaluation.every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_checkpointing=io is not None,
            callbacks=list(callbacks),
            logger=False,
            plugins=[io or AtomicCheckpointIO(), *environments()],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(
            f"trainer.accelerator={settings.accelerator!r}, trainer.devices={settings.devices}: {error}"
        ) from error


def environments() -> list[Any]:
    """Slurm's, without what Lightning would do there on its own: `StopSignal` and the job's script do it."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def log_config(trainer: Trainer, config: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))


def log_hyperparameters(trainer: Trainer, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """What distinguishes runs, beside the figure they are compared by: TensorBoard's hparams table."""
    chosen = {"norm": config["norm"]["name"], "seed": config["seed"], "protocol": config["protocol"]}
    for section in ("model", "optim"):
        chosen |= {f"{section}.{key}": value for key, value in config[section].items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(chosen, metrics={"hp/val_loss": record["val_loss"]})
            logger.experiment.flush()  # training, which flushes at its end, is over


def write_imported(decoder: Decoder, tokenizer: DocumentTokenizer, folder: Path) -> None:
    """Write what `evaluate` and `load_run` read beside the configuration: a checkpoint of step 0, and the tokenizer.

    Raises:
        UserError: it cannot be written.
    """
    io = AtomicCheckpointIO()
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    io.save_checkpoint({"state_dict": state, "tokens": 0}, folder / "checkpoints" / "step-00000000.ckpt")
    if io.failure:
        raise UserError(io.failure)
    save_tokenizer(tokenizer.backend, tokenizer.eos_id, tokenizer.pad_id, folder)


@rank_zero_only
def keep_tokenizer(data: TokenDataModule, folder: Path) -> None:
    """Copy the tokenizer into the run folder: a run can be sampled, and evaluated on other text, without its data."""
    save_tokenizer(data.tokenizer(), data.eos_id, data.pad_id, folder)


def save_tokenizer(tokenizer: Tokenizer, eos_id: int, pad_id: int, folder: Path) -> None:
    target = folder / TOKENIZER
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    special = {"eos_token": tokenizer.id_to_token(eos_id), "pad_token": tokenizer.id_to_token(pad_id)}
    (target / "special_tokens_map.json").write_text(json.dumps(special) + "\n")


@contextlib.contextmanager
def others_at_hand(settings: TrainerConfig) -> Generator[None]:
    """Where another rank does not answer, or is gone, or a signal ends a run outside of its steps, say so."""
    try:
        yield
    except SIGTERMException as error:  # Lightning's, before the first step or after the last; as it is, a success
        raise Stopped("stopped as asked") from error
    except RuntimeError as error:
        if settings.world_size == 1 or not (isinstance(error, DistError) or re.search(GONE, str(error))):
            raise
        raise Stopped(
            f"another of the {settings.world_size} ranks is gone, or did not answer for "
            f"trainer.timeout={settings.timeout:g} s ({first_line(error)})"
        ) from error


GONE = r"(?i)gloo|connection (closed|reset|refused)|timed out|broken pipe"
"""What messages of a lost connection have in common."""


@contextlib.contextmanager
def library_chatter_off() -> Generator[None]:
    """Silence what Lightning says about choices that are made on purpose here."""
    lightning = logging.getLogger("lightning.pytorch")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            # One row set per step, read in the main process unless data.loader_workers says otherwise.
            r".*does not have many workers.*",
            # The order of the rows is a function of the step alone: there is no state to resume.
            r".*resuming from a checkpoint that ended before the epoch ended.*",
            # Every rank reads its own share of the validation rows.
            r".*Your `IterableDataset` has `__len__` defined.*",
            # Every rank logs the same figures, which metrics have summed over all.
            r".*It is recommended to use `self\.log\(.*sync_dist=True.*",
            # A run of one process on a machine that has Slurm is meant so.
            r".*`srun` command is available on your system but is not used.*",
            # Lightning calls what torch has deprecated.
            r".*isinstance\(treespec, LeafSpec\).*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            lightning.setLevel(level)
