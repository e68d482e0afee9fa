"""`import`: make a run folder from a Hugging Face checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from cod_lightning.commands.options import require_model
from cod_lightning.errors import UserError

HELP = "Make a run folder from a Llama, Mistral or Qwen2 checkpoint, for evaluate and generate."


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", help="folder of the checkpoint, or its name on the hub")
    parser.add_argument("--output", type=Path, required=True, help="new run folder")


def run(model: str, output: Path) -> int:
    """Import weights, shape and tokenizer; all other settings get their defaults."""
    from cod_lightning.config.saved import save
    from cod_lightning.config.schema import TOKENIZER, Config
    from cod_lightning.config.validate import problems
    from cod_lightning.data.config import DataConfig

    require_model(model, "Give a folder with config.json, weights and tokenizer.")
    from cod_lightning.data.tokenizers import load_tokenizer, with_pad_below
    from cod_lightning.files import check_new_folder, new_folder
    from cod_lightning.nn.huggingface import import_hf
    from cod_lightning.train.load import write_imported

    check_new_folder(output)
    decoder = import_hf(model)
    tokenizer = with_pad_below(load_tokenizer(model), decoder.lm_head.out_features)
    config = Config(
        experiment="import",
        description=f"Imported from {model}.",
        model=decoder.config,
        norm={"name": "pre_ln"},
        data=DataConfig(
            tokenizer=str(output.absolute() / TOKENIZER),
            # Unused, but `evaluate data=...` checks it before it sets this tokenizer.
            vocab_size=decoder.lm_head.out_features,
            seq_len=1024,  # the usual length for perplexities of pre-trained models; evaluate can change it
            micro_batch_size=1,
        ),
    )
    if errors := problems(config):
        raise UserError("\n".join(errors))
    with new_folder(output) as partial:
        save(config, partial)
        write_imported(decoder, tokenizer, partial)
    print(output)
    return 0
