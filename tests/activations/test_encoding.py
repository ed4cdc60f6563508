"""What the types on disk lose, against their own rounding."""

from __future__ import annotations

import pytest
import torch

from tomoscope.activations.encoding import SCALE, restored, stored
from tomoscope.errors import DataError


@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-11)])
def test_floats_lose_their_rounding_only(kind: str, tolerance: float) -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    back = restored(stored("s", x, kind)["s"], None, torch.float32)
    assert bool(((back - x).abs() <= tolerance * x.abs()).all())


def test_int8_loses_half_a_step_of_its_row() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None]
    x[7] = 0
    held = stored("s", x, "int8")
    back = restored(held["s"], held["s" + SCALE], None)
    assert bool(((back - x).abs() <= x.abs().amax(1, keepdim=True) / 127 * 0.5001).all())


def test_a_float16_that_would_overflow_is_refused() -> None:
    with pytest.raises(DataError, match="bfloat16"):
        stored("s", torch.full((2, 2), 1e5), "float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_rows_are_restored_into_their_place(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    held = stored("s", x, kind)
    out = torch.full((9, 8), torch.nan, dtype=dtype)
    expected = restored(held["s"], held.get("s" + SCALE), dtype)
    assert restored(held["s"], held.get("s" + SCALE), dtype, out) is out
    assert torch.equal(out, expected)
