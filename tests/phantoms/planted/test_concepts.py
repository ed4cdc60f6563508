"""Concepts: readable from the layer the card says and not before, as well as the closed form says, used or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.phantoms.planted.conftest import same_weights
from tomoscope.model import add, open_model, project_out, replace
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import concepts, induction
from tomoscope.phantoms.planted.spaces import random_for
from tomoscope.phantoms.planted.statements import ANSWERS, LISTS, draw_statements, statement_tokenizer

SEEDS = (0, 1)
MANY = 1600


@pytest.fixture(scope="module")
def built():
    return {(form, seed): concepts.build(form, seed) for form in induction.FORMS for seed in SEEDS}


@pytest.fixture(scope="module")
def read(built):
    """The last position's stream at every site, on many statements, with their labels."""
    out = {}
    for key, specimen in built.items():
        texts, labels = draw_statements(specimen.data["classes"], MANY, random_for("test", key[1]))
        sites = ["embed", *(f"layer.{layer}.resid_{part}" for layer in range(4) for part in ("mid", "post"))]
        acts = specimen.subject.read(texts, *sites, at="last")
        out[key] = ({name: acts[name].double().numpy() for name in sites}, labels)
    return out


def direction(specimen, concept, holds=True):
    return next(k for k in specimen.card.of("direction") if k.value["concept"] == concept and k.holds == holds).value


def probe(values, labels):
    """Held-out accuracy of a linear probe (ridge regression on standardised activations)."""
    truth = np.array(labels)
    half = len(truth) // 2
    scaled = (values - values[:half].mean(0)) / (values[:half].std(0) + 1e-6)
    train = np.hstack([scaled[:half], np.ones((half, 1))])
    weights = np.linalg.solve(
        train.T @ train + 0.02 * half * np.eye(train.shape[1]), train.T @ (2.0 * truth[:half] - 1)
    )
    found = np.hstack([scaled[half:], np.ones((len(truth) - half, 1))]) @ weights > 0
    return float((found == truth[half:]).mean())


def answers(subject, texts, edits=()):
    logits = subject.last_logits(texts, edits=edits)
    no, yes = (subject.tokenizer.get_vocab()[answer] for answer in ANSWERS)
    return (logits[:, yes] - logits[:, no]).numpy()


@pytest.mark.parametrize("seed", SEEDS)
def test_the_answer_is_parity(built, form, seed):
    specimen = built[form, seed]
    texts, labels = zip(*specimen.data["statements"], strict=True)
    assert ((answers(specimen.subject, list(texts)) > 0) == np.array(labels)).all()
    top = specimen.subject.last_logits(list(texts)).argmax(-1)
    assert set(specimen.subject.tokenizer.batch_decode(top[:, None])) == set(ANSWERS)


def test_statements_are_balanced_independent_and_known(built, form):
    specimen = built[form, 0]
    labels = {name: np.array(some) for name, some in specimen.data["labels"].items()}
    bound = 4 / math.sqrt(concepts.STATEMENTS)
    signs = {name: 2.0 * some - 1 for name, some in labels.items()}
    for name, one in signs.items():
        assert abs(one.mean()) < bound, name
        assert all(abs((one * other).mean()) < bound for name2, other in signs.items() if name2 != name)
    tokenizer = statement_tokenizer()
    ids = tokenizer([text for text, _ in specimen.data["statements"]])["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    lists = [set(some) for some in LISTS.values()]
    assert all(not one & other for i, one in enumerate(lists) for other in lists[:i])


@pytest.mark.parametrize("concept", concepts.CONCEPTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_direction_reads_the_concept_from_its_layer_on(built, read, form, seed, concept):
    specimen, (values, labels) = built[form, seed], read[form, seed]
    known, truth = direction(specimen, concept), np.array(labels[concept])
    assert ((values[known["site"]] @ specimen.data["directions"][concept].numpy() > 0) == truth).mean() > 0.8
    vector = specimen.data["directions"][concept].double().numpy()
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5)
    for layer in range(known["from_layer"], 4):
        right = ((values[concepts.site(layer)] @ vector > 0) == truth).mean()
        error = 4 * math.sqrt(known["accuracy"] * (1 - known["accuracy"]) / len(truth)) + 0.015
        assert abs(right - known["accuracy"]) < error, (layer, right)


@pytest.mark.parametrize("concept", ["name", "place", "colour", "blurred", "parity"])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_linear_probe_finds_it_before(built, read, form, seed, concept):
    specimen, (values, labels) = built[form, seed], read[form, seed]
    before = direction(specimen, concept, holds=False)
    assert before["accuracy"] == 0.5
    found = probe(values[before["site"]], labels[concept])
    # a half of the statements is not quite balanced over parity's corners, and a probe follows that
    assert found < 0.5 + (6 if concept == "parity" else 4) * 0.5 / math.sqrt(MANY / 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_parity_is_no_linear_function_of_what_its_mlp_reads(built, read, form, seed):
    """The mean over either label is the same, while the four corners are apart: nothing linear can tell the labels."""
    specimen, (values, labels) = built[form, seed], read[form, seed]
    stream = values[direction(specimen, "parity", holds=False)["site"]]
    truth, name = np.array(labels["parity"]), np.array(labels["name"])
    error = stream.std(0) * math.sqrt(4 / MANY)
    assert (np.abs(stream[truth].mean(0) - stream[~truth].mean(0)) < 5 * error).all()
    apart = stream[truth & name].mean(0) - stream[truth & ~name].mean(0)
    assert np.linalg.norm(apart) == pytest.approx(2 * math.sqrt(2) * concepts.WRITTEN, rel=0.15)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_linear_probe_beats_the_closed_form(built, read, form, seed):
    """A probe on all of the stream, at every layer from the concept's on, reaches Phi(d'/2) and no more."""
    specimen, (values, labels) = built[form, seed], read[form, seed]
    known = direction(specimen, "blurred")
    assert known["accuracy"] == pytest.approx(0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=1e-9)
    for layer in (known["from_layer"], 3):
        found = probe(values[concepts.site(layer)], labels["blurred"])
        assert abs(found - known["accuracy"]) < 4 * math.sqrt(0.84 * 0.16 / (MANY / 2)) + 0.015, found
    assert probe(values[concepts.site(3)], labels["parity"]) == 1.0


def test_the_salient_direction_has_the_most_variance(built, read, form):
    specimen, (values, _) = built[form, 0], read[form, 0]
    for layer in range(-1, 4):
        centred = values[concepts.site(layer)] - values[concepts.site(layer)].mean(0)
        top = np.linalg.svd(centred, full_matrices=False)[2][0]
        assert abs(top @ specimen.data["directions"]["salient"].double().numpy()) > 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_taking_away_what_is_used_changes_the_answer_and_the_rest_does_not(built, form, seed):
    specimen = built[form, seed]
    texts, labels = (list(some) for some in zip(*specimen.data["statements"], strict=True))
    before = answers(specimen.subject, texts)
    size = np.abs(before).mean()
    for concept in concepts.CONCEPTS:
        known = direction(specimen, concept)
        vector = specimen.data["directions"][concept]
        after = answers(specimen.subject, texts, [project_out(known["site"], vector, at="last")])
        if known["used"]:
            assert np.abs(after).mean() < 0.2 * size, concept
        else:
            assert ((after > 0) == np.array(labels)).all(), concept
            # the norm enlarges what is left, by as much as the direction was of the whole
            assert np.corrcoef(before, after)[0, 1] > 0.98, concept


@pytest.mark.parametrize("seed", SEEDS)
def test_turning_the_used_direction_round_flips_the_answer(built, form, seed):
    specimen = built[form, seed]
    texts = [text for text, _ in specimen.data["statements"]][:100]
    place, vector = direction(specimen, "parity")["site"], specimen.data["directions"]["parity"]
    value = specimen.subject.read(texts, place, at="last")[place]
    turned = replace(place, value - 2 * (value @ vector)[:, None] * vector, at="last")
    assert ((answers(specimen.subject, texts) > 0) != (answers(specimen.subject, texts, [turned]) > 0)).all()
    steered = answers(specimen.subject, texts, [add(place, vector, 30.0, at="last")])
    assert (steered > 0).all()


def test_every_embedding_is_equally_long(built, form):
    weight = built[form, 0].subject.model.get_input_embeddings().weight
    assert torch.allclose(weight.norm(dim=1), torch.full((len(weight),), concepts.LENGTH), atol=1e-3)
    assert weight.sum(1).abs().max() < 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_the_null_has_the_salient_direction_and_nothing_else(form, seed):
    null = PHANTOMS[f"concepts_{form}"].null(seed)
    assert {k.value["concept"] for k in null.card.of("direction") if k.holds} == {"salient"}
    texts, labels = draw_statements(null.data["classes"], MANY, random_for("test", seed))
    acts = null.subject.read(texts, "layer.3.resid_post", at="last")["layer.3.resid_post"].double().numpy()
    for concept in ("name", "colour", "blurred", "parity"):
        assert probe(acts, labels[concept]) < 0.5 + 4 * 0.5 / math.sqrt(MANY / 2), concept
    assert probe(acts, labels["salient"]) == 1.0
    right = ((answers(null.subject, texts) > 0) == np.array(labels["parity"])).mean()
    assert abs(right - 0.5) < 4 * 0.5 / math.sqrt(MANY)


def test_builds_are_equal_by_seed_and_differ_between_seeds(form, tmp_path):
    one, again, other = (concepts.build(form, seed) for seed in (7, 7, 8))
    assert same_weights(one.subject.model, again.subject.model)
    assert (one.card, one.data["statements"]) == (again.card, again.data["statements"])
    assert not torch.equal(one.data["directions"]["parity"], other.data["directions"]["parity"])
    one.subject.model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, tokenizer=one.subject.tokenizer, device="cpu")
    assert same_weights(opened.model, one.subject.model)
