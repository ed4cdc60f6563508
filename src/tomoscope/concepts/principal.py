"""Items in their principal axes: one decomposition of a site that serves every labelling, fold and penalty.

    p = Principal.of(x)
    p.coordinates        [item, axis]: x less its mean, turned; no axis is correlated with another
    p.solve(t, penalty)  (x^T x + penalty)^-1 t, in these axes a division

A fit's time goes into factorising the Gram matrix; in these axes a ridge of any penalty is a division, and a logistic
fit has a preconditioner that is a division too. How it can mislead: axes without variance hold rounding only, and are
treated as if they were not there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.errors import DataError


@dataclass(frozen=True, eq=False)
class Principal:
    """Items turned into the axes of their Gram matrix.

    Attributes:
        coordinates: [item, axis]; axes = min(items, width).
        squares: [axis] sum over items of the squared coordinate, 0 where there is only rounding.
        axes: [width, axis] orthonormal.
        mean: [width] of the items.
    """

    coordinates: Float[Tensor, "item axis"]
    squares: Float[Tensor, " axis"]
    axes: Float[Tensor, "width axis"]
    mean: Float[Tensor, " width"]

    @classmethod
    def of(cls, x: Float[Tensor, "item width"]) -> Principal:
        """Decompose. Raises DataError for activations that are not finite."""
        if not torch.isfinite(x).all():
            raise DataError("An activation is not finite.", remedy="Look at the model in float32.")
        mean = x.mean(0)
        centred, basis = x - mean, None
        if len(x) < x.shape[1]:  # nothing is learned outside the span of the items
            basis, flat = torch.linalg.qr(centred.T)
            centred = flat.T
        values, vectors = _eigen(centred.T @ centred)
        floor = len(values) * torch.finfo(x.dtype).eps * values[-1].clamp(min=1e-20)
        squares = torch.where(values > floor, values, torch.zeros_like(values))
        return cls(centred @ vectors, squares, vectors if basis is None else basis @ vectors, mean)

    @property
    def unit(self) -> Float[Tensor, ""]:
        """Mean of the squares over axes; 1 where there is nothing to measure."""
        unit = self.squares.mean()
        return torch.where(unit > 1e-20, unit, torch.ones_like(unit))

    def inverse(self, penalty: Tensor | float) -> Tensor:
        """1 / (squares + penalty), and 0 where both are 0."""
        whole = self.squares + penalty
        return torch.where(whole > 0, 1 / whole.clamp(min=1e-38), torch.zeros_like(whole))

    def back(self, weight: Float[Tensor, "... axis output"]) -> Float[Tensor, "... width output"]:
        """A reader of the coordinates as one of the items themselves."""
        return self.axes @ weight


def _eigen(gram: Float[Tensor, "axis axis"]) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues and eigenvectors; slowly where the quick way does not converge (many equal values)."""
    try:
        return torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        from scipy.linalg import eigh

        values, vectors = eigh(gram.double().numpy(), driver="ev")
        return torch.from_numpy(values).to(gram), torch.from_numpy(vectors).to(gram)
