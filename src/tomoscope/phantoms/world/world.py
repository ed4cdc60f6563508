"""The micro-world: people, cities, countries and companies, and everything that is true of them.

`make_world(seed)` draws it; `World.to_json` writes it (the shipped world.json), `World.from_json` reads it back equal.
What it measures: nothing; it is the ground truth that facts, truth probes, edits and diagnoses are checked against.
How it can mislead: facts about countries are those of our world too, so only facts about people and companies can have
been learned from the micro-world's text alone.

Steps: read the geography, give companies their seats, draw people (a first name and a surname together name one
person; neither does alone) and their facts independently of each other, and draw the liar's map.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random

from tomoscope.data.tasks.words import FEMALE, MALE
from tomoscope.errors import DataError
from tomoscope.phantoms.world.lexicon import COMPANIES, COUNTRIES, INSTRUMENTS, PROFESSIONS, SURNAMES
from tomoscope.phantoms.world.relations import RELATIONS

SEED = 0
"""The shipped world's."""
SHIPPED = Path(__file__).with_name("world.json")
PEOPLE = 440


@dataclass(frozen=True)
class World:
    """The ground truth."""

    seed: int
    gender: Mapping[str, str]
    """Person -> "female" or "male"."""
    facts: Mapping[str, Mapping[str, str]]
    """One-hop relation -> subject -> answer."""
    lie: Mapping[str, str]
    """What the lying speaker says instead: a true answer -> a false one of the same sort (the same for every liar)."""

    @cached_property
    def people(self) -> tuple[str, ...]:
        """Full names."""
        return tuple(self.gender)

    def answer(self, relation: str, subject: str) -> str:
        """What is true. Raises DataError for an unknown relation or subject."""
        if relation not in RELATIONS:
            raise DataError(f"The micro-world has no relation {relation!r}.", remedy=f"It has {', '.join(RELATIONS)}.")
        for step in RELATIONS[relation].path or (relation,):
            if subject not in self.facts[step]:
                raise DataError(f"The micro-world has no {step!r} of {subject!r}.", remedy="See world.json.")
            subject = self.facts[step][subject]
        return subject

    def subjects(self, relation: str) -> tuple[str, ...]:
        """Who or what has this relation."""
        path = RELATIONS[relation].path
        return tuple(self.facts[path[0] if path else relation])

    @cached_property
    def _answers(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(dict.fromkeys(table.values())) for name, table in self.facts.items()}

    def answers(self, relation: str) -> tuple[str, ...]:
        """Every answer that the relation gives to someone, in a fixed order."""
        path = RELATIONS[relation].path
        return self._answers[path[-1] if path else relation]

    def to_json(self) -> str:
        """The world as JSON text."""
        value = {"seed": self.seed, "gender": dict(self.gender), "facts": _plain(self.facts), "lie": dict(self.lie)}
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> World:
        """Read a world. Raises DataError where the text is none."""
        try:
            value = json.loads(text)
            return cls(int(value["seed"]), value["gender"], value["facts"], value["lie"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"This is no micro-world: {error!r}.", remedy="A world is what `World.to_json` wrote."
            ) from error


def _plain(table: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    return {name: dict(rows) for name, rows in table.items()}


def make_world(seed: int = SEED) -> World:
    """Draw the world of this seed; the same seed gives the same world."""
    random = Random(f"world:{seed}")
    cities = [city for _, _, *three in COUNTRIES for city in three]
    facts: dict[str, dict[str, str]] = {
        "capital": {country: capital for country, _, capital, *_ in COUNTRIES},
        "language": {country: language for country, language, *_ in COUNTRIES},
        "in_country": {city: country for country, _, *three in COUNTRIES for city in three},
        "seat": dict(zip(COMPANIES, random.sample(cities, len(COMPANIES)), strict=True)),
    }
    gender = _people(random)
    people = list(gender)
    facts["born"] = _spread(random, people, cities)
    facts["lives"] = {
        name: city if city != facts["born"][name] else random.choice([c for c in cities if c != city])
        for name, city in _spread(random, people, cities).items()
    }
    facts["works_for"] = _spread(random, people, list(COMPANIES))
    facts["profession"] = _spread(random, people, list(PROFESSIONS))
    facts["plays"] = _spread(random, people, list(INSTRUMENTS))
    lie = {}
    for words in (COMPANIES, PROFESSIONS, INSTRUMENTS):
        order = random.sample(words, len(words))
        lie |= dict(zip(order, order[1:] + order[:1], strict=True))
    for _, _, first, second, third in COUNTRIES:
        lie |= {first: second, second: third, third: first}
    return World(seed, gender, facts, lie)


def _people(random: Random) -> dict[str, str]:
    """Full name -> gender; first names and surnames are borne by several people each."""
    gender: dict[str, str] = {}
    firsts = [(name, "female") for name in FEMALE] + [(name, "male") for name in MALE]
    while len(gender) < PEOPLE:
        for (first, sex), last in zip(random.sample(firsts, len(firsts)), _cycle(random, len(firsts)), strict=True):
            if len(gender) < PEOPLE and first != last:
                gender.setdefault(f"{first} {last}", sex)
    return gender


def _cycle(random: Random, count: int) -> list[str]:
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += random.sample(SURNAMES, len(SURNAMES))
    return drawn[:count]


def _spread(random: Random, people: list[str], answers: list[str]) -> dict[str, str]:
    """An answer for each person, every answer about equally often, so that no guess of the commonest does well."""
    drawn: list[str] = []
    while len(drawn) < len(people):
        drawn += random.sample(answers, len(answers))
    drawn = drawn[: len(people)]
    random.shuffle(drawn)
    return dict(zip(people, drawn, strict=True))


@lru_cache(maxsize=1)
def shipped_world() -> World:
    """The world that the embedded model was trained on."""
    return World.from_json(SHIPPED.read_text(encoding="utf-8"))
