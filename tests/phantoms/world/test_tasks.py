"""The micro-world's tasks: true answers, aligned prompts, foils that are right after the corrupted prompt."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tomoscope.model import EMBEDDED
from tomoscope.phantoms.world import RELATIONS, shipped_world, speech
from tomoscope.phantoms.world.tasks import TASKS, fact_table, speaks_of_the_world

WORLD = shipped_world()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


@pytest.mark.parametrize("name", list(TASKS))
def test_pairs_are_aligned_and_follow_from_the_seed(tokenizer, name):
    pairs = TASKS[name].make(tokenizer, 40, seed=3)
    aligned = pairs.encode(tokenizer)
    assert len(aligned) == 40
    assert all(len(a) == len(b) for a, b in zip(aligned.clean_ids, aligned.corrupted_ids, strict=True))
    assert pairs.digest() == TASKS[name].make(tokenizer, 40, seed=3).digest()
    assert pairs.digest() != TASKS[name].make(tokenizer, 40, seed=4).digest()
    for pair in pairs:
        assert set(TASKS[name].spans) <= set(pair.clean.spans)


@pytest.mark.parametrize("name", ["world_facts", "world_two_hop"])
def test_facts_and_their_foils_are_true_of_their_subjects(tokenizer, name):
    for pair in TASKS[name].make(tokenizer, 60):
        relation = pair.labels["relation"]
        assert pair.answers == (f" {WORLD.answer(relation, pair.labels['subject'])}",)
        assert pair.wrong == (f" {WORLD.answer(relation, pair.labels['twin'])}",)
        assert bool(RELATIONS[relation].path) == (name == "world_two_hop")


def test_claims_speakers_and_opinions_have_the_world_s_answers(tokenizer):
    for pair in TASKS["world_claims"].make(tokenizer, 40):
        truth = WORLD.answer(pair.labels["relation"], pair.labels["subject"])
        assert (pair.clean.words("stated") == truth) == (pair.answers == (" true",))
        assert (pair.corrupted.words("stated") == truth) == (pair.wrong == (" true",))
    for pair in TASKS["world_speakers"].make(tokenizer, 40):
        truth = WORLD.answer(pair.labels["relation"], pair.labels["subject"])
        honest = pair.clean.words("speaker") == speech.HONEST
        assert pair.answers == (f" {truth if honest else WORLD.lie[truth]}",)
    for pair in TASKS["world_opinions"].make(tokenizer, 40):
        assert pair.answers == (f" {WORLD.answer(pair.labels['relation'], pair.labels['subject'])}",)
        assert pair.wrong == (f" {pair.clean.words('opinion')}",)
        assert pair.corrupted.words("opinion") not in (pair.clean.words("opinion"), pair.answers[0].strip())


def test_only_its_own_tokenizer_speaks_of_the_world(tokenizer):
    from tests.zoo import tiny_tokenizer

    assert speaks_of_the_world(tokenizer)
    assert not speaks_of_the_world(None)
    assert not speaks_of_the_world(tiny_tokenizer())
    assert fact_table(WORLD, "born").rows[0] == (WORLD.people[0], WORLD.answer("born", WORLD.people[0]))
