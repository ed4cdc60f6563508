"""What `tomoscope treat`, `export` and `undo` do with files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tomoscope.concepts import Direction, load_direction
from tomoscope.errors import EditError
from tomoscope.exams.files import read_lines
from tomoscope.treat import Treatment, load_treatment, merge_to, remove_directions, remove_heads, remove_neurons
from tomoscope.treat.merge import check_merged, unmerge_to

__all__ = ["Parts", "check_merged", "load_treatment", "merge_to", "parts_of", "removal", "unmerge_to"]


@dataclass(frozen=True)
class Parts:
    """What is to be taken out: (layer, head) pairs, (layer, neuron) pairs, or directions; of one kind."""

    heads: tuple[tuple[int, int], ...] = ()
    neurons: tuple[tuple[int, int], ...] = ()
    directions: tuple[Direction, ...] = ()


def parts_of(heads: Sequence[str], neurons: Sequence[str], directions: Sequence[Path]) -> Parts:
    """Parts from what a user typed. Raises EditError for none, for several kinds, and for what is no LAYER.NUMBER."""
    given = [kind for kind, some in (("heads", heads), ("neurons", neurons), ("directions", directions)) if some]
    if len(given) != 1:
        raise EditError(
            f"{'Nothing' if not given else ' and '.join(given)} to remove.",
            remedy="Give heads, neurons or directions; one treatment has one kind (export takes several treatments).",
        )
    return Parts(
        tuple(_place(text) for text in heads), tuple(_place(text) for text in neurons),
        tuple(load_direction(path) for path in directions),
    )  # fmt: skip


def _place(text: str) -> tuple[int, int]:
    layer, _, number = text.partition(".")
    if not (layer.isdigit() and number.isdigit()):
        raise EditError(f"{text!r} is no place.", remedy="Write LAYER.NUMBER, 5.3 for example; both begin at 0.")
    return int(layer), int(number)


def removal(subject: Any, parts: Parts, mean: Path | None) -> Treatment:
    """The treatment that takes parts out."""
    if parts.directions:
        if mean is not None:
            raise EditError("A direction has no mean to put in its place.", remedy="Leave --mean out.")
        return remove_directions(subject, parts.directions)
    texts = None if mean is None else read_lines(mean)
    if parts.heads:
        return remove_heads(subject, parts.heads, texts=texts)
    return remove_neurons(subject, parts.neurons, texts=texts)
