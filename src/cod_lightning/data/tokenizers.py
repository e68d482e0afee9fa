"""Tokenizers: trained byte-level BPE, or one from a folder or the hub; one EOS per document, never a BOS."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cod_lightning.data.config import is_hub_name
from cod_lightning.data.hub import require_hub
from cod_lightning.data.manifest import TOKENIZER
from cod_lightning.data.workers import in_thread
from cod_lightning.errors import UserError, no_permission, one_line
from cod_lightning.files import read_regular, write_atomic
from cod_lightning.typed_json import read_json

PAD, EOS = "<pad>", "<eos>"
"""Special tokens of the trained BPE, ids 0 and 1; `PAD` is also added to a tokenizer without a pad."""
BPE_CHARACTERS = 32_000_000
"""Training text of the BPE: all of `docs`, about 16,000 documents of C4."""
WORD_CHARACTERS = 4096
"""The trainer's time is quadratic in the length of a word (200,000 letters take 30 s), so longer ones are split."""
EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_HUB_FILES = (
    *("tokenizer*", "*vocab*", "tekken*", "*.model", "*.spm", "*.tiktoken", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "config.json"),
)
"""Patterns of the files of a tokenizer, of every format that `has_tokenizer` knows."""


@dataclass(frozen=True)
class DocumentTokenizer:
    """A tokenizer as plain data, with the ids of pad and EOS.

    No text encodes to `pad_id`, unless the tokenizer's model itself has the spelling of pad as a piece, as T5's has:
    then a document that spells it out does.
    """

    json: str
    pad_id: int
    eos_id: int

    @cached_property
    def backend(self) -> Tokenizer:
        """The `tokenizers` object; a special token that is spelled out in a document stays ordinary text."""
        backend = Tokenizer.from_str(self.json)
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one, as an embedding needs it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def require_embeddings(self, count: int, name: str) -> None:
        """Check that a model with `count` embeddings has one for every piece; unused added tokens may lack one.

        Raises:
            UserError: it has not; `name` is that of the tokenizer.
        """
        pieces = max(self.backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        if pieces > count:
            raise UserError(
                f"{name} has {pieces:,} tokens, and the model embeds {count:,}: use the tokenizer that it was trained "
                "with"
            )

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def configured_ids(self) -> list[int]:
        """The ids of pad and EOS if they differ from those that the JSON alone yields, else nothing."""
        eos = _first_known(self.backend, EOS_NAMES)
        pad = _known_pad(self.backend, eos, PAD_NAMES)
        ids = [self.pad_id, self.eos_id]
        return [] if ids == [self.backend.token_to_id(token) for token in (pad, eos) if token] else ids

    def encode(self, documents: list[str]) -> list[list[int]]:
        """Return the ids of each document, followed by EOS.

        Raises:
            UserError: a text instead of a list of texts, or the tokenizer has no token for some of the text, and none
                for unknown text.
        """
        if isinstance(documents, str):
            raise UserError("encode takes a list of texts: pass [text]")
        try:
            encodings = self.backend.encode_batch_fast(documents, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"the tokenizer cannot encode the text: {error}; choose another data.tokenizer=") from error
        return [[*encoding.ids, self.eos_id] for encoding in encodings]

    def decode(self, token: int) -> str:
        """The text of a token; that of a special token is its name."""
        return self.backend.decode([token], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and the names of its special tokens into `folder`, which `data.tokenizer=` reads."""
        backend, folder = self.backend, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer.json", backend.to_str(pretty=True))
        special = {"eos_token": backend.id_to_token(self.eos_id), "pad_token": backend.id_to_token(self.pad_id)}
        write_atomic(folder / "special_tokens_map.json", json.dumps(special) + "\n")


def train_bpe(documents: Iterable[str], vocab_size: int) -> DocumentTokenizer:
    """Train byte-level BPE on the first `BPE_CHARACTERS` of `documents`; the same text gives the same bytes.

    Little text can yield fewer than `vocab_size` tokens.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = map(_split_long_words, take_characters(documents, BPE_CHARACTERS))
    in_thread(lambda: backend.train_from_iterator(text, trainer)).result()
    return trained_bpe(backend.to_str())


def trained_bpe(json: str) -> DocumentTokenizer:
    """Return the tokenizer that `train_bpe` produced, from its JSON."""
    return DocumentTokenizer(json, pad_id=0, eos_id=1)


def take_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield the leading documents, up to and including the one at which the sum of their lengths reaches a number."""
    read = 0
    for document in documents:
        yield document
        read += len(document)
        if read >= characters:
            return


_LONG_RUN = re.compile("|".join(rf"{kind}{{{WORD_CHARACTERS}}}" for kind in (r"[^\W\d_]", r"\d", r"[^\w\s]")))


def _split_long_words(document: str) -> str:
    """Break runs of letters, digits or symbols that are longer than any word of a language."""
    if len(document) <= WORD_CHARACTERS or max(map(len, document.split()), default=0) <= WORD_CHARACTERS:
        return document
    return _LONG_RUN.sub(r"\g<0>\n", document)


def load_tokenizer(name: str, setting: str | None = None) -> DocumentTokenizer:
    """Load the tokenizer of a folder or of a repository on the hub.

    Its configuration names pad and EOS; otherwise well-known spellings are tried. A tokenizer without a pad (Llama,
    GPT-2) gets `<pad>` as an additional last token, so its vocabulary is one larger than published.

    Args:
        name: a folder, a .gguf file, or a name on the hub.
        setting: what named it, for errors; None: data.tokenizer.

    Raises:
        UserError: no such folder, hub not reachable, no tokenizer in it, or no EOS token.
    """
    setting = setting or f"data.tokenizer={name!r}"
    if Path(name).is_dir():
        return _from_folder(Path(name), setting)
    if name.endswith(".gguf"):
        return _converted(Path(name), setting)
    if Path(name).is_file():
        raise UserError(f"{setting} is a file: name the folder that holds tokenizer.json")
    if not is_hub_name(name):
        raise UserError(f"{setting}: no such folder")
    return _from_folder(_download(name, setting), setting)


def with_pad_below(tokenizer: DocumentTokenizer, vocab_size: int) -> DocumentTokenizer:
    """Return the tokenizer for an embedding of `vocab_size` rows; another special token replaces a pad beyond them.

    No text encodes to a special token here but to EOS and to the one for unknown text, so any other can serve as pad.

    Raises:
        UserError: there is no other special token.
    """
    if tokenizer.pad_id < vocab_size:
        return tokenizer
    added = tokenizer.backend.get_added_tokens_decoder().items()
    unknown = unknown_token(tokenizer.backend)
    free = {id for id, token in added if token.special and token.content != unknown} - {tokenizer.eos_id}
    special = [id for id in free if id < vocab_size]
    if not special:
        raise UserError(
            "the tokenizer has no special token to pad rows with but EOS and the unknown token, below the "
            f"{vocab_size} of the model"
        )
    return replace(tokenizer, pad_id=max(special))


def _download(name: str, setting: str) -> Path:
    """Return a local folder with the tokenizer files of a hub repository, without network if they are cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from cod_lightning.nn.model_files import has_tokenizer

    try:
        cached = Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), local_files_only=True))
        if has_tokenizer(cached):
            return cached
    except HFValidationError as error:
        raise UserError(f"{setting} is neither a folder nor a name on the hub: {error}") from error
    except (HfHubHTTPError, OSError):
        pass  # not in the cache
    require_hub(setting, "Give a folder with tokenizer.json, or use data.tokenizer=bpe.")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{setting}: {error}") from error


def _from_folder(folder: Path, setting: str) -> DocumentTokenizer:
    if not (folder / TOKENIZER).is_file():
        return _converted(folder, setting)
    try:
        backend = Tokenizer.from_str(read_regular(folder / TOKENIZER))
    except PermissionError as error:
        raise no_permission(error, folder / TOKENIZER) from error
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{setting}: {folder / TOKENIZER} cannot be read: {one_line(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    named = _named_specials(folder)
    eos = _first_known(backend, [named.get("eos_token"), *EOS_NAMES])
    if eos is None:
        raise UserError(
            f"{setting} has no end-of-sequence token: name one as eos_token in "
            f"{folder / 'tokenizer_config.json'} (tried {', '.join(EOS_NAMES)})"
        )
    pad = _known_pad(backend, eos, [named.get("pad_token"), *PAD_NAMES])
    if pad is None:
        pad = PAD
        backend.add_special_tokens([PAD])
    ids = backend.get_vocab(with_added_tokens=True)
    return DocumentTokenizer(backend.to_str(), pad_id=ids[pad], eos_id=ids[eos])


def _named_specials(folder: Path) -> dict[str, str]:
    """Return the special tokens that the folder's configuration names, as {"eos_token": "</s>", ...}."""
    named: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        record = read_json(folder / file, dict[str, Any], 'it must hold a JSON object such as {"eos_token": "</s>"}')
        for role in ("eos_token", "pad_token"):
            token = record.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise UserError(f'{folder / file}: {role}={token!r} must be a token such as "</s>"')
            if token:
                named[role] = token
    return named


def unknown_token(backend: Tokenizer) -> str | None:
    """The token that text without any other is encoded to; None if there is none, or bytes take its place."""
    model = json.loads(backend.to_str())["model"]
    if model.get("byte_fallback") and all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)):
        return None
    if model.get("unk_id") is not None:  # Unigram
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _known_pad(backend: Tokenizer, eos: str | None, tokens: Iterable[str | None]) -> str | None:
    """The first known token that is neither EOS nor the one for unknown text."""
    used = (eos, unknown_token(backend))
    return _first_known(backend, [token for token in tokens if token not in used])


def _first_known(backend: Tokenizer, tokens: Iterable[str | None]) -> str | None:
    return next((token for token in tokens if token and backend.token_to_id(token) is not None), None)


def _converted(folder: Path, setting: str) -> DocumentTokenizer:
    """Convert another format (a SentencePiece model, vocab and merges, a .gguf file) with transformers."""
    try:
        from transformers import AutoTokenizer

        from cod_lightning.nn.model_files import COPY_TOKENIZER, find_source, has_tokenizer
    except ImportError as error:
        raise UserError(f"{setting} has no {TOKENIZER}; pip install 'cod_lightning[hf]' to convert it") from error
    if not folder.exists():
        raise UserError(f"{setting} does not exist: name a folder, a .gguf file, or OWNER/NAME on the hub")
    if folder.is_dir() and not has_tokenizer(folder):
        raise UserError(f"{setting}: no tokenizer: {COPY_TOKENIZER}")
    with tempfile.TemporaryDirectory() as converted:
        try:
            source = find_source(str(folder))
            tokenizer: Any = AutoTokenizer.from_pretrained(source.name, **source.options)
            tokenizer.save_pretrained(converted)
        except UserError:
            raise
        except Exception as error:  # transformers raises many kinds
            raise UserError(f"{setting} has no {TOKENIZER} and cannot be converted: {one_line(error)}") from error
        if not (Path(converted) / TOKENIZER).is_file():
            raise UserError(f"{setting} has no {TOKENIZER}, and transformers has no fast tokenizer for it")
        return _from_folder(Path(converted), setting)
