"""Truth directions of labelled statements, affirmative and negated: what holds for "is" and for "is not" alike.

Buerger et al. 2024 (arXiv:2407.12831): a probe of affirmative statements alone points along a sum of two directions,
of which one is turned round by a negation, so that it calls negated statements wrongly. Both are found together by
least squares of the centred activations on [truth, truth x polarity] (truth and polarity are 1 or -1): the *general*
direction and the *polar* one. A statement is judged by its place along the general direction and along a direction that
tells polarity, by a logistic regression of these two numbers, which is again one linear reader.

    found = truth_directions(collect(subject, texts), labels, topics, polarity)
    found.best                                  the site that held-out topics chose
    found.accuracy(found.best)                  on topics that the direction never saw
    found.directions[found.best].score(x)       above 0 where the model takes it to be true (if the probe is right)

How it can mislead: a direction that tells true from false statements of a list may follow what is familiar, frequent or
plausible; the model's belief is read only so far as it knows the topic. Topics keep similar statements together: with
one topic nothing says that the direction is of truth. Without negated statements the polar direction cannot be told
apart, and the general one is the difference of means.

Steps: centre; least squares; polarity; two numbers a statement; each topic judged by directions of the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.direction import Direction
from tomoscope.concepts.linear import fit
from tomoscope.concepts.splits import cluster_index, folds_of
from tomoscope.concepts.states import States
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval

_STRENGTH = 1e-2
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class TruthDirections:
    """A truth direction of every site, judged on topics it did not see.

    Attributes:
        sites: names.
        scores: [site, item] by directions of the other topics.
        labels: [item] 1 where true.
        topics: [item] numbers.
        polarity: [item] 1 affirmative, -1 negated.
        clusters: [item] numbers of the sources, for intervals.
        directions: site -> the direction of all items.
        general: site -> [width] the general truth direction.
        polar: site -> [width] the one that a negation turns round; zeros without negated statements.
        seed: of intervals.
    """

    sites: tuple[str, ...]
    scores: Float[np.ndarray, "site item"]
    labels: Int[np.ndarray, " item"]
    topics: Int[np.ndarray, " item"]
    polarity: Int[np.ndarray, " item"]
    clusters: Int[np.ndarray, " item"]
    directions: dict[str, Direction]
    general: dict[str, Tensor]
    polar: dict[str, Tensor]
    seed: int = 0

    @property
    def right(self) -> Float[np.ndarray, "site item"]:
        """1 where judged rightly."""
        return ((self.scores > 0) == (self.labels == 1)).astype(float)

    @property
    def best(self) -> str:
        """The site that is right most often on unseen topics (chosen on these items: measure on others)."""
        return self.sites[int(self.right.mean(1).argmax())]

    def accuracy(self, site: str, *, polarity: int = 0) -> Estimate:
        """Share right on topics not seen, of all items or of one polarity (1 or -1), its interval by source."""
        keep = np.ones(len(self.labels), dtype=bool) if polarity == 0 else self.polarity == polarity
        if not keep.any():
            return Estimate.unknown("no statement has this polarity", unit="share of statements")
        values = self.right[self.sites.index(site)][keep]
        return bootstrap_interval(values, seed=self.seed, clusters=self.clusters[keep], unit="share of statements")


def truth_directions(
    states: States,
    labels: Int[np.ndarray, " item"] | Sequence[int],
    topics: Sequence[Hashable] | np.ndarray,
    polarity: Int[np.ndarray, " item"] | Sequence[int] | None = None,
    *,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    concept: str = "truth",
    fitted_on: str = "",
    seed: int = 0,
) -> TruthDirections:
    """Fit at every site; each topic (or fold of topics, where there are many) is judged by the others' directions.

    Args:
        states: of the statements.
        labels: 1 true, 0 false.
        topics: a key an item; items of one topic are judged together.
        polarity: 1 affirmative, -1 negated; all affirmative by default.
        clusters: sources of the items for intervals; topics' items each their own by default.
        concept: a name.
        fitted_on: name of the data.
        seed: of folds and intervals.

    Raises:
        DataError: fewer than two topics, other labels than 0 and 1, a part without true and false statements.
    """
    y, topic = np.asarray(labels), cluster_index(topics)
    sign = np.ones(len(y), dtype=int) if polarity is None else np.asarray(polarity)
    if len(y) != states.n or len(sign) != states.n or len(topic) != states.n:
        raise DataError(f"{len(y)} labels for {states.n} items.", remedy="Give label, topic and polarity of each.")
    if set(np.unique(y)) - {0, 1} or set(np.unique(sign)) - {-1, 1}:
        raise DataError("Labels are 0 and 1, polarities 1 and -1.", remedy="Turn them into these.")
    count = int(topic.max()) + 1
    if count < 2:
        raise DataError("All statements are of one topic.", remedy="Give statements of two topics or more.")
    fold = topic if count <= _FOLDS else folds_of(topic, _FOLDS, seed=seed)
    for one in np.unique(fold):
        if len(np.unique(y[fold != one])) < 2:
            raise DataError("The other topics are all true or all false.", remedy="Give true and false ones of each.")
    scores, directions, general, polar = [], {}, {}, {}
    for site, value in states.items():
        mine = np.zeros(len(y))
        for one in np.unique(fold):
            inside, held = fold != one, torch.as_tensor(np.flatnonzero(fold == one))
            reader = _fit(value[torch.as_tensor(np.flatnonzero(inside))], y[inside], sign[inside])
            mine[held] = (value[held] @ reader.vector + reader.bias).double().numpy()
        scores.append(mine)
        whole = _fit(value, y, sign)
        general[site], polar[site] = whole.general, whole.polar
        told = (value @ whole.vector).std()
        directions[site] = Direction(
            concept, site, whole.vector, whole.bias, _shift(value, y, sign), value.mean(0), states.at,
            "general truth direction", "centre", fitted_on, len(y), float(told), seed,
        )  # fmt: skip
    sources = np.arange(len(y)) if clusters is None else cluster_index(clusters)
    return TruthDirections(tuple(states), np.stack(scores), y, topic, sign, sources, directions, general, polar, seed)


@dataclass(frozen=True, eq=False)
class _Reader:
    vector: Tensor
    bias: float
    general: Tensor
    polar: Tensor


def _fit(x: Tensor, y: np.ndarray, sign: np.ndarray) -> _Reader:
    truth, pole = torch.as_tensor(2 * y - 1).to(x), torch.as_tensor(sign).to(x)
    mean = x.mean(0)
    centred = x - mean
    columns = [truth, truth * pole] if bool((sign < 0).any()) and bool((sign > 0).any()) else [truth]
    design = torch.stack(columns, 1)
    # the truths' own mean is taken out as the activations' is, or unequal classes would lean on it
    design = design - design.mean(0)
    found = torch.linalg.lstsq(design.double(), centred.double()).solution.to(x)
    general, polar = found[0], found[1] if len(columns) == 2 else torch.zeros_like(found[0])
    axes = [general / general.norm().clamp(min=1e-30)]
    if len(columns) == 2:
        scale = centred.square().mean().sqrt().clamp(min=1e-30)
        reader = fit(centred / scale, torch.as_tensor(sign > 0).long()[None], 2, strengths=torch.tensor([_STRENGTH]))
        vector = reader.weight[0, :, 0]
        axes.append(vector / vector.norm().clamp(min=1e-30))
    plane = torch.stack(axes, 1)
    places = centred @ plane
    spread = places.std(0).clamp(min=1e-30)
    last = fit(places / spread, torch.as_tensor(y).long()[None], 2, strengths=torch.tensor([1e-3]))
    vector = plane @ (last.weight[0, :, 0] / spread)
    return _Reader(vector, float(last.bias[0, 0] - mean @ vector), general, polar)


def _shift(x: Tensor, y: np.ndarray, sign: np.ndarray) -> Tensor:
    """From false to true, each polarity counting the same."""
    steps = [
        x[torch.as_tensor((y == 1) & (sign == s))].mean(0) - x[torch.as_tensor((y == 0) & (sign == s))].mean(0)
        for s in (1, -1) if ((y == 1) & (sign == s)).any() and ((y == 0) & (sign == s)).any()
    ]  # fmt: skip
    return (
        torch.stack(steps).mean(0) if steps else x[torch.as_tensor(y == 1)].mean(0) - x[torch.as_tensor(y == 0)].mean(0)
    )
