"""What is different between two models: a crosscoder of a base's activations and of another model's difference from it.

A crosscoder (Lindsey et al. 2024, "Sparse Crosscoders") explains activations of two models at the same token by one
set of features with a decoder for each model. Here it reads and writes the base's activations and the difference
(the other's less the base's), both scaled alike, so that a small difference counts as much as what the models share;
the other model's decoder is the sum of the two. A feature is the other model's own as far as its decoder lies in the
difference.

How it can mislead: with an L1 penalty a crosscoder invents features of one model (complete shrinkage: the other
decoder is pressed to 0 though the feature is there; Minder et al. 2025, arXiv:2504.02922). BatchTopK has no such
pressure, and `scaling` looks for each feature in what the crosscoder leaves of the base: about 0 for a true own one,
about 1 for one that was shrunk.

Steps: train on paired rows; the share of each decoder in the difference; scaling; what some features write of the
difference, which can be taken from the other model's activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.activations import ArraySource
from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.features.training.config import TrainConfig
from tomoscope.features.training.export import finished_coder
from tomoscope.features.training.train import train

BASE, DIFFERENCE = "base", "difference"


@dataclass(frozen=True, eq=False)
class Differences:
    """A crosscoder of a base and of another model's difference from it.

    Attributes:
        coder: reads and writes base and difference side by side, [2 x width].
        share: [feature], of its decoder's two norms that of the difference, each in units of its side's mean norm.
        unexplained: shares of the variance of the base, and of the difference, that it leaves on the training rows.
    """

    coder: SparseCoder
    share: Float[Tensor, " feature"]
    unexplained: tuple[float, float]

    @property
    def width(self) -> int:
        """Of one model's activations."""
        return self.coder.d_in // 2

    @property
    def directions(self) -> Float[Tensor, "feature width"]:
        """What one unit of each feature adds to the other model's activations beyond the base's."""
        return self.coder.W_dec[:, self.width :]

    def codes(
        self, base: Float[Tensor, "*row width"], other: Float[Tensor, "*row width"]
    ) -> Float[Tensor, "*row feature"]:
        """Codes of paired activations."""
        return self.coder.encode(torch.cat([base, other - base], -1))

    def written(
        self, codes: Float[Tensor, "*row feature"], features: Int[Tensor, " some"]
    ) -> Float[Tensor, "*row width"]:
        """What some features write of the difference: taken from the other's activations, they are gone from it."""
        return codes[..., features] @ self.directions[features]

    def scaling(self, base: Float[Tensor, "row width"], other: Float[Tensor, "row width"]) -> Float[Tensor, " feature"]:
        """How much of each feature's part of the difference is in the base after all (latent scaling).

        The least-squares factor of what the feature writes of the difference in what the crosscoder leaves of the
        base. 0 where it never fires.
        """
        codes = self.codes(base, other)
        left = base - self.coder.decode(codes)[:, : self.width]
        along = ((left @ self.directions.T) * codes).sum(0)
        size = codes.square().sum(0) * self.directions.square().sum(1)
        return torch.where(size > 0, along / size.clamp(min=1e-30), torch.zeros_like(along))


def train_differences(
    base: Float[Tensor, "row width"],
    other: Float[Tensor, "row width"],
    *,
    latents: int = 512,
    k: int = 16,
    steps: int = 400,
    batch: int = 1024,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> Differences:
    """Train a BatchTopK crosscoder of two models' activations at the same tokens.

    Args:
        base, other: activations, aligned row by row.
        latents, k: features, and how many are active at a token in the mean.
        steps, batch, learning_rate: of the training.
        seed: of starting values and order.

    Raises:
        DataError: rows that do not align, or two models whose activations are the same.
    """
    if base.shape != other.shape:
        raise DataError(
            f"The two models' activations do not align: {list(base.shape)} and {list(other.shape)}.",
            remedy="Read both at the same tokens, at sites of the same width.",
        )
    if torch.equal(base, other):
        raise DataError("The two models' activations are the same.", remedy="Compare a model with another one.")
    values = {BASE: base.float(), DIFFERENCE: (other - base).float()}
    config = TrainConfig(
        reads=(BASE, DIFFERENCE), latents=latents, k=min(k, latents), architecture="batchtopk", steps=steps,
        batch=min(batch, len(base)), learning_rate=learning_rate, warmup=min(50, steps), dead_after=20 * batch,
        precision="float32", seed=seed,
    )  # fmt: skip
    (done,) = train(ArraySource(values, seed=seed), config)
    coder, width = finished_coder(done), base.shape[1]
    norms = [coder.W_dec[:, :width].norm(dim=1) * done.scale[BASE], coder.W_dec[:, width:].norm(dim=1)]
    norms[1] = norms[1] * done.scale[DIFFERENCE]
    x = torch.cat(list(values.values()), 1)
    left = (coder(x) - x).square()
    spread = (x - x.mean(0)).square()
    lost = tuple(float(left[:, side].sum() / spread[:, side].sum().clamp(min=1e-30)) for side in _sides(width))
    return Differences(coder, norms[1] / (norms[0] + norms[1]).clamp(min=1e-30), (lost[0], lost[1]))


def _sides(width: int) -> tuple[slice, slice]:
    return slice(0, width), slice(width, 2 * width)
