"""Intervals, tests and splits, all seeded, all returning records.

Efron and Tibshirani (1993) for the bootstrap (percentile and BCa, clustered where observations share a prompt or a
document), Wilson (1927) for proportions, Fisher's randomisation for the tests. How they can mislead: a bootstrap of
fewer than about ten observations is too narrow; observations that share a prompt are not independent (give
`clusters`); a p-value from B resamples is never below 1 / (B + 1), so give more resamples where many claims are
corrected together.

Resamples are drawn in blocks of bounded memory, never one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Int, Shaped

from tomoscope.errors import DataError
from tomoscope.findings.finding import Estimate

Alternative = Literal["greater", "less", "two-sided"]
Statistic = Callable[[np.ndarray], np.ndarray]

_BLOCK = 1 << 22  # elements of one block of resamples (32 MiB of doubles)
_NORMAL = NormalDist()


def bootstrap_interval(
    values: Shaped[np.ndarray, " observation"] | Sequence[float],
    *,
    seed: int,
    statistic: Literal["mean", "median"] | Statistic = "mean",
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    method: Literal["bca", "percentile"] = "bca",
    level: float = 0.95,
    n_resamples: int = 4000,
    unit: str = "",
) -> Estimate:
    """The statistic of the values with its bootstrap interval.

    `statistic` is "mean", "median", or a function that reduces the last axis. With `clusters` (one key per value) whole
    clusters are drawn, and the statistic is the pooled mean. No values give an unknown estimate, one value (or one
    cluster) a number without interval.

    Raises DataError for values that are not finite, and for clusters with a statistic other than the mean.
    """
    data = _finite(values)
    if len(data) == 0:
        return Estimate.unknown("there are no observations", unit=unit)
    if clusters is not None:
        if statistic != "mean":
            raise DataError(
                "A clustered bootstrap is defined for the mean only.", remedy="Reduce each cluster to a value."
            )
        sums, counts = _cluster_sums(data, clusters)
        n, kind = len(sums), "cluster bootstrap"
        value = float(sums.sum() / counts.sum())
        jackknife = _leave_one_out_ratio(sums, counts)
        resamples = _resample(n, n_resamples, seed, lambda rows: sums[rows].sum(-1) / counts[rows].sum(-1))
    else:
        n, kind = len(data), "bootstrap"
        reduce = _statistic(statistic)
        value = float(reduce(data))
        jackknife = _leave_one_out(data, statistic, reduce)
        resamples = _resample(n, n_resamples, seed, lambda rows: reduce(data[rows]))
    if n < 2:
        return Estimate(value=value, unit=unit, n=n, method=f"one {'cluster' if clusters is not None else 'value'}")
    low, high, used = _interval(value, resamples, jackknife if method == "bca" else None, level)
    text = f"{used} {kind}, {n_resamples} resamples"
    return Estimate(value=value, unit=unit, low=low, high=high, n=n, method=text)


def difference_interval(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    seed: int,
    paired: bool = False,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    level: float = 0.95,
    n_resamples: int = 4000,
    unit: str = "",
) -> Estimate:
    """The mean of `first` minus the mean of `second`, with its bootstrap interval.

    Paired: item i of both is the same prompt, and pairs are drawn (whole clusters of pairs, with `clusters`). Unpaired:
    both samples are drawn independently (percentile interval). No ratio is formed, so a small control does no harm.
    """
    a, b = _finite(first), _finite(second)
    if paired or clusters is not None:
        if len(a) != len(b):
            raise DataError(
                f"A paired difference needs samples of one length; these have {len(a)} and {len(b)}.",
                remedy="Give paired=False for two independent samples.",
            )
        return bootstrap_interval(a - b, seed=seed, clusters=clusters, level=level, n_resamples=n_resamples, unit=unit)
    if len(a) == 0 or len(b) == 0:
        return Estimate.unknown("one of the two samples has no observations", unit=unit)
    value = float(a.mean() - b.mean())
    n = min(len(a), len(b))
    if n < 2:
        return Estimate(value=value, unit=unit, n=n, method="one value")
    draws = _resample(len(a), n_resamples, seed, lambda rows: a[rows].mean(-1))
    draws = draws - _resample(len(b), n_resamples, seed + 1, lambda rows: b[rows].mean(-1))
    low, high, used = _interval(value, draws, None, level)
    text = f"{used} bootstrap of two samples ({len(a)} and {len(b)}), {n_resamples} resamples"
    return Estimate(value=value, unit=unit, low=low, high=high, n=n, method=text)


def ratio_interval(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    *,
    seed: int,
    level: float = 0.95,
    n_resamples: int = 4000,
    unit: str = "",
) -> Estimate:
    """sum(numerator) / sum(denominator) over clusters, with the bootstrap interval of its linearised values.

    Each cluster counts with r + (numerator - r denominator) / mean(denominator), whose mean is the ratio r and whose
    spread is the ratio's own (delta method): the interval has no draws in which the denominator happens to be near 0.

    Args:
        numerator, denominator: [cluster], sums over each cluster (a prompt, a document).
        seed: of the resamples.
        level: of the interval.
        n_resamples: draws of the bootstrap.
        unit: of the ratio.

    Returns:
        The ratio; unknown where the denominators sum to 0.
    """
    top, bottom = _finite(numerator), _finite(denominator)
    if len(top) != len(bottom):
        raise DataError(f"{len(top)} numerators and {len(bottom)} denominators.", remedy="Give one of each a cluster.")
    total = float(bottom.sum())
    if not len(top) or total == 0:
        return Estimate.unknown("there is nothing to divide by", unit=unit)
    ratio = float(top.sum()) / total
    values = ratio + (top - ratio * bottom) / (total / len(bottom))
    return bootstrap_interval(values, seed=seed, level=level, n_resamples=n_resamples, unit=unit)


def wilson_interval(successes: int, n: int, *, level: float = 0.95, unit: str = "share") -> Estimate:
    """A proportion with Wilson's score interval, which is honest at 0 and 1 and for small n."""
    if not 0 <= successes <= n:
        raise DataError(f"{successes} successes of {n} trials is not a proportion.", remedy="Count again.")
    if n == 0:
        return Estimate.unknown("there are no trials", unit=unit)
    z = _NORMAL.inv_cdf(0.5 + level / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = float(max(0.0, middle - half)), float(min(1.0, middle + half))
    return Estimate(value=share, unit=unit, low=min(low, share), high=max(high, share), n=n, method="Wilson interval")


def null_interval(draws: Sequence[float] | np.ndarray, *, level: float = 0.95, unit: str = "") -> Estimate:
    """A control's distribution as an estimate: the mean of its draws and the range that holds `level` of them."""
    data = _finite(draws)
    if len(data) == 0:
        return Estimate.unknown("no control was drawn", unit=unit)
    if len(data) == 1:
        return Estimate(value=float(data[0]), unit=unit, n=1, method="one draw")
    low, high = np.quantile(data, [(1 - level) / 2, (1 + level) / 2])
    mean = float(data.mean())
    low, high = min(float(low), mean), max(float(high), mean)
    return Estimate(value=mean, unit=unit, low=low, high=high, n=len(data), method=f"range of {len(data)} draws")


def null_p_value(
    observed: float, draws: Sequence[float] | np.ndarray, *, alternative: Alternative = "greater"
) -> float:
    """How often the control's draws are at least as extreme as what was observed: (1 + hits) / (1 + draws).

    Two-sided doubles the smaller tail. Raises DataError where there are no draws.
    """
    data = _finite(draws)
    if len(data) == 0:
        raise DataError("A p-value needs draws of the control.", remedy="Give at least 19 draws for p = 0.05.")
    slack = 1e-12 * max(1.0, abs(observed))
    above = (1 + int(np.sum(data >= observed - slack))) / (1 + len(data))
    below = (1 + int(np.sum(data <= observed + slack))) / (1 + len(data))
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]


def split_half(
    items: int | Sequence[Hashable] | np.ndarray, *, seed: int
) -> tuple[Int[np.ndarray, " chosen"], Int[np.ndarray, " measured"]]:
    """Two disjoint halves of the items: choose on the first, measure on the second.

    `items` is a number, or one key per item: items of one key (a template, a document) stay on one side. Returns sorted
    indices. Raises DataError where there are fewer than two items or keys.
    """
    keys = list(range(items)) if isinstance(items, int) else list(items)
    unique = list(dict.fromkeys(keys))
    if len(unique) < 2:
        raise DataError(
            f"{len(keys)} item(s) under {len(unique)} key(s) cannot be split in two halves.",
            remedy="Give at least two prompts (or keys).",
        )
    order = np.random.default_rng(seed).permutation(len(unique))
    first = {unique[index] for index in order[: len(unique) // 2]}
    side = np.array([key in first for key in keys])
    return np.flatnonzero(side), np.flatnonzero(~side)


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1:
        raise DataError(f"Expected one row of values, got shape {data.shape}.", remedy="Reduce the other axes first.")
    bad = int(np.sum(~np.isfinite(data)))
    if bad:
        raise DataError(
            f"{bad} of {len(data)} values are not finite.", remedy="Leave them out, and say so in the finding."
        )
    return data


def _statistic(statistic: str | Statistic) -> Statistic:
    if not isinstance(statistic, str):
        return statistic
    known: dict[str, Statistic] = {"mean": lambda x: x.mean(axis=-1), "median": lambda x: np.median(x, axis=-1)}
    if statistic not in known:
        raise DataError(f"There is no statistic {statistic!r}.", remedy="Give 'mean', 'median' or a function.")
    return known[statistic]


def _cluster_sums(data: np.ndarray, clusters: Sequence[Hashable] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum [cluster] and the count [cluster] of each cluster, in order of appearance."""
    if len(clusters) != len(data):
        raise DataError(f"{len(clusters)} cluster keys for {len(data)} values.", remedy="Give one key per value.")
    places = {key: place for place, key in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[key] for key in clusters])
    return np.bincount(index, weights=data), np.bincount(index).astype(float)


def _blocks(n_resamples: int, width: int) -> Iterator[int]:
    """Sizes of blocks of resamples, each at most _BLOCK elements."""
    size = max(1, min(n_resamples, _BLOCK // max(1, width)))
    for start in range(0, n_resamples, size):
        yield min(size, n_resamples - start)


def _resample(n: int, n_resamples: int, seed: int, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The statistic [resample] of draws with replacement; `reduce` maps row indices [block, n] to [block]."""
    generator = np.random.default_rng(seed)
    return np.concatenate([reduce(generator.integers(0, n, (size, n))) for size in _blocks(n_resamples, n)])


def _leave_one_out(data: np.ndarray, statistic: str | Statistic, reduce: Statistic) -> np.ndarray | None:
    """The statistic [observation] without each observation in turn; None where that would take too much memory."""
    n = len(data)
    if statistic == "mean" and n > 1:
        return (data.sum() - data) / (n - 1)
    if n < 2 or n * n > _BLOCK:
        return None
    others = np.arange(n - 1)[None, :] + (np.arange(n - 1)[None, :] >= np.arange(n)[:, None])
    return reduce(data[others])


def _leave_one_out_ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    return None if len(sums) < 2 else (sums.sum() - sums) / (counts.sum() - counts)


def _interval(
    value: float, resamples: np.ndarray, jackknife: np.ndarray | None, level: float
) -> tuple[float, float, str]:
    """The ends of the interval and its name; BCa where a jackknife is given and the correction is defined."""
    tails = (1 - level) / 2, (1 + level) / 2
    name = "percentile"
    if jackknife is not None:
        below = (np.sum(resamples < value) + 0.5 * np.sum(resamples == value)) / len(resamples)
        spread = jackknife.mean() - jackknife
        scale = float(np.sum(spread**2)) ** 1.5
        if 0 < below < 1 and scale > 0:
            bias = _NORMAL.inv_cdf(float(below))
            acceleration = float(np.sum(spread**3)) / (6 * scale)
            tails = tuple(_bca_tail(tail, bias, acceleration) for tail in tails)
            name = "BCa"
    low, high = np.quantile(resamples, tails)
    return float(low), float(high), name


def _bca_tail(tail: float, bias: float, acceleration: float) -> float:
    z = bias + _NORMAL.inv_cdf(tail)
    return _NORMAL.cdf(bias + z / (1 - acceleration * z))
