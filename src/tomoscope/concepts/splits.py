"""Which items a probe learns from and which it is measured on, and labels that mean nothing.

Items that share a source (`clusters`: one entity, one pair of statements, paraphrases) stay on one side of every split
and in one fold, and labels are shuffled so that what clusters look like is kept: a probe that only recognises the
source then scores no better on the shuffled labels than on nothing. How it can mislead: with few clusters there are few
different shuffles, and the null is coarse.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Int, Shaped

from tomoscope.errors import DataError
from tomoscope.findings.control import shuffled_labels


def cluster_index(clusters: Sequence[Hashable] | np.ndarray) -> Int[np.ndarray, " item"]:
    """Clusters as numbers from 0, in order of appearance."""
    places: dict[Hashable, int] = {}
    return np.array([places.setdefault(key, len(places)) for key in clusters], dtype=int)


def folds_of(
    clusters: Sequence[Hashable] | np.ndarray, count: int, *, seed: int, labels: np.ndarray | None = None
) -> Int[np.ndarray, " item"]:
    """The fold of each item, whole clusters in one fold, folds of about equal size.

    With labels (of classes), clusters are dealt out class by class, so that every fold has its share of each.

    Raises DataError where there are fewer clusters than folds.
    """
    index = cluster_index(clusters)
    sizes = np.bincount(index)
    if len(sizes) < count:
        raise DataError(
            f"{len(index)} items from {len(sizes)} sources can't be cut in {count} folds.",
            remedy="Give more sources, or fewer folds.",
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    if labels is not None and labels.dtype.kind in "iub":
        commonest = np.array([np.bincount(labels[index == cluster]).argmax() for cluster in range(len(sizes))])
        order = order[np.argsort(commonest[order], kind="stable")]
    of_cluster = np.empty(len(sizes), dtype=int)
    if labels is not None:
        of_cluster[order] = np.arange(len(sizes)) % count  # dealt out, so that classes are spread
    else:
        of_cluster[order] = np.minimum(np.cumsum(sizes[order]) * count // (sizes.sum() + 1), count - 1)
    return of_cluster[index]


def split(
    clusters: Sequence[Hashable] | np.ndarray, *, share: float = 0.5, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to measure on, `share` of the items in the second; whole clusters on one side."""
    if not 0 < share < 1:
        raise DataError(f"A share of {share} for the held-out items.", remedy="Give one between 0 and 1.")
    index = cluster_index(clusters)
    n = int(index.max()) + 1
    if n < 2:
        raise DataError("All items are of one source.", remedy="Give items of two sources or more.")
    kinds = np.zeros(n, dtype=int)
    if labels is not None and labels.dtype.kind in "iub":  # of each class its share of the sources
        kinds = np.array([np.bincount(labels[index == cluster]).argmax() for cluster in range(n)])
    order, held = np.random.default_rng(seed).permutation(n), np.zeros(n, dtype=bool)
    for kind in np.unique(kinds):
        members = order[kinds[order] == kind]
        count = round(share * len(members))
        held[members[: max(1, min(len(members) - 1, count)) if len(members) > 1 else count]] = True
    if held.all() or not held.any():
        held[order[0]] = not held[order[0]]
    return np.flatnonzero(~held[index]), np.flatnonzero(held[index])


def null_labels(
    labels: Shaped[np.ndarray, " item"], clusters: Sequence[Hashable] | np.ndarray, *, n: int, seed: int
) -> Shaped[np.ndarray, "draw item"]:
    """Labels shuffled `n` times: inside each cluster, and whole clusters' labels exchanged between clusters of a size.

    Where every item is its own cluster this is a plain shuffle; where a cluster has one label throughout, clusters
    exchange theirs; where a cluster is a pair of both labels, the pair's order is tossed.
    """
    labels, index = np.asarray(labels), cluster_index(clusters)
    if len(np.unique(index)) == len(index):
        return shuffled_labels(labels, n=n, seed=seed)
    out = np.empty((n, len(labels)), dtype=labels.dtype)
    generator = np.random.default_rng(seed)
    sizes = np.bincount(index)
    rows = np.argsort(index, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for size in np.unique(sizes):
        members = np.flatnonzero(sizes == size)
        places = rows[starts[members][:, None] + np.arange(size)]  # [cluster, item of it]
        blocks = np.repeat(labels[places][None], n, axis=0)
        order = generator.permuted(np.tile(np.arange(len(members)), (n, 1)), axis=1)
        blocks = np.take_along_axis(blocks, order[..., None], axis=1)
        out[:, places] = generator.permuted(blocks, axis=2)
    return out


def control_labels(
    types: Sequence[Hashable] | np.ndarray, labels: Int[np.ndarray, " item"], *, n: int, seed: int
) -> Int[np.ndarray, "draw item"]:
    """Control tasks (Hewitt and Liang 2019): each type of item has a random label, drawn from the labels."""
    index = cluster_index(types)
    generator = np.random.default_rng(seed)
    return generator.choice(np.asarray(labels), size=(n, int(index.max()) + 1))[:, index]
