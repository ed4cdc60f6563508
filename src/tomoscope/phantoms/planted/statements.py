"""Statements about a name, a place, a colour and a thing, each word of a class that chance has drawn, with labels.

No label follows from what a word means: a seed splits each list in two halves, so nothing known of language helps, and
a probe that scores above chance has found what the model computes. How it can mislead: labels are balanced and
independent of each other, which labels of people's text never are.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import transformers

from tomoscope.data.tasks import words
from tomoscope.phantoms.planted.words import task_texts, word_tokenizer

TEMPLATES = (
    "{name} saw the {colour} {thing} at the {place}. Say {end}",
    "At the {place}, {name} has a {thing} that is {colour}. Answer me {end}",
    "The {colour} {thing} of {name} is still in the {place}, so tell us {end}",
)
ENDS = ("now", "then", "here", "there", "today", "again", "please", "soon")
LISTS: dict[str, tuple[str, ...]] = {
    "name": (*words.FEMALE, *words.MALE),
    "place": words.PLACES,
    "colour": words.COLOURS,
    "thing": tuple(dict.fromkeys((*words.THINGS, *words.GIFTS))),
    "end": ENDS,
}
ANSWERS = (" no", " yes")


@cache
def statement_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tasks' tokenizer with the statements' words. Shared: change nothing in it."""
    pieces = [f"x {word}" for some in LISTS.values() for word in some] + [f"x{answer}" for answer in ANSWERS]
    return word_tokenizer((*task_texts(), *TEMPLATES, *words.FEMALE, *words.MALE, *pieces))


@dataclass(frozen=True)
class Classes:
    """What each word stands for: +1 or -1 in a class, or a number.

    Attributes:
        of: class -> word -> +1 or -1; classes "name", "place", "colour", "blurred" (a second one of the colours,
            independent of the first) and "salient" (of the last words).
        number: thing -> a normal quantile, so that all things together are a normal distribution.
    """

    of: dict[str, dict[str, int]]
    number: dict[str, float]


def draw_classes(choose: random.Random) -> Classes:
    """Split every list in two halves of equal size."""
    of = {}
    for name, some in (("name", "name"), ("place", "place"), ("salient", "end")):
        of[name] = _halves(LISTS[some], choose)
    of["colour"] = _halves(LISTS["colour"], choose)
    # in each half of the colours again a half, so that the two classes are independent
    parts = [[word for word, side in of["colour"].items() if side == wanted] for wanted in (1, -1)]
    of["blurred"] = {word: side for part in parts for word, side in _halves(part, choose).items()}
    things = list(LISTS["thing"])
    choose.shuffle(things)
    number = {word: NormalDist().inv_cdf((i + 0.5) / len(things)) for i, word in enumerate(things)}
    return Classes(of, number)


def _halves(some: tuple[str, ...] | list[str], choose: random.Random) -> dict[str, int]:
    order = list(some)
    choose.shuffle(order)
    return {word: 1 if i < len(order) // 2 else -1 for i, word in enumerate(order)}


def draw_statements(classes: Classes, n: int, choose: random.Random) -> tuple[list[str], dict[str, list[bool]]]:
    """`n` different statements and their labels: every class, and "parity" (name and place of unequal classes).

    The four corners of name's and place's classes come equally often (but for the last n % 4), the rest by chance.
    """
    found: dict[str, dict[str, bool]] = {}
    source = {"name": "name", "place": "place", "colour": "colour", "blurred": "colour", "salient": "end"}
    while len(found) < n:
        drawn = {name: choose.choice(some) for name, some in LISTS.items()}
        for name, bit in (("name", len(found) & 1), ("place", len(found) & 2)):
            drawn[name] = choose.choice([word for word, side in classes.of[name].items() if (side > 0) == bool(bit)])
        text = choose.choice(TEMPLATES).format(**drawn)
        sides = {name: classes.of[name][drawn[some]] for name, some in source.items()}
        found[text] = {name: side > 0 for name, side in sides.items()}
        found[text]["parity"] = sides["name"] != sides["place"]
    texts = list(found)
    choose.shuffle(texts)
    return texts, {name: [found[text][name] for text in texts] for name in found[texts[0]]}
