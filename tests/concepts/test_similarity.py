"""Similarities on data whose answer is known."""

from __future__ import annotations

import pytest
import torch

from tomoscope.concepts.similarity import cka, mutual_neighbours, permutation_null, procrustes, svcca
from tomoscope.errors import DataError


def normal(n, p, seed):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "p"), [(200, 32), (40, 64), (64, 200)])
def test_unrelated_data_are_not_alike(n, p):
    values = [cka(normal(n, p, 2 * seed), normal(n, p, 2 * seed + 1)) for seed in range(8)]
    assert abs(sum(values) / len(values)) < 0.05
    x, y = normal(n, p, 90), normal(n, p, 91)
    plain = (x - x.mean(0), y - y.mean(0))
    biased = (plain[1].T @ plain[0]).square().sum() / ((plain[0].T @ plain[0]).norm() * (plain[1].T @ plain[1]).norm())
    assert float(biased) > 0.1


@pytest.mark.parametrize("measure", [cka, svcca, procrustes, mutual_neighbours])
def test_a_rotation_changes_nothing(measure):
    x = normal(120, 10, 0) * torch.arange(1, 11)
    turned = 3.0 * x @ torch.linalg.qr(normal(10, 10, 1))[0] + 5.0
    assert measure(x, turned) == pytest.approx(1.0, abs=1e-6)
    null = permutation_null(measure, x, turned, n=10, seed=0)
    assert null.max() < measure(x, turned) - 0.2


def test_the_definition_over_all_pairs():
    """Debiased HSIC is the mean over quadruples of different items (Song et al. 2012); written out on few."""
    from itertools import permutations

    x, y = normal(6, 3, 0), normal(6, 2, 1)
    grams = [(a - a.mean(0)) @ (a - a.mean(0)).T for a in (x, y)]

    def hsic(k, m):
        total, count = 0.0, 0
        for i, j, q, r in permutations(range(6), 4):
            total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
            count += 1
        return total / count

    expected = hsic(*grams) / (hsic(grams[0], grams[0]) * hsic(grams[1], grams[1])).sqrt()
    assert cka(x, y) == pytest.approx(float(expected), abs=1e-9)


def test_what_does_not_fit():
    with pytest.raises(DataError, match="items"):
        cka(normal(5, 2, 0), normal(6, 2, 0))
