"""Principal axes: the same ridge as a solve, and nothing made of rounding."""

from __future__ import annotations

import pytest
import torch

from tests.concepts.made import planted
from tomoscope.concepts.principal import Principal
from tomoscope.errors import DataError


@pytest.mark.parametrize(("n", "width"), [(50, 8), (12, 30)])
def test_a_division_solves_what_a_solve_does(n, width):
    x = planted(n, width)[0].double()
    items = Principal.of(x)
    centred = x - x.mean(0)
    assert items.coordinates.shape == (n, min(n, width))
    torch.testing.assert_close(items.coordinates @ items.axes.T, centred)
    target = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = items.back(items.inverse(2.0)[:, None] * (items.coordinates.T @ target))
    torch.testing.assert_close(
        mine, torch.linalg.solve(centred.T @ centred + 2 * torch.eye(width, dtype=x.dtype), centred.T @ target)
    )


def test_the_slow_way_is_the_same(monkeypatch):
    x = planted(60, 9)[0].double()
    quick = Principal.of(x)

    def fails(_):
        raise torch.linalg.LinAlgError("too many repeated eigenvalues")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    slow = Principal.of(x)
    torch.testing.assert_close(slow.squares, quick.squares)
    torch.testing.assert_close(slow.coordinates.abs(), quick.coordinates.abs())


def test_axes_without_variance_are_left_out():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(3, 6)
    items = Principal.of(x)
    assert int((items.squares > 0).sum()) == 1
    assert int((items.inverse(0.0) > 0).sum()) == 1
    assert torch.isfinite(items.inverse(0.0)).all()
    assert float(Principal.of(torch.ones(5, 4)).unit) == 1
    with pytest.raises(DataError, match="not finite"):
        Principal.of(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
