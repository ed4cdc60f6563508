"""The ROC area against counting pairs and scikit-learn, its interval against DeLong's formula and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from tomoscope.errors import DataError
from tomoscope.findings.roc import clustered_share, roc_area, roc_interval
from tomoscope.findings.statistics import wilson_interval

SCORES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(-np.inf)), min_size=1, max_size=12)


def by_pairs(positive, negative):
    return np.mean([(a > b) + 0.5 * (a == b) for a in positive for b in negative])


@given(SCORES, SCORES)
@settings(max_examples=200, deadline=None)
def test_the_area_is_the_share_of_pairs_in_order(positive, negative):
    assert roc_area(positive, negative) == pytest.approx(by_pairs(positive, negative), abs=1e-12)
    assert roc_area(positive, negative) + roc_area(negative, positive) == pytest.approx(1)
    one = roc_interval(positive, negative)
    assert one.low <= one.value <= one.high


def test_the_area_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = np.round(rng.normal(0.5, 1, 30), 1), np.round(rng.normal(0, 1, 20), 1)
        assert roc_area(x, y) == pytest.approx(roc_auc_score([1] * 30 + [0] * 20, [*x, *y]), abs=1e-12)


def test_without_clusters_the_variance_is_delongs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(1, 1, 40), rng.normal(0, 1, 25)
    wins = (x[:, None] > y[None]).astype(float)
    variance = wins.mean(1).var(ddof=1) / len(x) + wins.mean(0).var(ddof=1) / len(y)
    one = roc_interval(x, y)
    low, high = (np.log(end / (1 - end)) for end in (one.low, one.high))
    from scipy.stats import t

    area = one.value
    assert high - low == pytest.approx(2 * t.ppf(0.975, 24) * np.sqrt(variance) / (area * (1 - area)))


def test_claims_said_again_about_the_same_specimen_add_nothing():
    rng = np.random.default_rng(2)
    x, y = rng.normal(1, 1, 15), rng.normal(0, 1, 15)
    once = roc_interval(x, y)
    keys = [f"p{i}" for i in range(15)] * 6, [f"n{i}" for i in range(15)] * 6
    again = roc_interval(np.tile(x, 6), np.tile(y, 6), positive_clusters=keys[0], negative_clusters=keys[1])
    assert (again.value, again.low, again.high) == pytest.approx((once.value, once.low, once.high))
    naive = roc_interval(np.tile(x, 6), np.tile(y, 6))
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


@pytest.mark.parametrize(("truth", "together"), [(0.5, 1), (0.8, 4), (0.95, 4), (0.99, 1)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(truth, together):
    rng, shift, held, rounds = np.random.default_rng(3), np.sqrt(2) * norm.ppf(truth), 0, 300
    for _ in range(rounds):
        keys, scores = [], []
        for side, mean in (("p", shift), ("n", 0.0)):
            own = np.repeat(rng.normal(size=12), together) * np.sqrt(0.5)
            scores.append(mean + own + rng.normal(size=12 * together) * np.sqrt(0.5))
            keys.append([f"{side}{i}" for i in range(12) for _ in range(together)])
        one = roc_interval(*scores, positive_clusters=keys[0], negative_clusters=keys[1])
        held += one.low <= truth <= one.high
    assert held / rounds > 0.92


def test_a_perfect_order_has_an_interval_that_narrows_with_specimens_alone():
    wide = roc_interval([1.0] * 5, [0.0] * 5)
    narrow = roc_interval([1.0] * 50, [0.0] * 50)
    same = roc_interval([1.0] * 50, [0.0] * 50, positive_clusters=[i % 5 for i in range(50)],
                        negative_clusters=[9 + i % 5 for i in range(50)])  # fmt: skip
    assert wide.high == narrow.high == 1
    assert wide.low < 0.75 < narrow.low
    assert same.low == pytest.approx(wide.low)
    one = roc_interval([1.0], [0.0])
    assert one.low < 0.5


def test_what_is_missing_is_said():
    assert "known to be true" in roc_interval([], [1.0]).missing
    assert "known to be false" in roc_interval([1.0], []).missing
    with pytest.raises(DataError):
        roc_area([np.nan], [0.0])
    with pytest.raises(DataError):
        roc_area([], [0.0])
    with pytest.raises(DataError):
        roc_interval([1.0], [0.0], positive_clusters=[])


def test_shares_count_specimens_not_claims():
    hits = [True] * 38 + [False] * 2
    alone = clustered_share(hits, range(40))
    assert (alone.low, alone.high) == (wilson_interval(38, 40).low, wilson_interval(38, 40).high)
    four = clustered_share(hits, [i % 10 for i in range(40)])
    assert four.n == 10
    assert four.value == 0.95
    assert (four.low, four.high) == (wilson_interval(9, 10).low, wilson_interval(10, 10).high)
    assert clustered_share([], []).value is None
    with pytest.raises(DataError):
        clustered_share([True], [])
