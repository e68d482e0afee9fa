"""`import`: make a run folder from a Hugging Face checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from cod_lightning.commands.models import read_pretrained
from cod_lightning.commands.options import nonempty_path
from cod_lightning.files import check_new_folder

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
