"""Every reader against scikit-learn's own: the same minimum, whatever the path to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid

from tests.concepts.made import planted
from tomoscope.concepts.linear import fit
from tomoscope.errors import DataError


def close(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    theirs = torch.as_tensor(theirs).to(ours)
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize(("n", "width"), [(120, 12), (30, 40)])
@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_is_scikit_learns(n, width, classes):
    x, y, _ = planted(n, width, classes=classes)
    x = x.double()
    for strength in (1e-3, 1e-1):
        mine = fit(x, torch.tensor(y)[None], classes, strengths=torch.tensor([strength]), tolerance=1e-9)
        assert mine.converged
        theirs = LogisticRegression(C=1 / (strength * n), tol=1e-10, max_iter=20_000).fit(x.numpy(), y)
        close(mine.weight[0].T, theirs.coef_)
        close(mine.bias[0], theirs.intercept_, 1e-3)


def test_many_problems_are_as_one_at_a_time():
    x, y, _ = planted(100, 10)
    rows = torch.stack([torch.tensor(y), torch.tensor(y).roll(1), 1 - torch.tensor(y)])
    strengths = torch.tensor([1e-3, 1e-2, 1.0])
    for method in ("logistic", "ridge", "means", "discriminant"):
        together = fit(x.double(), rows, 2, method=method, strengths=strengths, tolerance=1e-9)
        for i in range(3):
            alone = fit(x.double(), rows[i : i + 1], 2, method=method, strengths=strengths[i : i + 1], tolerance=1e-9)
            torch.testing.assert_close(together.weight[i], alone.weight[0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(together.scores(x)[:, i], alone.scores(x)[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "width"), [(120, 12), (30, 40)])
def test_ridge_is_scikit_learns(n, width):
    x, y, _ = planted(n, width)
    centred = x.double() - x.double().mean(0)
    unit = float(centred.square().sum() / min(n, width))
    mine = fit(x.double(), torch.tensor(y)[None], 2, method="ridge", strengths=torch.tensor([0.1]))
    theirs = Ridge(alpha=float(torch.tensor(0.1)) * unit).fit(x.double().numpy(), 2 * y - 1)
    close(mine.weight[0, :, 0], theirs.coef_, 1e-6)
    close(mine.bias[0], np.array([theirs.intercept_]), 1e-6)


@pytest.mark.parametrize("classes", [2, 3])
def test_discriminant_is_linear_discriminant_analysis(classes):
    x, y, _ = planted(200, 8, classes=classes)
    mine = fit(x.double(), torch.tensor(y)[None], classes, method="discriminant", strengths=torch.zeros(1))
    theirs = LinearDiscriminantAnalysis(solver="svd").fit(x.double().numpy(), y)
    said = mine.scores(x)[:, 0]
    if classes == 2:
        close(mine.weight[0, :, 0], theirs.coef_[0], 0.02)
        cosine = torch.nn.functional.cosine_similarity(mine.weight[0, :, 0], torch.tensor(theirs.coef_[0]), dim=0)
        assert cosine > 0.999999
        assert ((said[:, 0] > 0).numpy() == (theirs.predict(x.numpy()) == 1)).all()
    else:
        assert (said.argmax(-1).numpy() == theirs.predict(x.double().numpy())).all()


def test_a_loud_direction_turns_the_means_away_and_not_the_discriminant():
    x, y, _ = planted(100, loud=40.0)
    labels = torch.tensor(y)[None]
    right = [
        ((fit(x[:50], labels[:, :50], 2, method=m).scores(x[50:])[:, 0, 0] > 0) == labels[0, 50:]).float().mean()
        for m in ("discriminant", "means")
    ]
    assert right[0] > 0.85
    assert right[1] < right[0] - 0.05


@pytest.mark.parametrize("classes", [2, 4])
def test_means_are_the_nearest_class_mean(classes):
    x, y, _ = planted(150, 9, classes=classes)
    mine = fit(x.double(), torch.tensor(y)[None], classes, method="means").scores(x.double())[:, 0]
    said = (mine[:, 0] > 0).long() if classes == 2 else mine.argmax(-1)
    assert (said.numpy() == NearestCentroid().fit(x.double().numpy(), y).predict(x.double().numpy())).all()


def test_numbers():
    x, _, concept = planted(200, 10)
    y = x @ concept
    mine = fit(x, y[None], 0, method="ridge", strengths=torch.tensor([1e-6]))
    torch.testing.assert_close(mine.scores(x)[:, 0, 0], y, rtol=1e-3, atol=1e-3)


def test_weights_of_items_are_as_the_items_alone():
    x, y, _ = planted(80, 6)
    labels, keep = torch.tensor(y)[None].expand(2, -1), torch.zeros(2, 80)
    keep[0, :30], keep[1, 20:70] = 1, 1
    for method in ("logistic", "means"):
        both = fit(x.double(), labels, 2, method=method, weights=keep, tolerance=1e-10)
        for i in range(2):
            rows = keep[i].bool()
            alone = fit(x[rows].double(), labels[i : i + 1, rows], 2, method=method, tolerance=1e-10)
            torch.testing.assert_close(both.weight[i], alone.weight[0], rtol=1e-4, atol=1e-6)


def test_constant_and_zero_activations_say_nothing():
    y = torch.tensor([0, 1] * 20)[None]
    for x in (torch.zeros(40, 5), torch.ones(40, 5) * 3):
        for method in ("logistic", "ridge", "means", "discriminant"):
            scores = fit(x, y, 2, method=method).scores(x)
            assert torch.isfinite(scores).all()
            assert float(scores.abs().max()) < 1e-4


def test_what_cannot_be_fitted_says_so():
    x, y, _ = planted(20, 4)
    with pytest.raises(DataError, match="no probe method"):
        fit(x, torch.tensor(y)[None], 2, method="svm")
    with pytest.raises(DataError, match="not finite"):
        fit(x * float("nan"), torch.tensor(y)[None], 2)
    with pytest.raises(DataError, match="class has no items"):
        fit(x, torch.zeros(1, 20, dtype=torch.long), 2, method="means")
    with pytest.raises(DataError, match="ridge alone"):
        fit(x, torch.randn(1, 20), 0)
