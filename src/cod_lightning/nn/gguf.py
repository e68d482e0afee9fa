"""Weights of llama.cpp's .gguf files, through `transformers`."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor

from cod_lightning.errors import UserError, first_of
from cod_lightning.files import translate_read_errors


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of a file, whose tensors are all there.

    Raises:
        UserError: the file is damaged, or the optional package `gguf` is not installed.
    """
    if find_spec("gguf") is None:
        raise UserError(f"reading {path} needs gguf: pip install 'cod_lightning[gguf]'")
    from gguf import GGUFReader

    with translate_read_errors(path):
        reader = GGUFReader(path)
        family = reader.fields["general.architecture"].contents()
    if f"{family}.block_count" not in reader.fields:  # transformers would take the sizes of a model of its own
        raise UserError(f"{path}: no {family}.block_count in its metadata: fetch it again, or convert the model again")
    return reader


def read_gguf(reader: Any, path: str, empty: Any) -> dict[str, Tensor]:
    """The dequantized tensors of a .gguf file in float32, by their names in the `empty` model of `transformers`.

    Raises:
        UserError: the file has tensors, or a scaling of the rotary embeddings, that `transformers` would leave out.
    """
    from transformers import modeling_gguf_pytorch_utils as library

    family = reader.fields["general.architecture"].contents()
    options: dict[str, Any] = {}
    if "processor" in signature(library.get_gguf_hf_weights_map).parameters:  # in version 5
        options["processor"] = library.TENSOR_PROCESSORS.get(family, library.TensorProcessor)()
    known = library.get_gguf_hf_weights_map(empty, **options)
    names = [tensor.name for tensor in reader.tensors]
    if unknown := [name for name in names if name not in known and name.removesuffix(".weight") not in known]:
        raise UserError(f"{path}: transformers has no place for {first_of(unknown)}: use the model's safetensors files")
    scaling = [f"{family}.rope.scaling.type", f"{family}.rope.scale_linear"]
    for field in (reader.fields[name] for name in scaling if name in reader.fields and family != "gpt-oss"):
        if field.contents() not in ("none", 0, 1):
            raise UserError(
                f"{path}: transformers leaves out {field.name}={field.contents()!r}: use the model's safetensors files"
            )
    with redirect_stderr(io.StringIO()):  # a progress bar
        return library.load_gguf_checkpoint(path, return_tensors=True, model_to_load=empty)["tensors"]
