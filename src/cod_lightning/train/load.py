"""Load the model of a trained run, and write a model as a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cod_lightning.config.saved import CONFIG, describe_differences, load_config, read_config, save_config
from cod_lightning.config.schema import CHECKPOINTS, TOKENIZER, Config, resumable_settings, run_folder_of
from cod_lightning.config.validate import config_errors
from cod_lightning.data.datamodule import TokenDataModule, tokenizer_of
from cod_lightning.data.images import ImageDataModule
from cod_lightning.data.tokenizers import DocumentTokenizer, load_tokenizer
from cod_lightning.errors import UserError, shorten
from cod_lightning.files import new_folder
from cod_lightning.nn.decoder import Decoder, set_step
from cod_lightning.nn.strategies import build_all
from cod_lightning.nn.vit import VisionTransformer
from cod_lightning.nn.weights import load_weights, require_finite, shape_mismatches
from cod_lightning.settings import require_choice
from cod_lightning.train.checkpoint import BEST, AtomicCheckpointIO, load_file, newest_checkpoint, read_for_weights


@dataclass(frozen=True)
class InitialWeights:
    """Weights that replace the random initialisation."""

    weights: Mapping[str, Tensor]
    """By parameter name, without the name of the model."""
    checkpoint: str
    """The path that they were read from."""
    step: int

    @property
    def origin(self) -> dict[str, Any]:
        """The entry `init_from` of a run record."""
        return {"checkpoint": self.checkpoint, "step": self.step}


def checkpoint_of(folder: Path, which: str = "last") -> Path:
    """The `last` checkpoint of a run folder, or the `best` one by validation loss.

    Raises:
        UserError: the run folder has no such checkpoint, or `which` is neither of the two.
    """
    require_choice("checkpoint", which, ("last", "best"))
    path = newest_checkpoint(folder / CHECKPOINTS) if which == "last" else folder / CHECKPOINTS / BEST
    if path is None or not path.exists():
        raise UserError(f"{folder}: no {which} checkpoint in {CHECKPOINTS}/; train the run first with fit")
    return path


def load_run(
    folder: str | Path, checkpoint: str = "last", trust_code: bool = False
) -> tuple[Decoder, DocumentTokenizer]:
    """The decoder of a run folder, on the CPU, and its tokenizer.

    Args:
        folder: written by `fit` or `import`.
        checkpoint: "last", or "best" by validation loss.
        trust_code: import the strategy `norm=package.module:function` that the run names.

    Raises:
        UserError: no such run or checkpoint, a damaged file, a run of images, or code without `trust_code`.
    """
    config = load_config(Path(folder), trust_code=trust_code)
    return load_decoder(config, Path(folder), checkpoint_of(Path(folder), checkpoint))


def load_decoder(config: Config, folder: Path, checkpoint: Path) -> tuple[Decoder, DocumentTokenizer]:
    """The decoder of a checkpoint, on the CPU, and the run's tokenizer; does not read the data.

    Raises:
        UserError: the checkpoint is unreadable, or the run is one of images.
    """
    if config.task != "language":
        raise UserError(f"{folder} is a run of task={config.task}: only fit, evaluate and measure can read it")
    if not (folder / TOKENIZER).is_dir():
        raise UserError(f"{folder}: no folder {TOKENIZER}/: copy it from where the run was trained")
    tokenizer = load_tokenizer(str(folder / TOKENIZER), f"{folder}: its tokenizer")
    weights, vocab_size, step = read_run_weights(config, checkpoint)
    tokenizer.require_embeddings(vocab_size, f"{folder / TOKENIZER}")
    decoder = empty_decoder(config, vocab_size)
    load_weights(decoder, weights, str(checkpoint))
    set_step(decoder, step)
    return decoder, tokenizer


def require_own_tokenizer(folder: Path, data: TokenDataModule) -> None:
    """Check that a set was prepared with the tokenizer of a run folder: a `bpe` of other text has other tokens.

    Raises:
        UserError: it was not.
    """
    own = folder / TOKENIZER
    if own.is_dir() and load_tokenizer(str(own)).backend.to_str() != data.tokenizer.backend.to_str():
        remedy = f"pass data.tokenizer={own.absolute()}"
        if data.config.folder is not None:
            remedy = "name the set that the run was trained on by data.folder="
        raise UserError(f"{data.source} was prepared with another tokenizer than that of {folder}: {remedy}")


def require_own_classes(checkpoint: Path, data: ImageDataModule) -> None:
    """Check that images have the classes that a run was trained on, in the same order.

    Raises:
        UserError: they have others. Checkpoints of earlier versions do not name theirs.
    """
    own = load_file(checkpoint, mmap=True).get("ImageDataModule", {}).get("classes", data.classes)
    if own != data.classes:
        theirs = ", ".join(sorted(set(data.classes) - set(own))[:5] or data.classes[:5])
        raise UserError(
            f"{data.source} has other classes ({theirs}) than {checkpoint} was trained on: use images of "
            f"{shorten(', '.join(own))}"
        )


def load_vit(config: Config, checkpoint: Path) -> VisionTransformer:
    """The Vision Transformer of a checkpoint, on the CPU; does not read the images.

    Raises:
        UserError: the checkpoint is unreadable.
    """
    weights, classes, step = read_run_weights(config, checkpoint)
    specs = build_all(config.norm, config.model.num_hidden_layers)
    vit = VisionTransformer(config.model, specs, config.images.size, config.images.patch_size, classes)
    load_weights(vit, weights, str(checkpoint))
    set_step(vit, step)
    return vit


def read_run_weights(config: Config, checkpoint: Path) -> tuple[dict[str, Tensor], int, int]:
    """The weights of a run's decoder or Vision Transformer, the outputs of its head, and the step of the checkpoint.

    Raises:
        UserError: the checkpoint is unreadable, has no such head, holds NaN or Inf, or is of another model.
    """
    prefix, head = ("vit", "head.weight") if config.task == "vision" else ("decoder", "lm_head.weight")
    state = read_for_weights(checkpoint)
    require_own_model(config, checkpoint, state)
    weights = weights_of(state, prefix)
    if head not in weights or weights[head].ndim != 2:
        raise UserError(f"{checkpoint}: not a checkpoint of a {prefix}: {head} is missing or not a matrix")
    require_finite(weights.items(), str(checkpoint))
    return weights, len(weights[head]), state.get("global_step", 0)


def require_own_model(config: Config, path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Check that a run's configuration names the model and the strategy with which its checkpoint was trained.

    Raises:
        UserError: it names others.
    """
    if differing := describe_other_settings(config, checkpoint, ("model.", "norm.")):
        raise UserError(
            f"{path} was trained with another model than {CONFIG} of its run names ({differing}): restore {CONFIG}, or "
            "for norm.coefficients the function that it names"
        )


def describe_other_settings(config: Config, checkpoint: Mapping[str, Any], prefixes: str | tuple[str, ...] = "") -> str:
    """The settings with which a checkpoint was trained and that are others in a configuration; empty if there are none.

    Checkpoints of earlier versions lack newer settings, which had their defaults, or all of them.

    Args:
        config: of the run.
        checkpoint: its content.
        prefixes: of the settings to compare.
    """
    ours = resumable_settings(config)
    defaults = resumable_settings(Config()) | {"norm.coefficients": ours.get("norm.coefficients")}
    theirs = {name: defaults.get(name) for name in ours} | checkpoint.get("settings", ours)
    theirs, ours = ({n: v for n, v in each.items() if n.startswith(prefixes)} for each in (theirs, ours))
    return describe_differences(theirs, ours)


def weights_of(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The weights of a run's `decoder` or `vit` by parameter name."""
    start = f"{prefix}."
    state = checkpoint["state_dict"]
    return {name.removeprefix(start): tensor for name, tensor in state.items() if name.startswith(start)}


def empty_decoder(config: Config, vocab_size: int) -> Decoder:
    """A decoder of the run's shape, without initialisation."""
    specs = build_all(config.norm, config.model.num_hidden_layers)
    return Decoder(replace(config.model, vocab_size=vocab_size), specs)


def load_initial_weights(config: Config, source: Path) -> InitialWeights:
    """The weights of `init_from`.

    Args:
        config: the run that starts from them.
        source: a run folder, whose last checkpoint is read, or a .ckpt file.

    Raises:
        UserError: there is no checkpoint, shapes or tokenizers differ, or a weight holds NaN or Inf.
    """
    is_run = (source / CHECKPOINTS).is_dir() or (source / CONFIG).is_file()
    if not is_run and not (source.suffix == ".ckpt" and source.exists()):
        raise UserError(f"init_from={source}: neither a run folder nor a .ckpt file")
    path = source if source.suffix == ".ckpt" else checkpoint_of(source)
    source_tokenizer, name = run_folder_of(source) / TOKENIZER, config.data.tokenizer
    if str(source_tokenizer) == name and not source_tokenizer.is_dir():
        raise UserError(f"init_from={source}: no tokenizer at {source_tokenizer}; name one with data.tokenizer=")
    tokenizer = tokenizer_of(config.data)
    if source_tokenizer.is_dir() and load_tokenizer(str(source_tokenizer)).sha256 != tokenizer.sha256:
        raise UserError(
            f"data.tokenizer={name!r} is not the tokenizer of init_from={source}: use data.tokenizer={source_tokenizer}"
        )
    checkpoint = read_for_weights(path)
    if (source / CONFIG).is_file():
        require_own_model(read_config(source)[1], path, checkpoint)
    weights = weights_of(checkpoint, "decoder")
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    with torch.device("meta"):
        decoder = empty_decoder(config, vocab_size)
    if mismatches := shape_mismatches(decoder, weights):
        theirs = len(weights.get("lm_head.weight", ()))
        same_vocabulary = theirs in (0, vocab_size)
        remedy = "choose the model= and norm= of that run" if same_vocabulary else f"use model.vocab_size={theirs}"
        raise UserError(
            f"init_from={source}: {len(mismatches)} parameters have another shape than this run's ({mismatches[0]}): "
            f"{remedy}"
        )
    require_finite(weights.items(), f"init_from={source}")
    return InitialWeights(weights, str(path), checkpoint.get("global_step", 0))


def write_run(config: Config, decoder: Decoder, tokenizer: DocumentTokenizer, folder: Path) -> None:
    """Write a run folder with a checkpoint of step 0, for an imported, converted or grown model.

    Raises:
        UserError: `config` is invalid, or `folder` is not empty or not writable; nothing is written.
    """
    if errors := config_errors(config):
        raise UserError("\n".join(f"{folder} would have an invalid configuration: {error}" for error in errors))
    io = AtomicCheckpointIO()
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    with new_folder(folder) as partial:
        save_config(config, partial)
        io.save_checkpoint({"state_dict": state, "tokens": 0}, partial / CHECKPOINTS / "step-00000000.ckpt")
        if io.failure:
            raise UserError(io.failure)
        tokenizer.save(partial / TOKENIZER)
