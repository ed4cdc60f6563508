"""Do two dictionaries have the same features? Decoder directions matched one to one between seeds.

The Hungarian matching pairs each feature of one dictionary with one of the other so that the mean cosine is largest
(mean max cosine similarity, Sharkey et al. 2022, with each direction used once); a feature counts as shared where its
pair's cosine exceeds 0.7 (Paulo and Belrose 2025, arXiv:2501.16615, who find about 30 % shared between seeds of a
131k dictionary; they ask it of encoder and decoder).

How it can mislead: in a low dimension random directions have large best cosines too, so the same number is computed
for random directions of the same count (the control); dead features never move from their start: leave them out.
Exact up to `EXACT` features a side; beyond, the matching is among each feature's nearest `NEAREST`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, wilson_interval

SHARED = 0.7
EXACT = 4096
NEAREST = 16
PIECE = 2**24


@dataclass(frozen=True, eq=False)
class Stability:
    """How alike two dictionaries are.

    Attributes:
        pairs: [pair, 2], matched features.
        decoder: [pair], cosines of decoder directions.
        encoder: [pair], of encoder directions.
        cosine: the matched mean cosine of decoders.
        shared: features whose decoder and encoder both exceed 0.7.
        control: the matched mean cosine of random directions of the same counts.
    """

    pairs: Int[np.ndarray, "pair 2"]
    decoder: Float[np.ndarray, " pair"]
    encoder: Float[np.ndarray, " pair"]
    cosine: Estimate
    shared: Estimate
    control: Estimate


def match_features(
    first: SparseCoder,
    second: SparseCoder,
    *,
    alive: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    draws: int = 1,
    seed: int = 0,
) -> Stability:
    """Match the features of two dictionaries of one site.

    Args:
        first, second: the dictionaries.
        alive: indices of the features of each that ever fire; all where not given.
        draws: of the control.
        seed: of the control and the intervals.

    Raises:
        DataError: dictionaries of different widths, or without features.
    """
    if first.W_dec.shape[1] != second.W_dec.shape[1]:
        raise DataError("Dictionaries of different widths have no features in common.")
    kept = alive or (torch.arange(first.n_features), torch.arange(second.n_features))
    one, other = (torch.as_tensor(np.asarray(index)).long() for index in kept)
    if not len(one) or not len(other):
        raise DataError("A dictionary without living features can't be matched.")
    left, right = unit(first.W_dec[one]), unit(second.W_dec[other])
    rows, columns = matching(left, right)
    decoder = (left[rows] * right[columns]).sum(-1).numpy()
    encoder = (unit(first.W_enc.T[one[rows]]) * unit(second.W_enc.T[other[columns]])).sum(-1).numpy()
    generator = torch.Generator().manual_seed(seed)
    chance = []
    for _ in range(draws):
        drawn = [unit(torch.randn(side.shape, generator=generator)) for side in (left, right)]
        pair = matching(*drawn)
        chance.append((drawn[0][pair[0]] * drawn[1][pair[1]]).sum(-1).numpy())
    return Stability(
        torch.stack([one[rows], other[columns]], -1).numpy(), decoder, encoder,
        bootstrap_interval(decoder, seed=seed, unit="cosine"),
        wilson_interval(int(((decoder > SHARED) & (encoder > SHARED)).sum()), len(decoder), unit="share of features"),
        bootstrap_interval(np.concatenate(chance), seed=seed, unit="cosine"),
    )  # fmt: skip


def max_cosines(first: Float[Tensor, "feature d"], second: Float[Tensor, "other d"]) -> Float[Tensor, " feature"]:
    """For each direction of the first the largest cosine with any of the second (unmatched), in bounded memory."""
    left, right = unit(first), unit(second)
    step = max(1, PIECE // len(right))
    return torch.cat([(left[i : i + step] @ right.T).amax(-1) for i in range(0, len(left), step)])


def unit(rows: Tensor) -> Tensor:
    """Rows of norm 1 in float32; a zero row stays."""
    wide = rows.float()
    return wide / wide.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def matching(left: Float[Tensor, "a d"], right: Float[Tensor, "b d"]) -> tuple[Tensor, Tensor]:
    """Rows of both that are paired; as many as the smaller side has (fewer beyond EXACT, where neighbours run out)."""
    if max(len(left), len(right)) <= EXACT:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment((left @ right.T).numpy(), maximize=True)
        return torch.from_numpy(rows), torch.from_numpy(columns)
    if len(left) > len(right):
        columns, rows = matching(right, left)
        return rows, columns
    return _near_matching(left, right)


def _near_matching(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The best matching in which everyone has one of its nearest, or none: a sparse assignment."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    step, near = max(1, PIECE // len(right)), min(NEAREST, len(right))
    found = [(left[i : i + step] @ right.T).topk(near) for i in range(0, len(left), step)]
    values, places = torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
    n, m = len(left), len(right)
    # each row may also stay alone, at a column of its own which costs more than any cosine
    weights = torch.cat([2.0 - values, torch.full((n, 1), 4.0)], 1)
    columns = torch.cat([places, m + torch.arange(n)[:, None]], 1)
    starts = np.arange(n + 1) * (near + 1)
    graph = csr_matrix((weights.double().flatten().numpy(), columns.flatten().numpy(), starts), shape=(n, m + n))
    rows, matched = min_weight_full_bipartite_matching(graph)
    keep = matched < m
    return torch.from_numpy(rows[keep]).long(), torch.from_numpy(matched[keep]).long()
