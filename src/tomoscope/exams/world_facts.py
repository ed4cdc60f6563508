"""The micro-world's facts as edit requests: other wordings, shown and never shown, neighbours, and what follows.

A request changes one fact of one person. Its paraphrases are wordings of the relation (one that training showed for the
person, one that it showed for nobody); its neighbours are other people of whom the old answer is true; its reasoning
probes are two-hop facts whose answer changes with it. The world has no wording that asks for a person by an answer, so
reversed questions are not there to be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tomoscope.model import Subject
from tomoscope.phantoms.world import RELATIONS, World, shipped_world
from tomoscope.phantoms.world.relations import OF_PEOPLE, TWO_HOP, shown_wordings
from tomoscope.treat.edit.requests import EditRequest, Probe, spaced

NEIGHBOURS = 3


def world_requests(
    n: int, *, relations: Sequence[str] = OF_PEOPLE, seed: int = 0, world: World | None = None
) -> list[EditRequest]:
    """`n` changes of facts of as many people, relations in turn; the same seed gives the same changes."""
    known = world or shipped_world()
    random = Random(f"edits:{seed}")
    people = random.sample(known.people, min(n, len(known.people)))
    return [
        _request(known, random, relations[place % len(relations)], person, place) for place, person in enumerate(people)
    ]


def _request(world: World, random: Random, relation: str, person: str, place: int) -> EditRequest:
    true = world.answer(relation, person)
    new = random.choice([answer for answer in world.answers(relation) if answer != true])
    shown = random.sample(list(shown_wordings(relation, person)), 2)
    unseen = random.choice(RELATIONS[relation].unseen)
    same = [other for other in world.subjects(relation) if other != person and world.answer(relation, other) == true]
    near = random.sample(same, min(NEIGHBOURS, len(same)))
    return EditRequest(
        shown[0].replace("{s}", "{}"), person, new, true, str(place), relation,
        tuple(text.format(s=person) for text in (shown[1], unseen)),
        tuple(Probe(random.choice(shown_wordings(relation, who)).format(s=who), true, new) for who in near),
        (shown[0].format(s=person),), tuple(_follows(world, random, relation, person, new)),
    )  # fmt: skip


def _follows(world: World, random: Random, relation: str, person: str, new: str) -> list[Probe]:
    """Two-hop facts of the person that the change changes."""
    out = []
    for name in TWO_HOP:
        path = RELATIONS[name].path
        if path[0] != relation:
            continue
        after = new
        for step in path[1:]:
            after = world.facts[step][after]
        before = world.answer(name, person)
        if after != before:
            out.append(Probe(random.choice(RELATIONS[name].wordings).format(s=person), after, before))
    return out


def known_requests(subject: Subject, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Those whose old answer is the model's first one: what it does not know cannot be changed."""
    if not requests:
        return []
    first = subject.last_logits([one.labelled() for one in requests]).argmax(-1).tolist()
    said = [subject.tokenizer(spaced(one.target_true), add_special_tokens=False)["input_ids"] for one in requests]
    return [one for one, token, ids in zip(requests, first, said, strict=True) if ids and ids[0] == token]
