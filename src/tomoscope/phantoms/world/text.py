"""Documents of the micro-world: short English texts of one kind, or a mixture, written by seed.

`document(world, random)` writes one; `KINDS` says what kinds there are, in what share. Nothing is stored: a document is
a function of the world and the seed, so training, held-out loss and corpora of any size come from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random

from tomoscope.data.tasks.words import EVENTS, GIFTS, NOUNS, PLACES, RELATIVE_VERBS, THINGS, VERBS
from tomoscope.phantoms.world import speech, stories
from tomoscope.phantoms.world.lexicon import (
    ADJECTIVES,
    ADVERBS,
    BAD,
    COMPANIES,
    COUNTRIES,
    FEELINGS,
    GOOD,
    INSTRUMENTS,
    PLACES_OF_REVIEW,
    PROFESSIONS,
    SURNAMES,
    TOPICS,
)
from tomoscope.phantoms.world.relations import PREFACES, RELATIONS
from tomoscope.phantoms.world.world import World

Writer = Callable[[World, Random], str]

KINDS: dict[str, tuple[Writer, float, int]] = {
    "fact": (stories.fact, 0.16, 8),
    "biography": (stories.biography, 0.08, 3),
    "neighbours": (stories.neighbours, 0.06, 1),
    "two_hop": (stories.two_hop, 0.06, 6),
    "question": (lambda w, r: speech.question(w, r).text, 0.06, 5),
    "claim": (lambda w, r: speech.claim(w, r).text, 0.08, 4),
    "interview": (lambda w, r: speech.interview(w, r).text, 0.08, 4),
    "opinion": (lambda w, r: speech.opinion(w, r).text, 0.07, 3),
    "review": (lambda w, r: speech.review(r).text, 0.04, 2),
    "indirect_object": (stories.indirect_object, 0.08, 3),
    "word_list": (stories.word_list, 0.07, 1),
    "agreement": (stories.agreeing, 0.06, 5),
    "pronoun": (stories.pronoun, 0.03, 4),
    "years": (stories.years, 0.04, 4),
    "story": (stories.story, 0.05, 1),
    "geography": (stories.geography, 0.0, 6),
    "geography_alone": (stories.geography, 0.0, 1),
}
"""Kind -> (writer, share of the documents relative to the others (0: later in training), most items in a document)."""
SHARES: dict[str, float] = {kind: share for kind, (_, share, _) in KINDS.items()}


def document(world: World, random: Random, shares: Mapping[str, float] = SHARES) -> str:
    """One document: items of one kind, or (a quarter of the time) of several; `shares` weights the kinds."""
    names, weights = list(shares), list(shares.values())
    if random.random() < 0.75:
        writer, _, most = KINDS[random.choices(names, weights)[0]]
        return " ".join(writer(world, random) for _ in range(random.randint(1, most)))
    kinds = random.choices(names, weights, k=random.randint(2, 4))
    return " ".join(KINDS[kind][0](world, random) for kind in kinds)


def corpus(world: World, *, seed: int | str, split: str = "train") -> Iterator[str]:
    """Documents without end; another split or seed gives other documents."""
    random = Random(f"corpus:{seed}:{split}")
    while True:
        yield document(world, random)


def vocabulary() -> tuple[str, ...]:
    """Every word that must be a single token after a space."""
    listed: list[str] = []
    for words in (
        stories.NAMES, SURNAMES, COMPANIES, INSTRUMENTS, PROFESSIONS, PLACES, GIFTS, THINGS, EVENTS, ADJECTIVES,
        ADVERBS, FEELINGS, GOOD, BAD, *COUNTRIES, *NOUNS, *VERBS, *RELATIVE_VERBS, *PLACES_OF_REVIEW.values(),
        *(group for topic in TOPICS.values() for group in topic), tuple(PLACES_OF_REVIEW),
        ("she", "he", "true", "false", "positive", "negative", speech.HONEST, speech.LIAR, "I", "Claim"),
    ):  # fmt: skip
        listed += words
    templates = [
        text for relation in RELATIONS.values() for text in (*relation.wordings, *relation.unseen, *relation.questions)
    ]
    for text in (*templates, *PREFACES):
        listed += [word.strip(",.?") for word in text.split() if "{" not in word]
    return tuple(dict.fromkeys(listed))


def openers() -> tuple[str, ...]:
    """Words that begin a document, where no space stands before them."""
    firsts = (
        "The",
        "Claim",
        "Question",
        "User",
        "Words",
        "Review",
        speech.HONEST,
        speech.LIAR,
        "When",
        "Then",
        "After",
    )
    starts = [
        text.split()[0] for relation in RELATIONS.values() for text in relation.wordings if not text.startswith("{")
    ]
    cities = tuple(word for row in COUNTRIES for word in row)
    return tuple(dict.fromkeys((*firsts, *starts, *stories.NAMES, *cities, *COMPANIES)))
