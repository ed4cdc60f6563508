"""The micro-world's ground truth: sizes, seeds, and every answer against the tables read by hand."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tomoscope.errors import DataError
from tomoscope.phantoms.world import RELATIONS, World, make_world, shipped_world
from tomoscope.phantoms.world.relations import ONE_HOP, TWO_HOP, held_out_two_hop, held_out_wording, shown_wordings
from tomoscope.phantoms.world.world import SHIPPED

WORLD = make_world(0)


def test_the_world_is_as_large_as_promised():
    facts = WORLD.facts
    assert len(WORLD.people) >= 400
    assert len(facts["in_country"]) >= 120
    assert len(facts["capital"]) >= 40
    assert len(facts["seat"]) >= 60
    assert len(set(facts["plays"].values())) >= 20
    assert len(set(facts["profession"].values())) >= 30
    assert len(set(facts["language"].values())) == len(facts["language"])


def test_the_shipped_world_is_the_seed_s_own():
    assert shipped_world() == WORLD
    assert json.loads(SHIPPED.read_text()) == json.loads(WORLD.to_json())
    assert make_world(1) != WORLD
    assert World.from_json(make_world(1).to_json()) == make_world(1)


def test_no_one_s_name_tells_by_half():
    firsts = Counter(name.split()[0] for name in WORLD.people)
    lasts = Counter(name.split()[1] for name in WORLD.people)
    assert min(firsts.values()) >= 2
    assert sum(count > 1 for count in lasts.values()) >= 0.98 * len(lasts)
    assert len(set(WORLD.people)) == len(WORLD.people)


def test_two_hops_are_two_steps_through_the_tables():
    table = json.loads(SHIPPED.read_text())["facts"]
    for name in WORLD.people[::7]:
        country = table["in_country"][table["born"][name]]
        assert WORLD.answer("born_country", name) == country
        assert WORLD.answer("born_language", name) == table["language"][country]
        assert WORLD.answer("lives_country", name) == table["in_country"][table["lives"][name]]
        assert WORLD.answer("work_city", name) == table["seat"][table["works_for"][name]]


def test_capitals_lie_in_their_countries():
    for country, capital in WORLD.facts["capital"].items():
        assert WORLD.answer("in_country", capital) == country


@pytest.mark.parametrize("relation", ["born", "lives", "works_for", "profession", "plays"])
def test_no_answer_is_common_enough_to_guess(relation):
    counts = Counter(WORLD.facts[relation].values())
    assert max(counts.values()) / len(WORLD.people) < 0.05


def test_people_do_not_live_where_they_were_born():
    assert all(WORLD.facts["born"][name] != WORLD.facts["lives"][name] for name in WORLD.people)


def test_the_lie_is_false_of_the_same_sort_and_never_two_truths_alike():
    assert all(true != false for true, false in WORLD.lie.items())
    assert sorted(WORLD.lie.values()) == sorted(WORLD.lie)
    for relation in ("born", "works_for", "profession", "plays"):
        sort = set(WORLD.facts[relation].values()) if relation != "born" else set(WORLD.facts["in_country"])
        assert {WORLD.lie[answer] for answer in WORLD.answers(relation)} <= sort
    assert all(
        WORLD.answer("in_country", false) == WORLD.answer("in_country", true)
        for true, false in WORLD.lie.items()
        if true in WORLD.facts["in_country"]
    )


def test_wordings_stand_before_their_answer_and_are_held_out_by_rule():
    for name, relation in RELATIONS.items():
        assert all(text.count("{s}") == 1 for text in relation.wordings + relation.unseen + relation.questions)
        assert not set(relation.wordings) & set(relation.unseen)
        subject = WORLD.subjects(name)[3]
        held = relation.wordings[held_out_wording(name, subject, len(relation.wordings))]
        assert set(shown_wordings(name, subject)) == set(relation.wordings) - {held}
    assert all(len(RELATIONS[name].wordings) >= 8 for name in ONE_HOP)
    share = sum(held_out_two_hop(r, name) for r in TWO_HOP for name in WORLD.people) / (4 * len(WORLD.people))
    assert 0.15 < share < 0.25


def test_what_is_not_known_is_refused():
    with pytest.raises(DataError, match="no relation 'sings'"):
        WORLD.answer("sings", "Mary")
    with pytest.raises(DataError, match="no 'born' of 'Nobody'"):
        WORLD.answer("born_country", "Nobody")
    with pytest.raises(DataError, match="no micro-world"):
        World.from_json("{}")
