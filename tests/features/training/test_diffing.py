"""A crosscoder of two models: what was planted in one of them alone is its own, what both have is not."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from tomoscope.errors import DataError
from tomoscope.features.training import train_differences


def pair(n: int = 6000, width: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a base and of a model with two more features; the features' directions and codes."""
    draw = torch.Generator().manual_seed(4)
    shared = normalize(torch.randn(16, width, generator=draw), dim=1)
    own = normalize(torch.randn(2, width, generator=draw), dim=1)
    on = (torch.rand(n, 16, generator=draw) < 0.12) * (0.5 + torch.rand(n, 16, generator=draw))
    new = (torch.rand(n, 2, generator=draw) < 0.15) * (0.5 + torch.rand(n, 2, generator=draw))
    base = on @ shared + 0.02 * torch.randn(n, width, generator=draw)
    return base, base + 0.5 * new @ own + 0.02 * torch.randn(n, width, generator=draw), own, new


def test_planted_features_of_one_model_are_its_own():
    base, other, own, new = pair()
    crosscoder = train_differences(base, other, latents=20, k=3, steps=800, batch=512, learning_rate=1e-2)
    cosines = normalize(own, dim=1) @ normalize(crosscoder.directions, dim=1).T
    codes = crosscoder.codes(base, other)
    mine = ((crosscoder.share > 0.5) & ((codes > 0).sum(0) > 50)).nonzero()[:, 0]
    assert len(mine) == 2
    assert float(cosines[:, mine].amax(1).min()) > 0.98
    assert float(crosscoder.scaling(base, other)[mine].abs().max()) < 0.05
    gone = other - crosscoder.written(codes, mine)
    assert float((gone - base).square().sum() / (other - base).square().sum()) < 0.3
    for feature in (0, 1):
        best = mine[cosines[feature, mine].argmax()]
        assert float(torch.corrcoef(torch.stack([codes[:, best], new[:, feature]]))[0, 1]) > 0.8


def test_scaling_finds_what_the_base_has():
    """A base feature put into the difference as well: least squares by hand."""
    base, other, _, _ = pair(2000)
    crosscoder = train_differences(base, other, latents=32, k=3, steps=40, batch=512)
    codes = crosscoder.codes(base, other)
    left = base - crosscoder.coder.decode(codes)[:, :24]
    told = crosscoder.scaling(base, other)
    for feature in torch.where((codes > 0).any(0))[0][:5].tolist():
        written = codes[:, feature, None] * crosscoder.directions[feature]
        by_hand = float((left * written).sum() / written.square().sum())
        assert float(told[feature]) == pytest.approx(by_hand, abs=1e-4)
    assert bool((told[(codes == 0).all(0)] == 0).all())


def test_what_can_not_be_paired_is_refused():
    rows = torch.randn(50, 8)
    with pytest.raises(DataError, match="do not align"):
        train_differences(rows, torch.randn(50, 9))
    with pytest.raises(DataError, match="the same"):
        train_differences(rows, rows.clone())
