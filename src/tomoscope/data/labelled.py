"""Texts with labels, read from a table (.csv, .tsv, .jsonl, .parquet) whose columns are named by the caller.

    texts = load_labelled("statements.csv", text="statement", label="label")

Labels are classes (text, whole numbers, true/false) or, with `numeric`, numbers. `clusters` say which rows share a
source (an entity, a pair of paraphrases): they stay on one side of every split and are drawn together in every
interval. `check` refuses what would make any accuracy meaningless: missing labels, one class only, the label written in
the text, the same text twice with two labels. How it can mislead: a leak that is not spelled out (a template that only
one class uses) is not seen here; the baselines of length and of token identity are there for it.

Steps: read the rows, find the columns, turn labels into classes, look for what is wrong.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tomoscope.errors import DataError, nearest

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
TEXT_NAMES = ("text", "statement", "sentence", "prompt", "question")
LABEL_NAMES = ("label", "class", "target", "answer", "y")
_RAREST = 0.02
"""A class rarer than this share is an error: an accuracy above the majority's can then hardly be seen."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and what each is labelled.

    Attributes:
        texts: one a row.
        labels: [row] index into `classes`, or the number itself where `classes` is empty.
        classes: names of the classes, sorted; the second of two is the positive one.
        clusters: a key a row; rows of one key share a source.
        groups: a name a row (a template, a data set) between which probes are transferred; "" where there is none.
        name: where they came from.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    clusters: tuple[Hashable, ...] = ()
    groups: tuple[str, ...] = ()
    name: str = "texts"
    notes: tuple[str, ...] = field(default=())
    """Warnings of `check`: imbalance, a label told by length."""

    def __post_init__(self) -> None:
        n = len(self.texts)
        if len(self.labels) != n:
            raise DataError(f"{self.name}: {len(self.labels)} labels for {n} texts.", remedy="Give one label a text.")
        for what in ("clusters", "groups"):
            given = getattr(self, what)
            if given and len(given) != n:
                raise DataError(f"{self.name}: {len(given)} {what} for {n} texts.", remedy="Give one a text, or none.")
        if not self.clusters:
            object.__setattr__(self, "clusters", tuple(range(n)))
        if not self.groups:
            object.__setattr__(self, "groups", ("",) * n)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def numeric(self) -> bool:
        """Whether the labels are numbers rather than classes."""
        return not self.classes

    def take(self, rows: Sequence[int] | np.ndarray) -> LabelledTexts:
        """Some rows, in the order given."""
        rows = np.asarray(rows)
        return replace(
            self, texts=tuple(self.texts[i] for i in rows), labels=self.labels[rows],
            clusters=tuple(self.clusters[i] for i in rows), groups=tuple(self.groups[i] for i in rows),
        )  # fmt: skip


def load_labelled(
    path: str | Path,
    *,
    text: str = "",
    label: str = "",
    cluster: str = "",
    group: str = "",
    numeric: bool = False,
    limit: int | None = None,
    checked: bool = True,
) -> LabelledTexts:
    """Read a table of texts and labels.

    Args:
        path: .csv or .tsv with a header, .jsonl, or .parquet.
        text: the column of texts; by default the one column with a usual name ("text", "statement", "sentence" ...).
        label: the column of labels; likewise ("label", "class" ...).
        cluster: the column that says which rows share a source; each row its own by default.
        group: the column of templates or data sets.
        numeric: take the labels as numbers, for regression.
        limit: the first so many rows only.
        checked: refuse what `check` refuses.

    Raises:
        DataError: an unreadable file, a column that is not there, a missing label (with its row), and see `check`.
    """
    path = Path(path)
    rows = read_rows(path)
    rows = rows if limit is None else rows[:limit]
    if not rows:
        raise DataError(f"{path} holds no rows.", remedy="Give a table with a header and at least one row.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    text, label = _column(path, names, text, TEXT_NAMES, "texts"), _column(path, names, label, LABEL_NAMES, "labels")
    for name in (cluster, group):
        if name and name not in names:
            raise _no_column(path, names, name)
    texts = tuple(_text(row.get(text), f"{path}, row {i}", text) for i, row in enumerate(rows, start=1))
    labels, classes = _labels([row.get(label) for row in rows], path, label, numeric)
    made = LabelledTexts(
        texts, labels, classes, tuple(str(row.get(cluster)) for row in rows) if cluster else (),
        tuple(str(row.get(group)) for row in rows) if group else (), path.stem,
    )  # fmt: skip
    return check(made) if checked else made


def check(data: LabelledTexts, *, least: int = 8) -> LabelledTexts:
    """Refuse labels from which nothing can be learned, and note what makes learning look better than it is.

    Raises DataError for fewer than `least` rows, a constant label, a class of fewer than 4 rows or less than 2 % of
    them, a class's name written in all of its texts and in none of the others, and one text with two labels. Returns
    the data with notes: duplicates, imbalance.
    """
    name, n = data.name, len(data)
    if n < least:
        raise DataError(f"{name} has {n} rows, and {least} are needed.", remedy="Give more rows.")
    notes = []
    seen: dict[str, Any] = {}
    for text, value in zip(data.texts, data.labels.tolist(), strict=True):
        if seen.setdefault(text, value) != value:
            raise DataError(
                f"{name} has the text {text[:60]!r} twice, with two labels.", remedy="Keep one of them, or mend it."
            )
    if len(seen) < n:
        notes.append(
            f"{n - len(seen)} of {n} texts stand twice or more; they are drawn together only if `cluster` says so"
        )
    if data.numeric:
        if float(np.ptp(data.labels)) == 0:
            raise DataError(f"{name}: every label is {data.labels[0]:g}.", remedy="Give labels that differ.")
        return replace(data, notes=tuple(notes))
    counts = Counter(data.labels.tolist())
    if len(counts) < 2:
        raise DataError(
            f"{name}: every label is {data.classes[int(data.labels[0])]!r}.",
            remedy="Give labels of two classes or more.",
        )
    if len(counts) > max(50, n // 4):
        raise DataError(
            f"{name}: {len(counts)} different labels in {n} rows are no classes.",
            remedy="Name another label column, or give numeric=True for numbers.",
        )
    rare, few = min(counts.items(), key=lambda pair: pair[1])
    if few < 4 or few < _RAREST * n:
        raise DataError(
            f"{name}: the class {data.classes[rare]!r} has {few} of {n} rows.",
            remedy="Give more rows of it, or leave it out: a classifier that never says it would look right.",
        )
    if few < 0.5 * n / len(counts):
        notes.append(
            f"imbalanced: {data.classes[rare]!r} is {few} of {n} rows; compare with the majority class's share"
        )
    leak = _leaking(data)
    if leak:
        raise DataError(
            f"{name}: the text says its own label: {leak!r} stands in every text labelled so and in no other.",
            remedy="Cut the label out of the text.",
        )
    return replace(data, notes=tuple(notes))


def _leaking(data: LabelledTexts) -> str:
    """A class whose name is in all of its texts and in none of the others; "" where there is none."""
    for index, word in enumerate(data.classes):
        if len(word) < 2:
            continue
        has = np.array([word.lower() in text.lower() for text in data.texts])
        if (has == (data.labels == index)).all():
            return word
    return ""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a table as they are. Raises DataError for a file that cannot be read."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is of no kind that is read.", remedy=f"Give {', '.join(SUFFIXES)}.")
    try:
        if suffix == ".parquet":
            return _parquet(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                return _jsonl(path, file)
            return _csv(path, file, "\t" if suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).", remedy="Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", remedy="Check the path.") from error


def _csv(path: Path, file: Any, delimiter: str) -> list[dict[str, Any]]:
    try:
        rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} is no table: {error}.", remedy="Quote fields that hold the delimiter.") from error
    for i, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(
                f"{path}, row {i}: more fields than the header has.", remedy="Quote fields that hold the delimiter."
            )
    return [{str(key): value for key, value in row.items()} for row in rows]


def _jsonl(path: Path, file: Any) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}).", remedy="Mend or remove it.") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: no object.", remedy="Write one object a line.")
        rows.append(value)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}.", remedy="Write it again.") from error


def _column(path: Path, names: list[str], given: str, usual: tuple[str, ...], what: str) -> str:
    if given:
        if given not in names:
            raise _no_column(path, names, given)
        return given
    found = [name for name in names if name.lower() in usual]
    if len(found) == 1:
        return found[0]
    why = f"has several columns that could hold the {what}" if found else f"has no column with a usual name for {what}"
    raise DataError(f"{path} {why}.", remedy=f"Name it; the columns are {', '.join(map(repr, names))}.")


def _no_column(path: Path, names: list[str], name: str) -> DataError:
    hint = nearest(name, names)
    return DataError(
        f"{path} has no column {name!r}.", remedy=f"{hint} The columns are {', '.join(map(repr, names))}.".strip()
    )


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no text under {column!r}.", remedy="Fill it in, or remove the row.")
    return value


def _missing(value: Any) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def _labels(values: list[Any], path: Path, column: str, numeric: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    gone = [i for i, value in enumerate(values, start=1) if _missing(value)]
    if gone:
        shown = ", ".join(map(str, gone[:5])) + (" ..." if len(gone) > 5 else "")
        raise DataError(
            f"{path}: {len(gone)} of {len(values)} rows have no label under {column!r} (row {shown}).",
            remedy="Label them, or remove them.",
        )
    if numeric:
        try:
            numbers = np.array([float(value) for value in values])
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: a label under {column!r} is no number: {error}.", remedy="Mend it.") from error
        if not np.isfinite(numbers).all():
            raise DataError(f"{path}: a label under {column!r} is not finite.", remedy="Mend it.")
        return numbers, ()
    words = [_word(value, path, column) for value in values]
    classes = sorted(set(words), key=lambda word: (_number(word), word))
    index = {word: i for i, word in enumerate(classes)}
    return np.array([index[word] for word in words]), tuple(classes)


def _word(value: Any, path: Path, column: str) -> str:
    """A label as its class's name: 1, 1.0 and "1" are one class, true and "True" are one."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        word = value.strip()
        return word.lower() if word.lower() in ("true", "false", "yes", "no") else word
    raise DataError(f"{path}: a label under {column!r} is a {type(value).__name__}.", remedy="Give text or numbers.")


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.inf
