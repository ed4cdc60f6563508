"""Clean and corrupted prompts in pairs, aligned token by token, with the answers that tell them apart.

Activation patching compares two runs position by position, which means something only where both prompts have as many
tokens; `PairSet.encode` checks it and says what differs. Answers are text that continues the prompt (" Mary"), encoded
in its context, and may take several tokens. How it can mislead: a logit difference on the first tokens of answers is
right only if those differ between right and wrong answers; `AlignedPairs.answer_ids` refuses otherwise, and
`answer_tokens` has the whole sequences for a log-probability.

Steps: make pairs, check each pair's two token lists, encode answers as continuations, give arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any, overload

import numpy as np
from jaxtyping import Int

from tomoscope.data.prompts import Prompt, Span, as_prompt
from tomoscope.errors import AlignmentError, DataError, PromptError

NO_TOKEN = -1
"""Fills the rows of `answer_ids` and `wrong_ids` where a pair has fewer answers than another."""


@dataclass(frozen=True)
class Item:
    """One prompt with its right and wrong continuations, for what needs no corrupted twin (causal tracing by noise)."""

    prompt: Prompt
    answers: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, init=False)
class Pair:
    """A clean and a corrupted prompt; `answers` are right after the clean one, `wrong` are the foils.

    Prompts may be given as texts. Answers are continuations as text, with their leading space. `labels` are free
    (template, order, ...). Raises PromptError for an empty prompt, and for answers that are missing, empty or no texts.
    """

    clean: Prompt
    corrupted: Prompt
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __init__(
        self,
        clean: Prompt | str | Sequence[int],
        corrupted: Prompt | str | Sequence[int],
        answers: Sequence[str],
        wrong: Sequence[str],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        for name, given in (("answers", answers), ("wrong", wrong)):
            if isinstance(given, str) or not all(isinstance(text, str) for text in given):
                raise PromptError(f"{name}={given!r} is not a tuple of texts.", remedy=f"Write {name}=(' Mary',).")
            object.__setattr__(self, name, tuple(given))
        object.__setattr__(self, "clean", as_prompt(clean))
        object.__setattr__(self, "corrupted", as_prompt(corrupted))
        object.__setattr__(self, "labels", dict(labels or {}))
        if not self.answers or "" in self.answers or "" in self.wrong:
            raise PromptError(
                f"The pair {self.clean.text!r} has no answer, or an empty one.",
                remedy="Give at least one answer of text.",
            )


@dataclass(frozen=True)
class AlignedPairs:
    """Pairs as token ids, checked: in each pair both prompts have the same number of tokens.

    `clean_ids`, `corrupted_ids`: a tuple of token ids a pair (pairs may differ in length from each other).
    `answer_tokens`, `wrong_tokens`: for each pair, for each answer, its whole token sequence.
    `spans`, `corrupted_spans`: for each pair, label -> (first token, one past the last).
    """

    clean_ids: tuple[tuple[int, ...], ...]
    corrupted_ids: tuple[tuple[int, ...], ...]
    answer_tokens: tuple[tuple[tuple[int, ...], ...], ...]
    wrong_tokens: tuple[tuple[tuple[int, ...], ...], ...]
    spans: tuple[dict[str, Span], ...]
    corrupted_spans: tuple[dict[str, Span], ...]

    def __len__(self) -> int:
        return len(self.clean_ids)

    @property
    def answer_ids(self) -> Int[np.ndarray, "pair answer"]:
        """First token of each answer, -1 where a pair has fewer. Raises AlignmentError if answer and foil share it."""
        self._check_first_tokens()
        return _first_tokens(self.answer_tokens)

    @property
    def wrong_ids(self) -> Int[np.ndarray, "pair wrong"]:
        """First token of each wrong answer, -1 where a pair has fewer. Raises AlignmentError as `answer_ids` does."""
        self._check_first_tokens()
        return _first_tokens(self.wrong_tokens)

    @property
    def first_tokens_suffice(self) -> bool:
        """Whether in every pair the answers' first tokens differ from the wrong answers'."""
        return self._first_clash() is None

    def _first_clash(self) -> tuple[int, int] | None:
        for i, (answers, wrong) in enumerate(zip(self.answer_tokens, self.wrong_tokens, strict=True)):
            for token in {sequence[0] for sequence in answers} & {sequence[0] for sequence in wrong}:
                return i, token
        return None

    def _check_first_tokens(self) -> None:
        clash = self._first_clash()
        if clash is not None:
            i, token = clash
            raise AlignmentError(
                f"In pair {i} an answer and a wrong answer begin with the same token ({token}): "
                f"{self.answer_tokens[i]} and {self.wrong_tokens[i]}.",
                remedy="Score whole sequences (answer_tokens, wrong_tokens), or choose answers that differ at once.",
            )


@dataclass(frozen=True, init=False)
class PairSet(Sequence[Pair]):
    """Pairs of one task. `name` is the task, `seed` what it was drawn with, `corruption` how the twins were made."""

    pairs: tuple[Pair, ...]
    name: str = "pairs"
    seed: int | None = None
    corruption: str = ""

    def __init__(
        self, pairs: Sequence[Pair], name: str = "pairs", seed: int | None = None, corruption: str = ""
    ) -> None:
        if not pairs:
            raise DataError(f"The set {name!r} has no pairs.", remedy="Give at least one pair.")
        for key, value in (("pairs", tuple(pairs)), ("name", name), ("seed", seed), ("corruption", corruption)):
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> Pair | PairSet:
        return replace(self, pairs=self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    @property
    def clean(self) -> tuple[Prompt, ...]:
        """The clean prompts."""
        return tuple(pair.clean for pair in self.pairs)

    @property
    def corrupted(self) -> tuple[Prompt, ...]:
        """The corrupted prompts."""
        return tuple(pair.corrupted for pair in self.pairs)

    def halves(self, *, seed: int = 0) -> tuple[PairSet, PairSet]:
        """Two disjoint halves, to choose on one and measure on the other; pairs with one clean text stay together."""
        texts = sorted({pair.clean.text for pair in self.pairs})
        Random(f"{seed}:halves").shuffle(texts)
        chosen = set(texts[: len(texts) // 2])
        first = tuple(pair for pair in self.pairs if pair.clean.text in chosen)
        second = tuple(pair for pair in self.pairs if pair.clean.text not in chosen)
        if not first:
            raise DataError(
                f"{self.name!r} has {len(texts)} different clean prompt, which can't be split.",
                remedy="Give at least two.",
            )
        return replace(self, pairs=first), replace(self, pairs=second)

    def digest(self) -> str:
        """SHA-256 of the pairs' content, for the record of a run."""
        rows = json.dumps([asdict(pair) for pair in self.pairs], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(rows.encode()).hexdigest()

    def encode(self, tokenizer: Any) -> AlignedPairs:
        """Token ids of every prompt and answer, checked for alignment.

        Raises AlignmentError for a pair whose two prompts differ in length, and for an answer that merges with the end
        of its prompt; PromptError for an empty prompt or a span that covers no token.
        """
        clean = [pair.clean.encode(tokenizer) for pair in self.pairs]
        corrupted = [pair.corrupted.encode(tokenizer) for pair in self.pairs]
        for i, (one, other) in enumerate(zip(clean, corrupted, strict=True)):
            if len(one) != len(other):
                raise _misaligned(self.name, i, tokenizer, one.ids, other.ids)
        known: dict[tuple[str, str], tuple[int, ...]] = {}
        return AlignedPairs(
            clean_ids=tuple(one.ids for one in clean),
            corrupted_ids=tuple(one.ids for one in corrupted),
            answer_tokens=tuple(_continuations(tokenizer, pair.clean, pair.answers, known) for pair in self.pairs),
            wrong_tokens=tuple(_continuations(tokenizer, pair.clean, pair.wrong, known) for pair in self.pairs),
            spans=tuple(one.spans for one in clean),
            corrupted_spans=tuple(one.spans for one in corrupted),
        )


def continuation(tokenizer: Any, prompt: Prompt | str, answer: str) -> tuple[int, ...]:
    """Token ids of `answer` as it continues `prompt`: encoded together, less the prompt's own tokens.

    Raises AlignmentError where the tokenizer merges the answer with the end of the prompt, so that it is no
    continuation.
    """
    return _continuations(tokenizer, as_prompt(prompt), (answer,), {})[0]


def _continuations(
    tokenizer: Any, prompt: Prompt, answers: Sequence[str], known: dict[tuple[str, str], tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    # the tokens of a continuation depend on the last words only: encode those, once for each different end
    tail = prompt.text[-80:]
    lacking = [answer for answer in dict.fromkeys(answers) if (tail, answer) not in known]
    if lacking:
        texts = [tail, *(tail + answer for answer in lacking)]
        before, *afters = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for answer, after in zip(lacking, afters, strict=True):
            if after[: len(before)] != before or len(after) == len(before):
                one, other = (tokenizer.convert_ids_to_tokens(ids)[-3:] for ids in (before, after))
                raise AlignmentError(
                    f"The answer {answer!r} merges with the end of the prompt {prompt.text!r}: {one} becomes {other}.",
                    remedy="Begin the answer with the space that separates it, and end the prompt without one.",
                )
            known[tail, answer] = tuple(after[len(before) :])
    return tuple(known[tail, answer] for answer in answers)


def _misaligned(
    name: str, index: int, tokenizer: Any, clean: Sequence[int], corrupted: Sequence[int]
) -> AlignmentError:
    one, other = tokenizer.convert_ids_to_tokens(list(clean)), tokenizer.convert_ids_to_tokens(list(corrupted))
    first = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    here, there = (repr(tokens[first]) if first < len(tokens) else "the end" for tokens in (one, other))
    return AlignmentError(
        f"Pair {index} of {name!r} does not align: the clean prompt has {len(one)} tokens {one}, the corrupted one has "
        f"{len(other)} {other}; they first differ at position {first} ({here} against {there}).",
        remedy="Replace words by words of as many tokens, or let a task of tomoscope.data.tasks choose them.",
    )


def _first_tokens(sequences: Sequence[Sequence[Sequence[int]]]) -> Int[np.ndarray, "pair answer"]:
    width = max((len(row) for row in sequences), default=0)
    table = np.full((len(sequences), width), NO_TOKEN, dtype=np.int64)
    for i, row in enumerate(sequences):
        table[i, : len(row)] = [sequence[0] for sequence in row]
    return table
