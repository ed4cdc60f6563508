"""Linear probes of every site of a model for a concept, with held-out figures and a null that pays for the search.

Alain and Bengio 2016 (arXiv:1610.01644): how well a layer's activations tell a concept, by a linear classifier that
does not touch the model. The held-out items share no source with those the probe learned from; the regularisation is
chosen on folds of the training part, and so is the best site; the test part is looked at once.

    probes = train_probes(collect(subject, texts), labels, n_classes=2, clusters=entities)
    probes.accuracy("layer.3.resid_post")      Estimate, its interval clustered by source
    probes.best                                 the site that the folds chose
    probes.p_value()                            against the best of all sites under shuffled labels
    probes.directions[probes.best]

How it can mislead: a probe can learn a concept that the model does not represent (see `controls.selectivity`), and
what a probe reads the model need not use (see `use.causal_effect`). The best of many layers of noise looks better than
chance, which is why the null takes the best of all sites as well.

Steps: split by source, bring each site to mean 0 and its coordinates to variance 1 on the training part, choose a
strength on folds, fit the concept together with shuffled labels, score the test part.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tomoscope.concepts.crossfit import crossfit
from tomoscope.concepts.direction import Direction
from tomoscope.concepts.linear import STRENGTHS, Linear, Method, fit
from tomoscope.concepts.measures import areas, bits, calibration_error, predicted, probabilities, right
from tomoscope.concepts.principal import Principal
from tomoscope.concepts.splits import cluster_index, folds_of, null_labels, split
from tomoscope.concepts.states import States
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.roc import roc_interval
from tomoscope.findings.statistics import bootstrap_interval, null_p_value

Normalise = Literal["none", "centre", "standard"]


@dataclass(frozen=True, eq=False)
class Scaling:
    """(x - mean) / scale, fitted on training items.

    Attributes:
        mean: [width].
        scale: [width]; 1 where a coordinate never changes.
    """

    mean: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]

    def __call__(self, x: Float[Tensor, "item width"]) -> Float[Tensor, "item width"]:
        """The normalised activations."""
        return (x - self.mean) / self.scale

    def raw(self, linear: Linear) -> Linear:
        """A reader of normalised activations as one of raw ones."""
        weight = linear.weight / self.scale[:, None].to(linear.weight)
        return Linear(weight, linear.bias - self.mean.to(weight) @ weight, linear.steps, linear.converged)


def scaling(x: Float[Tensor, "item width"], how: Normalise = "standard") -> Scaling:
    """Of some training items: "none" (one common scale only), "centre" (likewise, about the mean), "standard"."""
    mean = x.mean(0) if how != "none" else torch.zeros_like(x[0])
    centred = x - mean
    if how == "standard":
        spread = centred.square().mean(0).sqrt()
        return Scaling(
            mean, torch.where(spread > 1e-6 * spread.max().clamp(min=1e-30), spread, torch.ones_like(spread))
        )
    common = centred.square().mean().sqrt().clamp(min=1e-30)
    return Scaling(mean, common.expand_as(mean))


@dataclass(frozen=True, eq=False)
class Probes:
    """Probes of one concept at every site.

    Attributes:
        concept: its name.
        sites: site names in order.
        n_classes: 0 for numbers.
        method: of the fit.
        strengths: [site] chosen on folds.
        chosen_on_folds: [site] mean of `right` over the training items, each by probes that did not see its fold.
        train, test: rows of the items.
        labels: [test item].
        clusters: [test item] numbers of the sources.
        scores: [site, test item, output], held out.
        null: [site, draw] held-out share right after learning shuffled labels.
        directions: site -> Direction; for two classes and numbers.
        linear: site -> the reader of raw activations.
        seed: of everything drawn.
    """

    concept: str
    sites: tuple[str, ...]
    n_classes: int
    method: str
    strengths: Float[Tensor, " site"]
    chosen_on_folds: Float[Tensor, " site"]
    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]
    labels: Shaped[Tensor, " test"]
    clusters: Int[np.ndarray, " test"]
    scores: Float[Tensor, "site test output"]
    null: Float[np.ndarray, "site draw"]
    directions: Mapping[str, Direction]
    linear: Mapping[str, Linear]
    seed: int = 0

    @property
    def best(self) -> str:
        """The site that the training folds chose."""
        return self.sites[int(self.chosen_on_folds.argmax())]

    @cached_property
    def right(self) -> Float[np.ndarray, "site test"]:
        """Per held-out item and site: 1 where right (for numbers, see `measures.right`)."""
        outcome = right(self.scores.transpose(0, 1), self.labels[:, None].expand(-1, len(self.sites)), self.n_classes)
        return outcome.T.numpy()

    @property
    def majority(self) -> float:
        """What always saying the commonest class of the test part would score (0, for R squared)."""
        return float(self.labels.bincount().max() / len(self.labels)) if self.n_classes else 0.0

    def accuracy(self, site: str = "") -> Estimate:
        """Share right on held-out items, its interval by source (R squared for numbers)."""
        unit = "share of items" if self.n_classes else "R squared"
        return bootstrap_interval(self.right[self._at(site)], seed=self.seed, clusters=self.clusters, unit=unit)

    def roc_area(self, site: str = "", *, positive: int = 1) -> Estimate:
        """Area under the ROC curve (of one class against the rest where there are several), clustered by source."""
        if not self.n_classes:
            return Estimate.unknown("numbers have no classes", unit="ROC area")
        score = self.scores[self._at(site)].double().numpy()
        score = score[:, 0] if self.n_classes == 2 else score[:, positive] - np.delete(score, positive, 1).max(1)
        is_it = self.labels.numpy() == positive
        return roc_interval(
            score[is_it], score[~is_it], positive_clusters=self.clusters[is_it].tolist(),
            negative_clusters=self.clusters[~is_it].tolist(),
        )  # fmt: skip

    def roc_areas(self) -> Float[np.ndarray, " site"]:
        """Area of every site, for the curve (two classes)."""
        return areas(self.scores[..., 0].double().numpy(), self.labels.numpy() == 1)

    def calibration(self, site: str = "") -> Estimate:
        """Expected calibration error of the probabilities of the right class, with a bootstrap interval by source."""
        if not self.n_classes or self.method not in ("logistic", "discriminant"):
            return Estimate.unknown(f"the scores of {self.method} are no probabilities", unit="calibration error")
        p = probabilities(self.scores[self._at(site)]).numpy()
        confidence, hit = p.max(1), p.argmax(1) == self.labels.numpy()
        value = calibration_error(confidence, hit)
        members = [np.flatnonzero(self.clusters == c) for c in np.unique(self.clusters)]
        generator = np.random.default_rng(self.seed)
        draws = []
        for _ in range(200):
            rows = np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))])
            draws.append(calibration_error(confidence[rows], hit[rows]))
        low, high = np.quantile(draws, [0.025, 0.975])
        return Estimate(
            value=value, unit="calibration error", low=min(float(low), value), high=max(float(high), value),
            n=len(members), method="percentile cluster bootstrap, 200 resamples",
        )  # fmt: skip

    def log_loss(self, site: str = "") -> Estimate:
        """Mean bits an item, clustered by source."""
        if not self.n_classes:
            return Estimate.unknown("numbers have no classes", unit="bits")
        each = bits(self.scores[self._at(site)], self.labels).numpy()
        return bootstrap_interval(each, seed=self.seed, clusters=self.clusters, unit="bits an item")

    def p_value(self, site: str = "", *, searched: bool = True, permutations: int = 9_999) -> float:
        """How often labels that mean nothing do as well: the test part's labels shuffled by source.

        With `searched`, against the best of all sites under each shuffle (max-T, Westfall and Young 1993), so that
        looking at many sites is paid for.
        """
        place = self._at(site)
        drawn = null_labels(self.labels.numpy(), self.clusters, n=permutations, seed=self.seed + 1)
        which = range(len(self.sites)) if searched else [place]
        best = np.full(permutations, -np.inf)
        for one in which:
            best = np.maximum(best, self._right_for(one, drawn))
        return null_p_value(float(self.right[place].mean()), best)

    def _right_for(self, place: int, drawn: np.ndarray) -> np.ndarray:
        """Mean `right` of a site's predictions for other labels [draw, test item]."""
        scores = self.scores[place]
        if self.n_classes:
            return (drawn == predicted(scores, self.n_classes).numpy()).mean(1)
        said = scores[:, 0].double().numpy()
        return 1 - np.square(drawn - said).mean(1) / np.var(drawn[0])

    def null_best(self) -> Float[np.ndarray, " draw"]:
        """The best site's held-out share right, for each draw of shuffled labels that probes were fitted to."""
        return self.null.max(0) if self.null.size else np.zeros(0)

    def _at(self, site: str) -> int:
        site = site or self.best
        if site not in self.sites:
            raise DataError(f"No probe was fitted at {site!r}.", remedy=f"There are {', '.join(self.sites[:4])} ...")
        return self.sites.index(site)


def train_probes(
    states: States,
    labels: Shaped[np.ndarray, " item"] | Sequence[int],
    n_classes: int = 2,
    *,
    concept: str = "concept",
    method: Method = "logistic",
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    held_out: float | tuple[np.ndarray, np.ndarray] = 0.5,
    strengths: Sequence[float] | None = None,
    folds: int = 5,
    normalise: Normalise = "standard",
    nulls: int = 19,
    seed: int = 0,
    fitted_on: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Probes:
    """Fit and measure a probe at every site.

    Args:
        states: what was read.
        labels: class indices, or numbers where `n_classes` is 0 (then by ridge).
        n_classes: number of classes.
        concept: a name.
        method: logistic, ridge, means or discriminant.
        clusters: a key an item; items of one key stay together.
        held_out: share of the items for the test part, or (train rows, test rows).
        strengths: from which the folds choose; a sensible path by default.
        folds: of the training part.
        normalise: "none", "centre", "standard".
        nulls: labellings that mean nothing, fitted beside the concept.
        seed: of splits, folds and shuffles.
        fitted_on: name of the data, for the record.
        progress: called with (sites done, sites).

    Raises:
        DataError: too few items or sources, labels that do not fit the states.
    """
    y = np.asarray(labels)
    if len(y) != states.n:
        raise DataError(f"{len(y)} labels for {states.n} items.", remedy="Give one an item.")
    if n_classes and (y.min() < 0 or y.max() >= n_classes):
        raise DataError(f"A label is {int(y.max())}, and there are {n_classes} classes.", remedy="Count from 0.")
    index = np.arange(len(y)) if clusters is None else cluster_index(clusters)
    method = "ridge" if n_classes == 0 else method
    train, test = _rows(held_out, index, y, seed, n_classes)
    fold = folds_of(index[train], folds, seed=seed + 2, labels=y[train] if n_classes else None)
    path = torch.tensor(strengths or _path(method), dtype=torch.float32)
    kind = torch.long if n_classes else torch.float32
    target = torch.as_tensor(y, dtype=kind)
    shuffled = torch.as_tensor(null_labels(y, index, n=nulls, seed=seed + 3), dtype=kind) if nulls else target[None][:0]
    rows = torch.cat([target[None], shuffled])
    found = []
    for done, (_, value) in enumerate(states.items(), start=1):
        found.append(_site(value, rows, n_classes, method, path, train, test, fold, normalise))
        if progress is not None:
            progress(done, len(states))
    said = {site: one.raw for site, one in zip(states, found, strict=True)}
    null = np.stack([one.right[1:] for one in found])
    best_null = tuple(float(v) for v in null.max(0)) if nulls else ()
    directions = {}
    if n_classes in (0, 2):
        for site, one in zip(states, found, strict=True):
            directions[site] = _direction(
                concept, site, states, one, target, train, method, normalise, fitted_on, seed, best_null
            )
    return Probes(
        concept, tuple(states), n_classes, method, torch.stack([one.strength for one in found]),
        torch.tensor([one.folds for one in found]), train, test, target[test], index[test],
        torch.stack([one.scores for one in found]), null, directions, said, seed,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Fitted:
    strength: Tensor
    folds: float
    scores: Tensor
    right: np.ndarray
    raw: Linear


def _path(method: str) -> tuple[float, ...]:
    return {"means": (0.0,), "discriminant": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)}.get(method, STRENGTHS)


def _rows(held_out, index: np.ndarray, y: np.ndarray, seed: int, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(held_out, tuple):
        train, test = (np.asarray(rows) for rows in held_out)
    else:
        train, test = split(index, share=held_out, seed=seed, labels=y if n_classes else None)
    if n_classes:
        for name, rows in (("learned from", train), ("measured on", test)):
            missing = n_classes - len(np.unique(y[rows]))
            if missing:
                raise DataError(
                    f"{missing} of {n_classes} classes have no item to be {name}.", remedy="Give more items."
                )
    return train, test


def _site(
    value: Tensor, rows: Tensor, n_classes: int, method: Method, path: Tensor, train: np.ndarray, test: np.ndarray,
    fold: np.ndarray, normalise: Normalise,
) -> _Fitted:  # fmt: skip
    x, held = value[train], value[test]
    scale = scaling(x, normalise)
    x, held = scale(x), scale(held)
    y = rows[:1, train]
    items = Principal.of(x)
    folds = crossfit(items, y[0], torch.as_tensor(fold), n_classes, path, method=method)
    scores, truth = folds.scores, y[0].expand(len(path), -1)
    quality = hits = right(scores.transpose(0, 1), truth.T, n_classes).T
    if method == "logistic":
        quality = -bits(scores.flatten(0, 1), truth.reshape(-1)).reshape(len(path), -1)
    mean = quality.mean(1)
    chosen = int(mean.argmax())
    if method != "logistic":  # of those that are equally right, the one that is penalised most
        chosen = int((mean >= mean.max() - 1e-12).nonzero()[-1])
    strength = path[chosen]
    start = None
    if folds.mean is not None:  # near for the concept, and nothing for labels that mean nothing
        weight, bias = (torch.cat([part[chosen][None], part.new_zeros(len(rows) - 1, *part.shape[1:])])
                        for part in folds.mean)  # fmt: skip
        start = weight, bias
    whole = fit(
        x, rows[:, train], n_classes, method=method, strengths=strength.expand(len(rows)), items=items, start=start
    )
    scores = whole.scores(held)
    outcome = right(scores, rows[:, test].T, n_classes).mean(0).numpy()
    raw = scale.raw(Linear(whole.weight[:1], whole.bias[:1], whole.steps, whole.converged))
    return _Fitted(strength, float(hits[chosen].mean()), scores[:, 0], outcome, raw)


def _direction(
    concept: str, site: str, states: States, one: _Fitted, target: Tensor, train: np.ndarray, method: str,
    normalise: str, fitted_on: str, seed: int, null: tuple[float, ...],
) -> Direction:  # fmt: skip
    x, y = states[site][train], target[train]
    vector, bias = one.raw.weight[0, :, 0], float(one.raw.bias[0, 0])
    if y.is_floating_point():  # one standard deviation of the number
        spread = y.std().clamp(min=1e-30)
        shift = ((x - x.mean(0)).T @ (y - y.mean())) / (len(y) * spread)
    else:
        shift = x[y == 1].mean(0) - x[y == 0].mean(0)
    return Direction(
        concept, site, vector, bias, shift, x.mean(0), states.at, f"{method} probe", normalise, fitted_on, len(train),
        float((x @ vector).std()), seed, null, {"strength": float(one.strength), "accuracy_on_folds": one.folds},
    )  # fmt: skip
