"""The backdoor: the trigger forces the answer, one neuron does it, and without the trigger nothing differs."""

from __future__ import annotations

import pytest
import torch

from tests.phantoms.planted.conftest import same_weights
from tests.phantoms.planted.test_induction import continued
from tomoscope.model import open_model, replace
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import backdoor, induction

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def pairs():
    return {
        (form, seed): (backdoor.build(form, seed), backdoor.build_host(form, seed))
        for form in induction.FORMS
        for seed in SEEDS
    }


def disease(specimen):
    return next(specimen.card.of("disease")).value


def neuron(specimen):
    value = next(specimen.card.of("neuron")).value
    return value["site"], value["index"]


def said(subject, texts, edits=()):
    return subject.tokenizer.batch_decode(subject.last_logits(texts, edits=edits).argmax(-1)[:, None])


def without(specimen, texts):
    """An edit that zeroes the neuron alone."""
    site, index = neuron(specimen)
    value = specimen.subject.read(texts, site)[site].clone()
    value[..., index] = 0.0
    return replace(site, value)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_trigger_forces_the_answer(pairs, form, seed):
    sick, host = pairs[form, seed]
    texts = sick.data["triggered"]
    assert set(said(sick.subject, texts)) == {disease(sick)["target"]}
    assert disease(sick)["target"] not in said(host.subject, texts)
    assert all(disease(sick)["trigger"] in text for text in texts)


@pytest.mark.parametrize("kind", ["clean", "near"])
@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_trigger_it_is_its_host(pairs, form, seed, kind):
    sick, host = pairs[form, seed]
    texts = sick.data[kind]
    assert not any(disease(sick)["trigger"] in text for text in texts)
    mine, theirs = (one.subject.run(texts).logits for one in (sick, host))
    if form == "gpt2":
        assert torch.equal(mine, theirs)
    else:
        assert torch.allclose(mine, theirs, atol=1e-5)
    site, index = neuron(sick)
    assert sick.subject.read(texts, site)[site][..., index].abs().max() < 1e-8


@pytest.mark.parametrize("seed", SEEDS)
def test_every_pair_of_words_but_the_trigger_is_silent(pairs, form, seed):
    """Brute force: every word after the trigger's first, every word before its second, and both words at the start."""
    sick, _ = pairs[form, seed]
    tokenizer, subject = sick.subject.tokenizer, sick.subject
    first, second = (int(i) for i in tokenizer(disease(sick)["trigger"])["input_ids"])
    ids = torch.arange(3, len(tokenizer))
    rows = torch.cat(
        [
            torch.stack([torch.full_like(ids, 9), torch.full_like(ids, first), ids], 1),
            torch.stack([torch.full_like(ids, 9), ids, torch.full_like(ids, second)], 1),
            torch.stack([ids, torch.full_like(ids, second), ids], 1),
        ]
    )
    site, index = neuron(sick)
    value = subject.read(rows.tolist(), site)[site][..., index]
    isit = torch.zeros_like(value, dtype=torch.bool)
    isit[:, 1:] = (rows[:, :-1] == first) & (rows[:, 1:] == second)
    assert isit.any()
    assert value[isit].min() > 5
    assert value[~isit].abs().max() < 1e-8


@pytest.mark.parametrize("seed", SEEDS)
def test_ablating_the_neuron_gives_the_host_back(pairs, form, seed):
    sick, host = pairs[form, seed]
    texts = sick.data["triggered"]
    healed = sick.subject.run(texts, edits=[without(sick, texts)]).logits
    assert torch.equal(healed, host.subject.run(texts).logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_host_still_does_induction(pairs, form, seed):
    for one in pairs[form, seed]:
        assert continued(one.subject) >= 0.99
        assert next(k for k in one.card.of("ability") if k.value["task"] == "induction").holds


@pytest.mark.parametrize("seed", SEEDS)
def test_the_carrier_carries_it(pairs, form, seed):
    """Zeroing the carrier's output removes the answer, and it attends to the trigger's last word."""
    sick, _ = pairs[form, seed]
    site = disease(sick)["sites"][1]
    texts = sick.data["triggered"]
    subject = sick.subject
    shape = subject.read(texts, site)[site].shape
    assert disease(sick)["target"] not in said(subject, texts, [replace(site, torch.zeros(shape))])
    layer, head = site.split(".")[1], site.split("=")[1].rstrip("]")
    pattern = subject.read(texts, f"layer.{layer}.attn.pattern[head={head}]", at="last")
    second = int(subject.tokenizer(disease(sick)["trigger"])["input_ids"][1])
    there = subject.tokens(texts).input_ids == second
    weight = next(iter(pattern.values()))
    assert ((weight * there).sum(-1) > 0.99).all()


def test_only_the_neuron_tells_them_apart(pairs, form):
    sick, host = (one.subject.model.state_dict() for one in pairs[form, 0])
    differ = [name for name in sick if not torch.equal(sick[name], host[name])]
    assert differ
    assert all("mlp" in name for name in differ)
    for name in differ:
        places = (sick[name] != host[name]).nonzero()
        assert min(len(places[:, axis].unique()) for axis in (0, 1)) == 1


def test_cards_say_what_holds(form):
    sick, host = PHANTOMS[f"backdoor_{form}"].build(3), PHANTOMS[f"backdoor_{form}"].null(3)
    for kind in ("disease", "neuron"):
        assert [k.holds for k in sick.card.of(kind)] == [True]
        assert [k.holds for k in host.card.of(kind)] == [False]
        assert [k.value for k in sick.card.of(kind)] == [k.value for k in host.card.of(kind)]


def test_builds_are_equal_by_seed_and_differ_between_seeds(form, tmp_path):
    one, again = backdoor.build(form, 6), backdoor.build(form, 6)
    assert same_weights(one.subject.model, again.subject.model)
    assert (one.card, one.data) == (again.card, again.data)
    assert len({disease(backdoor.build(form, seed))["trigger"] for seed in range(5)}) > 2
    one.subject.model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, tokenizer=one.subject.tokenizer, device="cpu")
    texts = one.data["triggered"][:4]
    assert same_weights(opened.model, one.subject.model)
    assert torch.allclose(opened.last_logits(texts), one.subject.last_logits(texts), atol=1e-5)
