"""Labelled texts of concepts whose answer is known, for exams: number, gender, truth, sentiment.

Each text ends where the model must know the concept to go on: before the verb, before the pronoun, before the verdict.
Items of one word (a noun, a name, a person) are one cluster: a probe is measured on words that it never saw, so that it
cannot have learned a list. How they can mislead: the two classes of truth differ in nothing but the world's facts, but
the two of sentiment differ in their words, which a bag of tokens tells as well (it is shown beside).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from tomoscope.data.prompts import read_text
from tomoscope.data.tasks import agreement, gendered_pronoun
from tomoscope.data.tasks.words import FEMALE, MALE, NOUNS, PLACES, RELATIVE_VERBS
from tomoscope.errors import DataError, TokenizerError, nearest
from tomoscope.phantoms.world import shipped_world, speech
from tomoscope.phantoms.world.tasks import speaks_of_the_world


@dataclass(frozen=True)
class ConceptItems:
    """Items of one concept.

    Attributes:
        name: of the concept.
        texts: one an item.
        labels: [item] 0 or 1.
        clusters: the word (or person) of each item.
        classes: what 0 and 1 mean.
        answers: what a model says next in class 0 and in class 1.
        others: further labels of the same items, for distractors.
    """

    name: str
    texts: tuple[str, ...]
    labels: np.ndarray
    clusters: tuple[str, ...]
    classes: tuple[str, str]
    answers: tuple[str, str]
    others: dict[str, np.ndarray] = field(default_factory=dict)


def number(n: int, seed: int) -> ConceptItems:
    """The grammatical number of a subject, with a noun of either number between it and the verb."""
    random = Random(f"number:{seed}")
    templates = [text for kind in ("preposition", "clause") for text in agreement.TEMPLATES[kind]]
    texts: dict[str, tuple[int, str, int]] = {}
    while len(texts) < n:
        label, other = len(texts) % 2, random.randint(0, 1)
        noun, attractor = random.sample(NOUNS, 2)
        text = random.choice(templates).format(
            subject=noun[label], attractor=attractor[other], relative=random.choice(RELATIVE_VERBS)[other]
        )
        texts.setdefault(text, (label, noun[0], other))
    return _items("number", texts, ("singular", "plural"), (" is", " are"), "the other noun's number")


def gender(n: int, seed: int) -> ConceptItems:
    """The gender of a name, where its pronoun comes next."""
    random = Random(f"gender:{seed}")
    texts: dict[str, tuple[int, str, int]] = {}
    while len(texts) < n:
        label = len(texts) % 2
        name, place = random.choice((MALE, FEMALE)[label]), random.choice(PLACES)
        template = random.randrange(len(gendered_pronoun.TEMPLATES))
        text = gendered_pronoun.TEMPLATES[template].format(name=name, place=place)
        texts.setdefault(text, (label, name, int(template < 3)))
    return _items("gender", texts, ("male", "female"), (" he", " she"), "the template")


def truth(n: int, seed: int) -> ConceptItems:
    """Whether a claim about the micro-world is true, where its verdict comes next."""
    world, random = shipped_world(), Random(f"truth:{seed}")
    texts: dict[str, tuple[int, str, int]] = {}
    counts = [0, 0]
    while len(texts) < n:
        said = speech.claim(world, random)
        label = int(said.answer == speech.TRUE)
        if counts[label] * 2 < n + 1 and said.prompt not in texts:
            texts[said.prompt] = (label, said.subject, int(said.relation in ("born", "lives")))
            counts[label] += 1
    return _items("truth", texts, ("false", "true"), (" false", " true"), "the relation")


def sentiment(n: int, seed: int) -> ConceptItems:
    """The sentiment of a review, where its verdict comes next; each text its own cluster."""
    random = Random(f"sentiment:{seed}")
    texts: dict[str, tuple[int, str, int]] = {}
    while len(texts) < n:
        label = len(texts) % 2
        said = speech.review(random, label=("negative", "positive")[label])
        texts.setdefault(said.prompt, (label, said.prompt, int(said.subject in ("film", "book"))))
    return _items("sentiment", texts, ("negative", "positive"), (" negative", " positive"), "what is reviewed")


def _items(
    name: str, texts: dict[str, tuple[int, str, int]], classes: tuple[str, str], answers: tuple[str, str], other: str
) -> ConceptItems:
    labels, clusters, others = zip(*texts.values(), strict=True)
    return ConceptItems(
        name, tuple(texts), np.array(labels), tuple(clusters), classes, answers, {other: np.array(others)}
    )


MAKERS = {"number": number, "gender": gender, "truth": truth, "sentiment": sentiment}
"""Concept -> (n, seed) -> items."""
OF_THE_WORLD = ("truth", "sentiment")


def concept_items(subject: Any, name: str, n: int, seed: int) -> ConceptItems | str:
    """A concept's items, or why this subject can't be asked. Raises DataError for an unknown concept."""
    if name not in MAKERS:
        raise DataError(f"There is no concept {name!r}.", remedy=nearest(name, MAKERS) or f"There are {list(MAKERS)}.")
    if name in OF_THE_WORLD and not speaks_of_the_world(subject.tokenizer):
        return f"the texts of {name} are of the micro-world, of which this model has not heard"
    made = MAKERS[name](n, seed)
    try:
        read_text(subject.tokenizer, list(made.texts), verbose=False)
    except TokenizerError as error:
        return error.what
    return made
