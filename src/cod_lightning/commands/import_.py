"""`import`: make a run folder from a Hugging Face checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import TYPE_CHECKING

from cod_lightning._torchmetrics import import_torchmetrics
from cod_lightning.commands.models import is_run, require_model
from cod_lightning.commands.options import nonempty_path
from cod_lightning.errors import UserError
from cod_lightning.files import check_new_folder

if TYPE_CHECKING:
    from cod_lightning.config.schema import Config
    from cod_lightning.data.tokenizers import DocumentTokenizer
    from cod_lightning.nn.decoder import Decoder

HELP = "Make a run folder from a Llama, Mistral or Qwen2 checkpoint."


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="folder of the checkpoint, .gguf file, glassllm, smollm2, or name on the hub")
    parser.add_argument("--output", type=nonempty_path, required=True, help="new run folder")


def run(model: str, output: Path) -> None:
    """Import weights, shape and tokenizer; all other settings get their defaults."""
    check_new_folder(output, "--output=")
    imported = read_pretrained(model, output)
    from cod_lightning.train.load import write_run

    write_run(*imported, output)
    print(output)


def read_pretrained(model: str, output: Path) -> tuple[Config, Decoder, DocumentTokenizer]:
    """A pretrained model as a run that will be in the folder `output`.

    Raises:
        UserError: there is no such model, or the decoder cannot have its weights, shape or tokenizer.
    """
    from cod_lightning.config.schema import TOKENIZER, Config
    from cod_lightning.config.validate import config_errors
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
    if errors := config_errors(config):
        raise UserError("\n".join(errors))
    return config, decoder, tokenizer
