"""Tasks made once: many specimens share a tokenizer and a seed, and making prompts takes longer than reading them.

A task's pairs follow from the tokenizer, the number, the seed and the corruption alone, so that what is remembered is
what would be made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from typing import Any

from tomoscope.data import TASKS, AlignedPairs, PairSet, TaskSpec
from tomoscope.errors import TomoscopeError

_KNOWN: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def vocabulary(tokenizer: Any) -> str:
    """A hash of what makes a tokenizer a different one; "" for none."""
    if tokenizer is None:
        return ""
    if tokenizer not in _KNOWN:
        inner = getattr(tokenizer, "backend_tokenizer", None)
        words = sorted(getattr(tokenizer, "get_vocab", dict)().items())
        text = f"{words}{'' if inner is None else inner.to_str()}{getattr(tokenizer, 'padding_side', '')}"
        _KNOWN[tokenizer] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return _KNOWN[tokenizer]


class Remembered(PairSet):
    """Pairs whose tokens are encoded once for each tokenizer, whatever model has it."""

    def encode(self, tokenizer: Any) -> AlignedPairs:
        """As `PairSet.encode`."""
        known = self.__dict__.setdefault("_encoded", {})
        key = vocabulary(tokenizer)
        if key not in known:
            known[key] = super().encode(tokenizer)
        return known[key]


class Memory:
    """The field's tasks, each made once for a tokenizer, number, seed and corruption."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], PairSet | TomoscopeError] = {}

    def tasks(self) -> dict[str, TaskSpec]:
        """Every task of `TASKS` as it is now, remembering what it made."""
        return {name: dataclasses.replace(spec, make=self._remembering(spec)) for name, spec in TASKS.items()}

    def _remembering(self, spec: TaskSpec) -> Any:
        def make(
            tokenizer: Any, n: int, *, seed: int = 0, corruption: str = spec.corruptions[0], **further: Any
        ) -> PairSet:
            if further:
                return spec.make(tokenizer, n, seed=seed, corruption=corruption, **further)
            key = (spec.name, vocabulary(tokenizer), n, seed, corruption)
            if key not in self._made:
                try:
                    made = spec.make(tokenizer, n, seed=seed, corruption=corruption)
                    self._made[key] = Remembered(made.pairs, made.name, made.seed, made.corruption)
                except TomoscopeError as error:  # too few words for this tokenizer: so every time
                    self._made[key] = error
            known = self._made[key]
            if isinstance(known, TomoscopeError):
                raise known
            return known

        return make
