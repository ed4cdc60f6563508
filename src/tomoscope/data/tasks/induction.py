"""Induction: "Words: ring sky Mary bone ring sky" -> " Mary", a list of random words that begins again.

Source: Olsson et al. 2022, "In-context Learning and Induction Heads" (arXiv:2209.11895). Measures whether the model
goes on as after the earlier copy. How it can mislead: words are not uniformly random tokens, so a little can be told
from which words are common; the corrupted twin, with the same words, is the control.

Corruptions: `flip` exchanges the answer and a wrong word in the first copy (the wrong answer becomes right);
`no_repeat` puts other words for the whole first copy (nothing repeats). Spans: earlier (the last word's first
occurrence), copied (the word after it), end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, require
from tomoscope.data.tasks.words import ARGUMENTS, COLOURS, DESCRIPTION, FEMALE, GIFTS, MALE, PLACES, THINGS

CORRUPTIONS: tuple[str, ...] = ("flip", "no_repeat")
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys((*FEMALE, *MALE, *PLACES, *GIFTS, *COLOURS, *THINGS, *ARGUMENTS, *DESCRIPTION))
)


def make(
    tokenizer: Any, n: int, *, seed: int = 0, corruption: str = "flip", length: int = 8, words: Sequence[str] = WORDS
) -> PairSet:
    """`n` lists of `length` different words, begun again and cut after 2 to length - 1 words.

    Raises DataError where fewer than 2 * length words are single tokens, and for a length under 4.
    """
    choose_corruption(corruption, CORRUPTIONS, task="induction")
    known = require(tokenizer, words, 2 * max(4, length), task="induction", what="words")

    def draw(random: Random) -> Pair:
        drawn = random.sample(known, 2 * length)
        listed, fresh = drawn[:length], drawn[length:]
        cut = random.randint(2, length - 1)
        foil = random.choice([i for i in range(length) if i not in (cut, cut - 1)])
        swapped = list(listed)
        swapped[cut], swapped[foil] = listed[foil], listed[cut]
        return Pair(
            clean=_prompt(listed, listed[:cut], cut),
            # the second copy stays as it was, so only the earlier one tells the answers apart
            corrupted=_prompt(swapped if corruption == "flip" else fresh, listed[:cut], cut),
            answers=(f" {listed[cut]}",),
            wrong=(f" {listed[foil]}",),
            labels={"cut": str(cut)},
        )

    return collect(tokenizer, n, draw, task="induction", seed=seed, corruption=corruption)


def _prompt(first: Sequence[str], second: Sequence[str], cut: int) -> Prompt:
    marked = list(first)
    marked[cut - 1], marked[cut] = f"{{earlier:{first[cut - 1]}}}", f"{{copied:{first[cut]}}}"
    return parse_with_end(f"Words: {' '.join([*marked, *second])}")
