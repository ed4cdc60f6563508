"""What the embedded model never saw in training, item by item, so that its abilities can be tested on it.

Each rule is a pure function of the item: the tests, the card and the training text agree on it without a file.
"""

from __future__ import annotations

import zlib

from tomoscope.data.tasks.facts import TEMPLATES as FACT_TEMPLATES
from tomoscope.data.tasks.words import ARGUMENTS, FEMALE, MALE, NOUNS

NAMES = frozenset(FEMALE[4::9] + MALE[4::9])
"""Never in an IOI sentence, a pronoun template or a word list; only in stories (where pronouns
tell their gender) and as first names of the facts' people."""
IOI_TEMPLATES = frozenset({5, 8})
"""Indices of `tasks.ioi.TEMPLATES` never shown."""
SUBJECT_NOUNS = frozenset(singular for singular, _ in NOUNS[3::6])
"""Never the subject of a verb across a phrase or a clause; they stand as attractors and in "The dogs are"."""
ARGUMENT_NAMES = frozenset(ARGUMENTS[5::6])
"""Never an argument in a docstring; only in word lists."""
UNSEEN_PARAPHRASES: dict[str, str] = {
    "capital": "The city where the government of {subject} meets is",
    "born": "The city where {subject} was born is",
    "lives": "The city where {subject} lives is",
    "works": "The work of {subject} is that of a",
}
"""Wordings never shown for anyone."""


def _hash(*parts: object) -> int:
    return zlib.crc32("|".join(map(str, parts)).encode())


def year_held_out(century: int, year: int) -> bool:
    """A tenth of the (century, start year) pairs never starts an event."""
    return _hash("year", century, year) % 10 == 0


def colour_held_out(thing: str, colour: str) -> bool:
    """A tenth of the (thing, colour) pairs is never asked for."""
    return _hash("colour", thing, colour) % 10 == 0


def fact_template_held_out(relation: str, subject: str) -> int:
    """The index of the one wording of the relation that is never shown for this subject."""
    return _hash("fact", relation, subject) % len(FACT_TEMPLATES[relation])
