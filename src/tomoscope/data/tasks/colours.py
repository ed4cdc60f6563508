"""Coloured objects: "The cup is red. The box is blue. The colour of the cup is" -> " red".

Source: the reasoning-about-coloured-objects task as used by Merullo et al. 2024, "Circuit Component Reuse Across
Tasks" (arXiv:2310.08744), in a plain wording. Measures whether the model copies the colour of the thing asked for. How
it can mislead: a model that copies any colour of the text is right half of the time; the wrong answers are the other
colours of the text.

Corruptions: `flip` exchanges the colours of the thing asked for and another (that colour becomes right); `query` asks
for the other thing (likewise); `random_colours` puts colours that are not in the text. Spans: thing, colour, query,
end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, require
from tomoscope.data.tasks.words import COLOURS, THINGS
from tomoscope.errors import DataError

CORRUPTIONS: tuple[str, ...] = ("flip", "query", "random_colours")
TEMPLATES: tuple[tuple[str, str], ...] = (
    ("The {thing} is {colour}.", "The colour of the {thing} is"),
    ("The {thing} was {colour}.", "What colour was the {thing}? It was"),
    ("Look at the {colour} {thing}.", "The {thing} is"),
)


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "flip",
    count: int = 3,
    templates: Sequence[tuple[str, str]] = TEMPLATES,
    things: Sequence[str] = THINGS,
    colours: Sequence[str] = COLOURS,
) -> PairSet:
    """`n` pairs with `count` things each.

    Raises DataError where too few things or colours are single tokens, or count < 2.
    """
    choose_corruption(corruption, CORRUPTIONS, task="colours")
    if count < 2:
        raise DataError(f"The task 'colours' was asked for {count} things.", remedy="Ask for at least two.")
    known = require(tokenizer, things, count, task="colours", what="things")
    tints = require(tokenizer, colours, 2 * count, task="colours", what="colours")

    def draw(random: Random) -> Pair:
        objects, drawn = random.sample(known, count), random.sample(tints, 2 * count)
        mine, fresh = drawn[:count], drawn[count:]
        asked, foil = random.sample(range(count), 2)
        swapped = list(mine)
        swapped[asked], swapped[foil] = mine[foil], mine[asked]
        template = random.choice(list(templates))
        twins = {"flip": (swapped, asked), "query": (mine, foil), "random_colours": (fresh, asked)}
        wrong = (mine[foil], *(mine[i] for i in range(count) if i not in (asked, foil)))
        return Pair(
            clean=_prompt(template, objects, mine, asked, asked),
            corrupted=_prompt(template, objects, twins[corruption][0], twins[corruption][1], asked),
            answers=(f" {mine[asked]}",),
            wrong=tuple(f" {colour}" for colour in wrong),
            labels={"template": " ".join(template), "asked": str(asked)},
        )

    return collect(tokenizer, n, draw, task="colours", seed=seed, corruption=corruption)


def _prompt(template: tuple[str, str], things: Sequence[str], tints: Sequence[str], asked: int, marked: int) -> Prompt:
    """The spans thing and colour mark the same places in both twins (`marked`), whatever is asked."""
    lines = [
        template[0].format(
            thing=f"{{thing:{thing}}}" if i == marked else thing, colour=f"{{colour:{tint}}}" if i == marked else tint
        )
        for i, (thing, tint) in enumerate(zip(things, tints, strict=True))
    ]
    return parse_with_end(f"{' '.join(lines)} {template[1].format(thing=f'{{query:{things[asked]}}}')}")
