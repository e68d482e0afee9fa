"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.errors import UserError
from cod_lightning.measure.options import parse_options
from cod_lightning.nn.packaged_models import is_packaged

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config
    from cod_lightning.data.tokenizers import DocumentTokenizer
    from cod_lightning.nn.decoder import Decoder

OVERRIDES = """\
Overrides are Hydra's: group=choice (experiments, model, norm, data, optim, protocol, trainer, scale) or
section.field=value. Examples:
  fit experiments=table1_350m norm=mix_ln
  fit norm=pre_ln seed=2 trainer.max_steps=100 output=/scratch/runs
  fit -m norm=pre_ln,lns seed=1,2
  fit 'logger=[csv,wandb]'
  fit data=files 'data.files=texts/*.json.gz' norm=my_package.my_module:my_strategy
"""


READS = {
    "evaluate": (
        *("data", "images", "model", "norm", "eval.paper_batch", "eval.paper_ranks"),
        *("trainer.precision", "trainer.auto_cuda", "trainer.accelerator", "trainer.devices", "trainer.num_nodes"),
        *("trainer.strategy", "trainer.hybrid", "trainer.offload", "trainer.checkpointing", "trainer.compile"),
        *("trainer.timeout", "trainer.threads"),
    ),
    "evaluate tasks=": (
        "data.seq_len",
        "data.batch_size",
        "data.micro_batch_size",
        "model",
        "norm",
        "trainer.accelerator",
    ),
    "predict": ("model", "norm", "seed", "task", "data.vocab_size", "data.tokenizer", "row"),
    "measure": ("data", "images", "model", "norm", "trainer.accelerator", "trainer.threads"),
    "measure of a pretrained model": ("data", "row", "paper", "trainer.accelerator", "trainer.threads"),
}
"""The sections and fields that a command reads with a model, so that an override of another one is refused.

`model` and `norm` have fields that are not in the weights, such as `model.norm_backend`; `load_config` refuses others.
"""

TEXT_CHOICES = ("data", "trainer", "experiments", "scale", "protocol")
"""The groups of which a command with a pretrained model takes a choice: they may set the text or the device."""


def add_overrides(parser: ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the configuration")


def add_run(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=nonempty_path, help="run folder")
    add_checkpoint(parser)


def nonempty_path(word: str) -> Path:
    """The path that a word names; an empty word, such as an unset variable, would be the current folder."""
    if not word:
        raise ArgumentTypeError("'' is empty: name a path")
    return Path(word)


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, model folder, .gguf file, glassllm, smollm2 or hub name")
    add_checkpoint(parser)
    add_trust_code(parser)


def add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="default: last")


def add_trust_code(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="import the strategy norm=package.module:function that a saved run names",
    )


def add_jobs(parser: ArgumentParser) -> None:
    parser.add_argument("-j", "--jobs", type=int, default=1, help="number of parallel runs (default: 1)")


def add_results(parser: ArgumentParser) -> None:
    parser.add_argument("--results", type=nonempty_path, help="folder of the records (default: experiments/results)")


def is_model(word: str) -> bool:
    """Whether a word names a model and is not key=value; paths of models may hold =, as in sweeps/lr=0.1."""
    key, equals, _ = word.partition("=")
    return not equals or os.sep in key or os.path.exists(word)


def check_no_repeats(words: Sequence[str]) -> None:
    """Check that no key of the words of a command is given twice, also as +key; paths may hold = themselves.

    Raises:
        UserError: one is; names it and both values.
    """
    values: dict[str, str] = {}
    for word in words:
        if is_model(word):
            continue
        key, _, value = word.lstrip("+").partition("=")
        if key in values:
            raise UserError(f"{key}={values[key]} and {key}={value} are both given: keep one")
        values[key] = value


def pop_options(words: Sequence[str], types: Mapping[str, Any], command: str) -> tuple[dict[str, Any], list[str]]:
    """Split `key=value` words into the options of a command and the overrides of the configuration.

    Args:
        words: `key=value` arguments.
        types: type of each option.
        command: name of the command, for errors.

    Raises:
        UserError: lists every value of the wrong type.
    """
    own = [word for word in words if word.partition("=")[0] in types]
    return parse_options(own, types, command), [word for word in words if word not in own]


def compose_norm(words: Sequence[str], command: str) -> dict[str, Any]:
    """The section `norm` of `norm=NAME norm.OPTION=VALUE`.

    Raises:
        UserError: other words, no name, or no such strategy or option.
    """
    from cod_lightning.config.compose import compose

    if unknown := [word for word in words if not word.startswith(("norm=", "norm.")) or "=" not in word]:
        raise UserError(f"{unknown[0]!r}: {command} reads norm=NAME and norm.OPTION=VALUE only")
    if not any(word.startswith("norm=") for word in words):
        raise UserError("norm= is missing: name a strategy, as in norm=lns")
    return compose(words).norm


def require_at_least(option: str, value: int | None, bound: int) -> None:
    """Check the value of a numeric option.

    Raises:
        UserError: the value is smaller than `bound`.
    """
    if value is not None and value < bound:
        raise UserError(f"--{option}={value} must be at least {bound}")


def require_text(option: str, text: str) -> None:
    """Check that the text of an option is valid UTF-8; Python keeps other bytes of a command line as surrogates.

    Raises:
        UserError: it is not; names the first other byte.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise UserError(
            f"{option} is not UTF-8: byte {byte:#x} in place {error.start + 1}: convert it, as with "
            "iconv -f latin1 -t utf-8"
        ) from error


def load_run_config(run: Path, overrides: Sequence[str], trust_code: bool, command: str) -> Config:
    """Load the configuration of a run folder.

    Args:
        run: the folder.
        overrides: of the command line.
        trust_code: see `load_config`.
        command: a key of `READS`.

    Raises:
        UserError: `load_config` fails, an override has no effect on the command, or the overrides select text for a run
            of images.
    """
    from cod_lightning.config.compose import selects_other_text
    from cod_lightning.config.groups import groups
    from cod_lightning.config.saved import load_config

    check_no_ignored_overrides(overrides, command, groups())  # `load_config` checks the choices
    config = load_config(run, overrides, trust_code)
    if config.task != "language" and selects_other_text(overrides):
        raise UserError(f"{run} is a run of task={config.task}: use images.folder= instead of data=")
    return config


def read_run(folder: Path, checkpoint: str, trust_code: bool) -> tuple[Config, Decoder, DocumentTokenizer]:
    """The configuration, the decoder and the tokenizer of a run folder.

    Raises:
        UserError: as `load_run`.
    """
    import_torchmetrics()
    from cod_lightning.config.saved import load_config
    from cod_lightning.train.load import checkpoint_of, load_decoder

    config = load_config(folder, trust_code=trust_code)
    return config, *load_decoder(config, folder, checkpoint_of(folder, checkpoint))


def ignored_overrides(overrides: Sequence[str], command: str, choices: Sequence[str]) -> list[str]:
    """The overrides that set no field that a command reads with a model.

    Args:
        overrides: of the command line.
        command: a key of `READS`.
        choices: the groups of which it takes a choice.
    """
    from cod_lightning.config.compose import parse

    known = READS[command]
    return [
        str(override.input_line)
        for override in parse(overrides)
        if (key := override.key_or_group) not in choices and key not in known and key.partition(".")[0] not in known
    ]


def check_no_ignored_overrides(overrides: Sequence[str], command: str, choices: Sequence[str]) -> None:
    """Check that there are no `ignored_overrides`.

    Raises:
        UserError: names every override that has no effect.
    """
    if words := ignored_overrides(overrides, command, choices):
        hint = f"{command} reads only {', '.join(READS[command])}"
        raise UserError("\n".join(f"{word} has no effect, remove it: {hint}" for word in words))


def require_model(model: str, alternative: str) -> None:
    """Check that a model is a local folder or .gguf file, in a package, cached, or can be downloaded from the hub.

    Raises:
        UserError: the model is not available; the error ends with `alternative`, which says what to pass instead.
    """
    require_path(model)
    if not Path(model).exists() and not is_packaged(model):
        from cod_lightning.data.hub import require_cached_or_hub

        require_cached_or_hub(model, alternative)


def is_run(model: str | Path) -> bool:
    """Whether a model is a run folder."""
    from cod_lightning.config.saved import CONFIG

    return (Path(model) / CONFIG).is_file()


def require_paths(models: Sequence[str], checkpoint: str, trust_code: bool) -> None:
    """Check the paths of models, and that `--checkpoint` and `--trust-code` have a run to act on.

    Raises:
        UserError: as `require_path`, or one of the options is given, and no model is a run.
    """
    for model in models:
        require_path(model)
    if (checkpoint != "last" or trust_code) and not any(map(is_run, models)):
        raise UserError("--checkpoint and --trust-code apply to runs, not to pretrained models: leave them out")


def require_path(model: str) -> None:
    """Check that a model is a folder with one, unless it looks like NAME or OWNER/NAME on the Hugging Face hub.

    Raises:
        UserError: it is empty, a file, a path to nothing, or a folder without a model.
    """
    if not model.strip():
        raise UserError(f"{model!r} names no model: name the folder of a run or of a model, or a .gguf file")
    path = Path(model)
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{model} is a file: name the folder of a run or of a model, or a .gguf file")
    in_folder = len(path.parts) == 2 and path.parent.is_dir()  # runs/nope, but not OWNER/NAME
    if not path.exists() and (in_folder or len(path.parts) > 2 or model.startswith(("/", ".", "~"))):
        raise UserError(f"{model} does not exist: name the folder of a run or of a model")
    if path.is_dir() and not is_run(path) and not (path / "config.json").exists() and not any(path.glob("*.gguf")):
        from cod_lightning.config.saved import runs_inside

        raise UserError(
            f"{model}: neither a run nor a model: it has no config.yaml, config.json or .gguf file{runs_inside(path)}"
        )
