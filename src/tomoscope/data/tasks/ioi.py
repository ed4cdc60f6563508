"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv:2211.00593). Measures whether the model names the one
who was not named twice. How it can mislead: a model that copies the least repeated name, or just any other name than
the last, does as well as one that understands giving; `abc` prompts have no right answer, so a patch from them
restores only what names carry.

Corruptions: `abc` puts three other names in the places of IO, S1 and S2 (nothing repeats); `flip` gives S2 the IO's
name (the wrong answer becomes right); `random_names` puts two other names (the pattern stays, the answer changes);
`s2_random` gives S2 a third name (S1 and IO stay). All keep every position. Spans: IO, S1, S2, end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, require
from tomoscope.data.tasks.words import FEMALE, GIFTS, MALE, PLACES
from tomoscope.errors import DataError

CORRUPTIONS: tuple[str, ...] = ("abc", "flip", "random_names", "s2_random")
ORDERS: tuple[str, ...] = ("ABBA", "BABA")
TEMPLATES: tuple[str, ...] = (
    "When {A} and {B} went to the {place}, {S} gave a {gift} to",
    "Then, {A} and {B} went to the {place}. {S} gave a {gift} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S} gave a {gift} to",
    "Then, {A} and {B} were working at the {place}. {S} decided to give a {gift} to",
    "After {A} and {B} went to the {place}, {S} gave a {gift} to",
    "While {A} and {B} were working at the {place}, {S} gave a {gift} to",
    "When {A} and {B} got a {gift} at the {place}, {S} decided to give it to",
    "Afterwards, {A} and {B} went to the {place}. {S} handed a {gift} to",
    "After the lunch, {A} and {B} went to the {place}. {S} gave a {gift} to",
    "Friends {A} and {B} found a {gift} at the {place}. {S} gave it to",
    "The {place} that {A} and {B} went to had a {gift}. {S} gave it to",
    "Then, {A} and {B} had a long argument, and afterwards {S} said to",
)


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "abc",
    order: str | None = None,
    templates: Sequence[str] = TEMPLATES,
    names: Sequence[str] = FEMALE + MALE,
) -> PairSet:
    """`n` IOI pairs for this tokenizer; `order` is "ABBA" (IO first), "BABA" (S first) or None (both, by chance).

    Raises DataError where fewer than 6 names, or no place or gift, are single tokens, and for an unknown corruption or
    order.
    """
    choose_corruption(corruption, CORRUPTIONS, task="ioi")
    if order not in (None, *ORDERS):
        raise DataError(f"The task 'ioi' has no order {order!r}.", remedy="Use 'ABBA', 'BABA' or None for both.")
    people = require(tokenizer, names, 6, task="ioi", what="names")
    places = require(tokenizer, PLACES, 1, task="ioi", what="places")
    gifts = require(tokenizer, GIFTS, 1, task="ioi", what="gifts")

    def draw(random: Random) -> Pair:
        template = random.choice(list(templates))
        words = {"place": random.choice(places), "gift": random.choice(gifts)}
        way = order or random.choice(ORDERS)
        recipient, giver, *others = random.sample(people, 5)
        twins = {
            "abc": (others[0], others[1], others[2]),
            "flip": (recipient, giver, recipient),
            "random_names": (others[0], others[1], others[1]),
            "s2_random": (recipient, giver, others[0]),
        }
        return Pair(
            clean=_prompt(template, way, (recipient, giver, giver), words),
            corrupted=_prompt(template, way, twins[corruption], words),
            answers=(f" {recipient}",),
            wrong=(f" {giver}",),
            labels={"order": way, "template": template},
        )

    return collect(tokenizer, n, draw, task="ioi", seed=seed, corruption=corruption)


def _prompt(template: str, order: str, names: tuple[str, str, str], words: dict[str, str]) -> Prompt:
    """Fill a template with (IO, S1, S2)."""
    io, s1 = f"{{IO:{names[0]}}}", f"{{S1:{names[1]}}}"
    first, second = (io, s1) if order == "ABBA" else (s1, io)
    return parse_with_end(template.format(A=first, B=second, S=f"{{S2:{names[2]}}}", **words))
