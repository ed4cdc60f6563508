"""Newton with conjugate gradients: scikit-learn's minimum for folds, labellings and penalties in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tests.concepts.made import planted
from tomoscope.concepts.linear import shares
from tomoscope.concepts.logistic import logistic
from tomoscope.concepts.principal import Principal


@pytest.mark.parametrize(("n", "width"), [(90, 7), (40, 60)])
@pytest.mark.parametrize("classes", [2, 3])
def test_every_problem_of_a_batch_is_scikit_learns(n, width, classes):
    x, y, _ = planted(n, width, classes=classes)
    x, fold = x.double(), np.arange(n) % 3
    items = Principal.of(x)
    problems = [(f, s) for f in range(3) for s in (1e-3, 1e-1, 10.0)]
    share = torch.tensor(np.array([fold != f for f, _ in problems])).double().T
    target = shares(torch.tensor(y)[None], classes, x).expand(-1, len(problems), -1)
    strengths = torch.tensor([s for _, s in problems], dtype=torch.float64)
    weight, bias, steps, rest = logistic(items, target, strengths, share / share.sum(0), tolerance=1e-9)
    assert rest
    assert 2 < steps < 40
    weight = items.back(weight)
    for i, (one, strength) in enumerate(problems):
        rows = fold != one
        theirs = LogisticRegression(C=1 / (strength * rows.sum()), tol=1e-10, max_iter=20_000)
        theirs.fit((x - items.mean)[rows].numpy(), y[rows])
        np.testing.assert_allclose(weight[i].T, theirs.coef_, rtol=1e-3, atol=1e-4 * np.abs(theirs.coef_).max())
        np.testing.assert_allclose(bias[i], theirs.intercept_, atol=1e-3)


def test_single_precision_comes_to_rest():
    x, y, _ = planted(200, 300, loud=40.0)
    items = Principal.of(x)
    target = shares(torch.tensor(y)[None], 2, x).expand(-1, 3, -1)
    share = torch.full((200, 3), 1 / 200)
    _, _, steps, rest = logistic(items, target, torch.tensor([1e-4, 1e-2, 1.0]), share)
    assert rest
    assert steps < 30


def test_what_has_no_minimum_is_told():
    x = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    target = shares(torch.tensor([[0, 0, 1, 1]]), 2, x)
    weight, _, _, rest = logistic(
        Principal.of(x), target, torch.zeros(1), torch.full((4, 1), 0.25), tolerance=0.0, max_steps=9
    )
    assert not rest
    assert torch.isfinite(weight).all()
