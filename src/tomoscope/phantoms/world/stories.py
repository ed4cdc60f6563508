"""The rest of the micro-world's text: stories by topic, biographies, the tasks of the library, and lists that repeat.

Each writer takes (world, random) and gives a few sentences of English. What the library's tasks are made of is theirs
(names, templates), with the held-out items of `holdout`. A story keeps to one topic, so that a topic is a feature with
a ground truth.
"""

from __future__ import annotations

from random import Random

from tomoscope.data.tasks import agreement, gendered_pronoun, greater_than, ioi
from tomoscope.data.tasks.words import EVENTS, FEMALE, GIFTS, MALE, NOUNS, PLACES, RELATIVE_VERBS, THINGS, VERBS
from tomoscope.phantoms.world import holdout
from tomoscope.phantoms.world.lexicon import ADJECTIVES, ADVERBS, FEELINGS, TOPICS
from tomoscope.phantoms.world.relations import (
    OF_PEOPLE,
    ONE_HOP,
    PREFACES,
    TWO_HOP,
    held_out_two_hop,
    shown_wordings,
    small,
)
from tomoscope.phantoms.world.world import World

NAMES: tuple[str, ...] = FEMALE + MALE
OPEN_NAMES: tuple[str, ...] = tuple(name for name in NAMES if name not in holdout.NAMES)
CENTURIES: tuple[int, ...] = tuple(range(11, 20))
LIST_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *(*PLACES, *GIFTS, *THINGS, *EVENTS, *(s for s, _ in NOUNS)),
            *(word for topic in TOPICS.values() for group in topic for word in group),
        )
    )
)


def fact_of(world: World, random: Random, relation: str, subject: str) -> str:
    """The fact in one of the wordings shown for this subject, a third of the time after a preface."""
    text = random.choice(shown_wordings(relation, subject))
    if random.random() < 0.35:
        text = f"{random.choice(PREFACES)} {small(text)}"
    return f"{text.format(s=subject)} {world.answer(relation, subject)}."


def fact(world: World, random: Random) -> str:
    """One fact, one hop; mostly of people."""
    relation = random.choices(ONE_HOP, [5, 5, 5, 5, 5, 1, 1, 2, 1.5])[0]
    return fact_of(world, random, relation, random.choice(world.subjects(relation)))


GEOGRAPHY: tuple[str, ...] = ("capital", "language", "in_country", "seat")


def geography(world: World, random: Random) -> str:
    """One fact of a country, a city or a company."""
    relation = random.choices(GEOGRAPHY, [1, 1, 4, 3])[0]
    return fact_of(world, random, relation, random.choice(world.subjects(relation)))


def two_hop(world: World, random: Random) -> str:
    """One fact two hops deep, of someone whose such facts are shown; half of the time after the hops it is made of."""
    while True:
        relation = random.choice(TWO_HOP)
        subject = random.choice(world.people)
        if not held_out_two_hop(relation, subject):
            return fact_of(world, random, relation, subject)


PRONOUN_FACTS: tuple[tuple[str, str], ...] = (
    ("born", "{P} was born in {answer}."), ("lives", "{P} lives in {answer}."),
    ("works_for", "{P} works for {answer}."), ("profession", "{P} is a {answer}."),
    ("plays", "{P} plays the {answer}."),
    ("born", "{P} comes from {answer}."), ("lives", "{P} has a house in {answer}."),
    ("works_for", "{P} has a job at {answer}."), ("plays", "{P} loves to play the {answer}."),
)  # fmt: skip


def biography(world: World, random: Random) -> str:
    """Several facts of one person, the later ones with a pronoun or with the name again."""
    name = random.choice(world.people)
    pronoun = "She" if world.gender[name] == "female" else "He"
    relations = random.sample(OF_PEOPLE, random.randint(2, 4))
    lines = [fact_of(world, random, relations[0], name)]
    for relation in relations[1:]:
        if random.random() < 0.5:
            lines.append(fact_of(world, random, relation, name))
        else:
            text = random.choice([text for kind, text in PRONOUN_FACTS if kind == relation])
            lines.append(text.format(P=pronoun, answer=world.answer(relation, name)))
    return " ".join(lines)


def neighbours(world: World, random: Random) -> str:
    """Facts of two people, each named in full again and again."""
    two = random.sample(world.people, 2)
    left = [(name, relation) for name in two for relation in OF_PEOPLE]
    return " ".join(fact_of(world, random, relation, name) for name, relation in random.sample(left, 6))


def indirect_object(world: World, random: Random) -> str:
    """One IOI sentence; a few have a third giver (then either recipient)."""
    index = random.choice([i for i in range(len(ioi.TEMPLATES)) if i not in holdout.IOI_TEMPLATES])
    a, b, other = random.sample(OPEN_NAMES, 3)
    giver, recipient = random.choice([(a, b), (b, a)])
    if random.random() < 0.05:
        giver = other
    place, gift = random.choice(PLACES), random.choice(GIFTS)
    text = ioi.TEMPLATES[index].format(A=a, B=b, S=giver, place=place, gift=gift)
    after = random.choice(["", "", f" Then {giver} went home.", f" {recipient} was {random.choice(FEELINGS)}."])
    return f"{text} {recipient}.{after}"


def word_list(world: World, random: Random) -> str:
    """A list of random names or words that repeats, once to three times, the last copy perhaps cut."""
    pool = random.choice([OPEN_NAMES, LIST_WORDS, OPEN_NAMES + LIST_WORDS])
    words = random.sample(pool, random.randint(4, 16))
    repeats = words * random.randint(2, 4)
    kept = repeats[: len(repeats) - random.randint(0, len(words) - 1)]
    return f"Words: {' '.join(kept)}."


def agreeing(world: World, random: Random) -> str:
    """A subject, perhaps a phrase or clause with another noun, and a verb that agrees with the subject."""
    kind = random.choice(["simple", "preposition", "clause", "clause"])
    nouns = NOUNS if kind == "simple" else [pair for pair in NOUNS if pair[0] not in holdout.SUBJECT_NOUNS]
    number, other = random.randint(0, 1), random.randint(0, 1)
    text = random.choice(agreement.TEMPLATES[kind]).format(
        subject=random.choice(nouns)[number],
        attractor=random.choice(NOUNS)[other],
        relative=random.choice(RELATIVE_VERBS)[other],
    )
    verb = random.choice(VERBS)
    form = verb[number]
    if verb[0] in ("is", "was"):
        end = random.choice(ADJECTIVES)
    elif verb[0] in ("runs", "walks", "goes"):
        end = f"to the {random.choice(PLACES)}"
    else:
        end = f"the {random.choice(THINGS)}"
    return f"{text} {form} {end}."


def pronoun(world: World, random: Random) -> str:
    """A name, then the pronoun of its gender."""
    names, word = random.choice([(FEMALE, "she"), (MALE, "he")])
    name = random.choice([n for n in names if n not in holdout.NAMES])
    start = random.choice(gendered_pronoun.TEMPLATES).format(name=name, place=random.choice(PLACES))
    if start.endswith("isn't"):
        return f"{start} {word}?"
    return (
        f"{start} {word} {random.choice(['was ' + random.choice(FEELINGS), 'went to the ' + random.choice(PLACES)])}."
    )


def years(world: World, random: Random) -> str:
    """An event that ends in a later year of the century it began in."""
    century, year = random.choice(CENTURIES), random.randint(2, 97)
    while holdout.year_held_out(century, year):
        century, year = random.choice(CENTURIES), random.randint(2, 97)
    text = random.choice(greater_than.TEMPLATES)
    start = text.format(event=random.choice(EVENTS), start=f"{century}{year:02d}", century=century)
    return f"{start}{random.randint(year + 1, 99):02d}."


SCENES: tuple[str, ...] = (
    "The {adjective} {noun} {verb} {adverb}.", "{name} saw the {adjective} {noun} near the {other}.",
    "{P} {verb} and thought about the {noun}.", "There was a {noun}, a {other} and a {adjective} {third}.",
    "{adverb_}, {name} {verb} with the {noun}.", "The {noun} and the {other} were {adjective}.",
    "{P} was {feeling} because of the {adjective} {noun}.", "{P} put the {noun} next to the {other}.",
    "At last {name} {verb}, and the {noun} was {adjective}.", "Nobody knew the {adjective} {other} better than {name}.",
    "{P} told {friend} about the {noun}.", "{friend} wanted a {noun} and a {other}.",
)  # fmt: skip


def story(world: World, random: Random) -> str:
    """Three to six sentences of one topic about one person, whose pronouns tell the gender of the name."""
    nouns, adjectives, verbs = TOPICS[random.choice(list(TOPICS))]
    names, word = random.choice([(FEMALE, "She"), (MALE, "He")])
    name, friend = random.choice(names), random.choice(NAMES)
    lines = [f"{name} loved the {random.choice(nouns)} and the {random.choice(nouns)}."]
    for scene in random.sample(SCENES, random.randint(2, 5)):
        noun, other, third = random.sample(nouns, 3)
        adverb = random.choice(ADVERBS)
        lines.append(
            scene.format(
                name=name,
                friend=friend,
                P=word,
                noun=noun,
                other=other,
                third=third,
                adverb=adverb,
                adjective=random.choice(adjectives),
                verb=random.choice(verbs),
                feeling=random.choice(FEELINGS),
                adverb_=adverb.capitalize(),
            )
        )
    return " ".join(lines)
