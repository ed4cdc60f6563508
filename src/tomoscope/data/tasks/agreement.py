"""Subject-verb agreement: "The teachers near the dog" -> " are", not " is".

Source: Linzen et al. 2016, "Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies" (arXiv:1611.01368);
the circuit view in Marks et al. 2024, "Sparse Feature Circuits" (arXiv:2403.19647). Measures whether the verb agrees
with its subject across a phrase or a clause. How it can mislead: with an attractor of the same number any noun tells
the verb; by default the attractor's number differs from the subject's, so agreeing with the nearest noun is always
wrong.

Corruptions: `flip` changes the subject's number (the wrong answer becomes right); `random_subject` puts another
subject of the other number (likewise); `attractor` changes the attractor's number (nothing should change: a control,
not for `simple`). Spans: subject, attractor (if there is one), end.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, other, parse_with_end, single_tokens, too_few
from tomoscope.data.tasks.words import NOUNS, RELATIVE_VERBS, VERBS
from tomoscope.errors import DataError

CORRUPTIONS: tuple[str, ...] = ("flip", "random_subject", "attractor")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("The {subject}",),
    "preposition": (
        "The {subject} near the {attractor}",
        "The {subject} behind the {attractor}",
        "The {subject} with the {attractor}",
        "The {subject} beside the {attractor}",
    ),
    "clause": (
        "The {subject} that the {attractor} {relative}",
        "The {subject} that saw the {attractor}",
        "The {subject} that helped the {attractor}",
    ),
}


def _both_forms(tokenizer: Any, pairs: Sequence[tuple[str, str]], needed: int, what: str) -> list[tuple[str, str]]:
    known = single_tokens(tokenizer, [form for pair in pairs for form in pair])
    kept = [pair for pair in pairs if pair[0] in known and pair[1] in known]
    if len(kept) < needed:
        raise too_few("agreement", what, len(kept), len(pairs), needed)
    return kept


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "flip",
    kinds: Sequence[str] = ("preposition", "clause"),
    attractors: str = "opposite",
    nouns: Sequence[tuple[str, str]] = NOUNS,
    verbs: Sequence[tuple[str, str]] = VERBS,
) -> PairSet:
    """`n` pairs of the kinds "simple", "preposition", "clause"; `attractors` are "opposite" in number or "any".

    Raises DataError where fewer than 3 nouns or 1 verb are single tokens in both numbers, and for an unknown kind or
    choice.
    """
    choose_corruption(corruption, CORRUPTIONS, task="agreement")
    for kind in kinds:
        if kind not in TEMPLATES or (kind == "simple" and corruption == "attractor"):
            raise DataError(
                f"The task 'agreement' has no kind {kind!r} with corruption {corruption!r}.",
                remedy=f"Use {', '.join(TEMPLATES)}; 'simple' has no attractor.",
            )
    if attractors not in ("opposite", "any"):
        raise DataError(f"attractors={attractors!r} is no choice of 'agreement'.", remedy="Use 'opposite' or 'any'.")
    subjects = _both_forms(tokenizer, nouns, 3, "nouns")
    forms = _both_forms(tokenizer, verbs, 1, "verbs")
    relatives = _both_forms(tokenizer, RELATIVE_VERBS, 1, "verbs of relative clauses")

    def draw(random: Random) -> Pair:
        kind = random.choice(list(kinds))
        template, number = random.choice(TEMPLATES[kind]), random.randint(0, 1)
        apart = 1 - number if attractors == "opposite" else random.randint(0, 1)
        subject, verb, relative = random.choice(subjects), random.choice(forms), random.choice(relatives)
        attractor = other(random, subjects, subject)
        clean = _prompt(template, subject[number], attractor[apart], relative[apart])
        twins = {
            "flip": (subject[1 - number], attractor[apart], relative[apart]),
            "random_subject": (
                other(random, subjects, subject, attractor)[1 - number],
                attractor[apart],
                relative[apart],
            ),
            "attractor": (subject[number], attractor[1 - apart], relative[1 - apart]),
        }
        return Pair(
            clean=clean,
            corrupted=_prompt(template, *twins[corruption]),
            answers=(f" {verb[number]}",),
            wrong=(f" {verb[1 - number]}",),
            labels={"kind": kind, "number": ("singular", "plural")[number], "template": template},
        )

    return collect(tokenizer, n, draw, task="agreement", seed=seed, corruption=corruption)


def _prompt(template: str, subject: str, attractor: str, relative: str) -> Prompt:
    marked = template.format(
        subject=f"{{subject:{subject}}}", attractor=f"{{attractor:{attractor}}}", relative=relative
    )
    return parse_with_end(marked)
