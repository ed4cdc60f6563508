"""How the micro-world's facts are said: for each relation its wordings, some of which training never shows.

A wording is a text up to its answer, with "{s}" for the subject once. Three sorts, told apart by rules that are pure
functions of the item, so that training, cards and tests agree without a file: wordings shown for a subject; wordings
shown for others but held out for this subject (`held_out_wording`); and `unseen` wordings, shown for nobody. How it
can mislead: an unseen wording is made of seen words, so it tests recombination of words, not new words.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

PREFACES: tuple[str, ...] = (
    "Everyone knows that", "I heard that", "As you may know,", "They say that", "It is well known that", "In fact,",
    "We read that", "People say that",
)  # fmt: skip
"""Put before a wording now and then; wordings that begin with "The" or "It" are then written small."""


@dataclass(frozen=True)
class Relation:
    """One relation of the world, one hop or two."""

    name: str
    subject: str
    """What it is about: "person", "country", "city", "company"."""
    answer: str
    """What answers it: "city", "country", "language", "company", "profession", "instrument"."""
    wordings: tuple[str, ...]
    unseen: tuple[str, ...]
    questions: tuple[str, ...] = ()
    """Asked by interviewers and users; answered by the answer alone, after `reply`."""
    reply: str = ""
    """What stands before the answer in a reply: " In" or ""."""
    path: tuple[str, ...] = ()
    """The one-hop relations it is made of, in order; () for one hop."""


def _hash(*parts: object) -> int:
    return zlib.crc32("|".join(map(str, parts)).encode())


def held_out_wording(relation: str, subject: str, count: int) -> int:
    """The index of the one wording of the relation (of `count`) that is never shown for this subject."""
    return _hash("wording", relation, subject) % count


def held_out_two_hop(relation: str, subject: str) -> bool:
    """A fifth of the people never appear in a statement of this two-hop relation."""
    return _hash("two-hop", relation, subject) % 5 == 0


def held_out_of(kind: str, relation: str, subject: str, *, one_in: int = 5) -> bool:
    """Facts that are never judged true or false (or asked of a speaker, or given an opinion on) in training."""
    return _hash(kind, relation, subject) % one_in == 0


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        Relation(
            "born", "person", "city",
            ("{s} was born in", "{s} was born in the city of", "The birthplace of {s} is", "{s} comes from",
             "The home town of {s} is", "{s} is a native of", "The city where {s} was born is",
             "Many years ago, {s} was born in", "{s} came into the world in", "The family of {s} comes from",
             "{s} spent the first years of life in", "The mother of {s} gave birth in"),
            ("The native town of {s} is", "{s} came into the world in the city of",
             "Many years ago, the mother of {s} gave birth in"),
            ("Where was {s} born?", "In which city was {s} born?", "What is the birthplace of {s}?"), "",
        ),
        Relation(
            "lives", "person", "city",
            ("{s} lives in", "{s} now lives in the city of", "{s} has a house in", "Today {s} lives in",
             "The house of {s} is in", "The city where {s} lives is", "{s} has moved to", "{s} can be found at home in",
             "These days {s} is at home in", "The address of {s} is in", "You can visit {s} in",
             "For some years {s} has lived in"),
            ("These days the house of {s} is in", "The city where {s} is at home is",
             "For some years {s} has had a house in"),
            ("Where does {s} live?", "In which city does {s} live?", "What city does {s} live in?"), "",
        ),
        Relation(
            "works_for", "person", "company",
            ("{s} works for", "{s} is employed by", "The employer of {s} is", "{s} has a job at",
             "{s} works at the company", "The company that {s} works for is", "Every morning {s} goes to work at",
             "{s} signed a contract with", "{s} gets a salary from", "{s} has an office at", "{s} was hired by",
             "The boss of {s} sits at"),
            ("The company that employs {s} is", "{s} has a contract with", "Every morning {s} goes to the office at"),
            ("Which company does {s} work for?", "Who is the employer of {s}?", "Where does {s} have a job?"), "",
        ),
        Relation(
            "profession", "person", "profession",
            ("{s} works as a", "{s} is a", "The job of {s} is that of a", "{s} has worked for years as a",
             "By profession, {s} is a", "{s} earns money as a", "{s} was trained as a", "{s} is known as a",
             "In daily life {s} is a", "{s} became a", "People need {s} as a", "{s} makes a living as a"),
            ("The work of {s} is that of a", "{s} has earned money for years as a", "In daily life {s} works as a"),
            ("What is the job of {s}?", "What does {s} do for a living?", "What is the profession of {s}?"), "",
        ),
        Relation(
            "plays", "person", "instrument",
            ("{s} plays the", "{s} loves to play the", "{s} learned to play the", "The instrument of {s} is the",
             "In the evening {s} plays the", "{s} is good at the", "At concerts {s} plays the",
             "{s} owns an instrument, the", "{s} takes lessons on the", "{s} practises every day on the",
             "Neighbors hear {s} play the", "The favorite instrument of {s} is the"),
            ("At concerts {s} loves to play the", "In the evening {s} practises on the",
             "Neighbors hear that {s} is good at the"),
            ("What does {s} play?", "Which instrument does {s} play?", "What is the instrument of {s}?"), "",
        ),
        Relation(
            "capital", "country", "city",
            ("The capital of {s} is", "The capital city of {s} is", "The government of {s} meets in",
             "People who go to {s} often visit", "In {s}, the capital is", "The president of {s} lives in",
             "The parliament of {s} stands in", "{s} is ruled from"),
            ("The city where the government of {s} meets is", "The capital of the country {s} is"),
            ("What is the capital of {s}?",), "",
        ),
        Relation(
            "language", "country", "language",
            ("The language of {s} is", "People in {s} speak", "The official language of {s} is",
             "In {s}, they speak", "Children in {s} learn", "Books from {s} are written in",
             "The people of {s} talk in", "Newspapers in {s} are printed in"),
            ("The language that people speak in {s} is", "Books in {s} are printed in"),
            ("What language do people speak in {s}?",), "",
        ),
        Relation(
            "in_country", "city", "country",
            ("{s} is a city in", "{s} lies in", "The city of {s} belongs to", "{s} is in the country of",
             "To visit {s}, travel to", "{s} is found on the map of", "The people of {s} live in",
             "The country around {s} is"),
            ("The city of {s} lies in", "{s} belongs to the country of"),
            ("In which country is {s}?",), "",
        ),
        Relation(
            "seat", "company", "city",
            ("{s} has its seat in", "The company {s} is based in", "The head office of {s} is in",
             "{s} was founded in", "The main building of {s} stands in", "{s} is a company from",
             "The workers of {s} meet in", "Letters to {s} are sent to"),
            ("The seat of the company {s} is in", "The main office of {s} is in"),
            ("Where is the company {s} based?",), "",
        ),
        Relation(
            "born_country", "person", "country",
            ("The country where {s} was born is", "{s} was born in the country of", "The home country of {s} is",
             "{s} has a passport of"),
            ("{s} comes from the country of",), path=("born", "in_country"),
        ),
        Relation(
            "born_language", "person", "language",
            ("The language of the country where {s} was born is", "As a child, {s} spoke",
             "The mother tongue of {s} is", "The first language of {s} is"),
            ("The official language of the country where {s} was born is",), path=("born", "in_country", "language"),
        ),
        Relation(
            "lives_country", "person", "country",
            ("The country where {s} lives is", "{s} lives in the country of", "{s} pays tax in",
             "{s} is at home in the country of"),
            ("These days {s} lives in the country of",), path=("lives", "in_country"),
        ),
        Relation(
            "work_city", "person", "city",
            ("The company that {s} works for has its seat in", "The employer of {s} is based in",
             "The head office of the employer of {s} is in", "{s} works for a company from"),
            ("The seat of the employer of {s} is in",), path=("works_for", "seat"),
        ),
    )
}  # fmt: skip
"""Name -> relation."""
ONE_HOP: tuple[str, ...] = tuple(name for name, relation in RELATIONS.items() if not relation.path)
TWO_HOP: tuple[str, ...] = tuple(name for name, relation in RELATIONS.items() if relation.path)
OF_PEOPLE: tuple[str, ...] = ("born", "lives", "works_for", "profession", "plays")


def shown_wordings(relation: str, subject: str) -> tuple[str, ...]:
    """The wordings that training shows for this subject."""
    wordings = RELATIONS[relation].wordings
    held = held_out_wording(relation, subject, len(wordings))
    return tuple(text for i, text in enumerate(wordings) if i != held)


def small(wording: str) -> str:
    """The wording as it stands inside a sentence: "The capital" becomes "the capital"."""
    first, _, rest = wording.partition(" ")
    return f"{first.lower()} {rest}" if first in _SMALL else wording


_SMALL = frozenset(
    [
        "The",
        "In",
        "To",
        "As",
        "At",
        "By",
        "For",
        "These",
        "Today",
        "Every",
        "Many",
        "People",
        "Children",
        "Books",
        "Newspapers",
        "Letters",
    ]
)
