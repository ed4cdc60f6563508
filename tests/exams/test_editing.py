"""Editing on the micro-world: what it knows is rewritten by each method, what it does not know is not measured."""

from __future__ import annotations

import numpy as np
import pytest

from tests.exams.test_zoo import SMALL
from tomoscope.exams import EXAMS, Context, examine
from tomoscope.exams.editing import METHODS, random_change, score_of
from tomoscope.exams.world_facts import known_requests, world_requests
from tomoscope.phantoms.trained import micro_world, untrained
from tomoscope.phantoms.world import shipped_world
from tomoscope.treat import Dense, LowRank, measure, treatment_of


@pytest.fixture(scope="module")
def subject():
    return micro_world().subject


def test_requests_follow_the_world(subject):
    world = shipped_world()
    asked = world_requests(20, seed=3)
    assert asked == world_requests(20, seed=3) != world_requests(20, seed=4)
    assert len({one.subject for one in asked}) == 20
    for one in asked:
        assert world.answer(one.relation, one.subject) == one.target_true != one.target_new
        assert one.target_new in world.answers(one.relation)
        assert all(one.subject in text for text in one.paraphrases)
        for probe in one.neighbours:
            assert one.subject not in probe.prompt
            assert probe.right == one.target_true
        for probe in one.reasoning:
            assert probe.right != probe.wrong
    born = next(one for one in asked if one.relation == "born" and one.reasoning)
    countries = world.facts["in_country"]
    assert countries[born.target_new] in {p.right for p in born.reasoning} or all(
        p.right in world.facts["language"].values() for p in born.reasoning
    )
    known = known_requests(subject, asked)
    assert len(known) > 15  # the model knows its world
    assert measure(subject, known).per_fact("efficacy").mean() == 0.0  # and says the old answer


def test_what_is_known_is_rewritten(subject):
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    exam = EXAMS["facts.editing"]
    context = Context(subject, exam, options=exam.configure({**SMALL["facts.editing"], "steps": 8}))
    found = {one.id.partition("/")[2]: one for one in examine(exam, subject, context=context)}
    assert set(found) == {"r_rome", "memit", "alphaedit", "ft", "ft_l", "lora", "where"}
    assert len(METHODS) == len(found) - 1
    memit = found["memit"]
    assert memit.estimate.value > 0.7
    assert memit.estimate.value > memit.controls[0].estimate.value
    assert {effect.name for effect in memit.treatments[0].side_effects} == {
        "loss on text", "essence drift", "neighbourhood exact",
    }  # fmt: skip
    assert memit.chosen_on.name != memit.measured_on.name
    edited = context.arrays["where_edited.values"]
    assert edited.shape == context.arrays["where_traced.values"].shape == (2, 6)
    assert np.isfinite(edited).all()
    assert f"layer {int(found['where'].sites[0].split('.')[1])}" in found["where"].claim
    now = subject.model.state_dict()
    assert all((now[name] == value).all() for name, value in before.items())


def test_what_is_not_known_is_not_measured():
    found = examine(EXAMS["facts.editing"], untrained().subject, options={"facts": 8})
    assert {one.verdict for one in found} == {"not measured"}
    assert len(found) == 7
    assert "knows only" in found[0].reason


def test_a_random_change_has_the_norm_and_the_rank(subject):
    import torch

    name = "model.layers.2.mlp.down_proj.weight"
    made = treatment_of(
        subject, {name: LowRank(torch.ones(192, 3), torch.ones(3, 512))}, method="x"
    )  # fmt: skip
    turned = random_change(made, seed=0).changes[name]
    assert turned.left.shape == (192, 3)
    assert float(turned.dense().norm()) == pytest.approx(made.norms()[name], rel=1e-4)
    made = treatment_of(subject, {name: Dense(torch.ones(192, 512))}, method="x")
    assert float(random_change(made, seed=0).changes[name].dense().norm()) == pytest.approx(
        made.norms()[name], rel=1e-4
    )
    asked = known_requests(subject, world_requests(8))
    assert score_of(measure(subject, asked)).mean() < 0.5
