"""The geometric median against its own condition, and against a mean that outliers move."""

from __future__ import annotations

import torch

from tomoscope.features.training import geometric_median


def test_unit_vectors_to_all_rows_add_to_nothing() -> None:
    rows = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)).double() ** 3
    point = geometric_median(rows, steps=1000, tolerance=1e-12)
    away = rows - point
    assert float((away / away.norm(dim=1, keepdim=True)).sum(0).norm()) < 1e-4
    rows[:20] += 1e6
    assert float(geometric_median(rows).norm()) < 5 < float(rows.mean(0).norm())
