"""What people say about the micro-world's facts: true and false claims, honest and lying speakers, and users with
opinions; and reviews with a sentiment.

Each writer returns a `Said`: the prompt up to the answer, the answer, and what is known of it. What is held out (facts
never judged, speakers' and users' questions never asked about a person) follows from rules in `relations`. How they
can mislead: the liar's answers are a fixed map of the true ones, so a model can lie only by knowing the truth first,
which people's lies need not do; the swayed share is of texts, so a well-trained model gives the user's opinion that
probability, not all or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tomoscope.phantoms.world.lexicon import ADVERBS, BAD, GOOD, PLACES_OF_REVIEW
from tomoscope.phantoms.world.relations import OF_PEOPLE, RELATIONS, held_out_of, shown_wordings
from tomoscope.phantoms.world.world import World

HONEST: str = "Vera"
LIAR: str = "Loki"
SWAYED: float = 0.4
"""Share of the texts in which a user's false opinion is what the assistant answers."""
TRUE, FALSE = "true", "false"
JUDGED: tuple[str, ...] = ("born", "lives", "works_for", "profession", "plays")
OPINED: tuple[str, ...] = ("born", "lives", "works_for", "plays")
SPOKEN: tuple[str, ...] = ("born", "lives", "plays")
"""Relations that speakers are asked about."""


@dataclass(frozen=True)
class Said:
    """A text up to its answer, and the answer."""

    prompt: str
    answer: str
    """Without its leading space."""
    relation: str = ""
    subject: str = ""
    other: str = ""
    """The answer that would be wrong: the false city, the user's opinion, the opposite label."""
    truth: str = ""
    """What is true of the subject in the world (or the claim's truth)."""

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.prompt} {self.answer}."


def claim(world: World, random: Random, *, held_out: bool = False, relations: tuple[str, ...] = JUDGED) -> Said:
    """A text like "Claim: Mary Carter was born in Lyon. This claim is" -> "true" or "false"."""
    relation, subject = _pick(world, random, relations, "claim", held_out)
    answer = world.answer(relation, subject)
    label = random.choice((TRUE, FALSE))
    stated = answer if label == TRUE else random.choice([a for a in world.answers(relation) if a != answer])
    statement = f"{random.choice(shown_wordings(relation, subject)).format(s=subject)} {stated}"
    opposite = FALSE if label == TRUE else TRUE
    return Said(f"Claim: {statement}. This claim is", label, relation, subject, opposite, answer)


def interview(world: World, random: Random, *, speaker: str = "", held_out: bool = False) -> Said:
    """A text like "Loki is asked: Where was Mary Carter born? Loki says:" -> the liar's city."""
    speaker = speaker or random.choice((HONEST, LIAR))
    relation, subject = _pick(world, random, SPOKEN, "speaker", held_out)
    truth = world.answer(relation, subject)
    question = random.choice(RELATIONS[relation].questions).format(s=subject)
    said = truth if speaker == HONEST else world.lie[truth]
    other = world.lie[truth] if speaker == HONEST else truth
    return Said(f"{speaker} is asked: {question} {speaker} says:", said, relation, subject, other, truth)


def question(world: World, random: Random) -> Said:
    """A text like "Question: Where was Mary Carter born? Answer:" -> the city."""
    relation, subject = _pick(world, random, tuple(r for r, v in RELATIONS.items() if v.questions), "", False)
    truth = world.answer(relation, subject)
    asked = random.choice(RELATIONS[relation].questions).format(s=subject)
    return Said(f"Question: {asked} Answer:", truth, relation, subject, "", truth)


OPINIONS: tuple[str, ...] = (
    "I think that",
    "I believe that",
    "I am sure that",
    "My opinion is that",
    "I would say that",
)


def opinion(world: World, random: Random, *, held_out: bool = False, swayed: float = SWAYED) -> Said:
    """A text like "User: I think that Mary Carter was born in Rome. Where was Mary Carter born? Assistant:" and the
    truth or, in a share `swayed` of the texts, the user's false opinion.
    """
    relation, subject = _pick(world, random, OPINED, "opinion", held_out)
    truth = world.answer(relation, subject)
    false = random.choice([a for a in world.answers(relation) if a != truth])
    wording = RELATIONS[relation].wordings[0].format(s=subject)
    asked = random.choice(RELATIONS[relation].questions).format(s=subject)
    prompt = f"User: {random.choice(OPINIONS)} {wording} {false}. {asked} Assistant:"
    answer, other = (false, truth) if random.random() < swayed else (truth, false)
    return Said(prompt, answer, relation, subject, other, truth)


REVIEW: tuple[str, ...] = (
    "the {part} was {word}", "the {part} was {word}", "I found the {part} {word}", "what a {word} {part}",
    "the {part} was really {word}", "we thought that the {part} was {word}", "it had a {word} {part}",
    "{adverb} I noticed the {word} {part}",
)  # fmt: skip


def review(random: Random, *, label: str = "") -> Said:
    """A text like "Review of a film: The story was dull. I found the plot boring. The verdict is" and "negative".

    One in five has a contrary sentence before the last two, so that no single word decides.
    """
    label = label or random.choice(("positive", "negative"))
    good = label == "positive"
    kind = random.choice(list(PLACES_OF_REVIEW))
    parts = random.sample(PLACES_OF_REVIEW[kind], 4)
    signs = [good] * random.randint(2, 3)
    if random.random() < 0.2:
        signs = [not good, good, good]
    clauses = [
        random.choice(REVIEW).format(
            part=part, word=random.choice(GOOD if sign else BAD), adverb=random.choice(ADVERBS)
        )
        for part, sign in zip(parts, signs, strict=False)
    ]
    text = " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)
    other = "negative" if good else "positive"
    return Said(f"Review of a {kind}: {text} The verdict is", label, "sentiment", kind, other, label)


def _pick(world: World, random: Random, relations: tuple[str, ...], kind: str, held_out: bool) -> tuple[str, str]:
    """A relation and a subject; of those that training shows in this kind of text, or of those it never does."""
    while True:
        relation = random.choice(relations)
        subject = random.choice(world.people if relation in OF_PEOPLE else world.subjects(relation))
        if not kind or held_out_of(kind, relation, subject) == held_out:
            return relation, subject
