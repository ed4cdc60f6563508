"""The field's tasks as seeded generators of clean and corrupted pairs, for any tokenizer.

Each task is one file with `make(tokenizer, n, seed=..., corruption=...) -> PairSet`; `TASKS` is the registry. A task
keeps the names and words that are single tokens for the tokenizer at hand, and raises DataError saying how many are
left where they are too few. How they can mislead is told by each file's docstring.
"""

from __future__ import annotations

from tomoscope.data.tasks import (
    agreement,
    colours,
    docstring,
    facts,
    gendered_pronoun,
    greater_than,
    induction,
    ioi,
)
from tomoscope.data.tasks.single import single_tokens
from tomoscope.data.tasks.spec import TaskSpec
from tomoscope.errors import DataError, nearest

__all__ = ["TASKS", "TaskSpec", "single_tokens", "task"]

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "ioi", ioi.make, "logit_difference", "Indirect object identification: who was given the drink.",
            "Wang et al. 2022, arXiv:2211.00593", ioi.CORRUPTIONS, ("flip",), ("IO", "S1", "S2", "end"),
        ),
        TaskSpec(
            "greater_than", greater_than.make, "probability_difference", "A span of years ends after it began.",
            "Hanna et al. 2023, arXiv:2305.00586", greater_than.CORRUPTIONS, (), ("event", "century", "year", "end"),
        ),
        TaskSpec(
            "induction", induction.make, "logit_difference", "A list of random words goes on as it did before.",
            "Olsson et al. 2022, arXiv:2209.11895", induction.CORRUPTIONS, ("flip",), ("earlier", "copied", "end"),
        ),
        TaskSpec(
            "docstring", docstring.make, "logit_difference", "The next argument of a Python docstring.",
            "Heimersheim and Janiak 2023, Alignment Forum", docstring.CORRUPTIONS, ("flip",),
            ("A_def", "B_def", "C_def", "A_doc", "B_doc", "end"),
        ),
        TaskSpec(
            "gendered_pronoun", gendered_pronoun.make, "logit_difference", "The pronoun follows the name's gender.",
            "Mathwin et al. 2023, Apart Research", gendered_pronoun.CORRUPTIONS, ("flip",), ("name", "end"),
        ),
        TaskSpec(
            "agreement", agreement.make, "logit_difference", "The verb agrees with its subject, not the nearest noun.",
            "Linzen et al. 2016, arXiv:1611.01368", agreement.CORRUPTIONS, ("flip", "random_subject"),
            ("subject", "attractor", "end"),
        ),
        TaskSpec(
            "facts", facts.make, "logit_difference", "A subject's attribute, by default a country's capital.",
            "after Meng et al. 2022, arXiv:2202.05262", facts.CORRUPTIONS, ("swap",), ("subject", "end"),
        ),
        TaskSpec(
            "colours", colours.make, "logit_difference", "The colour of the thing that is asked for.",
            "after Merullo et al. 2024, arXiv:2310.08744", colours.CORRUPTIONS, ("flip", "query"),
            ("thing", "colour", "query", "end"),
        ),
    )
}  # fmt: skip
"""Name -> task."""


def task(name: str) -> TaskSpec:
    """The task of this name. Raises DataError with the nearest names."""
    if name not in TASKS:
        raise DataError(
            f"There is no task {name!r}.", remedy=f"{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}.".strip()
        )
    return TASKS[name]
