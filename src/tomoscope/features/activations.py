"""Which features of a dictionary fire: from pre-activations to codes.

ReLU; JumpReLU (Rajamanoharan et al. 2024, arXiv:2407.14435; a code is the pre-activation where it exceeds the feature's
threshold, strictly); TopK (Gao et al. 2024, arXiv:2406.04093; of each sample's k largest the positive ones). A code
that is not zero equals its pre-activation in all three, which attribution relies on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ReLU:
    """max(0, pre-activation)."""

    def __call__(self, pre: Float[Tensor, "*sample feature"]) -> Float[Tensor, "*sample feature"]:
        """Codes, dense."""
        return pre.clamp(min=0)


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """The pre-activation where it exceeds the threshold, else 0.

    Attributes:
        threshold: [feature].
    """

    threshold: Float[Tensor, " feature"]

    def __call__(self, pre: Float[Tensor, "*sample feature"]) -> Float[Tensor, "*sample feature"]:
        """Codes, dense."""
        return pre * (pre > self.threshold.to(pre))


@dataclass(frozen=True)
class TopK:
    """Of each sample's k largest pre-activations, the positive ones."""

    k: int

    def __call__(self, pre: Float[Tensor, "*sample feature"]) -> Float[Tensor, "*sample feature"]:
        """Codes, dense."""
        best, which = pre.topk(min(self.k, pre.shape[-1]), dim=-1)
        return torch.zeros_like(pre).scatter(-1, which, best.clamp(min=0))


Activation = ReLU | JumpReLU | TopK
"""How pre-activations become codes."""
