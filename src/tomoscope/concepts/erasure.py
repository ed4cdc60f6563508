"""Take a concept out of activations so that no linear probe finds it: closed forms, and projection step by step.

    moments = Moments.of(x, z)                    or .update(...) over a stream
    eraser = moments.eraser("leace")
    eraser(x);  subject.run(prompts, edits=[eraser.edit("layer.3.resid_post")])

- leace (Belrose et al. 2023, arXiv:2306.03819): x - W+ P W (x - mean), W the whitening of x and P the projector on the
  columns of W cov(x, z): of all affine maps that leave no covariance with the concept (so that no linear probe beats a
  constant) the one that changes x least.
- orthogonal: the orthogonal projection that leaves no covariance; changes x more, reads nothing of its covariance.
- mean: for two classes the orthogonal projection along the difference of the means, the same span as "orthogonal"; for
  more classes the span of all differences.
- splice (Holstege et al. 2025, preserving task-relevant information under linear concept removal): as leace, by the
  oblique projection that leaves the covariance with some other labels as it was.
- inlp (Ravfogel et al. 2020, arXiv:2004.07667): fit a linear probe, project its direction out, and again.
- `equalise` moves each class's mean to the common mean: it needs the labels of the items it is applied to.

How they can mislead: what is left is linear-probe-free, not gone: an MLP may find it in the second moments, and the
model's later layers may too (`remaining` fits both kinds anew). With fewer items than coordinates the guarantee is of
the fitted items only. The rank is found by a *relative* tolerance: an absolute one would leave a small real effect in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.direction import Direction, affine
from tomoscope.concepts.linear import fit
from tomoscope.concepts.probes import scaling
from tomoscope.errors import DataError
from tomoscope.model import Edit

Method = Literal["leace", "orthogonal", "mean", "splice"]
METHODS: tuple[Method, ...] = ("leace", "orthogonal", "mean", "splice")
_RELATIVE = 1e-5
"""Singular values of the whitened cross-covariance below this share of the largest are rounding."""


@dataclass(frozen=True, eq=False)
class Eraser:
    """x - ((x - mean) reads) writes.

    Attributes:
        reads: [width, rank].
        writes: [rank, width].
        mean: [width].
        method: how it was made.
        n: items behind it.
    """

    reads: Float[Tensor, "width rank"]
    writes: Float[Tensor, "rank width"]
    mean: Float[Tensor, " width"]
    method: str
    n: int = 0

    @property
    def rank(self) -> int:
        """Dimensions taken out."""
        return self.reads.shape[1]

    def __call__(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Activations without the concept."""
        wide = x.to(self.reads)
        return (wide - (wide - self.mean) @ self.reads @ self.writes).to(x.dtype)

    def edit(self, site: str, *, at: Any = None, rows: Any = None, during: str = "all") -> Edit:
        """The same as an edit of a running model."""
        reads, writes, mean = (part.float() for part in (self.reads, self.writes, self.mean))
        return affine(site, reads, writes, mean, at=at, rows=rows, during=during)

    def direction(self, concept: str, site: str) -> Direction:
        """Of rank 1: as a direction whose `erase` is this."""
        if self.rank != 1:
            raise DataError(f"An eraser of rank {self.rank} is no single direction.", remedy="Use .edit.")
        return Direction(
            concept, site, self.reads[:, 0].float(), 0.0, self.writes[0].float(), self.mean.float(),
            method=self.method, n=self.n,
        )  # fmt: skip


@dataclass(eq=False)
class Moments:
    """Means and covariances of activations and labels, gathered over a stream in float64.

    Attributes:
        n: items seen.
        mean_x, mean_z: [width], [label].
        xx, xz, zz: sums of products about the means.
    """

    n: int
    mean_x: Tensor
    mean_z: Tensor
    xx: Tensor
    xz: Tensor
    zz: Tensor

    @classmethod
    def empty(cls, width: int, labels: int) -> Moments:
        """Of nothing yet."""
        kind = torch.float64
        return cls(
            0, torch.zeros(width, dtype=kind), torch.zeros(labels, dtype=kind), torch.zeros(width, width, dtype=kind),
            torch.zeros(width, labels, dtype=kind), torch.zeros(labels, labels, dtype=kind),
        )  # fmt: skip

    @classmethod
    def of(cls, x: Float[Tensor, "item width"], z: Float[Tensor, "item label"]) -> Moments:
        """Of one batch; `one_hot` makes z of classes."""
        return cls.empty(x.shape[1], z.shape[1]).update(x, z)

    def update(self, x: Float[Tensor, "item width"], z: Float[Tensor, "item label"]) -> Moments:
        """Add a batch; returns itself."""
        if len(x) != len(z):
            raise DataError(f"{len(z)} labels for {len(x)} items.", remedy="Give one an item.")
        if not len(x):
            return self
        x, z = x.double(), z.double()
        if not torch.isfinite(x).all():
            raise DataError("An activation is not finite.", remedy="Look at the model in float32.")
        total = self.n + len(x)
        new_x, new_z = x.mean(0), z.mean(0)
        gap_x, gap_z = new_x - self.mean_x, new_z - self.mean_z
        weight = self.n * len(x) / total
        a, b = x - new_x, z - new_z
        self.xx += a.T @ a + weight * torch.outer(gap_x, gap_x)
        self.xz += a.T @ b + weight * torch.outer(gap_x, gap_z)
        self.zz += b.T @ b + weight * torch.outer(gap_z, gap_z)
        self.mean_x += gap_x * len(x) / total
        self.mean_z += gap_z * len(x) / total
        self.n = total
        return self

    def eraser(self, method: Method = "leace", *, keep: Float[Tensor, "width label"] | None = None) -> Eraser:
        """The closed form.

        Args:
            method: see the module.
            keep: for splice, the covariance cov(x, y) to leave as it is (`cross_covariance`).

        Raises:
            DataError: fewer than two items, an unknown method, nothing to erase, or a concept that cannot be told from
                what is to be kept.
        """
        if method not in METHODS:
            raise DataError(f"There is no erasure {method!r}.", remedy=f"It is one of {', '.join(METHODS)}.")
        if self.n < 2:
            raise DataError(f"{self.n} items were seen.", remedy="Give at least two.")
        cross = self.xz / (self.n - 1)
        if method in ("orthogonal", "mean"):
            basis = span(cross)
            return Eraser(basis, basis.T, self.mean_x.clone(), method, self.n)
        values, vectors = torch.linalg.eigh(self.xx / (self.n - 1))
        alive = values > values.max().clamp(min=1e-300) * max(len(values), self.n) * torch.finfo(torch.float64).eps
        root = values[alive].sqrt()
        white, colour = vectors[:, alive] / root, vectors[:, alive] * root  # symmetric W = white vectors'
        told = white.T @ cross
        basis = span(told)
        if method == "leace":
            left = basis
        else:
            if keep is None:
                raise DataError("splice needs the covariance to keep.", remedy="Give keep=cross_covariance(x, y).")
            other = span(white.T @ keep.double())
            rest = basis - other @ (other.T @ basis)
            inner = basis.T @ rest
            if float(torch.linalg.eigvalsh(inner).min()) < 1e-6:
                raise DataError(
                    "The concept lies in the span of what is to be kept.", remedy="Keep less, or erase by leace."
                )
            left = rest @ torch.linalg.inv(inner)
        return Eraser(white @ left, (colour @ basis).T, self.mean_x.clone(), method, self.n)


def cross_covariance(x: Float[Tensor, "item width"], y: Float[Tensor, "item label"]) -> Float[Tensor, "width label"]:
    """cov(x, y)."""
    x, y = x.double(), y.double()
    return (x - x.mean(0)).T @ (y - y.mean(0)) / (len(x) - 1)


def span(matrix: Float[Tensor, "width count"]) -> Float[Tensor, "width rank"]:
    """An orthonormal basis of the columns' span, its rank by a relative tolerance; raises DataError for nothing."""
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    if not len(values) or float(values[0]) < 1e-300:
        raise DataError("The labels do not vary with the activations at all.", remedy="Give labels of two classes.")
    return left[:, values > values[0] * _RELATIVE]


def one_hot(labels: Int[np.ndarray, " item"] | Tensor, n_classes: int = 2) -> Float[Tensor, "item class"]:
    """Classes as numbers for `Moments`."""
    return torch.nn.functional.one_hot(torch.as_tensor(np.asarray(labels)).long(), n_classes).double()


def equalise(
    x: Float[Tensor, "item width"], labels: Int[np.ndarray, " item"], n_classes: int = 2
) -> Float[Tensor, "item width"]:
    """Each class moved to the common mean; exact for these items, and of no use where labels are not known."""
    hot = one_hot(labels, n_classes).to(x)
    means = hot.T @ x / hot.sum(0).clamp(min=1)[:, None]
    return x - hot @ means + x.mean(0)


def inlp(
    x: Float[Tensor, "item width"],
    labels: Int[np.ndarray, " item"],
    n_classes: int = 2,
    *,
    rounds: int = 20,
    margin: float = 0.02,
    strength: float = 1e-2,
    seed: int = 0,
) -> Eraser:
    """Iterative nullspace projection: until a probe of a fresh half is within `margin` of the commonest class's share.

    Raises DataError where nothing was found to take out.
    """
    y = torch.as_tensor(np.asarray(labels))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    learn, ask = order[: len(y) // 2], order[len(y) // 2 :]
    mean = x.double().mean(0)
    inner = x.double() - mean
    common = float(y[ask].bincount().max() / len(ask))
    basis = torch.zeros(x.shape[1], 0, dtype=torch.float64)
    for _ in range(min(rounds, x.shape[1])):
        now = inner - inner @ basis @ basis.T
        scale = scaling(now[learn], "centre")
        linear = fit(scale(now[learn]), y[None, learn], n_classes, strengths=torch.tensor([strength]))
        scores = linear.scores(scale(now[ask]))[:, 0]
        said = (scores[:, 0] > 0).long() if n_classes == 2 else scores.argmax(-1)
        if float((said == y[ask]).double().mean()) <= common + margin:
            break
        weight = linear.weight[0] - basis @ (basis.T @ linear.weight[0])
        basis = torch.cat([basis, span(weight)], dim=1)
    if not basis.shape[1]:
        raise DataError("A linear probe finds nothing to take out.", remedy="See whether the concept is there at all.")
    return Eraser(basis, basis.T, mean, "inlp", len(y))


@dataclass(frozen=True, eq=False)
class Remaining:
    """What probes that are fitted anew still find.

    Attributes:
        linear: [test item] right or not, by a fresh linear probe.
        mlp: [test item] likewise by a fresh MLP of one hidden layer.
        majority: share of the commonest class.
    """

    linear: Float[np.ndarray, " item"]
    mlp: Float[np.ndarray, " item"]
    majority: float


def remaining(
    x: Float[Tensor, "item width"],
    labels: Int[np.ndarray, " item"],
    *,
    train: Int[np.ndarray, " train"],
    test: Int[np.ndarray, " test"],
    n_classes: int = 2,
    hidden: int = 64,
    steps: int = 200,
    seed: int = 0,
) -> Remaining:
    """Fit a linear probe and an MLP to activations (erased ones, say), and measure them on held-out items."""
    y = torch.as_tensor(np.asarray(labels))
    scale = scaling(x[train])
    inner, held = scale(x[train]).float(), scale(x[test]).float()
    linear = fit(inner, y[None, train], n_classes, strengths=torch.tensor([1e-2])).scores(held)[:, 0]
    said = (linear[:, 0] > 0).long() if n_classes == 2 else linear.argmax(-1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(x.shape[1], hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, n_classes)
        )
        optimiser = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.05)
        for _ in range(steps):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(inner), y[train]).backward()
            optimiser.step()
    with torch.no_grad():
        mlp = network(held).argmax(-1)
    truth = y[test]
    return Remaining(
        (said == truth).double().numpy(), (mlp == truth).double().numpy(), float(truth.bincount().max() / len(truth))
    )
