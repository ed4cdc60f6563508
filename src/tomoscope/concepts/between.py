"""Directions beside each other: cosines between concepts, two at once, a dictionary's feature, another model's stream.

- `cosines`: between the differences of means of several concepts of the same items. A stream has few loud directions,
  so any two directions lean on each other; the null is the cosine after one concept's labels are shuffled.
- `composition`: does adding two directions do what each does alone? Each one's effect on its own answer, alone and
  beside the other.
- `feature_direction`: a dictionary's feature as a direction: the encoder reads, the decoder writes.
- `model_map`: a linear map between two models' activations on the same items, fitted by ridge, its strength chosen on
  folds; `carry` takes a direction across: what it reads through the map back, what it writes through the map there.

How they can mislead: concepts whose labels agree on the items have a cosine for that reason alone (`overlap` is told);
a map fitted on few items carries little more than what varies most; the two models must have read the same texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.crossfit import crossfit
from tomoscope.concepts.direction import Direction
from tomoscope.concepts.linear import STRENGTHS
from tomoscope.concepts.principal import Principal
from tomoscope.concepts.splits import null_labels, split
from tomoscope.concepts.use import Metric
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.model import Subject


@dataclass(frozen=True, eq=False)
class Cosines:
    """Cosines of concepts' directions at one site.

    Attributes:
        concepts: names.
        values: [concept, concept].
        null: [draw, concept, concept] after the column's labels are shuffled.
        overlap: [concept, concept] correlation of the labels.
    """

    concepts: tuple[str, ...]
    values: Float[np.ndarray, "concept concept"]
    null: Float[np.ndarray, "draw concept concept"]
    overlap: Float[np.ndarray, "concept concept"]

    @property
    def p_values(self) -> Float[np.ndarray, "concept concept"]:
        """How often shuffled labels give a cosine as large either way; 1 on the diagonal."""
        found = (1 + (np.abs(self.null) >= np.abs(self.values)).sum(0)) / (1 + len(self.null))
        np.fill_diagonal(found, 1.0)
        return np.maximum(found, found.T)


def cosines(
    x: Float[Tensor, "item width"],
    labels: Mapping[str, Int[np.ndarray, " item"]],
    *,
    clusters: Sequence[Any] | np.ndarray | None = None,
    draws: int = 199,
    seed: int = 0,
) -> Cosines:
    """Cosines between the differences of means of several concepts, with a null each.

    Args:
        x: activations.
        labels: concept -> 0 or 1 an item.
        clusters: sources of the items, which shuffles keep together.
        draws: shuffles.
        seed: of the shuffles.

    Raises:
        DataError: fewer than two concepts, or labels other than 0 and 1.
    """
    if len(labels) < 2:
        raise DataError("A cosine is between two concepts or more.", remedy="Give labels of two.")
    rows = {name: np.asarray(values) for name, values in labels.items()}
    for name, values in rows.items():
        if len(values) != len(x) or set(np.unique(values)) != {0, 1}:
            raise DataError(f"The labels of {name!r} are not 0 and 1 of each item.", remedy="Give both classes.")
    index = np.arange(len(x)) if clusters is None else clusters
    centred = (x - x.mean(0)).double().numpy()

    def units(y: np.ndarray) -> np.ndarray:
        """[.., item] labels to unit directions [.., width]."""
        weight = y / y.sum(-1, keepdims=True) - (1 - y) / (1 - y).sum(-1, keepdims=True)
        found = weight @ centred
        return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-30)

    mine = units(np.stack(list(rows.values())).astype(float))
    null = np.stack([
        units(null_labels(values, index, n=draws, seed=seed + i).astype(float))
        for i, values in enumerate(rows.values())
    ])  # fmt: skip
    return Cosines(
        tuple(rows), mine @ mine.T, np.einsum("cw,kdw->dck", mine, null), np.corrcoef(np.stack(list(rows.values())))
    )


@dataclass(frozen=True, eq=False)
class Composition:
    """Two directions added alone and together.

    Attributes:
        alone: [direction, metric, item] change of each metric by each direction alone.
        both: [metric, item] by both.
        clusters: sources of the items, or none.
        seed: of intervals.
    """

    alone: Float[np.ndarray, "direction metric item"]
    both: Float[np.ndarray, "metric item"]
    clusters: Sequence[Any] | None
    seed: int

    def kept(self, which: int) -> Estimate:
        """Of a direction's own effect, the share that is left when the other is added too."""
        own, mine = self.alone[which, which], self.both[which]
        if abs(float(own.mean())) < 1e-9:
            return Estimate.unknown("alone it does nothing", unit="share of its own effect")
        return bootstrap_interval(
            mine / own.mean(), seed=self.seed, clusters=self.clusters, unit="share of its own effect"
        )

    def crosstalk(self, which: int) -> Estimate:
        """What the other direction alone does to this one's metric, as a share of its own effect."""
        own, other = self.alone[which, which], self.alone[1 - which, which]
        if abs(float(own.mean())) < 1e-9:
            return Estimate.unknown("alone it does nothing", unit="share of its own effect")
        return bootstrap_interval(
            other / own.mean(), seed=self.seed, clusters=self.clusters, unit="share of its own effect"
        )


def composition(
    subject: Subject,
    prompts: Sequence[Any],
    directions: tuple[Direction, Direction],
    metrics: tuple[Metric, Metric],
    *,
    strengths: tuple[float, float] = (1.0, 1.0),
    at: Any = None,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
) -> Composition:
    """Add each of two directions alone and both together.

    Args:
        subject: the model.
        prompts: the items.
        directions: of two concepts, at one site or two.
        metrics: of the last logits, what each direction is for.
        strengths: steps of each.
        at: positions; every one by default.
        clusters: a key an item.
        seed: of intervals.
    """
    batch = subject.tokens(list(prompts))
    edits = [one.write(strength, at=at) for one, strength in zip(directions, strengths, strict=True)]

    def run(some: list[Any]) -> np.ndarray:
        logits = subject.last_logits(batch, edits=some).float().cpu()
        return np.stack([metric(logits).double().numpy() for metric in metrics])

    plain = run([])
    alone = np.stack([run([edit]) - plain for edit in edits])
    return Composition(alone, run(edits) - plain, clusters, seed)


def feature_direction(
    encoder: Float[Tensor, " width"],
    decoder: Float[Tensor, " width"],
    site: str,
    *,
    bias: float = 0.0,
    size: float = 1.0,
    name: str = "feature",
    mean: Float[Tensor, " width"] | None = None,
    at: Any = None,
) -> Direction:
    """A dictionary's feature: scored by its pre-activation, written as its decoder row times a usual activation.

    Args:
        encoder: the feature's column of W_enc.
        decoder: its row of W_dec.
        site: that the dictionary was trained on.
        bias: of its pre-activation (with the decoder's bias taken in).
        size: an activation that is usual where the feature is active; one step of `write`.
        name: of the feature.
        mean: of the site's activations, where erasing leaves it.
        at: positions that it is read at.
    """
    return Direction(name, site, encoder.float(), bias, (size * decoder).float(), mean, at, "dictionary feature")


@dataclass(frozen=True, eq=False)
class ModelMap:
    """Linear maps between two sites, there and back.

    Attributes:
        there: [width, other width]; x_other = (x - mean) there + other mean.
        back: [other width, width].
        mean, other_mean: of the items it was fitted on.
        site, other_site: names.
        explained: [2] share of held-out variance explained, there and back.
        exchanged: [2] the same with the pairs of the fit exchanged at random.
        n: items of the fit.
    """

    there: Float[Tensor, "width other"]
    back: Float[Tensor, "other width"]
    mean: Float[Tensor, " width"]
    other_mean: Float[Tensor, " other"]
    site: str
    other_site: str
    explained: tuple[float, float]
    exchanged: tuple[float, float]
    n: int

    def carry(self, direction: Direction) -> Direction:
        """The direction in the other model. Raises DataError for a direction of another site."""
        if direction.site != self.site or direction.width != len(self.mean):
            raise DataError(f"{direction} is not of {self.site}.", remedy="Carry directions of the map's own site.")
        assert direction.shift is not None
        vector = self.back @ direction.vector
        bias = direction.bias + float((self.mean - self.other_mean @ self.back) @ direction.vector)
        return Direction(
            direction.concept, self.other_site, vector, bias, direction.shift @ self.there, self.other_mean,
            direction.at, f"{direction.method}, carried by a linear map", fitted_on=direction.fitted_on, n=self.n,
            notes={"explained": list(self.explained), "exchanged": list(self.exchanged)},
        )  # fmt: skip


def model_map(
    x: Float[Tensor, "item width"],
    other: Float[Tensor, "item other"],
    site: str,
    other_site: str,
    *,
    clusters: Sequence[Any] | np.ndarray | None = None,
    held_out: float = 0.25,
    seed: int = 0,
) -> ModelMap:
    """Fit maps between activations of the same items in two models, with exchanged pairs as the control.

    Args:
        x: activations of the one.
        other: activations of the other, the same items in the same order.
        site: of the one.
        other_site: of the other.
        clusters: sources of the items.
        held_out: share of the items on which the maps are measured.
        seed: of the split, the folds and the exchange.

    Raises:
        DataError: unequal numbers of items, or fewer than 16.
    """
    if len(x) != len(other) or len(x) < 16:
        raise DataError(f"{len(x)} items here and {len(other)} there.", remedy="Read the same sixteen texts or more.")
    index = np.arange(len(x)) if clusters is None else clusters
    train, test = split(index, share=held_out, seed=seed)
    order = np.random.default_rng(seed).permutation(train)
    maps, explained, exchanged = [], [], []
    for source, target in ((x, other), (other, x)):
        found = _ridge_map(source[train], target[train], seed)
        maps.append(found)
        explained.append(_explained(found, source, target, train, test))
        exchanged.append(_explained(_ridge_map(source[train], target[order], seed), source, target, train, test))
    return ModelMap(
        maps[0], maps[1], x[train].mean(0), other[train].mean(0), site, other_site, tuple(explained), tuple(exchanged),
        len(train),
    )  # fmt: skip


def _ridge_map(source: Tensor, target: Tensor, seed: int) -> Tensor:
    """[width, other] by ridge; one strength for all outputs, chosen on folds of some random mixtures of them."""
    items = Principal.of(source)
    centred = target - target.mean(0)
    fold = torch.as_tensor(np.random.default_rng(seed).permutation(np.arange(len(source)) % 4))
    strengths = torch.tensor(STRENGTHS)
    mixed = centred @ torch.randn(target.shape[1], 4, generator=torch.Generator().manual_seed(seed))
    wrong = torch.zeros(len(strengths))
    for k in range(mixed.shape[1]):
        scores = crossfit(items, mixed[:, k], fold, 0, strengths, method="ridge").scores[..., 0]
        wrong += (scores - mixed[:, k]).square().sum(1) / mixed[:, k].square().sum().clamp(min=1e-30)
    strength = strengths[int(wrong.argmin())]
    inverse = items.inverse(strength * items.unit)
    return items.back(inverse[:, None] * (items.coordinates.T @ centred))


def _explained(found: Tensor, source: Tensor, target: Tensor, train: np.ndarray, test: np.ndarray) -> float:
    made = (source[test] - source[train].mean(0)) @ found + target[train].mean(0)
    whole = (target[test] - target[train].mean(0)).square().sum()
    return float(1 - (target[test] - made).square().sum() / whole.clamp(min=1e-30))
