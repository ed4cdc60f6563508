"""Merged moments against torch's own over all rows, with a mean far from 0."""

from __future__ import annotations

import torch

from tomoscope.activations import Moments


def test_moments_merge_to_those_of_the_whole() -> None:
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 1e4
    merged = Moments.empty(6)
    for piece in rows.split([1, 200, 99, 200]):
        merged = merged.merge(Moments.of(piece))
    wide = rows.double()
    torch.testing.assert_close(merged.mean, wide.mean(0))
    torch.testing.assert_close(merged.variance, wide.var(0, correction=0))
    torch.testing.assert_close(merged.mean_norm, float(wide.norm(dim=1).mean()))
    assert Moments.empty(6).merge(Moments.empty(6)).n == 0
