"""Cosines, composition, features and maps against what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tomoscope.concepts import Direction, composition, cosines, feature_direction, model_map
from tomoscope.errors import DataError
from tomoscope.phantoms.trained import micro_world


def items(n: int = 400, width: int = 40, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    draw = np.random.default_rng(seed)
    labels = {name: draw.permutation(np.arange(n) % 2) for name in ("a", "b", "c")}
    x = 2 * torch.randn(n, width, generator=generator) + 3 * torch.randn(n, 1, generator=generator) * basis[:, 5]
    lean = (basis[:, 0] + basis[:, 1]) / 2**0.5
    for name, vector in (("a", basis[:, 0]), ("b", lean), ("c", basis[:, 2])):
        x = x + 3 * torch.tensor(2.0 * labels[name] - 1)[:, None] * vector
    return x.float(), labels


def test_cosines_that_were_planted_and_the_ones_that_a_loud_direction_makes():
    x, labels = items(width=80)
    found = cosines(x, labels, draws=99)
    at = found.concepts.index
    assert abs(found.values[at("a"), at("b")] - 0.7) < 0.25
    assert found.p_values[at("a"), at("b")] <= 0.02
    assert found.p_values[at("a"), at("c")] > 0.05
    assert found.p_values[at("c"), at("b")] > 0.05
    assert abs(found.overlap[at("a"), at("b")]) < 0.2
    np.testing.assert_allclose(np.diag(found.values), 1)
    steps = [x[labels[k] == 1].mean(0) - x[labels[k] == 0].mean(0) for k in ("a", "b")]
    assert found.values[0, 1] == pytest.approx(float(torch.nn.functional.cosine_similarity(*steps, dim=0)), abs=1e-5)
    with pytest.raises(DataError, match="two concepts"):
        cosines(x, {"a": labels["a"]})


def test_composition_is_the_edits_own():
    subject = micro_world().subject
    generator, width = torch.Generator().manual_seed(0), subject.facts.d_model
    pair = tuple(
        Direction(name, site, torch.randn(width, generator=generator))
        for name, site in (("one", "layer.2.resid_post"), ("two", "layer.4.resid_post"))
    )
    texts = ["Mary lives in", "The capital of", "Anna works for"]
    metrics = (lambda logits: logits[:, 3], lambda logits: logits[:, 9])
    found = composition(subject, texts, pair, metrics, strengths=(2.0, 1.0))
    plain = subject.last_logits(texts)[:, 9]
    both = subject.last_logits(texts, edits=[pair[0].write(2.0), pair[1].write(1.0)])[:, 9]
    np.testing.assert_allclose(found.both[1], (both - plain).numpy(), rtol=1e-3, atol=1e-4)
    assert found.alone.shape == (2, 2, 3)
    assert found.kept(0).value is not None
    assert found.crosstalk(1).n == 3


def test_a_feature_reads_with_its_encoder_and_writes_with_its_decoder():
    encoder, decoder = torch.eye(4)[0], torch.eye(4)[1] + torch.eye(4)[0]
    one = feature_direction(encoder, decoder, "layer.0.resid_post", bias=-0.5, size=3.0)
    x = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    assert float(one.score(x)) == 1.5
    torch.testing.assert_close(one.shift, 3 * decoder)
    assert float(one.erase().apply(x) @ encoder) == pytest.approx(0.0)


def test_a_direction_is_carried_to_a_turned_model_and_not_by_exchanged_pairs():
    x, labels = items(width=16)
    generator = torch.Generator().manual_seed(4)
    turn = torch.randn(16, 24, generator=generator)
    other = x @ turn + 0.05 * torch.randn(len(x), 24, generator=generator) + 2
    found = model_map(x, other, "here", "there")
    assert min(found.explained) > 0.95
    assert max(found.exchanged) < 0.1
    step = x[labels["a"] == 1].mean(0) - x[labels["a"] == 0].mean(0)
    direction = Direction("a", "here", step, -1.0, step, x.mean(0))
    carried = found.carry(direction)
    torch.testing.assert_close(carried.score(other), direction.score(x), rtol=0.1, atol=1.0)
    theirs = other[labels["a"] == 1].mean(0) - other[labels["a"] == 0].mean(0)
    assert float(torch.nn.functional.cosine_similarity(carried.shift, theirs, dim=0)) > 0.98
    assert (((carried.score(other) > carried.score(other).median()).numpy()) == labels["a"]).mean() > 0.8
    with pytest.raises(DataError, match="not of here"):
        found.carry(carried)
    with pytest.raises(DataError, match="same sixteen"):
        model_map(x[:5], other[:5], "here", "there")
