"""Truth directions on planted statements: the general one is found though a negation turns the louder one round."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tomoscope.concepts import States, truth_directions
from tomoscope.concepts.linear import fit
from tomoscope.errors import DataError


def planted(n: int = 600, width: int = 24, *, polar: float = 3.0, seed: int = 0):
    """Truth x general + truth x polarity x polar + polarity x pole + topics' own places + noise."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    y, sign = np.arange(n) % 2, np.where(np.arange(n) // 2 % 2, 1, -1)
    topic = np.arange(n) // 4 % 6
    t, p = torch.tensor(2.0 * y - 1), torch.tensor(sign).float()
    x = torch.randn(n, width, generator=generator)
    x += 1.5 * t[:, None] * basis[:, 0] + polar * (t * p)[:, None] * basis[:, 1] + 2 * p[:, None] * basis[:, 2]
    x += (4 * torch.randn(6, width, generator=generator) @ basis[:, 3:9] @ basis[:, 3:9].T)[topic]
    return States({"embed": x + 5}), y, topic, sign, basis


def test_both_directions_are_least_squares_and_the_general_one_judges_negations():
    states, y, topic, sign, basis = planted()
    found = truth_directions(states, y, topic, sign, concept="true", fitted_on="made")
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(found.general["embed"], basis[:, 0], dim=0)) > 0.95
    assert float(cosine(found.polar["embed"], basis[:, 1], dim=0)) > 0.95
    for polarity in (0, 1, -1):
        assert found.accuracy("embed", polarity=polarity).low > 0.85
    # what a probe of affirmative statements alone makes of negated ones
    x, up = states["embed"], sign > 0
    alone = fit(x[up], torch.tensor(y[up])[None], 2)
    said = (alone.scores(x[~up])[:, 0, 0] > 0).numpy()
    assert (said == y[~up]).mean() < 0.1
    truth = np.stack([2 * y - 1, (2 * y - 1) * sign], 1).astype(float)
    theirs = np.linalg.lstsq(truth - truth.mean(0), (x - x.mean(0)).double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.general["embed"], theirs[0], atol=1e-4)
    direction = found.directions[found.best]
    assert ((direction.score(x) > 0).numpy() == y).mean() > 0.85
    assert float(direction.cosine(basis[:, 0])) > 0.8
    assert float(direction.score(direction.mean + direction.shift) - direction.score(direction.mean)) > 0


def test_without_negations_it_is_the_difference_of_means():
    states, y, topic, sign, _ = planted(polar=0.0)
    up = np.flatnonzero(sign > 0)
    some = states.take(up)
    found = truth_directions(some, y[up], topic[up])
    x, labels = some["embed"], y[up]
    difference = x[labels == 1].mean(0) - x[labels == 0].mean(0)
    torch.testing.assert_close(2 * found.general["embed"], difference, rtol=1e-4, atol=1e-4)
    assert not found.polar["embed"].any()
    assert found.accuracy("embed").low > 0.8
    assert found.accuracy("embed", polarity=-1).missing


def test_topics_that_do_not_share_a_direction_are_not_taken_for_truth():
    """Each topic has its own direction of truth: directions of the others are at chance on it."""
    generator = torch.Generator().manual_seed(0)
    own = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    topic, y = np.arange(480) // 2 % 4, np.arange(480) % 2
    x = torch.randn(480, 12, generator=generator) + 3 * torch.tensor(2.0 * y - 1)[:, None] * own[torch.tensor(topic)]
    found = truth_directions(States({"embed": x}), y, topic)
    assert abs(found.accuracy("embed").value - 0.5) < 0.1
    assert ((found.directions["embed"].score(x) > 0).numpy() == y).mean() > 0.9


def test_what_does_not_fit():
    states, y, topic, sign, _ = planted(80)
    with pytest.raises(DataError, match="one topic"):
        truth_directions(states, y, np.zeros(80, dtype=int), sign)
    with pytest.raises(DataError, match="0 and 1"):
        truth_directions(states, y + 1, topic, sign)
    with pytest.raises(DataError, match="labels for"):
        truth_directions(states, y[:-1], topic[:-1], sign[:-1])
    with pytest.raises(DataError, match="all true or all false"):
        truth_directions(states, (topic == 0).astype(int), (topic == 0).astype(int), sign)
