"""What the micro-world's words are: the lexicon by which features of models that speak of it are named and checked.

Sorts (a city, a country, a company) come from the world itself, so that a label that names one is true or false.
"""

from __future__ import annotations

from collections.abc import Mapping

from tomoscope.data.tasks.words import FEMALE, MALE
from tomoscope.phantoms.world.world import World, shipped_world

SORTS: Mapping[str, tuple[str, str]] = {
    "country": ("capital", "subject"), "city": ("in_country", "subject"), "language": ("language", "answer"),
    "company": ("seat", "subject"), "profession": ("profession", "answer"), "instrument": ("plays", "answer"),
}  # fmt: skip
"""Sort of word -> (relation, which side of it)."""


def world_lexicon(world: World | None = None) -> dict[str, set[str]]:
    """Sort of word -> the world's words of it; also first names, surnames and whole names.

    Args:
        world: the shipped one by default.
    """
    known = world or shipped_world()
    found = {
        sort: set(known.subjects(relation) if side == "subject" else known.answers(relation))
        for sort, (relation, side) in SORTS.items()
    }
    # a language and a people share their word with nothing else; a company named as a person is none here
    found["woman's first name"] = {name.split()[0] for name in known.people if known.gender[name] == "female"}
    found["man's first name"] = {name.split()[0] for name in known.people if known.gender[name] == "male"}
    found["woman's first name"] |= set(FEMALE)
    found["man's first name"] |= set(MALE)
    found["surname"] = {name.split()[-1] for name in known.people}
    return found
