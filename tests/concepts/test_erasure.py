"""Erasure: the closed forms against their definitions and the reference library; as edits of a running model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.concepts.made import planted
from tests.zoo import ZOO
from tomoscope.concepts.erasure import (
    METHODS,
    Moments,
    cross_covariance,
    equalise,
    inlp,
    one_hot,
    remaining,
)
from tomoscope.errors import DataError
from tomoscope.model import build_subject


def data(n=300, width=8, classes=2, seed=0):
    x, y, _ = planted(n, width, classes=classes, seed=seed)
    return x.double(), y, one_hot(y, classes)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_no_covariance_is_left(method, classes):
    x, _, z = data(classes=classes)
    other = torch.randn(300, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + x[:, :1]
    keep = cross_covariance(x, other)
    eraser = Moments.of(x, z).eraser(method, keep=keep)
    erased = eraser(x)
    assert float(cross_covariance(erased, z).abs().max()) < 1e-10
    assert eraser.rank == classes - 1
    torch.testing.assert_close(erased.mean(0), x.mean(0))
    torch.testing.assert_close(eraser(erased), erased)
    if method == "splice":
        torch.testing.assert_close(cross_covariance(erased, other), keep, rtol=1e-8, atol=1e-9)


def test_leace_changes_least():
    x, _, z = data()
    moments = Moments.of(x, z)
    sizes = {m: float((moments.eraser(m, keep=cross_covariance(x, x[:, :1]))(x) - x).square().sum()) for m in METHODS}
    assert min(sizes, key=sizes.get) == "leace"


@pytest.mark.parametrize("method", ["leace", "orthogonal"])
@pytest.mark.parametrize("classes", [2, 3])
def test_equal_to_concept_erasure(method, classes):
    library = pytest.importorskip("concept_erasure", reason="concept-erasure is not installed")
    x, _, z = data(classes=classes)
    name = {"orthogonal": "orth"}.get(method, method)
    theirs = library.LeaceFitter.fit(x, z, method=name, shrinkage=False)
    torch.testing.assert_close(Moments.of(x, z).eraser(method)(x), theirs.eraser(x), rtol=1e-9, atol=1e-9)


def test_a_stream_is_as_one_batch():
    x, _, z = data()
    stream = Moments.empty(8, 2)
    for start in range(0, 300, 70):
        stream.update(x[start : start + 70], z[start : start + 70])
    torch.testing.assert_close(stream.eraser()(x), Moments.of(x, z).eraser()(x), rtol=1e-10, atol=1e-10)


def test_a_small_real_effect_is_erased_too():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 4, generator=g, dtype=torch.float64)
    z = torch.randint(0, 2, (20_000, 1), generator=g).double()
    x[:, :1] += 0.02 * z
    assert float(cross_covariance(Moments.of(x, z).eraser()(x), z).abs().max()) < 1e-12


def test_what_remains():
    """Nothing for a linear probe; what lies in the spread, an MLP still finds."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (1200,), generator=g).numpy()
    x = torch.randn(1200, 6, generator=g)
    x[:, 0] += 2.0 * torch.tensor(y)
    x[:, 1] *= torch.where(torch.tensor(y) == 1, 3.0, 0.3)
    train, test = np.arange(800), np.arange(800, 1200)
    eraser = Moments.of(x[train], one_hot(y[train])).eraser()
    before, after = (remaining(v, y, train=train, test=test) for v in (x, eraser(x)))
    assert before.linear.mean() > 0.75
    assert after.linear.mean() < after.majority + 0.06
    assert after.mlp.mean() > 0.7


def test_projection_step_by_step():
    x, y, _ = data(400)
    eraser = inlp(x, y)
    assert eraser.rank >= 1
    torch.testing.assert_close(eraser.reads.T @ eraser.reads, torch.eye(eraser.rank, dtype=torch.float64))
    found = remaining(eraser(x), y, train=np.arange(200), test=np.arange(200, 400))
    assert found.linear.mean() < found.majority + 0.12
    with pytest.raises(DataError, match="finds nothing"):
        inlp(torch.randn(60, 4, generator=torch.Generator().manual_seed(5)), np.arange(60) % 2)


def test_means_made_equal():
    x, y, z = data()
    assert float(cross_covariance(equalise(x, y), z).abs().max()) < 1e-12


def test_as_an_edit_of_a_running_model():
    subject = build_subject(ZOO["llama"].build())
    prompts = [[5, 9, 17], [8, 30, 31, 32], [21, 22]]
    site = "layer.1.resid_post"
    before = subject.read(prompts, site, at="last")[site]
    eraser = Moments.of(before, one_hot(np.array([0, 1, 1]))).eraser("orthogonal")
    erased = subject.read(prompts, site, at="last", edits=[eraser.edit(site)])[site]
    torch.testing.assert_close(erased, eraser(before), rtol=1e-4, atol=1e-5)
    direction = eraser.direction("some", site)
    same = subject.read(prompts, site, at="last", edits=[direction.erase()])[site]
    torch.testing.assert_close(same, erased, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_erased_says_so():
    x, _, z = data()
    with pytest.raises(DataError, match="no erasure"):
        Moments.of(x, z).eraser("all")
    with pytest.raises(DataError, match="do not vary"):
        Moments.of(x, torch.ones(300, 1)).eraser()
    with pytest.raises(DataError, match="to keep"):
        Moments.of(x, z).eraser("splice")
    with pytest.raises(DataError, match="in the span"):
        Moments.of(x, z).eraser("splice", keep=cross_covariance(x, z))
