"""Probes on models whose concepts are known: layer and direction found, what is not there not found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tomoscope.concepts import States, causal_effect, collect, train_probes
from tomoscope.concepts.controls import transfer
from tomoscope.data.tasks import single_tokens
from tomoscope.errors import DataError
from tomoscope.exams import EXAMS, examine
from tomoscope.exams.concept_data import MAKERS, concept_items
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted.concepts import ideal_accuracy
from tomoscope.phantoms.trained import sibling
from tomoscope.phantoms.world.diseases import cases


@pytest.fixture(scope="module")
def planted():
    specimen = PHANTOMS["concepts_llama"].build(1)
    texts = [text for text, _ in specimen.data["statements"]][:512]
    return specimen, texts, collect(specimen.subject, texts, ["embed", "layer.*.resid_mid", "layer.*.resid_post"])


def test_layer_and_direction_are_found(planted):
    specimen, _, states = planted
    known = {one.value["concept"]: one.value for one in specimen.card.of("direction") if one.holds}
    before = {one.value["concept"]: one.value for one in specimen.card.of("direction") if not one.holds}
    for concept in ("name", "colour", "parity"):
        labels = np.array(specimen.data["labels"][concept][:512]).astype(int)
        sites = [before[concept]["site"], known[concept]["site"]]
        probes = train_probes(States({site: states[site] for site in sites}), labels, method="means", nulls=9)
        assert probes.best == known[concept]["site"]
        assert probes.accuracy().low > 0.9
        assert probes.accuracy(sites[0]).value < 0.8
        truth = specimen.data["directions"][concept]
        shift = probes.directions[probes.best].shift
        assert abs(float(torch.nn.functional.cosine_similarity(shift, truth, dim=0))) > 0.9


def test_the_best_probe_is_no_better_than_it_can_be(planted):
    specimen, _, states = planted
    labels = np.array(specimen.data["labels"]["blurred"][:512]).astype(int)
    last = [site for site in states if site.endswith("resid_post")][-1]
    probes = train_probes(States({last: states[last]}), labels, method="discriminant", nulls=9)
    accuracy = probes.accuracy()
    assert accuracy.low < ideal_accuracy() < accuracy.high + 0.12
    assert accuracy.value < ideal_accuracy() + 0.06


def test_an_absent_concept_is_not_found():
    specimen = PHANTOMS["concepts_llama"].null(1)
    texts = [text for text, _ in specimen.data["statements"]][:160]
    labels = np.array(specimen.data["labels"]["colour"][:160]).astype(int)
    probes = train_probes(collect(specimen.subject, texts), labels, method="means", nulls=9)
    assert probes.p_value(permutations=499) > 0.05


def test_what_is_used_is_told_from_what_is_only_there(planted):
    specimen, texts, states = planted
    no, yes = (single_tokens(specimen.subject.tokenizer, [a.strip()])[a.strip()] for a in specimen.data["answers"])
    last = f"layer.{specimen.subject.facts.n_layers - 1}.resid_post"
    effects = {}
    for concept in ("parity", "colour"):
        labels = np.array(specimen.data["labels"][concept][:512]).astype(int)
        probes = train_probes(States({last: states[last]}), labels, method="means", nulls=0)
        effects[concept] = causal_effect(
            specimen.subject,
            texts[:24],
            lambda logits: logits[:, yes] - logits[:, no],
            probes.directions[last],
            draws=5,
        )
    assert effects["parity"].steering.low > 10 * abs(effects["colour"].steering.value)
    assert effects["parity"].steering.low > effects["parity"].random_steerings.max()


def test_the_exam_on_the_embedded_model_and_on_an_untrained_one():
    options = {"n": 120, "draws": 3, "nulls": 5, "concepts": ("number",)}
    phantom = PHANTOMS["micro_world"]
    found = {
        f.id.split("/")[1]: f for f in examine(EXAMS["concepts.probes"], phantom.build(0).subject, options=options)
    }
    for key in ("number_probe", "number_selective", "number_used"):
        assert found[key].verdict == "confirmed", (key, found[key].reason)
    null = examine(EXAMS["concepts.probes"], phantom.null(0).subject, options=options)
    assert not [f.id for f in null if f.verdict == "confirmed"]


def test_the_shortcut_taker_is_told_by_what_its_probe_transfers_to():
    """A probe learned where day and words agree follows the day in the shortcut-taker, the words in its twin."""
    right = {}
    for name in ("shortcut", "honest_twin"):
        subject = sibling(name).subject
        both = [cases(sibling(name).data["world"], "shortcut", 40, present=there) for there in (False, True)]
        texts = [case.prompt for some in both for case in some]
        labels = np.array([int(case.healthy == "positive") for some in both for case in some])
        groups = ["agrees"] * 40 + ["contradicts"] * 40
        states = collect(subject, texts, ["layer.4.resid_post"])
        right[name] = transfer(states, labels, groups, np.arange(80)).right[0]
    assert right["shortcut"][0, 0] > 0.9
    assert right["honest_twin"][0, 0] > 0.9
    assert right["shortcut"][0, 1] < 0.3
    assert right["honest_twin"][0, 1] > 0.7


def test_items_of_every_concept():
    for name, make in MAKERS.items():
        items = make(60, 3)
        assert len(set(items.texts)) == 60
        assert 24 <= items.labels.sum() <= 36
        assert make(60, 3).texts == items.texts
        assert items.name == name
    with pytest.raises(DataError, match="no concept"):
        concept_items(None, "colour of magic", 10, 0)
