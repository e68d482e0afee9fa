"""Read documents and records from files: text, JSON, CSV and Parquet, also compressed."""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cod_lightning.data.config import UTF_8
from cod_lightning.data.instructions import Example, prompt_of
from cod_lightning.errors import UserError, first_line, plural

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst")
FILE_SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
SUFFIXES_HELP = f"{', '.join(FILE_SUFFIXES)}, each (but .parquet) also with {' or '.join(COMPRESSED)}"
DOCUMENT_BYTES = 2**30
"""Largest line, file of text or JSON list, which are read at once: a file of one line would fill the memory."""


def format_of(path: Path) -> str:
    """The suffix of a file without that of its compression, such as ".jsonl" of a.jsonl.gz."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_readable(path: Path) -> bool:
    """Whether the name of a file has one of `FILE_SUFFIXES`, also compressed."""
    return format_of(path) in FILE_SUFFIXES and not (format_of(path) == ".parquet" and path.suffix in COMPRESSED)


def read_file(path: Path, field: str = "text", encoding: str = UTF_8) -> Iterator[str]:
    """Yield the documents of one file: all of a .txt or .md, else the `field` of each record.

    Skips documents that are empty or whitespace.

    Args:
        path: the file.
        field: name of the field or column with the text.
        encoding: Python's name of the encoding.

    Raises:
        UserError: names the file, and the line or record if there are any: not readable, damaged, in another encoding,
            too long, not JSON, or without `field`.
    """
    if format_of(path) in TEXT_SUFFIXES:
        with opened(path, encoding) as file:
            content = bounded(file.read(DOCUMENT_BYTES + 1), str(path))
            texts: Iterable[str] = [content.decode(text_codec(encoding))]
    else:
        hint = ": name one with data.text_field="
        texts = (string_of(place, record, field, hint) for place, record in records(path, encoding, [field]))
    for text in texts:
        if text and not text.isspace():
            yield text


def read_examples(path: Path, encoding: str = UTF_8) -> Iterator[Example]:
    """Yield the examples of a file of instructions: records, which a .json or .jsonl may also hold as one list.

    Raises:
        UserError: as `read_file`; text; or a record without an instruction or an output.
    """
    if format_of(path) in TEXT_SUFFIXES:
        raise UserError(f"data.source=instructions: {path} is not one of {', '.join(RECORD_SUFFIXES)}")
    for location, record in records(path, encoding, None):
        yield example_of(location, record)


def example_of(location: str, record: Any) -> Example:
    instruction, output = string_of(location, record, "instruction"), string_of(location, record, "output")
    for name, text in (("instruction", instruction), ("output", output)):
        if not text or text.isspace():
            raise UserError(f'{location}: the field "{name}" is empty')
    return Example(prompt_of(instruction, string_of(location, {"input": "", **record}, "input")), output)


def string_of(location: str, record: Any, name: str, hint: str = "") -> str:
    """A field of a record; with a `hint` the error of another record names its fields."""
    fields = record if isinstance(record, dict) else {}
    text = fields.get(name)
    if not isinstance(text, str):
        strings = [other for other, value in fields.items() if isinstance(value, str) and name not in fields]
        others = f"; it has {', '.join(strings)}{hint}" if strings and hint else ""
        raise UserError(f'{location}: no string in the field "{name}"{others}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UserError(f"{location}: not valid Unicode ({error})") from error
    return text


# --- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path, encoding: str) -> Generator[Any, None, None]:
    """Open a file, decompressed; errors while reading it name it."""
    try:
        with open_bytes(path) as file:
            if encoding == UTF_8 and file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UnicodeError("it begins with the byte order mark of UTF-16")
            yield file
    except UnicodeError as error:
        raise wrong_encoding(str(path), encoding, error) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def open_bytes(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow(path, "pyarrow").input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def pyarrow(path: Path, module: str) -> Any:
    """Import a module of pyarrow, which reads a file.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{path}: {path.suffix} needs pyarrow: pip install 'cod_lightning[hf]'") from error


def text_codec(encoding: str) -> str:
    """Python's codec of an encoding; that of UTF-8 drops a byte order mark, as that of UTF-16 does."""
    return "utf-8-sig" if encoding == UTF_8 else encoding


def wrong_encoding(location: str, encoding: str, error: UnicodeError) -> UserError:
    return UserError(
        f"{location} is not {encoding.upper()}: {first_line(error)}; name its encoding, as in data.encoding=latin-1 or "
        "data.encoding=utf-16"
    )


def bounded(content: Any, location: str) -> Any:
    """Return what was read at once, if it is not longer than `DOCUMENT_BYTES`."""
    if len(content) > DOCUMENT_BYTES:
        raise UserError(
            f"{location} is longer than {DOCUMENT_BYTES:,} bytes, which are read at once: split it into documents, as "
            "one JSON object a line"
        )
    return content


# --- records ----------------------------------------------------------------------------------------------------------


def records(path: Path, encoding: str, columns: list[str] | None) -> Iterator[tuple[str, Any]]:
    """Yield the location and the record of each line, row or list entry; of a .parquet only `columns` if given."""
    kind = format_of(path)
    if kind == ".parquet":
        yield from parquet_records(path, columns)
        return
    lists = kind == ".json" or columns is None
    with opened(path, encoding) as file:
        if kind == ".csv" or encoding != UTF_8:  # UTF-8 stays bytes: a wrong one does not hide the number of its line
            file = io.TextIOWrapper(file, text_codec(encoding), newline="")
        yield from csv_records(path, file) if kind == ".csv" else json_records(path, file, lists)


def numbered_lines(path: Path, file: IO[Any]) -> Iterator[tuple[int, Any]]:
    number = 1
    while line := file.readline(DOCUMENT_BYTES + 1):
        yield number, bounded(line, f"{path}, line {number}")
        number += 1


def json_records(path: Path, file: IO[Any], lists: bool) -> Iterator[tuple[str, Any]]:
    """Yield the records of JSON lines, or of one list if `lists`."""
    first = True
    for number, line in numbered_lines(path, file):
        if line.isspace():
            continue
        location = f"{path}, line {number}"
        if first and is_list(line):
            if not lists:
                raise UserError(f"{location}: a list, but .jsonl has one object a line; a .json can be a list")
            content = bounded(line + file.read(DOCUMENT_BYTES + 1 - len(line)), str(path))
            for entry, record in enumerate(parse_json(str(path), content), 1):
                yield f"{path}, record {entry}", record
            return
        first = False
        yield location, parse_json(location, line, "; expected one object a line")


def is_list(line: str | bytes) -> bool:
    start = line.removeprefix(codecs.BOM_UTF8).lstrip()[:1] if isinstance(line, bytes) else line.lstrip()[:1].encode()
    return start == b"["


def parse_json(location: str, content: str | bytes, hint: str = "") -> Any:
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")  # json would guess the encoding
        return json.loads(text)
    except UnicodeError as error:
        raise wrong_encoding(location, UTF_8, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not JSON ({error}){hint}") from error


def csv_records(path: Path, file: IO[str]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV file, whose first row names the columns."""
    rows = csv.DictReader((line for _, line in numbered_lines(path, file)), strict=True)
    limit = csv.field_size_limit(DOCUMENT_BYTES)  # of the process: others read CSV, too
    try:
        names = list(rows.fieldnames or ())
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f'{path}: two columns "{twice[0]}": rename one')
        for row in rows:
            location = f"{path}, line {rows.line_num}"
            if unnamed := row.get(None):  # values beyond the named columns
                raise UserError(
                    f"{location}: {len(names) + len(unnamed)} values for {plural(len(names), 'column')}: "
                    "quote values that hold a comma"
                )
            yield location, row
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def parquet_records(path: Path, columns: list[str] | None) -> Iterator[tuple[str, Any]]:
    arrow, parquet = (pyarrow(path, module) for module in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = file.schema_arrow.names
            for name in columns or []:
                if name not in known:
                    raise UserError(
                        f'{path}: no column "{name}"; it has {", ".join(known)}: name one with data.text_field='
                    )
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except (OSError, UnicodeDecodeError, arrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
