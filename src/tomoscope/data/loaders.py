"""Prompt pairs and facts that others wrote, read from their files.

Three shapes are known: an object with "prompts", each {clean, corrupt, answers, wrong_answers} (IOI, docstring and
greater-than pairs as circuit-discovery tools ship them), or one such object a line; one object a line {clean_prefix,
patch_prefix, clean_answer, patch_answer, case} (agreement pairs of Marks et al. 2024, arXiv:2403.19647, after Finlayson
et al. 2021); and a list of {prompt, subject, attribute} (the 1,000 facts of Meng et al. 2022, arXiv:2202.05262). How
they can mislead: such pairs were aligned for one tokenizer, mostly GPT-2's; with another, `PairSet.encode` may refuse
them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tomoscope.data.pairs import Item, Pair, PairSet
from tomoscope.data.prompts import Prompt, Span, mark
from tomoscope.errors import DataError, PromptError

_WORD = re.compile(r"\w+|[^\w\s]")


def load_pairs(path: str | Path, *, name: str | None = None) -> PairSet:
    """Read prompt pairs from JSON (an object with "prompts") or from one JSON object a line.

    Where the file counts words ("word_idxs") and its counting fits the text, the words become spans. Raises DataError,
    with file and entry, for what is neither shape.
    """
    path = Path(path)
    text = _read(path)
    try:
        whole: Any = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict) and "prompts" in whole:
        places = whole.get("word_idxs", {})
        pairs = [_from_prompts(entry, places, f"{path}, prompt {i}") for i, entry in enumerate(whole["prompts"])]
    else:
        pairs = _lines(text, path)
    if not pairs:
        raise DataError(f"{path} holds no pairs.", remedy="Give a file with at least one.")
    return PairSet(tuple(pairs), name=name or path.stem, corruption="as in the file")


def load_facts(path: str | Path) -> tuple[Item, ...]:
    """Read facts: a JSON list of {prompt, subject, attribute}; the subject's first place in the prompt becomes the
    span `subject`.

    Answers have a leading space. Raises DataError, with file and entry, where a key is missing or the subject is not
    in its prompt.
    """
    path = Path(path)
    try:
        entries = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}).", remedy="Mend or fetch it again."
        ) from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is not a list of facts.", remedy="Write a list of {prompt, subject, attribute}.")
    items = []
    for i, entry in enumerate(entries):
        where = f"{path}, fact {i}"
        prompt, subject, attribute = (_get(entry, key, where) for key in ("prompt", "subject", "attribute"))
        try:
            marked = mark(prompt, [("subject", subject)])
        except PromptError as error:
            raise DataError(
                f"{where}: the subject {subject!r} is not in {prompt!r}.", remedy="Mend the entry."
            ) from error
        labels = {"relation": str(entry.get("relation_id", ""))}
        items.append(Item(marked, (f" {attribute.strip()}",), labels=labels))
    return tuple(items)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}).", remedy="Convert the file to UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", remedy="Check the path.") from error


def _get(entry: Any, key: str, where: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise DataError(f"{where}: no text under {key!r}.", remedy="Mend the entry.")
    return entry[key]


def _from_prompts(entry: Any, places: Mapping[str, int], where: str) -> Pair:
    clean = _get(entry, "clean", where)
    corrupted = _get(entry, "corrupted" if isinstance(entry, dict) and "corrupted" in entry else "corrupt", where)
    answers, wrong = entry.get("answers"), entry.get("wrong_answers", [])
    for given in (answers, wrong):
        if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
            raise DataError(f"{where}: answers that are no list of texts.", remedy="Mend the entry.")
    return Pair(
        Prompt(clean, _word_spans(clean, places)),
        Prompt(corrupted, _word_spans(corrupted, places)),
        tuple(answers),
        tuple(wrong),
    )


def _word_spans(text: str, places: Mapping[str, int]) -> dict[str, Span]:
    """Spans of counted words; none where the count does not end at the text's last word, for then it counts other
    pieces.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    if places.get("end") != len(words) - 1:
        return {}
    return {label: words[i] for label, i in places.items() if label.isidentifier() and 0 <= i < len(words)}


def _lines(text: str, path: Path) -> list[Pair]:
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not JSON ({error.msg}, column {error.colno}).",
                remedy="Give an object with 'prompts', or one object a line.",
            ) from error
        if isinstance(entry, dict) and "clean" in entry:
            pairs.append(_from_prompts(entry, {}, where))
            continue
        keys = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer")
        clean, corrupted, answer, wrong = (_get(entry, key, where) for key in keys)
        pairs.append(Pair(Prompt(clean), Prompt(corrupted), (answer,), (wrong,), {"case": str(entry.get("case", ""))}))
    return pairs
