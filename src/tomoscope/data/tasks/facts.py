"""Facts: "The capital of France is" -> " Paris"; capitals by default, and any table of facts of one's own.

Source: the tracing of Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (arXiv:2202.05262), in
form. Measures recall of an attribute from its subject. How it can mislead: a model may guess the commonest answer of a
relation, so compare with the corrupted twin (another subject).

Corruptions: `swap` puts another subject with as many tokens and another answer (the wrong answer, its own, becomes
right). Spans: subject, end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tomoscope.data.pairs import Pair, PairSet
from tomoscope.data.prompts import Prompt
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, single_tokens, too_few
from tomoscope.data.tasks.words import CAPITALS
from tomoscope.errors import DataError

CORRUPTIONS: tuple[str, ...] = ("swap",)


@dataclass(frozen=True)
class FactTable:
    """One relation: who has which attribute, and how it is said."""

    relation: str
    rows: tuple[tuple[str, str], ...]
    """(subject, answer)."""
    templates: tuple[str, ...]
    """Texts up to the answer, with "{subject}" once."""

    def __post_init__(self) -> None:
        for template in self.templates:
            if template.count("{subject}") != 1:
                raise DataError(
                    f"The template {template!r} of {self.relation!r} has no {{subject}}, or more than one.",
                    remedy="Write it once in each template, where the subject stands.",
                )
        if not self.templates or len(self.rows) < 2:
            raise DataError(
                f"The facts {self.relation!r} are {len(self.rows)} rows and {len(self.templates)} templates.",
                remedy="Give two rows and one template, or more.",
            )


CAPITAL = FactTable(
    "capital",
    CAPITALS,
    (
        "The capital of {subject} is",
        "The capital city of {subject} is",
        "The government of {subject} meets in",
        "People who go to {subject} often visit",
        "In {subject}, the capital is",
    ),
)
"""The capitals of countries, which any model of English may know."""


def make(
    tokenizer: Any,
    n: int,
    *,
    seed: int = 0,
    corruption: str = "swap",
    tables: Sequence[FactTable] = (CAPITAL,),
) -> PairSet:
    """`n` pairs of these facts; relation and template by chance.

    Subjects may have several tokens; answers are single ones. Raises DataError where a relation has fewer than two
    subjects with single-token answers.
    """
    choose_corruption(corruption, CORRUPTIONS, task="facts")
    known = {
        (table.relation, template): _known(tokenizer, table, template)
        for table in tables
        for template in table.templates
    }

    def draw(random: Random) -> Pair:
        table = random.choice(list(tables))
        template = random.choice(table.templates)
        rows = known[table.relation, template]
        subject, answer, length = random.choice(rows)
        twin, foil, _ = random.choice([row for row in rows if row[2] == length and row[1] != answer])
        return Pair(
            clean=_prompt(template, subject),
            corrupted=_prompt(template, twin),
            answers=(f" {answer}",),
            wrong=(f" {foil}",),
            labels={"relation": table.relation, "template": template, "subject": subject, "twin": twin},
        )

    return collect(tokenizer, n, draw, task="facts", seed=seed, corruption=corruption)


def _known(tokenizer: Any, table: FactTable, template: str) -> list[tuple[str, str, int]]:
    """(subject, answer, tokens of the prompt), of subjects that have a twin of as many tokens with another answer.

    Lengths are of the whole prompt: a name is often one token after a space and several at the start of a text.
    """
    single = single_tokens(tokenizer, [answer for _, answer in table.rows])
    kept_rows = [(subject, answer) for subject, answer in table.rows if answer in single]
    texts = [template.format(subject=subject) for subject, _ in kept_rows]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]] if texts else []
    rows = [(subject, answer, length) for (subject, answer), length in zip(kept_rows, lengths, strict=True)]
    by_length: dict[int, set[str]] = {}
    for _, answer, length in rows:
        by_length.setdefault(length, set()).add(answer)
    kept = [row for row in rows if len(by_length[row[2]]) > 1]
    if len(kept) < 2:
        raise too_few("facts", f"answers of {table.relation!r}", len(kept), len(table.rows), 2)
    return kept


def _prompt(template: str, subject: str) -> Prompt:
    return parse_with_end(template.format(subject=f"{{subject:{subject}}}"))
