"""The files of a model of `transformers`, in a folder or in the cache of the hub: find them, read its weights."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cod_lightning.errors import UserError
from cod_lightning.files import damage_message, translate_read_errors
from cod_lightning.nn.packaged_models import packaged_path
from cod_lightning.nn.weights import why_not_dense
from cod_lightning.typed_json import read_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that hold the weights or list their shards; the first that exists is read, as in `transformers`."""

TOKENIZER_FILES = re.compile(r"tokenizer\.|vocab|tekken|\.(model|spm|tiktoken)$")
"""Names of the files that hold the vocabulary of a tokenizer."""
COPY_TOKENIZER = "copy its tokenizer.json, or tokenizer.model, and tokenizer_config.json into the folder"
"""The end of an error about a folder without these."""


@dataclass(frozen=True)
class Source:
    """The location of a checkpoint."""

    name: str
    """A folder, or a name on the hub."""
    gguf: str | None = None
    """A file in the folder, instead of its other files."""

    @property
    def config_file(self) -> str:
        """The file with the configuration; for a name on the hub that name."""
        return f"{self.name}/{self.gguf or 'config.json'}" if Path(self.name).is_dir() else self.name

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`."""
        return {"trust_remote_code": False} | ({} if self.gguf is None else {"gguf_file": self.gguf})


@dataclass(frozen=True)
class WeightIndex:
    """The list of the shards."""

    weight_map: dict[str, str]
    """The file of each weight."""


def find_source(name: str) -> Source:
    """The checkpoint that a path, the short name of a packaged model, or a name on the hub means.

    Raises:
        UserError: the package is not installed; the path does not exist or is another file; or a folder holds several
            .gguf files, or an adapter.
    """
    name = packaged_path(name)
    folder = Path(name)
    if folder.suffix == ".gguf" and folder.is_file():
        return Source(str(folder.parent), folder.name)
    if folder.is_file():
        raise UserError(f"{name} is a file: name the folder of the model, or a .gguf file")
    if not folder.is_dir():
        if folder.suffix == ".gguf" or name.startswith(("/", ".", "~")) or name.count("/") > 1:
            raise UserError(
                f"{name} does not exist: name the folder of a model, a .gguf file, or OWNER/NAME on the hub"
            )
        return Source(name)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{name}: adapter_config.json makes it an adapter of another model: merge the two and save them"
        )
    quantized = sorted(folder.glob("*.gguf"))
    if not quantized or any((folder / file).exists() for file in WEIGHT_FILES):
        return Source(name)
    if len(quantized) > 1:
        raise UserError(f"{name}: has {len(quantized)} .gguf files: name one, such as {quantized[0]}")
    return Source(name, quantized[0].name)


def find_file(source: Source, file: str) -> Path | None:
    """A file of a folder, or of the hub's repository in the cache; None if it does not exist."""
    if Path(source.name).is_dir():
        path = Path(source.name) / file
        return path if path.is_file() else None
    from transformers.utils import cached_file

    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    cached = cached_file(source.name, file, **optional)
    return None if cached is None else Path(cached)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a file with a vocabulary."""
    return any(TOKENIZER_FILES.search(path.name) for path in folder.iterdir())


def require_tokenizer(source: Source) -> None:
    """Check that a folder with a model has a tokenizer.

    Raises:
        UserError: it has none.
    """
    folder = Path(source.name)
    if source.gguf is None and (folder / "config.json").is_file() and not has_tokenizer(folder):
        raise UserError(f"{folder}: the model has no tokenizer: {COPY_TOKENIZER}")


def read_weights(source: Source) -> dict[str, Tensor]:
    """All tensors of the weight files, by name.

    Raises:
        UserError: there is no weight file, a shard is missing, or a file is damaged or not a state dict.
    """
    listed = next((path for file in WEIGHT_FILES if (path := find_file(source, file)) is not None), None)
    if listed is None:
        raise UserError(f"{source.name}: no weights: expected one of {', '.join(WEIGHT_FILES)}, or one .gguf file")
    files = [listed]
    if listed.suffix == ".json":
        files = []
        index = read_json(listed, WeightIndex, damage_message(listed), ignore_unknown=True)
        for shard in sorted(set(index.weight_map.values())):
            if Path(shard).name != shard:
                raise UserError(f"{listed}: {shard} leads out of the folder: name a file of the folder")
            path = find_file(source, shard)
            if path is None:
                raise UserError(f"{source.name}: {shard} is missing, which {listed.name} lists: copy all shards")
            files.append(path)
    state: dict[str, Tensor] = {}
    for path in files:
        part = read_tensors(path)
        if not isinstance(part, Mapping) or not all(
            isinstance(k, str) and isinstance(x, Tensor) for k, x in part.items()
        ):
            raise UserError(f"{path}: not a state dict of names and tensors: save model.state_dict()")
        for key, tensor in part.items():
            if problem := why_not_dense(tensor):
                raise UserError(f"{path}: {key} is {problem}: save dense weights, with their values")
        if twice := sorted(part.keys() & state.keys()):
            raise UserError(f"{source.name}: {twice[0]} is in two shards ({len(twice)} weights are): remove one")
        state |= part
    return state


def read_tensors(path: Path) -> Any:
    """The content of a .safetensors file, or of one that `torch.save` wrote; executes no code.

    Raises:
        UserError: it is damaged, or holds more than tensors.
    """
    from safetensors.torch import load_file

    with translate_read_errors(path):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path}: holds more than tensors, which is not read, or is {damage_message(path)}"
            ) from error
