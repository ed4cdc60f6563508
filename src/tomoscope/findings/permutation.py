"""Permutation tests: exact where the number of arrangements allows, seeded Monte Carlo beyond (Phipson and Smyth 2010).

A permutation test asks how often the observed difference of means would arise if the labels meant nothing. It misleads
when the exchanged units are not exchangeable: items of one prompt must be flipped together (`clusters`).

Two forms: paired (the sign of each pair's difference is flipped) and unpaired (the labels of both are shuffled).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from tomoscope.errors import DataError
from tomoscope.findings.statistics import _blocks, _cluster_sums, _finite

Alternative = Literal["greater", "less", "two-sided"]


def permutation_test(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    seed: int,
    paired: bool = False,
    alternative: Alternative = "greater",
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    n_resamples: int = 9999,
) -> float:
    """The p-value of mean(first) > mean(second) (or <, or different) under exchangeability.

    Paired tests flip signs of the differences, and of whole clusters where `clusters` gives one key per pair. Unpaired
    tests shuffle labels. Raises DataError for empty samples, unequal lengths when paired, and clusters when unpaired.
    """
    a, b = _finite(first), _finite(second)
    if len(a) == 0 or len(b) == 0:
        raise DataError("A test needs observations in both samples.", remedy="Say 'not measured' instead.")
    if not paired:
        if clusters is not None:
            raise DataError("Clusters are for paired tests.", remedy="Average each cluster and test the averages.")
        return _shuffle_labels(a, b, alternative, seed, n_resamples)
    if len(a) != len(b):
        raise DataError(f"A paired test of {len(a)} and {len(b)} values.", remedy="Give one pair per prompt.")
    return sign_flip_test(a - b, seed=seed, alternative=alternative, clusters=clusters, n_resamples=n_resamples)


def sign_flip_test(
    differences: Sequence[float] | np.ndarray,
    *,
    seed: int,
    alternative: Alternative = "greater",
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    n_resamples: int = 9999,
) -> float:
    """The p-value of mean(differences) > 0 (or <, or different), if each sign were a coin's toss.

    Exact (all 2^n sign patterns) where there are no more of them than `n_resamples`.
    """
    values = _finite(differences)
    if len(values) == 0:
        raise DataError("A test needs observations.", remedy="Say 'not measured' instead.")
    if clusters is not None:
        values, _ = _cluster_sums(values, clusters)
    n, observed = len(values), float(values.sum())
    if 2**n <= n_resamples + 1:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)[None, :]) & 1)
        return _tail(signs @ values, observed, alternative, values, exact=True)
    generator = np.random.default_rng(seed)
    sums = np.concatenate(
        [(1.0 - 2.0 * generator.integers(0, 2, (size, n), dtype=np.int8)) @ values for size in _blocks(n_resamples, n)]
    )
    return _tail(sums, observed, alternative, values, exact=False)


def _shuffle_labels(a: np.ndarray, b: np.ndarray, alternative: Alternative, seed: int, n_resamples: int) -> float:
    pooled = np.concatenate([a, b])
    centred = pooled - pooled.mean()  # the sum of the first sample then orders arrangements as the difference does
    labels = np.concatenate([np.ones(len(a)), np.zeros(len(b))])
    generator = np.random.default_rng(seed)
    sums = np.concatenate(
        [
            generator.permuted(np.broadcast_to(labels, (size, len(labels))), axis=1) @ centred
            for size in _blocks(n_resamples, len(labels))
        ]
    )
    return _tail(sums, float(labels @ centred), alternative, pooled, exact=False)


def _tail(sums: np.ndarray, observed: float, alternative: Alternative, values: np.ndarray, *, exact: bool) -> float:
    """The share of arrangements at least as extreme; the observed one counts as one of them."""
    slack = 1e-10 * max(float(np.abs(values).sum()), 1e-300)  # sums of one set in another order differ by rounding
    if alternative == "greater":
        hits = np.sum(sums >= observed - slack)
    elif alternative == "less":
        hits = np.sum(sums <= observed + slack)
    else:
        hits = np.sum(np.abs(sums) >= abs(observed) - slack)
    return float(hits / len(sums)) if exact else float((1 + hits) / (1 + len(sums)))
