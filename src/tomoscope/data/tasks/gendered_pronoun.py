"""Gendered pronouns: "So Mary is a really great friend, isn't" -> " she".

Source: Mathwin et al. 2023, "Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small".
Measures whether the pronoun follows the name. How it can mislead: names' genders are what English readers usually take
them for; a model with a bias to one pronoun is right on half, so look at both genders apart (label `gender`).

Corruptions: `flip` puts a name of the other gender (the wrong answer becomes right); `same_gender` puts another name
of the same (nothing should change: a control). Spans: name, end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, other, parse_with_end, require
from tomoscope.data.tasks.words import FEMALE, MALE, PLACES

CORRUPTIONS: tuple[str, ...] = ("flip", "same_gender")
PRONOUNS: dict[str, str] = {"female": "she", "male": "he"}
TEMPLATES: tuple[str, ...] = (
    "So {name} is a really great friend, isn't",
    "Yesterday {name} was very tired because",
    "When {name} got home,",
    "The teacher said that {name} would come if",
    "After {name} went to the {place},",
    "I know that {name} is happy because",
)


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "flip",
    templates: Sequence[str] = TEMPLATES,
    female: Sequence[str] = FEMALE,
    male: Sequence[str] = MALE,
) -> PairSet:
    """`n` pairs, half of them female within one.

    Raises DataError where fewer than 2 names of a gender, or a pronoun, are left.
    """
    choose_corruption(corruption, CORRUPTIONS, task="gendered_pronoun")
    require(tokenizer, tuple(PRONOUNS.values()), 2, task="gendered_pronoun", what="pronouns")
    names = {
        "female": require(tokenizer, female, 2, task="gendered_pronoun", what="female names"),
        "male": require(tokenizer, male, 2, task="gendered_pronoun", what="male names"),
    }
    places = require(tokenizer, PLACES, 1, task="gendered_pronoun", what="places")
    turn = {"female": 0, "male": 0}

    def draw(random: Random) -> Pair:
        gender = "female" if turn["female"] <= turn["male"] else "male"
        opposite = "male" if gender == "female" else "female"
        name = random.choice(names[gender])
        twin = random.choice(names[opposite]) if corruption == "flip" else other(random, names[gender], name)
        template, place = random.choice(list(templates)), random.choice(places)
        turn[gender] += 1
        return Pair(
            clean=_prompt(template, name, place),
            corrupted=_prompt(template, twin, place),
            answers=(f" {PRONOUNS[gender]}",),
            wrong=(f" {PRONOUNS[opposite]}",),
            labels={"gender": gender, "template": template},
        )

    return collect(tokenizer, n, draw, task="gendered_pronoun", seed=seed, corruption=corruption)


def _prompt(template: str, name: str, place: str) -> Prompt:
    return parse_with_end(template.format(name=f"{{name:{name}}}", place=place))
