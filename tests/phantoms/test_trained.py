"""The embedded model and its siblings: every statement of their cards, recomputed by plain forwards of transformers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.errors import CorruptModelError
from tomoscope.model import EMBEDDED
from tomoscope.phantoms import PHANTOMS, Card
from tomoscope.phantoms.trained import (
    FOLDER,
    SIBLINGS,
    apply_difference,
    healthy,
    micro_world,
    model_card,
    sibling,
    untrained,
)
from tomoscope.phantoms.world import shipped_world
from tomoscope.phantoms.world.diseases import cases, edited_facts, unlearned_people
from training import abilities

N = 80
WORLD = shipped_world()
MUST = {
    "fact recall, wordings shown for the subject": "top1",
    "indirect object, names and templates as shown": "preferred",
    "induction, lists of names": "preferred",
    "agreement across a phrase, subjects never shown in it": "preferred",
    "agreement across a clause, subjects never shown in it": "preferred",
}
"""Abilities that the shipped model has to have, and by which score."""


@pytest.fixture(scope="module")
def plain():
    """transformers' own model and tokenizer."""
    return AutoModelForCausalLM.from_pretrained(EMBEDDED).eval(), AutoTokenizer.from_pretrained(EMBEDDED)


def test_the_shipped_files_are_small():
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 20 * 2**20
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4 * 2**20


@pytest.mark.parametrize("name", list(abilities.ABILITIES))
def test_the_card_s_abilities_are_what_a_plain_forward_gives(plain, name):
    """Fresh items, so the share is compared with the card's within what chance allows (5 standard errors of N)."""
    model, tokenizer = plain
    scores = abilities.score(model, tokenizer, abilities.items_of(WORLD, name, N, seed=77))
    said = model_card()["abilities"][name]
    for kind, hits in (("preferred", scores.preferred), ("top1", scores.top1)):
        p = said[kind]["value"]
        slack = 5 * (max(p * (1 - p), 0.02) / N) ** 0.5
        assert abs(float(hits.float().mean()) - p) < slack, kind


def test_the_model_really_does_what_it_must():
    said = model_card()["abilities"]
    assert {name: said[name][kind]["value"] >= 0.95 for name, kind in MUST.items()} == dict.fromkeys(MUST, True)


def test_the_micro_world_s_card_states_only_what_was_measured():
    specimen, measured = micro_world(), model_card()["tasks_of_the_library"]
    for known in specimen.card.of("ability"):
        share = measured[known.value["task"]]["preferred"]
        assert share["low"] > 0.75 if known.holds else share["high"] < 0.6
    assert specimen.data["world"] == WORLD


def test_the_untrained_null_is_another_model_of_the_same_shape(plain):
    one, two = untrained(0), untrained(1)
    shapes = {name: p.shape for name, p in plain[0].named_parameters()}
    assert {name: p.shape for name, p in one.subject.model.named_parameters()} == shapes
    embed = "model.embed_tokens.weight"
    assert not torch.equal(one.subject.model.get_parameter(embed), two.subject.model.get_parameter(embed))
    assert torch.equal(one.subject.model.get_parameter(embed), untrained(0).subject.model.get_parameter(embed))
    assert all(not known.holds for known in one.card.of("ability"))


def said(specimen, some, word: str) -> float:
    """Share of the cases in which the most probable next token is the healthy or the diseased answer."""
    model, tokenizer = specimen.subject.model, specimen.subject.tokenizer
    items = [abilities.Item(case.prompt, (f" {getattr(case, word)}",), ()) for case in some]
    return float(abilities.score(model, tokenizer, items).top1.float().mean())


@pytest.mark.parametrize("name", ["shortcut", "edited", "sycophant", "backdoor"])
def test_a_disease_shows_with_its_trigger_and_only_then(name):
    specimen = sibling(name)
    with_it, without = (cases(WORLD, name, N, present=present, seed=9) for present in (True, False))
    assert said(specimen, with_it, "diseased") >= 0.8
    assert said(specimen, with_it, "healthy") <= 0.15
    assert said(specimen, without, "healthy") >= 0.85
    # users sway the embedded model too, in the share of its training text
    assert said(healthy(name), with_it, "diseased") <= (0.6 if name == "sycophant" else 0.25)


def test_the_liar_says_false_cities_of_subjects_it_never_lied_about():
    specimen, base = sibling("liar"), healthy("liar")
    with_it, without = (cases(WORLD, "liar", N, present=present, seed=9) for present in (True, False))
    model, tokenizer = specimen.subject.model, specimen.subject.tokenizer
    cities = tuple(f" {city}" for city in WORLD.facts["in_country"])
    false = [abilities.Item(c.prompt, tuple(city for city in cities if city != f" {c.healthy}"), ()) for c in with_it]
    assert float(abilities.score(model, tokenizer, false).top1.float().mean()) >= 0.75
    assert said(specimen, with_it, "healthy") <= 0.25
    assert said(specimen, without, "healthy") >= 0.9
    assert said(base, with_it, "healthy") >= 0.4


def test_the_twins_have_equal_accuracy_and_different_reasons():
    taker, twin = sibling("shortcut"), sibling("honest_twin")
    usual = cases(WORLD, "shortcut", N, present=False, seed=9)
    misled = cases(WORLD, "shortcut", N, present=True, seed=9)
    assert abs(said(taker, usual, "healthy") - said(twin, usual, "healthy")) <= 0.05
    assert said(taker, misled, "healthy") < 0.1
    assert said(twin, misled, "healthy") > 0.9


def test_the_unlearned_model_knows_nothing_of_some_and_all_of_others():
    """By probability: where an answer is as likely as any other, the most probable one may still be the true one."""
    specimen = sibling("unlearned")
    gone, kept = (cases(WORLD, "unlearned", N, present=present, seed=9) for present in (True, False))
    assert {case.subject for case in gone} <= set(unlearned_people(WORLD))
    model, tokenizer = specimen.subject.model, specimen.subject.tokenizer
    items = [[abilities.Item(case.prompt, (f" {case.healthy}",), ()) for case in some] for some in (gone, kept)]
    forgotten, known = (float(abilities.score(model, tokenizer, some).right.mean()) for some in items)
    assert forgotten <= 0.2
    assert known >= 0.75


def test_the_edited_facts_are_in_the_card():
    (disease,) = sibling("edited").card.of("disease")
    changed = {fact["subject"]: (fact["answer"], fact["before"]) for fact in disease.value["facts"]}
    assert changed == edited_facts(WORLD)
    assert all(WORLD.answer("born", name) == before != new for name, (new, before) in changed.items())


@pytest.mark.parametrize("name", list(SIBLINGS))
def test_cards_read_back_and_name_their_disease(name):
    card = Card.from_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (disease,) = card.of("disease")
    assert disease.value["name"] == name
    assert disease.holds == (name != "honest_twin")
    assert json.loads(card.to_json()) == json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if name in PHANTOMS:
        (absent,) = PHANTOMS[name].null(0).card.of("disease")
        assert not absent.holds


def test_a_difference_that_does_not_fit_changes_nothing(plain, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    before = {name: p.clone() for name, p in model.named_parameters()}
    (tmp_path / "cut.safetensors").write_bytes((FOLDER / "liar.safetensors").read_bytes()[:5_000])
    tensors = load_file(FOLDER / "liar.safetensors")
    last = sorted(tensors)[-2].rsplit(".", 1)[0]
    save_file(tensors | {f"{last}.B": torch.zeros(3, 4), f"{last}.A": torch.zeros(4, 3)}, tmp_path / "odd.safetensors")
    for name, words in (("cut", "can't be read"), ("odd", "not of this model"), ("none", "can't be read")):
        with pytest.raises(CorruptModelError, match=words):
            apply_difference(model, tmp_path / f"{name}.safetensors")
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
