"""Text corpora as streams: documents from files or a hub data set, packed into rows of a fixed number of tokens.

Reads .txt (documents separated by blank lines), .jsonl, .json (a list), .parquet, each of the first three also as .gz,
a directory of such files in the order of their paths, or a data set of the hub through `datasets`. Memory stays
bounded whatever the size: one document, one read buffer, or one batch of rows is held at a time. How it can mislead:
packed rows hold the end of one document and the start of another, and attention crosses the border unless masked by
`Row.documents`; a corpus read only in part is not a random sample of it.

Steps: find the files, stream documents with their index, tokenize some at a time, cut into rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Int

from tomoscope.data.readers import SUFFIXES, Record, hub_records, kind_of, records
from tomoscope.errors import DataError

_AT_A_TIME = 32


@dataclass(frozen=True)
class Document:
    """One text of a corpus: `index` counts from 0 over the whole corpus, `source` says the file and line (or row)."""

    text: str
    index: int
    source: str


@dataclass(frozen=True)
class Row:
    """One packed row: token ids, and for each token the index of the document it came from."""

    ids: Int[np.ndarray, " position"]
    documents: Int[np.ndarray, " position"]


@dataclass(frozen=True)
class Corpus:
    """A stream of documents that can be read again and from any document on.

    `source` is a file, a directory or a hub id ("owner/name"; `split` chooses its part). `field` names the text in
    .jsonl, .json of objects, .parquet and hub data sets. `limit` ends the corpus after that many documents. Empty
    documents are left out.
    """

    source: str | Path
    field: str = "text"
    split: str = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"The corpus was limited to {self.limit} documents.", remedy="Give at least one.")
        self.files()

    def files(self) -> tuple[Path, ...]:
        """The files in the order they are read; none for a hub data set.

        Raises DataError where there is nothing to read.
        """
        path = Path(self.source)
        if path.is_dir():
            found = tuple(sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file)))
            if not found:
                raise DataError(f"The directory {path} holds no text.", remedy=f"Known kinds: {', '.join(SUFFIXES)}.")
            return found
        if path.is_file():
            if not kind_of(path):
                raise DataError(f"{path} is of no known kind.", remedy=f"Known kinds: {', '.join(SUFFIXES)}.")
            return (path,)
        if kind_of(path) or path.is_absolute() or str(self.source).count("/") > 1 or not str(self.source):
            raise DataError(f"There is no file or directory {str(self.source)!r}.", remedy="Check the path.")
        return ()

    def documents(self, *, start: int = 0) -> Iterator[Document]:
        """Documents from index `start` on, in order.

        Raises DataError, naming file and line, where a file is truncated, a line is not JSON or not UTF-8, or the
        field is missing.
        """
        stream = islice(self._records(), start, self.limit)
        for index, record in enumerate(stream, start=start):
            yield Document(record.text, index, record.source)

    def _records(self) -> Iterator[Record]:
        files = self.files()
        if not files:
            found = hub_records(str(self.source), self.field, self.split)
        else:
            found = (record for file in files for record in records(file, self.field))
        return (record for record in found if record.text.strip())

    def pack(
        self, tokenizer: Any, length: int, *, seed: int | None = None, start: int = 0, buffer: int = 1_000
    ) -> Iterator[Row]:
        """Rows of exactly `length` tokens; after each document stands the tokenizer's end token, if it has one.

        A long document fills several rows; a last row that is not full is dropped. With a seed, documents are shuffled
        within a buffer of that many documents. To go on after a stop, give `start` the index after the last row's last
        document (without a seed; the rest of that document is passed over). Raises DataError for a length under 1.
        """
        if length < 1:
            raise DataError(f"Rows of {length} tokens were asked for.", remedy="Ask for at least one token a row.")
        end = getattr(tokenizer, "eos_token_id", None)
        documents = self.documents(start=start)
        if seed is not None:
            documents = _shuffled(documents, seed, buffer)
        ids: list[int] = []
        owners: list[int] = []
        while some := list(islice(documents, _AT_A_TIME)):
            encoded = tokenizer([document.text for document in some], add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
            for document, tokens in zip(some, encoded, strict=True):
                ids += tokens if end is None else [*tokens, end]
                owners += [document.index] * (len(ids) - len(owners))
            full = len(ids) - len(ids) % length
            for i in range(0, full, length):
                row, documents_of = ids[i : i + length], owners[i : i + length]
                yield Row(np.array(row, dtype=np.int64), np.array(documents_of, dtype=np.int64))
            del ids[:full], owners[:full]


def _shuffled(documents: Iterator[Document], seed: int, buffer: int) -> Iterator[Document]:
    """Each document leaves from a random place of a buffer that the stream refills."""
    random = Random(f"{seed}:shuffle")
    held = list(islice(documents, max(1, buffer)))
    for document in documents:
        i = random.randrange(len(held))
        held[i], leaving = document, held[i]
        yield leaving
    random.shuffle(held)
    yield from held
