"""What training on the micro-world's text never shows of the library's tasks, item by item.

Each rule is a pure function of the item: tests, cards and the training text agree on it without a file.
"""

from __future__ import annotations

import zlib

from tomoscope.data.tasks.words import FEMALE, MALE, NOUNS

NAMES = frozenset(FEMALE[4::9] + MALE[4::9])
"""Never in an IOI sentence, a pronoun template or a word list; only in stories (where pronouns tell their gender) and
as first names of people."""
IOI_TEMPLATES = frozenset({5, 8})
"""Indices of `tasks.ioi.TEMPLATES` never shown."""
SUBJECT_NOUNS = frozenset(singular for singular, _ in NOUNS[3::6])
"""Never the subject of a verb across a phrase or a clause; they stand as attractors and in "The dogs are"."""


def year_held_out(century: int, year: int) -> bool:
    """A tenth of the (century, start year) pairs never starts an event."""
    return zlib.crc32(f"year|{century}|{year}".encode()) % 10 == 0
