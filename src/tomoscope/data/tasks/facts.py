"""Facts: "The capital of France is" -> " Paris"; and the invented people of the embedded model's world.

Source: the tracing of Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262), in
form. Measures recall of an attribute from its subject. How it can mislead: a model may guess the commonest answer of a
relation, so compare with the corrupted twin (another subject); `born`, `lives` and `works` are invented, so only the
embedded model can know them.

Corruptions: `swap` puts another subject with as many tokens and another answer (the wrong answer, its own, becomes
right). Spans: subject, end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, single_tokens, too_few
from tomoscope.data.tasks.words import CAPITALS, SMALL_WORLD
from tomoscope.errors import DataError, nearest

CORRUPTIONS: tuple[str, ...] = ("swap",)
FACTS: dict[str, tuple[tuple[str, str], ...]] = {
    "capital": CAPITALS,
    "born": tuple((name, born) for name, born, _, _ in SMALL_WORLD),
    "lives": tuple((name, lives) for name, _, lives, _ in SMALL_WORLD),
    "works": tuple((name, works) for name, _, _, works in SMALL_WORLD),
}
"""Relation -> (subject, answer). Capitals are true; the others hold in the embedded model's world only."""
TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {subject} is",
        "The capital city of {subject} is",
        "The government of {subject} meets in",
        "People who go to {subject} often visit",
        "In {subject}, the capital is",
    ),
    "born": (
        "{subject} was born in",
        "{subject} was born in the city of",
        "The birthplace of {subject} is",
        "{subject} comes from",
        "The home town of {subject} is",
    ),
    "lives": (
        "{subject} lives in",
        "{subject} now lives in the city of",
        "{subject} has a house in",
        "Today {subject} lives in",
        "The house of {subject} is in",
    ),
    "works": (
        "{subject} works as a",
        "{subject} is a",
        "The job of {subject} is that of a",
        "{subject} has worked for years as a",
        "For many years {subject} was a",
    ),
}


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "swap",
    relations: Sequence[str] = ("capital",),
    templates: Sequence[str] | None = None,
) -> PairSet:
    """`n` pairs of the relations "capital", "born", "lives", "works"; `templates` replaces their wordings ({subject}
    once).

    Subjects may have several tokens; answers are single ones. Raises DataError for an unknown relation, and where a
    relation has fewer than two subjects with single-token answers.
    """
    choose_corruption(corruption, CORRUPTIONS, task="facts")
    wordings = {relation: tuple(templates or TEMPLATES[relation]) for relation in relations if relation in TEMPLATES}
    known = {
        (relation, template): _known(tokenizer, relation, template)
        for relation in relations
        for template in wordings.get(relation, ("{subject}",))
    }

    def draw(random: Random) -> Pair:
        relation = random.choice(list(relations))
        template = random.choice(wordings[relation])
        rows = known[relation, template]
        subject, answer, length = random.choice(rows)
        twin, foil, _ = random.choice([row for row in rows if row[2] == length and row[1] != answer])
        return Pair(
            clean=_prompt(template, subject),
            corrupted=_prompt(template, twin),
            answers=(f" {answer}",),
            wrong=(f" {foil}",),
            labels={"relation": relation, "template": template, "subject": subject, "twin": twin},
        )

    return collect(tokenizer, n, draw, task="facts", seed=seed, corruption=corruption)


def _known(tokenizer: Any, relation: str, template: str) -> list[tuple[str, str, int]]:
    """(subject, answer, tokens of the prompt), of subjects that have a twin of as many tokens with another answer.

    Lengths are of the whole prompt: a name is often one token after a space and several at the start of a text.
    """
    if relation not in FACTS:
        raise DataError(
            f"The task 'facts' has no relation {relation!r}.",
            remedy=f"{nearest(relation, FACTS)} It has {', '.join(FACTS)}.".strip(),
        )
    single = single_tokens(tokenizer, [answer for _, answer in FACTS[relation]])
    rows = [
        (subject, answer, len(tokenizer(template.format(subject=subject))["input_ids"]))
        for subject, answer in FACTS[relation]
        if answer in single
    ]
    kept = [row for row in rows if any(twin[2] == row[2] and twin[1] != row[1] for twin in rows)]
    if len(kept) < 2:
        raise too_few("facts", f"answers of {relation!r}", len(kept), len(FACTS[relation]), 2)
    return kept


def _prompt(template: str, subject: str) -> Prompt:
    return parse_with_end(template.format(subject=f"{{subject:{subject}}}"))
