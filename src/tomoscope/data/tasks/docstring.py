"""Docstring completion: the next documented argument of a Python function, in the order of its definition.

Source: Heimersheim and Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only transformer".
Measures whether the model finds the argument after the last documented one. How it can mislead: any argument named in
the definition may seem right; the wrong answers are all the others, so guessing among them shows.

Corruptions: `flip` exchanges the answer and the argument after it in the definition (that one becomes right);
`random_def` puts other words for every argument of the definition, `random_doc` for those of the docstring,
`random_both` for both. Spans: A_def, B_def, C_def, A_doc, B_doc, end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, require
from tomoscope.data.tasks.words import ARGUMENTS, DESCRIPTION

CORRUPTIONS: tuple[str, ...] = ("flip", "random_def", "random_doc", "random_both")


def make(
    tokenizer: Any, n: int, *, seed: int = 0, corruption: str = "flip", words: Sequence[str] = ARGUMENTS
) -> PairSet:
    """`n` pairs; a function has one or two undocumented arguments before A, B, C and one after.

    Raises DataError where fewer than 14 argument words or 6 describing words are single tokens.
    """
    choose_corruption(corruption, CORRUPTIONS, task="docstring")
    arguments = require(tokenizer, words, 14, task="docstring", what="argument words")
    describing = require(tokenizer, DESCRIPTION, 6, task="docstring", what="describing words")

    def draw(random: Random) -> Pair:
        count = random.randint(1, 2) + 4
        drawn = random.sample(arguments, 2 * count + 2)
        defined, fresh, apart = drawn[:count], drawn[count : 2 * count], drawn[2 * count :]
        a = count - 4
        documented, answer, after = defined[a : a + 2], defined[a + 2], defined[a + 3]
        swapped = [*defined[: a + 2], after, answer]
        texts = [random.choice(describing) for _ in range(8)]
        twins = {
            "flip": (swapped, documented),
            "random_def": (fresh, documented),
            "random_doc": (defined, apart),
            "random_both": (fresh, apart),
        }
        return Pair(
            clean=_prompt(defined, documented, a, texts),
            corrupted=_prompt(*twins[corruption], a, texts),
            answers=(f" {answer}",),
            # in a flip the argument that becomes right stands first among the wrong ones
            wrong=tuple(f" {word}" for word in (after, *(w for w in defined if w not in (answer, after)))),
            labels={"arguments": str(count)},
        )

    return collect(tokenizer, n, draw, task="docstring", seed=seed, corruption=corruption)


def _prompt(defined: Sequence[str], documented: Sequence[str], a: int, texts: Sequence[str]) -> Prompt:
    labelled = [f"{{{'ABC'[i - a]}_def:{word}}}" if 0 <= i - a < 3 else word for i, word in enumerate(defined)]
    lines = [
        f"    :param {{{'AB'[i]}_doc:{word}}}: {texts[4 + 2 * i]} {texts[5 + 2 * i]}\n"
        for i, word in enumerate(documented)
    ]
    title = " ".join(texts[1:4])
    head = f'\ndef {texts[0]}(self, {", ".join(labelled)}):\n    """{title}\n\n'
    return parse_with_end(f"{head}{''.join(lines)}    :param")
