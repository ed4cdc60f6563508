"""Superposition: the stream is the sum of known features; facts agree with closed forms and brute force."""

from __future__ import annotations

import pytest
import torch

from tests.phantoms.planted.conftest import same_weights
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import superposition
from tomoscope.phantoms.planted.spaces import generator_for, unit_codes


@pytest.fixture(scope="module")
def built():
    return superposition.build(0)


@pytest.fixture(scope="module")
def null():
    return PHANTOMS["superposition"].null(0)


def facts(specimen):
    (known,) = specimen.card.of("features")
    return known.value


def test_the_stream_is_the_sum_of_the_tokens_features(built):
    texts, subject = built.data["texts"][:8], built.subject
    acts = subject.read(texts, "embed", facts(built)["site"])
    ids = torch.tensor(subject.tokenizer(texts)["input_ids"])
    assert ids.shape == (8, superposition.WORDS)
    assert not (ids < 3).any()
    summed = torch.zeros(8, superposition.WORDS, superposition.SIZE.d_model)
    for row, position in torch.cartesian_prod(torch.arange(8), torch.arange(superposition.WORDS)).tolist():
        for feature in built.data["codes"][ids[row, position]].nonzero().flatten().tolist():
            strength = built.data["codes"][ids[row, position], feature]
            summed[row, position] += strength * built.data["dictionary"][feature]
    for site in ("embed", facts(built)["site"]):
        assert torch.allclose(acts[site], summed, atol=1e-5), site


def test_codes_are_sparse_and_of_the_stated_moments(built):
    activations, codes = built.data["sample"](20_000, 1)
    assert torch.allclose(activations, codes @ built.data["dictionary"], atol=1e-5)
    on = codes > 0
    assert codes.min() >= 0
    assert codes[on].min() >= superposition.LOW
    assert codes.max() <= superposition.HIGH
    assert float(on.sum(1).float().mean()) == pytest.approx(facts(built)["mean_active"], rel=0.03)
    mean, variance = superposition.Source(built.data["dictionary"]).moments
    assert float(codes.mean()) == pytest.approx(mean, rel=0.02)
    assert float(codes.var()) == pytest.approx(variance, rel=0.02)


def test_coherence_by_brute_force(built):
    dictionary, known = built.data["dictionary"], facts(built)
    assert torch.allclose(dictionary.norm(dim=1), torch.ones(len(dictionary)), atol=1e-5)
    cosines = [abs(float(a @ b)) for i, a in enumerate(dictionary) for b in dictionary[:i]]
    assert known["coherence"] == pytest.approx(max(cosines), abs=1e-5)
    assert known["mean_interference"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert known["welch_bound"] < known["coherence"]


def test_the_best_linear_recovery_leaves_what_the_closed_form_says(built):
    activations, codes = built.data["sample"](60_000, 2)
    x, c = activations.double() - activations.double().mean(0), codes.double() - codes.double().mean(0)
    recovered = x @ torch.linalg.lstsq(x, c).solution
    left = float((c - recovered).square().sum() / c.square().sum())
    assert left == pytest.approx(facts(built)["linear_recovery_error"], abs=0.01)


def test_the_null_has_the_same_covariance_and_no_sparse_direction(built, null):
    mine, theirs = built.data["sample"](40_000, 3)[0], null.data["sample"](40_000, 3)[0]
    assert torch.allclose(mine.mean(0), theirs.mean(0), atol=0.02)
    spread = mine.T.cov()
    assert float((spread - theirs.T.cov()).norm() / spread.norm()) < 0.06
    # along a feature the planted activations are heavy-tailed, the null's as normal as anywhere
    tails = [
        ((some - some.mean(0)) @ built.data["dictionary"].T).pow(4).mean(0)
        / ((some - some.mean(0)) @ built.data["dictionary"].T).pow(2).mean(0).square()
        for some in (mine, theirs)
    ]
    assert tails[0].median() > 3.5
    assert (tails[1] - 3).abs().max() < 0.3
    assert [known.holds for known in null.card.of("features")] == [False]
    assert torch.equal(null.data["dictionary"], built.data["dictionary"])
    assert not null.data["codes"].any()


def test_a_tight_frame_fills_every_direction_equally():
    frame = superposition.tight_frame(unit_codes(40, 16, generator_for("t", 0)))
    assert torch.allclose(frame.norm(dim=1), torch.ones(40), atol=1e-4)
    assert torch.allclose(frame.T @ frame, 40 / 16 * torch.eye(16), atol=1e-2)


def test_builds_are_equal_by_seed_and_differ_between_seeds(built):
    again, other = superposition.build(0), superposition.build(1)
    assert same_weights(built.subject.model, again.subject.model)
    assert (built.card, built.data["texts"]) == (again.card, again.data["texts"])
    assert torch.equal(built.data["sample"](5, 1)[0], again.data["sample"](5, 1)[0])
    assert not torch.equal(built.data["dictionary"], other.data["dictionary"])
