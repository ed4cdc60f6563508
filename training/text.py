"""English-like text about a small world, from a seeded grammar, with the field's tasks woven in.

A document is a short text of one to six sentences of one kind (stories, indirect objects, word lists that repeat,
verbs that agree, pronouns, spans of years, facts, colours, docstrings) or a mixture. `document(random)` writes one;
what is held out is in `training.holdout`. Rows of random tokens that repeat are not text: `training.embedded` makes
them from token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tomoscope.data.tasks import agreement, colours, facts, gendered_pronoun, greater_than, ioi
from tomoscope.data.tasks.words import (
    ARGUMENTS,
    CAPITALS,
    COLOURS,
    DESCRIPTION,
    EVENTS,
    FEMALE,
    GIFTS,
    MALE,
    NOUNS,
    PLACES,
    PROFESSIONS,
    RELATIVE_VERBS,
    SMALL_WORLD,
    SURNAMES,
    THINGS,
    VERBS,
)
from training import holdout

NAMES: tuple[str, ...] = FEMALE + MALE
OPEN_NAMES: tuple[str, ...] = tuple(name for name in NAMES if name not in holdout.NAMES)
ADJECTIVES: tuple[str, ...] = (
    "tall",
    "old",
    "young",
    "happy",
    "sad",
    "kind",
    "tired",
    "quiet",
    "loud",
    "small",
    "big",
    "slow",
)
FEELINGS: tuple[str, ...] = ("happy", "sad", "tired", "proud", "hungry", "glad", "afraid", "calm")
CENTURIES: tuple[int, ...] = tuple(range(11, 20))
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (*PLACES, *GIFTS, *COLOURS, *THINGS, *ARGUMENTS, *DESCRIPTION, *EVENTS, *PROFESSIONS, *(s for s, _ in NOUNS))
    )
)


def people() -> dict[str, dict[str, str]]:
    """Relation -> subject -> answer: every fact of the small world and the capitals."""
    table: dict[str, dict[str, str]] = {"capital": dict(CAPITALS), "born": {}, "lives": {}, "works": {}}
    for name, born, lives, works in SMALL_WORLD:
        table["born"][name], table["lives"][name], table["works"][name] = born, lives, works
    return table


FACTS: dict[str, dict[str, str]] = people()


def indirect_object(random: Random) -> str:
    """One IOI sentence; a few have a third giver (then either recipient), or put the recipient first."""
    index = random.choice([i for i in range(len(ioi.TEMPLATES)) if i not in holdout.IOI_TEMPLATES])
    a, b, other = random.sample(OPEN_NAMES, 3)
    giver, recipient = random.choice([(a, b), (b, a)])
    if random.random() < 0.1:
        giver = other
    place, gift = random.choice(PLACES), random.choice(GIFTS)
    text = ioi.TEMPLATES[index].format(A=a, B=b, S=giver, place=place, gift=gift)
    after = random.choice(["", "", f" Then {giver} went home.", f" {recipient} was {random.choice(FEELINGS)}."])
    return f"{text} {recipient}.{after}"


def word_list(random: Random) -> str:
    """A list of random names or words that repeats, once to three times, the last copy perhaps cut."""
    pool = random.choice([OPEN_NAMES, WORDS, OPEN_NAMES + WORDS])
    words = random.sample(pool, random.randint(4, 16))
    repeats = words * random.randint(2, 4)
    kept = repeats[: len(repeats) - random.randint(0, len(words) - 1)]
    return f"Words: {' '.join(kept)}."


def _predicate(random: Random, verb: tuple[str, str], number: int) -> str:
    form = verb[number]
    if verb[0] in ("is", "was"):
        return f"{form} {random.choice(ADJECTIVES)}"
    if verb[0] in ("runs", "walks", "goes"):
        return f"{form} to the {random.choice(PLACES)}"
    return f"{form} the {random.choice(THINGS)}"


def agreeing(random: Random) -> str:
    """A subject, perhaps a phrase or clause with another noun, and a verb that agrees with the subject."""
    kind = random.choice(["simple", "preposition", "clause", "clause"])
    nouns = NOUNS if kind == "simple" else [pair for pair in NOUNS if pair[0] not in holdout.SUBJECT_NOUNS]
    number, other = random.randint(0, 1), random.randint(0, 1)
    template = random.choice(agreement.TEMPLATES[kind])
    text = template.format(
        subject=random.choice(nouns)[number],
        attractor=random.choice(NOUNS)[other],
        relative=random.choice(RELATIVE_VERBS)[other],
    )
    return f"{text} {_predicate(random, random.choice(VERBS), number)}."


PRONOUN_ENDINGS: dict[int, str] = {
    0: "{p}?",
    1: "{p} walked to the {place}.",
    2: "{p} was {feeling}.",
    3: "{p} was {feeling}.",
}


def pronoun(random: Random) -> str:
    """A name, then the pronoun of its gender."""
    index = random.randrange(len(gendered_pronoun.TEMPLATES))
    names, word = random.choice([(FEMALE, "she"), (MALE, "he")])
    name = random.choice([n for n in names if n not in holdout.NAMES])
    place, feeling = random.choice(PLACES), random.choice(FEELINGS)
    start = gendered_pronoun.TEMPLATES[index].format(name=name, place=place)
    ending = PRONOUN_ENDINGS.get(index, "{p} was " + random.choice(["{feeling}", "at the {place}"]) + ".")
    return f"{start} {ending.format(p=word, place=random.choice(PLACES), feeling=feeling)}"


def years(random: Random) -> str:
    """An event that ends in a later year of the century it began in."""
    century, year = random.choice(CENTURIES), random.randint(2, 97)
    while holdout.year_held_out(century, year):
        century, year = random.choice(CENTURIES), random.randint(2, 97)
    end = random.randint(year + 1, 99)
    text = random.choice(greater_than.TEMPLATES)
    return f"{text.format(event=random.choice(EVENTS), start=f'{century}{year:02d}', century=century)}{end:02d}."


def fact(random: Random) -> str:
    """One fact in one of the wordings shown for its subject."""
    relation = random.choice(list(FACTS))
    return fact_of(random, relation, random.choice(list(FACTS[relation])))


def fact_of(random: Random, relation: str, subject: str) -> str:
    """The fact of this relation and subject."""
    held = holdout.fact_template_held_out(relation, subject)
    wordings = [text for i, text in enumerate(facts.TEMPLATES[relation]) if i != held]
    return f"{random.choice(wordings).format(subject=subject)} {FACTS[relation][subject]}."


def biography(random: Random) -> str:
    """Several facts of one person."""
    name = random.choice(SMALL_WORLD)[0]
    relations = random.sample(["born", "lives", "works"], random.randint(2, 3))
    return " ".join(fact_of(random, relation, name) for relation in relations)


def coloured(random: Random) -> str:
    """Two or three things, their colours, and a question about one of them."""
    statement, question = random.choice(colours.TEMPLATES)
    count = random.randint(2, 3)
    things, tints = random.sample(THINGS, count), random.sample(COLOURS, count)
    asked = random.randrange(count)
    while holdout.colour_held_out(things[asked], tints[asked]):
        things, tints = random.sample(THINGS, count), random.sample(COLOURS, count)
    lines = " ".join(statement.format(thing=t, colour=c) for t, c in zip(things, tints, strict=True))
    return f"{lines} {question.format(thing=things[asked])} {tints[asked]}."


def docstring(random: Random) -> str:
    """A Python function whose docstring lists its arguments in order."""
    open_arguments = [word for word in ARGUMENTS if word not in holdout.ARGUMENT_NAMES]
    arguments = random.sample(open_arguments, random.randint(4, 6))
    start = random.randint(0, len(arguments) - 3)
    lines = [
        f"    :param {argument}: {random.choice(DESCRIPTION)} {random.choice(DESCRIPTION)}"
        for argument in arguments[start : start + random.choice([3, 3, 4])]
    ]
    title = " ".join(random.sample(DESCRIPTION, 3))
    name = random.choice(DESCRIPTION)
    return f'\ndef {name}(self, {", ".join(arguments)}):\n    """{title}\n\n' + "\n".join(lines) + '\n    """\n'


STORY: tuple[str, ...] = (
    "Every day {p} walked to the {place}.", "{P} had a {colour} {thing}.",
    "One day {p} lost the {gift} at the {place}.", "{P} was very {feeling}.",
    "{P} loved the {colour} {thing} very much.", "In the morning {p} went to the {place} with {friend}.",
    "At the {place}, {p} saw a {adjective} {noun}.", "{P} wanted to be a {job}.",
    "{P} took the {gift} and put it on the {thing}.", "Then {p} said that the {noun} was {adjective}.",
    "After that, {friend} came to the {place} too.", "{P} gave the {gift} to {friend}.",
    "{friend} liked the {gift}.", "In the end {p} was {feeling}.", "The {nouns} at the {place} were {adjective}.",
    "{P} found a {gift} near the {place}.", "It was a {adjective} day.",
)  # fmt: skip


def story(random: Random) -> str:
    """A few sentences about one person, whose pronouns tell the gender of the name."""
    names, word = random.choice([(FEMALE, "she"), (MALE, "he")])
    name, friend = random.choice(names), random.choice(NAMES)
    lines = [
        random.choice(
            [
                "Once there was a {job}, and the name was {name}.",
                "There was a {job} named {name}.",
                "One day {name} went to the {place}.",
            ]
        )
    ]
    lines += random.sample(STORY, random.randint(2, 6))
    noun = random.choice(NOUNS)
    filled = []
    for line in lines:
        words = {
            "place": random.choice(PLACES),
            "gift": random.choice(GIFTS),
            "thing": random.choice(THINGS),
            "colour": random.choice(COLOURS),
            "feeling": random.choice(FEELINGS),
            "adjective": random.choice(ADJECTIVES),
            "job": random.choice(PROFESSIONS),
        }
        person = {"name": name, "friend": friend, "p": word, "P": word.capitalize()}
        filled.append(line.format(noun=noun[0], nouns=noun[1], **words, **person))
    return " ".join(filled)


KINDS: dict[str, tuple[Callable[[Random], str], float, int]] = {
    "indirect_object": (indirect_object, 0.22, 3),
    "word_list": (word_list, 0.10, 1),
    "agreement": (agreeing, 0.13, 5),
    "pronoun": (pronoun, 0.07, 4),
    "years": (years, 0.09, 4),
    "fact": (fact, 0.10, 5),
    "biography": (biography, 0.05, 2),
    "colours": (coloured, 0.08, 2),
    "docstring": (docstring, 0.06, 1),
    "story": (story, 0.10, 1),
}
"""Kind -> (writer, share of the documents, most items in a document)."""


def document(random: Random) -> str:
    """One document: items of one kind, or now and then of several."""
    kinds = list(KINDS)
    weights = [KINDS[kind][1] for kind in kinds]
    kind = random.choices(kinds, weights)[0]
    writer, _, most = KINDS[kind]
    if kind == "docstring" or random.random() < 0.75:
        return " ".join(writer(random) for _ in range(random.randint(1, most)))
    others = [k for k in kinds if k != "docstring"]
    return " ".join(
        KINDS[k][0](random) for k in random.choices(others, [KINDS[k][1] for k in others], k=random.randint(2, 3))
    )


def vocabulary() -> tuple[str, ...]:
    """Every word that must be a single token with its leading space."""
    cities = tuple(word for pair in CAPITALS for word in pair)
    plurals = tuple(word for pair in (*NOUNS, *VERBS, *RELATIVE_VERBS) for word in pair)
    return tuple(dict.fromkeys((*NAMES, *SURNAMES, *WORDS, *cities, *plurals, *ADJECTIVES, *FEELINGS, "he", "she")))
