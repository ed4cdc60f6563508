"""Activations whose concept is known: a class along one direction, loud nuisance along others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def planted(
    n: int = 240, width: int = 16, *, step: float = 3.0, loud: float = 6.0, seed: int = 0, classes: int = 2
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Activations, labels, and the concept's unit direction (of two classes)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    x = x + loud * torch.randn(n, 1, generator=generator) * basis[:, 1]
    labels = torch.randint(0, classes, (n,), generator=generator)
    if classes == 2:
        x = x + step * (labels[:, None] - 0.5) * basis[:, 0]
    else:
        x = x + step * basis[:, 2 : 2 + classes].T[labels]
    return x + 2.0, labels.numpy(), basis[:, 0]
