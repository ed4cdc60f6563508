"""Which words are single tokens in context, for the tokenizer at hand.

A word is tested as it will stand: "prefix" and "prefix word" are encoded and compared, since a word encoded alone may
lose or gain a space (SentencePiece puts one before it, byte-level BPE does not). How it can mislead: the test holds
after an ordinary word; after other characters the same word may be split, which `PairSet.encode` then reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, TypeVar

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt, read_text
from tomoscope.errors import DataError, TokenizerError, nearest

PREFIX = "So the"
T = TypeVar("T")


def single_tokens(tokenizer: Any, words: Iterable[str], *, prefix: str = PREFIX) -> dict[str, int]:
    """The words that are one token after `prefix` and a space, with that token's id, in the order given.

    Left out: words of several tokens, words unknown to the tokenizer, and a second word with the same token (a
    tokenizer that drops case may hold two words for one).
    """
    words = list(dict.fromkeys(words))
    if not words:
        return {}
    try:
        before = read_text(tokenizer, prefix, add_special_tokens=False)["input_ids"]
        encoded = read_text(tokenizer, [f"{prefix} {word}" for word in words], add_special_tokens=False)["input_ids"]
    except TokenizerError:  # one that can't read words it does not know: none is a token after the prefix
        return {}
    unknown = getattr(tokenizer, "unk_token_id", None)
    kept: dict[str, int] = {}
    taken: set[int] = set()
    for word, ids in zip(words, encoded, strict=True):
        if len(ids) != len(before) + 1 or list(ids[:-1]) != list(before) or ids[-1] == unknown or ids[-1] in taken:
            continue
        kept[word] = int(ids[-1])
        taken.add(int(ids[-1]))
    return kept


def require(tokenizer: Any, words: Sequence[str], needed: int, *, task: str, what: str) -> list[str]:
    """The single-token words. Raises DataError saying how many are left where fewer than `needed` are."""
    kept = list(single_tokens(tokenizer, words))
    if len(kept) < needed:
        raise too_few(task, what, len(kept), len(words), needed)
    return kept


def too_few(task: str, what: str, left: int, of: int, needed: int) -> DataError:
    """The error for a task whose words the tokenizer splits."""
    return DataError(
        f"The task {task!r} needs {needed} {what} that are single tokens, and {left} of {of} are for this tokenizer.",
        remedy="Give more of them as an argument, or use another task or tokenizer.",
    )


def choose_corruption(name: str, known: Sequence[str], *, task: str) -> str:
    """Check a corruption's name. Raises DataError with the nearest names."""
    if name not in known:
        raise DataError(
            f"The task {task!r} has no corruption {name!r}.",
            remedy=f"{nearest(name, known)} It has {', '.join(known)}.".strip(),
        )
    return name


def collect(
    tokenizer: Any, n: int, draw: Callable[[Random], Pair], *, task: str, seed: int, corruption: str, tries: int = 60
) -> PairSet:
    """`n` pairs with different clean texts, drawn with a seed, checked for alignment.

    Raises DataError for n < 1 and where the words at hand make fewer different prompts, AlignmentError where the
    tokenizer does not keep a pair aligned.
    """
    if n < 1:
        raise DataError(f"The task {task!r} was asked for {n} pairs.", remedy="Ask for at least one.")
    random = Random(f"{task}:{corruption}:{seed}")
    pairs: dict[str, Pair] = {}
    missed = 0
    while len(pairs) < n:
        pair = draw(random)
        if pair.clean.text in pairs:
            missed += 1
            if missed > tries * n + 1_000:
                raise DataError(
                    f"With this tokenizer the task {task!r} makes {len(pairs)} different prompts of {n} asked for.",
                    remedy=f"Ask for at most {len(pairs)}, or give more words or templates.",
                )
            continue
        pairs[pair.clean.text] = pair
    made = PairSet(tuple(pairs.values()), name=task, seed=seed, corruption=corruption)
    made.encode(tokenizer)
    return made


def other(random: Random, items: Sequence[T], *taken: T) -> T:
    """One of the items that is not taken."""
    return random.choice([item for item in items if item not in taken])


def parse_with_end(marked: str) -> Prompt:
    """Parse a marked text and label its last word `end` (the token whose logits are read is that word's last).

    Where the last word is another span too (agreement's noun), both labels stand for it.
    """
    prompt = Prompt.parse(marked)
    start = max(prompt.text.rfind(" "), prompt.text.rfind("\n")) + 1
    return Prompt(prompt.text, {**prompt.spans, "end": (start, len(prompt.text))})
