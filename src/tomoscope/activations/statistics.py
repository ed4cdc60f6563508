"""Mean, spread and norm of activations as they stream by, merged over pieces in any order.

Welford's update in its pairwise form (Chan et al. 1979): sums of squares are taken about each piece's own mean, so that
a mean far from 0, as residual streams have it, does not eat the digits of the variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Moments:
    """Running moments of rows [row, width], in float64.

    Attributes:
        n: rows seen.
        mean: [width].
        squares: [width], sums of squared deviations from the mean.
        norms: sum of the rows' Euclidean norms.
    """

    n: int
    mean: Float[Tensor, " width"]
    squares: Float[Tensor, " width"]
    norms: float

    @classmethod
    def empty(cls, width: int) -> Moments:
        """Of no rows."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64), 0.0)

    @classmethod
    def of(cls, rows: Float[Tensor, "row width"]) -> Moments:
        """Of some rows."""
        if not len(rows):
            return cls.empty(rows.shape[1])
        wide = rows.double()
        mean = wide.mean(0)
        return cls(len(rows), mean, (wide - mean).square().sum(0), float(wide.norm(dim=1).sum()))

    def merge(self, other: Moments) -> Moments:
        """Of both."""
        n = self.n + other.n
        if not n:
            return self
        step = other.mean - self.mean
        return Moments(
            n, self.mean + step * (other.n / n),
            self.squares + other.squares + step.square() * (self.n * other.n / n), self.norms + other.norms,
        )  # fmt: skip

    @property
    def variance(self) -> Float[Tensor, " width"]:
        """[width], of the population."""
        return self.squares / max(self.n, 1)

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return self.norms / max(self.n, 1)

    @property
    def total_variance(self) -> float:
        """Mean squared distance from the mean: what a fraction of variance unexplained is a fraction of."""
        return float(self.variance.sum())
