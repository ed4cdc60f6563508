from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tomoscope.errors import DataError
from tomoscope.findings import (
    bootstrap_interval,
    difference_interval,
    null_interval,
    null_p_value,
    permutation_test,
    ratio_interval,
    sign_flip_test,
    split_half,
    wilson_interval,
)

numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40)


def coverage(make, truth, *, trials=300):
    hits = 0
    for trial in range(trials):
        estimate = make(np.random.default_rng(trial), trial)
        hits += estimate.low <= truth <= estimate.high
    return hits / trials


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_the_interval_of_a_mean_covers_it(method):
    def make(rng, seed):
        return bootstrap_interval(rng.normal(3, 2, 40), seed=seed, method=method, n_resamples=800)

    assert 0.90 <= coverage(make, 3.0) <= 0.985


def test_bca_covers_the_mean_of_a_skewed_sample():
    def make(rng, seed):
        return bootstrap_interval(rng.exponential(1.0, 60), seed=seed, n_resamples=800)

    assert 0.88 <= coverage(make, 1.0) <= 0.985


def test_clusters_widen_the_interval_to_what_is_true():
    def draw(rng):
        return (rng.normal(0, 1, 30)[:, None] + rng.normal(0, 0.1, (30, 10))).ravel()

    keys = np.repeat(np.arange(30), 10)
    assert coverage(lambda rng, s: bootstrap_interval(draw(rng), seed=s, clusters=keys, n_resamples=500), 0.0) > 0.88
    naive = coverage(lambda rng, s: bootstrap_interval(draw(rng), seed=s, n_resamples=500), 0.0)
    assert naive < 0.6, "as if the ten items of a cluster were independent"


def test_bca_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2, 1, 50)
    ours = bootstrap_interval(values, seed=1, n_resamples=20000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="BCa", rng=2).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_median_and_own_statistic_agree_with_numpy():
    values = np.random.default_rng(0).normal(size=31)
    assert bootstrap_interval(values, seed=0, statistic="median").value == np.median(values)
    assert bootstrap_interval(values, seed=0, statistic=lambda x: x.max(-1)).value == values.max()


@given(numbers, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_interval_is_ordered_seeded_and_inside_the_data(values, seed):
    first = bootstrap_interval(values, seed=seed, n_resamples=200)
    assert first == bootstrap_interval(values, seed=seed, n_resamples=200)
    slack = 1e-9 * (1 + max(abs(value) for value in values))
    assert min(values) - slack <= first.low <= first.high <= max(values) + slack
    assert first.value == pytest.approx(np.mean(values), abs=1e-9)


@given(numbers, st.floats(-100, 100))
@settings(max_examples=30, deadline=None)
def test_a_shift_shifts_the_interval(values, shift):
    base = bootstrap_interval(values, seed=1, n_resamples=200, method="percentile")
    moved = bootstrap_interval(np.array(values) + shift, seed=1, n_resamples=200, method="percentile")
    assert moved.low == pytest.approx(base.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(base.high + shift, abs=1e-6)


def test_no_data_is_unknown_and_one_value_has_no_interval():
    assert bootstrap_interval([], seed=0).value is None
    assert bootstrap_interval([], seed=0).missing
    single = bootstrap_interval([2.0], seed=0)
    assert (single.value, single.low, single.high) == (2.0, None, None)
    assert difference_interval([], [1.0], seed=0).value is None
    assert wilson_interval(0, 0).value is None


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="1 of 2 values are not finite"):
        bootstrap_interval([1.0, float("nan")], seed=0)
    with pytest.raises(DataError, match="mean only"):
        bootstrap_interval([1.0, 2.0], seed=0, clusters=[0, 1], statistic="median")
    with pytest.raises(DataError, match="one length"):
        difference_interval([1.0], [1.0, 2.0], seed=0, paired=True)
    with pytest.raises((DataError, TypeError)):  # the checked test run refuses the shape first
        bootstrap_interval(np.zeros((2, 2)), seed=0)
    with pytest.raises((DataError, TypeError)):
        bootstrap_interval([1.0, 2.0], seed=0, statistic="mode")


def test_difference_covers_and_pairs_are_narrower():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 3, 80)
    better = base + rng.normal(0.5, 0.2, 80)
    paired = difference_interval(better, base, seed=0, paired=True)
    loose = difference_interval(better, base, seed=0)
    assert paired.value == pytest.approx(loose.value)
    assert paired.high - paired.low < 0.2 * (loose.high - loose.low)
    unpaired = coverage(
        lambda r, s: difference_interval(r.normal(1, 1, 50), r.normal(0, 1, 50), seed=s, n_resamples=500), 1.0
    )
    assert 0.9 <= unpaired <= 0.985


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (57, 200)])
def test_wilson_agrees_with_scipy(successes, n):
    ours = wilson_interval(successes, n)
    theirs = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-12)
    assert ours.high == pytest.approx(theirs.high, abs=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_p_values_are_uniform_under_the_null(paired):
    p = [
        permutation_test(r.normal(size=25), r.normal(size=25), seed=s, paired=paired, n_resamples=499)
        for s in range(400)
        for r in [np.random.default_rng(s)]
    ]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.085


def test_exact_sign_flips_by_hand_and_against_scipy():
    assert sign_flip_test([1.0, 2.0, 3.0], seed=0) == 1 / 8
    assert sign_flip_test([1.0, 2.0, 3.0], seed=0, alternative="less") == 1.0
    assert sign_flip_test([1.0, 2.0, 3.0], seed=0, alternative="two-sided") == 2 / 8
    values = np.random.default_rng(3).normal(0.4, 1, 12)
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert sign_flip_test(values, seed=0) == pytest.approx(theirs.pvalue)


def test_shuffled_labels_agree_with_scipy():
    rng = np.random.default_rng(5)
    a, b = rng.normal(0.5, 1, 20), rng.normal(0, 1, 25)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), alternative="greater", vectorized=True,
        n_resamples=20000, rng=1,
    ).pvalue  # fmt: skip
    assert permutation_test(a, b, seed=0, n_resamples=20000) == pytest.approx(theirs, abs=0.008)


def test_clustered_signs_do_not_count_copies_as_evidence():
    keys = np.repeat(np.arange(5), 40)
    values = np.repeat([0.5, 0.4, 0.6, 0.3, -0.1], 40)
    assert sign_flip_test(values, seed=0) < 0.001
    assert sign_flip_test(values, seed=0, clusters=keys) == 2 / 32


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_p_values_lie_in_their_range(values, seed):
    p = sign_flip_test(values, seed=seed, n_resamples=99)
    assert 0 < p <= 1
    assert p == sign_flip_test(values, seed=seed, n_resamples=99)


def test_null_p_value_counts_the_observed_once():
    draws = np.arange(99.0)
    assert null_p_value(1000.0, draws) == 1 / 100
    assert null_p_value(-1.0, draws) == 1.0
    assert null_p_value(-1.0, draws, alternative="less") == 1 / 100
    assert null_p_value(98.0, draws, alternative="two-sided") == 4 / 100
    with pytest.raises(DataError):
        null_p_value(1.0, [])
    assert null_interval(draws).value == 49.0


@given(st.integers(2, 200), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_halves_are_disjoint_and_whole(n, seed):
    chosen, measured = split_half(n, seed=seed)
    assert sorted([*chosen, *measured]) == list(range(n))
    assert abs(len(chosen) - len(measured)) <= 1


def test_halves_keep_keys_together():
    keys = ["a", "b", "a", "c", "b", "d"]
    chosen, measured = split_half(keys, seed=0)
    assert not {keys[i] for i in chosen} & {keys[i] for i in measured}
    with pytest.raises(DataError, match="cannot be split"):
        split_half(["a", "a"], seed=0)


def test_a_ratio_is_that_of_sums_and_its_interval_covers():
    generator = np.random.default_rng(0)
    covered, spread = 0, []
    for draw in range(200):
        size = generator.uniform(1, 5, 60)
        part = 0.3 * size + generator.normal(0, 0.2, 60)
        found = ratio_interval(part, size, seed=draw, n_resamples=400)
        assert found.value == pytest.approx(part.sum() / size.sum())
        covered += found.low <= 0.3 <= found.high
        spread.append(found.high - found.low)
    assert 0.88 < covered / 200 < 0.99
    assert ratio_interval([1.0, 2.0], [0.0, 0.0], seed=0).value is None
    with pytest.raises(DataError):
        ratio_interval([1.0], [1.0, 2.0], seed=0)
