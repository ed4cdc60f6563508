"""Truth directions on the micro-world's models: right on facts they never saw, whatever the model says aloud."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tomoscope.concepts import judgements
from tomoscope.concepts.belief import Asked
from tomoscope.data import LabelledTexts
from tomoscope.errors import DataError
from tomoscope.exams.lying import world_items
from tomoscope.phantoms.trained import micro_world, sibling

SITES = ["layer.5.resid_post"]


@pytest.fixture(scope="module")
def honest():
    return micro_world().subject


def test_they_judge_facts_that_they_never_saw_and_the_sycophants_belief_stays(honest):
    asked = world_items(90, 3, kind="opinion")
    for subject in (honest, sibling("sycophant").subject):
        found = judgements(subject, asked, sites=SITES)
        assert not found.missing
        assert found.accuracy.low > 0.6
        assert set(found.frames) == {"Claim: {statement}. This claim is"}
        assert len(found.directions) == 2
    # the sycophant says the user's falsehood every time; what it takes to be true hardly moves
    moved = (found.margin > 0) != (found.swayed > 0)
    assert moved.mean() < 0.4


def test_statements_of_ones_own(honest):
    asked = world_items(60, 5, kind="opinion")
    texts = [text for one in asked[:40] for text in one.statements]
    data = LabelledTexts(
        tuple(texts), np.tile([1, 0], 40), ("false", "true"), tuple(i // 2 for i in range(80)),
        tuple(str(one.topic) for one in asked[:40] for _ in range(2)),
    )  # fmt: skip
    items = [dataclasses.replace(one, right=None) for one in asked[40:]]
    found = judgements(honest, items, statements=data, sites=SITES)
    assert len(found.directions) == 1
    assert found.accuracy.missing
    assert (found.margin > 0).mean() > 0.6  # the first is the right one, which it was not told


def test_single_statements_are_judged_by_themselves(honest):
    asked = []
    for one in world_items(60, 7, kind="opinion"):
        for text, right in zip(one.statements, (1, 0), strict=True):
            asked.append(Asked("", f"Claim: {text}. This claim is", " true", " false", right, one.source,
                               topic=one.topic, statement=text))  # fmt: skip
    found = judgements(honest, asked, sites=SITES)
    assert found.accuracy.low > 0.6
    assert np.isnan(found.swayed).all()


def test_where_nothing_is_known(honest):
    asked = [dataclasses.replace(one, right=None) for one in world_items(20, 1)]
    found = judgements(honest, asked, sites=SITES)
    assert "known answer" in found.missing
    assert found.accuracy.missing
    assert np.isnan(found.margin).all()
    with pytest.raises(DataError, match="where the statement stands"):
        judgements(honest, asked, frames=["Claim:"])
