"""Readers of one file each, as streams of texts: .txt, .jsonl, .json lists, .parquet, and data sets of the hub.

Every reader holds one document or one buffer at a time and names file and line (or row) in its errors. How it can
mislead: a .txt file's documents are what blank lines separate; a file with one document a line and no blank lines is
one document.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from tomoscope.errors import DataError

SUFFIXES: tuple[str, ...] = (".txt", ".jsonl", ".json", ".txt.gz", ".jsonl.gz", ".json.gz", ".parquet")
_CHUNK = 1 << 16
_BLANKS = " \t\r\n"


class Record(NamedTuple):
    """A text and where it stands."""

    text: str
    source: str


def kind_of(path: Path) -> str:
    """The reader's name for a file ("txt", "jsonl", "json", "parquet"), or '' for a kind that is not read."""
    name = path.name.lower()
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return suffix.removesuffix(".gz").lstrip(".")


def records(path: Path, field: str = "text") -> Iterator[Record]:
    """The texts of one file. Raises DataError, with file and line, for what cannot be read."""
    reader: Callable[[Path, str], Iterator[Record]] = _READERS[kind_of(path)]
    try:
        yield from reader(path, field)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}.", remedy="Fetch or write it again.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}.", remedy="Check the file and its permissions.") from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line)."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}).",
                    remedy="Convert the file to UTF-8.",
                ) from error


def _text_of(value: Any, field: str, where: str) -> str:
    """The text of a JSON value: itself, or an object's field."""
    if isinstance(value, dict):
        if field not in value:
            raise DataError(
                f"{where}: no field {field!r}.",
                remedy=f"It has {', '.join(map(repr, value)) or 'no fields'}; give field=.",
            )
        value = value[field]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {type(value).__name__} where a text should be.", remedy="Give a field that holds text."
        )
    return value


def _txt(path: Path, field: str) -> Iterator[Record]:
    held: list[str] = []
    first = 1
    for number, line in _lines(path):
        if line.strip():
            first = first if held else number
            held.append(line)
        elif held:
            yield Record("".join(held).rstrip("\r\n"), f"{path}:{first}")
            held = []
    if held:
        yield Record("".join(held).rstrip("\r\n"), f"{path}:{first}")


def _jsonl(path: Path, field: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg}, column {error.colno}).", remedy="Mend or remove it."
            ) from error
        yield Record(_text_of(value, field, where), f"{path}:{number}")


def _json(path: Path, field: str) -> Iterator[Record]:
    """The items of a JSON list, decoded one by one from a buffer that is refilled."""
    for number, value in enumerate(json_items(path)):
        yield Record(_text_of(value, field, f"{path}, item {number}"), f"{path}:{number}")


def json_items(path: Path) -> Iterator[Any]:
    """The items of a file that is one JSON list, one at a time.

    Raises DataError where it is not one, or is cut short.
    """
    decoder = json.JSONDecoder()
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
    with _open(path) as file:
        text, done, seen = "", False, 0

        def more() -> bool:
            nonlocal text, done
            chunk = file.read(_CHUNK)
            done = not chunk
            try:
                text += utf8.decode(chunk, final=done)
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, item {seen}: not UTF-8.", remedy="Convert the file to UTF-8.") from error
            return not done

        while not text.lstrip(_BLANKS) and more():
            pass
        text = text.lstrip(_BLANKS)
        if not text.startswith("["):
            raise DataError(f"{path} is not a JSON list.", remedy="Write a list, or one object a line in .jsonl.")
        text, separated = text[1:], True
        while True:
            text = text.lstrip(_BLANKS)
            if text.startswith("]"):
                return
            if text.startswith(",") and not separated:
                text, separated = text[1:].lstrip(_BLANKS), True
            try:
                value, end = decoder.raw_decode(text)
                # a number at the buffer's end may go on in the next chunk
                whole = end < len(text) or done
            except json.JSONDecodeError:
                whole = False
            if whole and separated:
                yield value
                text, seen, separated = text[end:], seen + 1, False
            elif not whole and not done:
                more()
            else:
                raise DataError(
                    f"{path}, item {seen}: not JSON, or the file is cut short.",
                    remedy="Mend it, or fetch or write it again.",
                )


def _parquet(path: Path, field: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise DataError(
                    f"{path} has no column {field!r}.",
                    remedy=f"It has {', '.join(file.schema_arrow.names)}; give field=.",
                )
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield Record(_text_of(value, field, f"{path}, row {number}"), f"{path}:{number}")
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}.", remedy="Fetch or write it again.") from error


def hub_records(name: str, field: str, split: str) -> Iterator[Record]:
    """The texts of a hub data set, streamed. Raises DataError where `datasets` is absent or the set cannot be had."""
    try:
        datasets = importlib.import_module("datasets")  # an extra: not there for everyone
    except ImportError as error:
        raise DataError(
            f"{name!r} is no file here, and data sets of the hub need the package `datasets`.",
            remedy="Check the path, or install tomoscope[hub].",
        ) from error
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
        for number, row in enumerate(stream):
            yield Record(_text_of(row, field, f"{name}, row {number}"), f"{name}:{number}")
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name!r} is no file here, and the hub gives no data set of that name (split {split!r}): {error}.",
            remedy="Check the path or the id, the split and the network.",
        ) from error


_READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "json": _json,
    "parquet": _parquet,
}
