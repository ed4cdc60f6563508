"""Statistics of groups of a sorted array, all groups at once: dashboards without a loop over features.

Each function takes entries with a group number that never falls (`group`, from 0 to n - 1), and gives one row a group.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


def rank_within(group: Int[np.ndarray, " entry"]) -> Int[np.ndarray, " entry"]:
    """0, 1, 2 ... inside each run of equal numbers."""
    if not len(group):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    lengths = np.diff(np.append(starts, len(group)))
    return np.arange(len(group)) - np.repeat(starts, lengths)


def maxima(group: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"], n: int) -> Float[np.ndarray, " n"]:
    """The largest value of each group; 0 for an empty one."""
    out = np.zeros(n, dtype=float)
    np.maximum.at(out, group, value)
    return out


def histograms(
    group: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"], top: Float[np.ndarray, " n"], bins: int
) -> Int[np.ndarray, "n bin"]:
    """Counts in equal bins from 0 to each group's largest value."""
    where = bin_of(group, value, top, bins)
    return np.bincount(group * bins + where, minlength=len(top) * bins).reshape(len(top), bins)


def bin_of(
    group: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"], top: Float[np.ndarray, " n"], bins: int
) -> Int[np.ndarray, " entry"]:
    """Which of the equal bins from 0 to the group's largest value an entry falls in."""
    return np.minimum((value / np.maximum(top[group], 1e-30) * bins).astype(np.int64), bins - 1)


def best_of_rows(
    group: Int[np.ndarray, " entry"], row: Int[np.ndarray, " entry"], value: Float[np.ndarray, " entry"]
) -> Bool[np.ndarray, " entry"]:
    """True at the largest entry of each (group, row): a text counts once, at its strongest token."""
    order = np.lexsort((-value, row, group))
    g, r = group[order], row[order]
    first = np.append(True, (g[1:] != g[:-1]) | (r[1:] != r[:-1])) if len(g) else np.zeros(0, dtype=bool)
    out = np.zeros(len(group), dtype=bool)
    out[order[first]] = True
    return out


def token_counts(
    group: Int[np.ndarray, " entry"], token: Int[np.ndarray, " entry"], n: int, keep: int
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"], Int[np.ndarray, "n keep"], Int[np.ndarray, "n keep"]]:
    """On which tokens a group's entries stand.

    Returns:
        Entropy of the tokens (bits), the share of the commonest one, the commonest tokens (-1 where there are fewer)
        and their counts.
    """
    wide = int(token.max()) + 1 if len(token) else 1
    pairs, counts = np.unique(group.astype(np.int64) * wide + token, return_counts=True)
    of, which = pairs // wide, pairs % wide
    total = np.bincount(of, weights=counts, minlength=n)
    share = counts / np.maximum(total[of], 1)
    entropy = np.bincount(of, weights=-share * np.log2(share), minlength=n)
    single = np.zeros(n)
    np.maximum.at(single, of, share)
    order = np.lexsort((which, -counts, of))
    rank = rank_within(of[order])
    first = rank < keep
    tokens, numbers = np.full((n, keep), -1, dtype=np.int64), np.zeros((n, keep), dtype=np.int64)
    tokens[of[order][first], rank[first]] = which[order][first]
    numbers[of[order][first], rank[first]] = counts[order][first]
    return np.maximum(entropy, 0.0), single, tokens, numbers
