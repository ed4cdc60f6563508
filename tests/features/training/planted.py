"""Rows that are sparse sums of known directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def planted(n: int = 8192, width: int = 24, features: int = 48, chance: float = 0.05, seed: int = 9) -> tuple:
    """Rows [n, width] with an offset, and the dictionary [feature, width]."""
    draw = torch.Generator().manual_seed(seed)
    dictionary = normalize(torch.randn(features, width, generator=draw), dim=1)
    on = torch.rand(n, features, generator=draw) < chance
    codes = on * (0.5 + torch.rand(n, features, generator=draw))
    return codes @ dictionary + 0.3 * torch.randn(width, generator=draw), dictionary


def best_cosines(found: Tensor, dictionary: Tensor) -> Tensor:
    """[feature], each known direction's largest cosine with a found one."""
    return (normalize(dictionary, dim=1) @ normalize(found, dim=1).T).amax(1)
