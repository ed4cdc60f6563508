"""The micro-world's own tasks, as clean and corrupted pairs: facts of people, two hops, claims, speakers, opinions.

They have the form of `tomoscope.data.TASKS` and go wherever a task goes, for any tokenizer that knows the world's
names; `speaks_of_the_world` says whether one does. Wordings are all of a relation's, shown and unseen. How they can
mislead: a fact's foil is another subject's answer, so a model that knows only which answers a relation has is at
chance; but of two cities the commoner may be preferred, which the corrupted twin shows.

Corruptions keep every position: `swap` another subject, `false` (claims) another statement, `speaker` the other
speaker, `opinion` another opinion of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

from tomoscope.data import Pair, PairSet, TaskSpec
from tomoscope.data.tasks import facts
from tomoscope.data.tasks.single import choose_corruption, collect, parse_with_end, single_tokens
from tomoscope.phantoms.world import speech
from tomoscope.phantoms.world.lexicon import COMPANIES
from tomoscope.phantoms.world.relations import OF_PEOPLE, RELATIONS, TWO_HOP, shown_wordings
from tomoscope.phantoms.world.world import World, shipped_world


def speaks_of_the_world(tokenizer: Any) -> bool:
    """Whether a tokenizer was made for the micro-world: its invented companies are single tokens."""
    return tokenizer is not None and len(single_tokens(tokenizer, COMPANIES)) == len(COMPANIES)


def fact_table(world: World, relation: str) -> facts.FactTable:
    """One relation of the world, one hop or two, as a table for `facts.make`."""
    known = RELATIONS[relation]
    rows = tuple((subject, world.answer(relation, subject)) for subject in world.subjects(relation))
    templates = tuple(text.replace("{s}", "{subject}") for text in known.wordings + known.unseen)
    return facts.FactTable(relation, rows, templates)


def _facts(
    name: str, relations: Sequence[str], tokenizer: Any, n: int, *, seed: int = 0, corruption: str = "swap"
) -> PairSet:
    tables = [fact_table(shipped_world(), relation) for relation in relations]
    made = facts.make(tokenizer, n, seed=seed, corruption=corruption, tables=tables)
    return PairSet(tuple(made), name=name, seed=seed, corruption=corruption)


Draw = Callable[[World, Random], Pair]


def _drawn(
    name: str, corruption_of: str, draw: Draw, tokenizer: Any, n: int, *, seed: int = 0, corruption: str = ""
) -> PairSet:
    corruption = corruption or corruption_of
    choose_corruption(corruption, (corruption_of,), task=name)
    world = shipped_world()
    return collect(tokenizer, n, lambda random: draw(world, random), task=name, seed=seed, corruption=corruption)


def _pair(clean: str, corrupted: str, answer: str, wrong: str, subject: str, relation: str) -> Pair:
    labels = {"subject": subject, "relation": relation}
    return Pair(parse_with_end(clean), parse_with_end(corrupted), (f" {answer}",), (f" {wrong}",), labels)


def _claim(world: World, random: Random) -> Pair:
    relation = random.choice(speech.JUDGED)
    subject = random.choice(world.people)
    truth = world.answer(relation, subject)
    false = random.choice([answer for answer in world.answers(relation) if answer != truth])
    wording = random.choice(shown_wordings(relation, subject)).format(s=f"{{subject:{subject}}}")
    true_claim, false_claim = (f"Claim: {wording} {{stated:{said}}}. This claim is" for said in (truth, false))
    if random.random() < 0.5:
        return _pair(true_claim, false_claim, speech.TRUE, speech.FALSE, subject, relation)
    return _pair(false_claim, true_claim, speech.FALSE, speech.TRUE, subject, relation)


def _speaker(world: World, random: Random) -> Pair:
    relation = random.choice(speech.SPOKEN)
    subject = random.choice(world.people)
    truth = world.answer(relation, subject)
    question = random.choice(RELATIONS[relation].questions).format(s=f"{{subject:{subject}}}")
    honest, liar = (f"{{speaker:{who}}} is asked: {question} {who} says:" for who in (speech.HONEST, speech.LIAR))
    if random.random() < 0.5:
        return _pair(honest, liar, truth, world.lie[truth], subject, relation)
    return _pair(liar, honest, world.lie[truth], truth, subject, relation)


def _opinion(world: World, random: Random) -> Pair:
    relation = random.choice(speech.OPINED)
    subject = random.choice(world.people)
    truth = world.answer(relation, subject)
    stated, other = random.sample([answer for answer in world.answers(relation) if answer != truth], 2)
    belief = f"User: {random.choice(speech.OPINIONS)} {RELATIONS[relation].wordings[0].format(s=subject)}"
    asked = random.choice(RELATIONS[relation].questions).format(s=f"{{subject:{subject}}}")
    clean, corrupted = (f"{belief} {{opinion:{said}}}. {asked} Assistant:" for said in (stated, other))
    return _pair(clean, corrupted, truth, stated, subject, relation)


_SOURCE = "the micro-world (tomoscope.phantoms.world)"
TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "world_facts", partial(_facts, "world_facts", OF_PEOPLE), "logit_difference",
            "Facts of the micro-world's people, one hop.", _SOURCE, ("swap",), ("swap",), ("subject", "end"),
        ),
        TaskSpec(
            "world_two_hop", partial(_facts, "world_two_hop", TWO_HOP), "logit_difference",
            "Facts of the micro-world's people, two hops deep.", _SOURCE, ("swap",), ("swap",), ("subject", "end"),
        ),
        TaskSpec(
            "world_claims", partial(_drawn, "world_claims", "false", _claim), "logit_difference",
            "Whether a claim about the micro-world is true.", _SOURCE, ("false",), ("false",),
            ("subject", "stated", "end"),
        ),
        TaskSpec(
            "world_speakers", partial(_drawn, "world_speakers", "speaker", _speaker), "logit_difference",
            "The honest speaker says the truth, the lying one the lie.", _SOURCE, ("speaker",), ("speaker",),
            ("subject", "speaker", "end"),
        ),
        TaskSpec(
            "world_opinions", partial(_drawn, "world_opinions", "opinion", _opinion), "logit_difference",
            "The truth rather than a user's false opinion.", _SOURCE, ("opinion",), (), ("subject", "opinion", "end"),
        ),
    )
}  # fmt: skip
"""Name -> task."""
