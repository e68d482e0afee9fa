"""Carry out a run: build the parts, train, validate, record."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tokenizers import Tokenizer
from torch import Tensor, nn

from cod_lightning.data.config import DataConfig, ImageConfig
from cod_lightning.data.datamodule import TokenDataModule, tokenizer_of
from cod_lightning.data.images import ImageDataModule
from cod_lightning.data.tokenizer import DocumentTokenizer, load_tokenizer
from cod_lightning.errors import UserError
from cod_lightning.nn.config import DecoderConfig
from cod_lightning.nn.decoder import Decoder
from cod_lightning.nn.strategies import build_all
from cod_lightning.train.callbacks import (
    LayerStatisticsCallback,
    MeasureCallback,
    ProgressBar,
    Recorder,
    progress,
)
from cod_lightning.train.checkpoint import (
    BEST,
    AtomicCheckpointIO,
    Checkpoints,
    checkpoints,
    differing,
    read_checkpoint,
    resumable,
)
from cod_lightning.train.config import TOKENIZER, EvalConfig, OptimConfig, TrainerConfig, run_of
from cod_lightning.train.module import DecoderModule
from cod_lightning.train.record import environment, write_record
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
    """
    with library_chatter_off():
        going_on = run.resume and checkpoints(folder / "checkpoints")
        origin, weights = (None, None) if run.init_from is None or going_on else initial(run, Path(run.init_from))
        data, module = build(run)
        if going_on:  # what is wrong with it is said before anything is written
            state = resumable(going_on[-1], mmap=True)
            data.load_state_dict(state.get(data.__class__.__qualname__, {"fingerprint": None}))
        module.origin, module.initial = origin, weights
        recorder = Recorder(run.trainer.log_every)
        callbacks: list[Callback] = [recorder, *probes(run.trainer, data, recorder)]
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
        module.configure_model()
        load_state(module, read_checkpoint(checkpoint)["state_dict"], checkpoint)
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
        "max_steps": run.trainer.max_steps,
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
    module = DecoderModule(
        replace(run.model, vocab_size=vocab_size),
        evaluation=run.evaluation,
        seq_len=run.data.seq_len,
        pad_id=data.pad_id,
        val_rows=data.val_count,
        **settings,
    )
    return data, module


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
    path = checkpoint_of(source) if source.is_dir() else source
    theirs, ours = run_of(source) / TOKENIZER, run.data.tokenizer
    if str(theirs) == ours and not theirs.is_dir():
        raise UserError(f"init_from={source}: there is no tokenizer at {theirs}; name one with data.tokenizer=")
    tokenizer = tokenizer_of(run.data)
    if theirs.is_dir() and load_tokenizer(str(theirs)).sha256 != tokenizer.sha256:
        raise UserError(
            f"data.tokenizer={ours!r} is not the tokenizer of init_from={source}: data.tokenizer={theirs} is"
        )
    checkpoint = read_checkpoint(path, mmap=True)
    weights = decoder_state(checkpoint)
    with torch.device("meta"):
        decoder = decoder_for(run, run.model.vocab_size or tokenizer.vocab_size)
    if found := differing(decoder.state_dict(), weights):
        raise UserError(
            f"init_from={source}: {len(found)} parameters have another shape than this run's ({found[0]}): "
            "choose its model= and norm="
        )
    return {"checkpoint": str(path), "step": checkpoint.get("global_step", 0)}, weights


def decoder_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    state = checkpoint["state_dict"]
    return {name.removeprefix("decoder."): tensor for name, tensor in state.items() if name.startswith("decoder.")}


def decoder_for(run: Sections, vocab_size: int) -> Decoder:
    """A decoder of the run's shape, not initialised."""
    return Decoder(replace(run.model, vocab_size=vocab_size), build_all(run.norm, run.model.num_hidden_layers))


def load_run(run: Sections, folder: Path, checkpoint: Path) -> tuple[Decoder, DocumentTokenizer]:
    """The decoder of a checkpoint on the CPU, and the run's tokenizer; the data is not needed.

    Raises:
        UserError: a checkpoint that cannot be read, or a run of images.
    """
    if run.task != "language":
        raise UserError(f"{folder} is a run of task={run.task}: only fit and evaluate can read it")
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    state = decoder_state(read_checkpoint(checkpoint))
    head = state.get("lm_head.weight")
    if head is None or head.ndim != 2:
        raise UserError(f"{checkpoint}: holds no decoder: lm_head.weight is missing, or no matrix")
    decoder = decoder_for(run, len(head))
    load_state(decoder, state, checkpoint)
    return decoder, tokenizer


def load_state(module: nn.Module, state: Mapping[str, Tensor], checkpoint: Path) -> None:
    if found := differing(module.state_dict(), state):
        raise UserError(
            f"{checkpoint}: {len(found)} parameters have another shape than the run's configuration says ({found[0]})"
        )
    module.load_state_dict(state)


def checkpoint_of(folder: Path, which: str = "last") -> Path:
    """The checkpoint of a run folder.

    Args:
        folder: of the run.
        which: `last`, or `best` by validation loss.

    Raises:
        UserError: there is none.
    """
    found = checkpoints(folder / "checkpoints") if which == "last" else [folder / "checkpoints" / BEST]
    if not found or not found[-1].is_file():
        raise UserError(f"{folder}: no {which} checkpoint below checkpoints/; train it first with fit")
    return found[-1]


def build_trainer(run: Sections, callbacks: Sequence[Callback] = (), io: AtomicCheckpointIO | None = None) -> Trainer:
    """The Trainer of a run; it writes nothing yet.

    Raises:
        UserError: the machine does not have what `trainer.*` asks for.
    """
    settings = run.trainer
    strategy = settings.strategy
    if strategy == "ddp" and run.optim.lisa_layers:
        strategy = "ddp_find_unused_parameters_true"  # plain DDP waits for the gradients of the blocks that rest
    try:
        return Trainer(
            accelerator=accelerator(settings),
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy,
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
            plugins=[io or AtomicCheckpointIO()],
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise UserError(
            f"trainer.accelerator={settings.accelerator!r}, trainer.devices={settings.devices}: {error}"
        ) from error


def accelerator(settings: TrainerConfig) -> str:
    """Lightning's name for the accelerator; its own "auto" would take an Apple GPU, which has no float64 for sums.

    Raises:
        UserError: torch finds no CUDA device, and one is asked for.
    """
    if settings.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("trainer.accelerator='gpu', but torch finds no CUDA device here: trainer.accelerator=cpu")
    return {"gpu": "cuda", "cpu": "cpu"}[settings.accelerator]


def precision(settings: TrainerConfig) -> Any:
    """`precision=auto` resolved: `auto_cuda` on a CUDA device that has bfloat16, float32 elsewhere."""
    if settings.precision != "auto":
        return settings.precision
    cuda = accelerator(settings) == "cuda" and torch.cuda.is_bf16_supported()
    return settings.auto_cuda if cuda else "32-true"


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
            # Lightning calls what torch has deprecated.
            r".*isinstance\(treespec, LeafSpec\).*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            lightning.setLevel(level)
