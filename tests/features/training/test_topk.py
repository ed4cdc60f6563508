"""The two-step selection against torch's own, with ties and rows that are not positive."""

from __future__ import annotations

import pytest
import torch

from tomoscope.features.training.topk import top_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "k"), [(4096, 32), (2048, 32), (640, 7), (100, 100)])
def test_values_are_those_of_topk_and_columns_hold_them(width: int, k: int, dtype: torch.dtype) -> None:
    rows = torch.randn(50, width, generator=torch.Generator().manual_seed(k)).to(dtype)
    rows[3] = -rows[3].abs()
    rows[4] = 0
    values, columns = top_k(rows, k)
    assert torch.equal(values.clamp(min=0).sort(1)[0], rows.topk(k)[0].clamp(min=0).sort(1)[0])
    assert torch.equal(rows.gather(1, columns), values)
    assert all(len(row.unique()) == k for row in columns)
