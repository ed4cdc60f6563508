"""Matching against brute force, and against a dictionary that was only shuffled."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from tests.features.parts import coder, normal
from tomoscope.errors import DataError
from tomoscope.features import SparseCoder, match_features
from tomoscope.features import stability as module
from tomoscope.features.stability import matching, max_cosines, unit


def test_the_matching_is_the_best_of_all():
    left, right = unit(normal(5, 4)), unit(normal(5, 4, seed=9))
    rows, columns = matching(left, right)
    best = max(sum(float(left[i] @ right[j]) for i, j in enumerate(order)) for order in permutations(range(5)))
    assert float((left[rows] * right[columns]).sum()) == pytest.approx(best, abs=1e-5)
    torch.testing.assert_close(max_cosines(left, right), (left @ right.T).amax(-1))


def test_a_shuffled_dictionary_is_the_same_and_a_random_one_is_chance():
    one = coder(64, 100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    same = SparseCoder(one.W_enc[:, order], one.W_dec[order] * 3.0, one.b_enc[order], one.b_dec)
    found = match_features(one, same)
    assert found.cosine.value == pytest.approx(1.0, abs=1e-5)
    assert found.shared.value == 1.0
    assert (order[found.pairs[:, 1]].numpy() == found.pairs[:, 0]).all()
    other = coder(64, 100, W_dec=normal(100, 64, seed=5), W_enc=normal(64, 100, seed=6))
    chance = match_features(one, other, draws=3)
    assert chance.shared.value == 0.0
    assert abs(chance.cosine.value - chance.control.value) < 0.03
    part = match_features(one, same, alive=(torch.arange(40), torch.arange(100)))
    assert len(part.pairs) == 40
    assert part.cosine.value == pytest.approx(1.0, abs=1e-5)


def test_beyond_the_exact_size_the_nearest_are_matched(monkeypatch):
    one = coder(32, 60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    W = one.W_dec[order] + 0.1 * normal(60, 32, seed=8)
    other = SparseCoder(one.W_enc[:, order], W, one.b_enc, one.b_dec)
    exact = match_features(one, other)
    monkeypatch.setattr(module, "EXACT", 10)
    near = match_features(one, other)
    assert near.cosine.value == pytest.approx(exact.cosine.value, abs=1e-5)
    assert len(match_features(one, coder(32, 30, W_dec=W[:30], W_enc=one.W_enc[:, :30])).pairs) <= 30


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(DataError, match="widths"):
        match_features(coder(6), coder(7))
    with pytest.raises(DataError, match="living"):
        match_features(coder(), coder(), alive=(torch.zeros(0), torch.arange(10)))
