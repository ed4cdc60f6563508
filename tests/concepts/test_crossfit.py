"""Held-out scores of all folds at once, against one fit a fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.concepts.made import planted
from tomoscope.concepts.crossfit import crossfit
from tomoscope.concepts.linear import fit
from tomoscope.concepts.principal import Principal


@pytest.mark.parametrize(("n", "width"), [(120, 9), (30, 50), (400, 3)])
@pytest.mark.parametrize(("method", "classes"), [
    ("logistic", 2), ("logistic", 3), ("ridge", 2), ("ridge", 3), ("ridge", 0), ("means", 2), ("discriminant", 3),
])  # fmt: skip
def test_as_one_fit_a_fold(n, width, method, classes):
    x, y, _ = planted(n, max(width, 5), classes=max(classes, 2))
    x = x.double()[:, :width]
    labels = x @ torch.randn(width, dtype=x.dtype) if classes == 0 else torch.tensor(y)
    fold = torch.as_tensor(np.random.default_rng(0).permutation(np.arange(n) % 4))
    strengths = torch.tensor([1e-2, 1.0], dtype=x.dtype)
    mine = crossfit(Principal.of(x), labels, fold, classes, strengths, method=method, tolerance=1e-10).scores
    assert mine.shape == (2, n, 1 if classes <= 2 else classes)
    for one in range(4):
        inside, held = fold != one, fold == one
        alone = fit(
            x[inside], labels[None, inside].expand(2, -1), classes, method=method, strengths=strengths, tolerance=1e-10
        )
        torch.testing.assert_close(mine[:, held], alone.scores(x[held]).transpose(0, 1), rtol=1e-4, atol=1e-5)
