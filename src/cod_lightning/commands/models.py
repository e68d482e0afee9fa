"""The run or model that a command reads: checks its path, then loads its configuration or its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.overrides import check_conditions, check_no_ignored_overrides
from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder
from cod_lightning.nn.packaged_models import is_packaged

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config
    from cod_lightning.data.tokenizers import DocumentTokenizer
    from cod_lightning.nn.decoder import Decoder


def is_run(model: str | Path) -> bool:
    """Whether a model is a run folder."""
    from cod_lightning.config.saved import CONFIG

    return (Path(model) / CONFIG).is_file()


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


def require_paths(models: Sequence[str], checkpoint: str, trust_code: bool) -> None:
    """Check the paths of models, and that `--checkpoint` and `--trust-code` have a run to act on.

    Raises:
        UserError: as `require_path`, or one of the options is given, and no model is a run.
    """
    for model in models:
        require_path(model)
    if (checkpoint != "last" or trust_code) and not any(map(is_run, models)):
        raise UserError("--checkpoint and --trust-code apply to runs, not to pretrained models: leave them out")


def require_model(model: str, alternative: str) -> None:
    """Check that a model is a local folder or .gguf file, in a package, cached, or can be downloaded from the hub.

    Raises:
        UserError: the model is not available; the error ends with `alternative`, which says what to pass instead.
    """
    require_path(model)
    if not Path(model).exists() and not is_packaged(model):
        from cod_lightning.data.hub import require_cached_or_hub

        require_cached_or_hub(model, alternative)


def load_run_config(
    run: Path, overrides: Sequence[str], trust_code: bool, command: str, protocol: str | None = None
) -> Config:
    """Load the configuration of a run folder.

    Args:
        run: the folder.
        overrides: of the command line.
        trust_code: see `load_config`.
        command: a key of `READS`.
        protocol: replaces that of the run, if the command has one.

    Raises:
        UserError: `load_config` fails, or an override has no effect on the command.
    """
    from cod_lightning.config.groups import groups
    from cod_lightning.config.saved import load_config

    check_no_ignored_overrides(overrides, command, groups())  # `load_config` checks the choices
    config = load_config(run, overrides, trust_code)
    config = config if protocol is None else replace(config, protocol=protocol)
    check_conditions(overrides, command, config)
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


def read_pretrained(model: str, output: Path) -> tuple[Config, Decoder, DocumentTokenizer]:
    """A pretrained model as a run that will be in the folder `output`.

    Raises:
        UserError: there is no such model, or the decoder cannot have its weights, shape or tokenizer.
    """
    from cod_lightning.config.schema import TOKENIZER, Config
    from cod_lightning.data.config import DataConfig

    require_model(model, "Give a folder with config.json, weights and tokenizer, or a .gguf file.")
    if is_run(model):
        raise UserError(
            f"{model}: a run folder, not a pretrained model: use it without import, as in `python -m cod_lightning "
            f"evaluate {model}`, or change it with convert or grow"
        )
    import_torchmetrics()
    from cod_lightning.data.tokenizers import load_tokenizer, with_pad_below
    from cod_lightning.nn.huggingface import import_hf
    from cod_lightning.nn.model_files import find_source, require_tokenizer
    from cod_lightning.nn.packaged_models import packaged_path

    require_tokenizer(find_source(model))
    decoder = import_hf(model)
    tokenizer = load_tokenizer(packaged_path(model), model)
    tokenizer.require_embeddings(decoder.lm_head.out_features, f"{model}: its tokenizer")
    if tokenizer.eos_id >= decoder.lm_head.out_features:
        raise UserError(
            f"{model}: the end-of-sequence token {tokenizer.eos_id} has no embedding: the model has "
            f"{decoder.lm_head.out_features} tokens: use the tokenizer that it was trained with"
        )
    tokenizer = with_pad_below(tokenizer, decoder.lm_head.out_features)
    config = Config(
        experiment="import",
        description=f"Imported from {model}.",
        model=decoder.config,
        norm={"name": "pre_ln"},
        data=DataConfig(
            tokenizer=str(output.absolute() / TOKENIZER),
            # The usual length for perplexities of pretrained models; evaluate can change it.
            seq_len=min(1024, decoder.config.max_position_embeddings or 1024),
            micro_batch_size=1,
        ),
    )
    return config, decoder, tokenizer


def read_trained(
    model: str, checkpoint: str, trust_code: bool, output: Path
) -> tuple[Config, Decoder, DocumentTokenizer]:
    """A run, or a pretrained model that `import` reads, for a run that will be in the new folder `output`.

    Raises:
        UserError: there is no such model, an option of runs is given for a pretrained one, or `output` is not a new
            folder.
    """
    require_paths([model], checkpoint, trust_code)
    check_new_folder(output, "--output=")
    return read_run(Path(model), checkpoint, trust_code) if is_run(model) else read_pretrained(model, output)
