"""How well an exam tells what is there from what is not: ROC area and shares, with intervals by specimen.

The ROC area is the probability that a claim which is known to be true scores above one which is known to be false, ties
counting one half (Mann and Whitney 1947; Hanley and McNeil 1982). Claims about one specimen are not independent, so the
area's variance is DeLong's (1988) summed over specimens (Obuchowski 1997), with Student's t for the few specimens there
are, on the logit's scale (Qin and Hotilovac 2008), which keeps the interval inside 0 and 1. Where that variance says
nothing (all pairs in order, or a single specimen on one side) the interval is Newcombe's (2006, method 5) score
interval with the specimens as its counts, as wide as if all claims about a specimen were one.

How it can mislead: an area says how well scores *rank*, not whether the rule's threshold is a good one (for that:
sensitivity and specificity), and it depends on which nulls there are: an untrained model is an easy one.

Steps: ranks to area; placements of each claim, summed by specimen; the interval. Shares count as many observations as
there are specimens (Wilson).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import wilson_interval

UNIT = "ROC area"


def roc_area(positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray) -> float:
    """The share of (positive, negative) pairs in which the positive scores higher, ties counting one half.

    Scores may be infinite (a claim that was not measured scores -inf). Raises DataError where a side is empty or a
    score is NaN.
    """
    return float(_placements(*_checked(positive, negative))[0].mean())


def roc_interval(
    positive: Sequence[float] | np.ndarray,
    negative: Sequence[float] | np.ndarray,
    *,
    positive_clusters: Sequence[Hashable] | None = None,
    negative_clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Estimate:
    """The ROC area with its interval; a cluster's key is the same on both sides where it is the same specimen.

    Args:
        positive: scores of the claims that are true.
        negative: scores of the claims that are false.
        positive_clusters: the specimen of each positive; each its own where not given.
        negative_clusters: likewise.
        level: of the interval.

    Returns:
        The area; missing where a side is empty. `n` is the smaller number of specimens of the two sides.
    """
    if len(positive) == 0 or len(negative) == 0:
        side = "true" if len(positive) == 0 else "false"
        return Estimate.unknown(f"no claim is known to be {side}", unit=UNIT)
    x, y = _checked(positive, negative)
    keys = [
        _keys(positive_clusters, len(x), "positive"), _keys(negative_clusters, len(y), "negative"),
    ]  # fmt: skip
    m, n = (len(set(side)) for side in keys)
    above, below = _placements(x, y)
    area = float(above.mean())
    variance = _clustered_variance(above - area, below - area, keys)
    if m < 2 or n < 2 or variance <= 1e-15 or not 0 < area < 1:
        low, high = _score_interval(area, m, n, level)
        method = "Newcombe's score interval by specimen"
    else:
        from scipy.stats import t

        reach = float(t.ppf(0.5 + level / 2, min(m, n) - 1)) * math.sqrt(variance) / (area * (1 - area))
        middle = math.log(area / (1 - area))
        low, high = (1 / (1 + math.exp(-min(max(end, -700.0), 700.0))) for end in (middle - reach, middle + reach))
        method = "DeLong, clustered by specimen, logit scale"
    return Estimate(
        value=area, unit=UNIT, low=min(low, area), high=max(high, area), n=min(m, n),
        method=f"{method} ({m} with, {n} without)",
    )  # fmt: skip


def clustered_share(
    hits: Sequence[bool] | np.ndarray, clusters: Sequence[Hashable], *, unit: str = "share", level: float = 0.95
) -> Estimate:
    """A share of claims with Wilson's interval, for as many observations as there are specimens (clusters).

    Missing where there are no claims.
    """
    if len(hits) != len(clusters):
        raise DataError(f"{len(clusters)} specimens for {len(hits)} claims.", remedy="Give one a claim.")
    if len(hits) == 0:
        return Estimate.unknown("there are no claims", unit=unit)
    value, n = float(np.mean(np.asarray(hits, dtype=float))), len(set(clusters))
    low = wilson_interval(math.floor(value * n + 1e-9), n, level=level).low
    high = wilson_interval(math.ceil(value * n - 1e-9), n, level=level).high
    said = "Wilson interval" if n == len(hits) else f"Wilson interval, {len(hits)} claims about {n} specimens"
    return Estimate(value=value, unit=unit, low=low, high=high, n=n, method=said)


def _checked(
    positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.asarray(side, dtype=float) for side in (positive, negative))
    if x.ndim != 1 or y.ndim != 1 or not len(x) or not len(y):
        raise DataError("A ROC area needs a row of scores on both sides.", remedy="Say 'not measured' instead.")
    if np.isnan(x).any() or np.isnan(y).any():
        raise DataError("A score is NaN.", remedy="A claim that was not measured scores -inf.")
    return x, y


def _keys(clusters: Sequence[Hashable] | None, n: int, side: str) -> list[Hashable]:
    if clusters is None:
        return [(side, i) for i in range(n)]
    if len(clusters) != n:
        raise DataError(f"{len(clusters)} specimens for {n} scores.", remedy="Give one a score.")
    return list(clusters)


def _placements(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    from scipy.stats import rankdata  # imported late: records are read without scipy

    ranks = rankdata(np.concatenate([x, y]))
    above = (ranks[: len(x)] - rankdata(x)) / len(y)
    below = 1 - (ranks[len(x) :] - rankdata(y)) / len(x)
    return above, below


def _clustered_variance(above: np.ndarray, below: np.ndarray, keys: list[list[Hashable]]) -> float:
    """Obuchowski's variance of the area from centred placements; 0 where a side has a single specimen."""
    m, n = (len(set(side)) for side in keys)
    if m < 2 or n < 2:
        return 0.0
    index = {key: place for place, key in enumerate(dict.fromkeys([*keys[0], *keys[1]]))}
    sums = [
        np.bincount([index[key] for key in side], weights=values, minlength=len(index))
        for side, values in zip(keys, (above, below), strict=True)
    ]
    a, b = sums[0] / len(above), sums[1] / len(below)
    both = len(index) / (len(index) - 1)
    return float(m / (m - 1) * (a @ a) + n / (n - 1) * (b @ b) + 2 * both * (a @ b))


def _score_interval(area: float, m: int, n: int, level: float) -> tuple[float, float]:
    """The areas whose own standard error leaves the observed one inside; Newcombe's method 5."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    z, middle = float(norm.ppf(0.5 + level / 2)), (m + n) / 2

    def spread(value: float) -> float:
        inner = 1 + (middle - 1) * ((1 - value) / (2 - value) + value / (1 + value))
        return z * math.sqrt(max(0.0, value * (1 - value) / (m * n) * inner))

    # at the observed end itself the spread is 0 too: the bracket leaves that root out
    edge = 1e-9
    low = 0.0 if area <= 0 else float(brentq(lambda v: area - v - spread(v), 0.0, min(area, 1 - edge)))
    high = 1.0 if area >= 1 else float(brentq(lambda v: v - area - spread(v), max(area, edge), 1.0))
    return low, high
