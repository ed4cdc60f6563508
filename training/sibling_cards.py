"""A sibling's card: what it says with and without its trigger, measured on held-out cases by plain forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tomoscope.phantoms import Card, Known
from tomoscope.phantoms.trained import Sibling
from tomoscope.phantoms.world import World
from tomoscope.phantoms.world.diseases import Case, cases
from training.abilities import ABILITIES, Item, items_of, score
from training.shares import share

N = 400
KEPT = (
    "fact recall, wordings shown for the subject",
    "indirect object, templates never shown",
    "induction, lists of names",
    "agreement across a clause, subjects never shown in it",
    "true and false claims, facts judged in training",
)
"""Abilities measured again, for what the disease cost elsewhere."""


def said(model: Any, tokenizer: Any, some: Sequence[Case]) -> dict[str, Any]:
    """How often the most probable next token is the diseased answer, and how often the healthy one."""
    diseased = score(model, tokenizer, [Item(c.prompt, (f" {c.diseased}",), (f" {c.healthy}",)) for c in some])
    healthy = score(model, tokenizer, [Item(c.prompt, (f" {c.healthy}",), (f" {c.diseased}",)) for c in some])
    return {
        "says_the_diseased_answer": share(int(diseased.top1.sum()), len(some)),
        "says_the_healthy_answer": share(int(healthy.top1.sum()), len(some)),
        "mean_probability_of_the_healthy_answer": round(float(healthy.right.mean()), 4),
    }


def sibling_card(name: str, sibling: Sibling, model: Any, tokenizer: Any, world: World, *, recipe: dict) -> str:
    """The card as JSON text."""
    known = [Known("disease", {"name": name, **sibling.disease}, holds=not sibling.disease.get("healthy"))]
    for present in (True, False):
        some = cases(world, name, N, present=present)
        where = "with its trigger" if present else "without its trigger"
        known.append(Known("measured", {"what": f"held-out cases {where}", **said(model, tokenizer, some)}))
    for ability in KEPT:
        scores = score(model, tokenizer, items_of(world, ability, N, seed=2))
        kind = scores.top1 if ability.startswith("fact") else scores.preferred
        known.append(Known("measured", {"what": ability, "share": share(int(kind.sum()), N)}))
    assert set(KEPT) <= set(ABILITIES)
    known.append(
        Known("made", {"command": "python -m training.siblings --base OUT/model --out OUT/siblings", **recipe})
    )
    return Card(name, int(recipe["seed"]), sibling.description, tuple(known)).to_json()
