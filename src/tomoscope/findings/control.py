"""What a number would be by chance: shuffled labels, random directions of equal norm, random subsets of equal size.

Hewitt and Liang (2019) for control tasks; Wang et al. (2023) for random circuits of equal size. A control misleads when
it is easier to beat than what a sceptic would put up: prefer the one that keeps most (same norm, same number of heads
*per layer*, same label counts). Everything is seeded numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

from tomoscope.errors import DataError


def shuffled_labels(
    labels: Sequence[Hashable] | np.ndarray,
    *,
    n: int = 1,
    seed: int,
    groups: Sequence[Hashable] | np.ndarray | None = None,
) -> np.ndarray:
    """The labels in `n` random orders, [n, item]; with `groups`, shuffled inside each group only."""
    array = np.asarray(labels)
    generator = np.random.default_rng(seed)
    tiled = np.repeat(array[None], n, axis=0)
    if groups is None:
        return generator.permuted(tiled, axis=1)
    if len(groups) != len(array):
        raise DataError(f"{len(groups)} group keys for {len(array)} labels.", remedy="Give one key per label.")
    for key in dict.fromkeys(groups):
        members = np.flatnonzero([other == key for other in groups])
        tiled[:, members] = generator.permuted(tiled[:, members], axis=1)
    return tiled


def random_directions(
    like: Float[np.ndarray, "*batch d_model"],
    *,
    n: int = 1,
    seed: int,
    covariance: Float[np.ndarray, "d_model d_model"] | None = None,
) -> Float[np.ndarray, "n *batch d_model"]:
    """`n` random directions for each vector of `like`, uniform on the sphere of the vector's own norm.

    With `covariance`, directions are drawn with the activations' own covariance (a stronger control, as most of the
    stream's variance lies in few directions), then scaled to the norm.
    """
    vectors = np.asarray(like, dtype=float)
    drawn = np.random.default_rng(seed).standard_normal((n, *vectors.shape))
    if covariance is not None:
        eigenvalues, basis = np.linalg.eigh(np.asarray(covariance, dtype=float))
        drawn = (drawn * np.sqrt(np.clip(eigenvalues, 0, None))) @ basis.T
    lengths = np.linalg.norm(drawn, axis=-1, keepdims=True)
    return drawn / np.where(lengths == 0, 1.0, lengths) * np.linalg.norm(vectors, axis=-1, keepdims=True)


def random_subsets(
    population: int | Sequence[Hashable],
    size: int,
    *,
    n: int,
    seed: int,
    exclude: Sequence[int] | np.ndarray = (),
    strata: Sequence[Hashable] | np.ndarray | None = None,
    like: Sequence[int] | np.ndarray = (),
) -> Int[np.ndarray, "n size"]:
    """`n` random subsets of `size` indices of the population, without replacement inside a subset.

    `exclude` leaves indices out (the circuit itself). With `strata` (one key per member, for example its layer) each
    subset has as many members of each stratum as the subset `like` has. Raises DataError where too few are left.
    """
    total = population if isinstance(population, int) else len(population)
    allowed = np.setdiff1d(np.arange(total), np.asarray(exclude, dtype=int))
    generator = np.random.default_rng(seed)
    if strata is None:
        return _draw(allowed, size, n, generator)
    if len(strata) != total or len(like) != size:
        raise DataError(
            "Subsets by stratum need one stratum per member, and a subset of the wanted size to be like.",
            remedy="Give `strata` for the whole population and `like` of length `size`.",
        )
    parts = []
    for key in dict.fromkeys(strata[index] for index in like):
        members = np.array([index for index in allowed if strata[index] == key], dtype=int)
        parts.append(_draw(members, sum(bool(strata[index] == key) for index in like), n, generator))
    return np.concatenate(parts, axis=1) if parts else np.empty((n, 0), dtype=int)


def _draw(allowed: np.ndarray, size: int, n: int, generator: np.random.Generator) -> np.ndarray:
    if size > len(allowed):
        raise DataError(
            f"A random subset of {size} cannot be drawn from the {len(allowed)} members that are left.",
            remedy="Ask for a smaller control, or exclude less.",
        )
    return allowed[np.argsort(generator.random((n, len(allowed))), axis=1)[:, :size]]


def stable_seed(*parts: str | int) -> int:
    """A seed of 63 bits that follows from its parts alone: the same on every machine, in every process."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
