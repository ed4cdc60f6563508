"""Anomaly watch: what is normal inside a model is learned from trusted inputs; others are flagged where it is not so.

    watch = fit_watch(subject, trusted)             # texts that are known to be fine
    seen = watch.look(subject, texts, rate=0.05)    # p-value and verdict of each, and which detector saw it where
    seen.flagged, seen.p_values, seen.seen_by

Three detectors, at the last token (where the answer is made) of every site:

- distance: squared Mahalanobis distance from the trusted inputs' mean, with the covariance shrunk (OAS).
- dictionary: what a dictionary of the site fails to reconstruct, where dictionaries are given.
- probes: an ensemble of ridge probes, each fitted on its own half of the trusted inputs, that foretell the last site
  from each earlier one. What they miss, and by how much they disagree, rises where the model takes another way.

Every detector's score at every site is put on one scale by further trusted inputs; a text's score is the highest, and
its p-value its place among yet further trusted inputs (conformal): whatever the distribution, the share of new trusted
inputs that is flagged is at most the rate, on average over draws of the trusted texts.

How it can mislead: an input of another kind (another language, another length) is unusual too, with no disease behind
it: `exams.watching` therefore compares with harmless unusual inputs, and with a healthy model. What happened in a
trusted input is never flagged. Nothing is said of why.
Sources: Lee et al. 2018 (arXiv:1807.03888), Mahalanobis distances in a network; Chen et al. 2010, OAS shrinkage; Vovk
et al. 2005, conformal prediction; Christiano 2022 and Johnston et al. 2024 (arXiv:2405.05466), anomalous mechanisms.

Steps: cut the trusted inputs into a part to fit, one to scale and one to place; stream moments; solve; score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.features import SparseCoder
from tomoscope.model import Subject

SITES = ("layer.*.resid_post",)
PROBES = 4
RIDGE = 1e-2
"""Of the probes, relative to the mean variance of what they read."""
SHARES = (0.5, 0.25, 0.25)
"""Of the trusted inputs: to fit, to scale, to place."""
FEWEST = 80
AT_A_TIME = 64
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Normal:
    """The normal range of one site.

    Attributes:
        mean: [width].
        factor: [width, width] lower Cholesky factor of the shrunk covariance.
        probes: [probe, width + 1, outcome] maps of the site (and a constant) to the last site; None at the last.
        spread: [outcome], standard deviation of what the probes miss of what they were not fitted on.
    """

    mean: Float[Tensor, " width"]
    factor: Float[Tensor, "width width"]
    probes: Float[Tensor, "probe column outcome"] | None
    spread: Float[Tensor, " outcome"] | None

    def distance(self, x: Float[Tensor, "text width"]) -> Float[Tensor, " text"]:
        """Squared Mahalanobis distance, over the width: 1 is usual."""
        white = torch.linalg.solve_triangular(self.factor, (x - self.mean).T, upper=False)
        return white.square().mean(0)

    def surprise(self, x: Float[Tensor, "text width"], y: Float[Tensor, "text outcome"]) -> Float[Tensor, " text"]:
        """What the probes miss of the last site (the mean of their squares), in units of what they usually miss."""
        assert self.probes is not None
        assert self.spread is not None
        made = torch.cat([x - self.mean, x.new_ones(len(x), 1)], dim=1) @ self.probes  # [probe, text, outcome]
        # the mean of squares holds both the ensemble's error and its disagreement
        return ((made - y) / self.spread).square().mean((0, 2))


@dataclass(frozen=True, eq=False)
class Seen:
    """What a watch saw in some texts.

    Attributes:
        p_values: [text], of being a trusted input; no lower than 1 / (placed trusted inputs + 1).
        scores: [text], highest score on the common scale.
        flagged: [text].
        rate: share of trusted inputs that may be flagged.
        detectors: "distance at layer.3.resid_post", ..., in the order of `by_detector`.
        by_detector: [text, detector], each on the common scale.
        least_p: the lowest p-value there can be.
    """

    p_values: Float[np.ndarray, " text"]
    scores: Float[np.ndarray, " text"]
    flagged: Bool[np.ndarray, " text"]
    rate: float
    detectors: tuple[str, ...]
    by_detector: Float[np.ndarray, "text detector"]
    least_p: float

    @property
    def seen_by(self) -> tuple[str, ...]:
        """The detector with the highest score, for each text."""
        return tuple(self.detectors[i] for i in self.by_detector.argmax(1))


@dataclass(frozen=True, eq=False)
class Watch:
    """Normal ranges of a model's sites; made by `fit_watch`.

    Attributes:
        sites: their names, in order of depth.
        normal: of each.
        coders: dictionaries of some.
        middle, scale: [detector], median and spread of scores of trusted inputs that were not fitted.
        placed: [text], highest scores of further trusted inputs, ascending.
        n: trusted inputs in all.
    """

    sites: tuple[str, ...]
    normal: Mapping[str, Normal]
    coders: Mapping[str, SparseCoder]
    middle: Float[np.ndarray, " detector"]
    scale: Float[np.ndarray, " detector"]
    placed: Float[np.ndarray, " text"]
    n: int
    detectors: tuple[str, ...] = field(default=())

    def look(
        self, subject: Subject, texts: Sequence[str], *, rate: float = 0.05, progress: Progress | None = None
    ) -> Seen:
        """Score texts and flag those that are unusual.

        Args:
            subject: the model.
            texts: one input each.
            rate: share of trusted inputs that may be flagged.
            progress: called with texts done and in all.

        Raises:
            DataError: no text, a rate that is no share, or one too small for so few trusted inputs.
        """
        least = 1 / (len(self.placed) + 1)
        if not 0 < rate < 1:
            raise DataError(f"A false alarm rate of {rate}.", remedy="Give a share, 0.05 for example.")
        if least > rate:
            needed = math.ceil((1 / rate - 1) / SHARES[2])
            raise DataError(
                f"{self.n} trusted inputs can't place a text below p = {least:.2g}; a rate of {rate:g} is asked for.",
                remedy=f"Give at least {needed} trusted inputs, or a higher rate.",
            )
        raw = np.concatenate([
            _scores(self.sites, self.normal, self.coders, acts)
            for acts in _streamed(subject, texts, self.sites, progress)
        ])  # fmt: skip
        scaled = (raw - self.middle) / self.scale
        highest = scaled.max(1)
        above = len(self.placed) - np.searchsorted(self.placed, highest, side="left")
        p_values = (1 + above) / (len(self.placed) + 1)
        return Seen(p_values, highest, p_values <= rate, rate, self.detectors, scaled, least)


def fit_watch(
    subject: Subject,
    trusted: Sequence[str],
    *,
    sites: Sequence[str] = SITES,
    coders: Mapping[str, SparseCoder] | None = None,
    probes: int = PROBES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Watch:
    """Learn what is normal from trusted inputs.

    Args:
        subject: the model.
        trusted: texts that are known to be fine, of the kind that will be watched.
        sites: names or patterns.
        coders: site -> a dictionary of it.
        probes: how many probes foretell the last site from each other one; 0 for none.
        seed: of the cut into parts and of the probes' halves.
        progress: called with texts done and in all.

    Raises:
        DataError: fewer than 80 trusted inputs, or a dictionary of a site that is not watched.
    """
    if len(trusted) < FEWEST:
        raise DataError(f"{len(trusted)} trusted inputs.", remedy=f"Give at least {FEWEST}.")
    names = tuple(dict.fromkeys(site.name for pattern in sites for site in subject.grammar.parse(pattern)))
    dictionaries = dict(coders or {})
    strange = [name for name in dictionaries if name not in names]
    if strange:
        raise DataError(f"A dictionary of {strange[0]}, which is not watched.", remedy=f"Watched: {', '.join(names)}.")
    order = np.random.default_rng(seed).permutation(len(trusted))
    cuts = np.cumsum([round(share * len(trusted)) for share in SHARES[:-1]])
    fit, scale, place = ([trusted[i] for i in part] for part in np.split(order, cuts))
    done = 0

    def tell(here: int, _: int) -> None:
        if progress is not None:
            progress(done + here, len(trusted))

    normal = _fitted(_streamed(subject, fit, names, tell), names, probes, seed)
    done += len(fit)
    held = np.concatenate([_scores(names, normal, dictionaries, a) for a in _streamed(subject, scale, names, tell)])
    done += len(scale)
    middle = np.median(held, axis=0)
    spread = np.quantile(held, 0.9, axis=0) - middle
    spread = np.where(spread > 0, spread, 1.0)
    last = np.concatenate([_scores(names, normal, dictionaries, a) for a in _streamed(subject, place, names, tell)])
    placed = np.sort(((last - middle) / spread).max(1))
    return Watch(
        names, normal, dictionaries, middle, spread, placed, len(trusted), _names(names, normal, dictionaries)
    )  # fmt: skip


# ---- reading


def _streamed(
    subject: Subject, texts: Sequence[str], sites: Sequence[str], progress: Progress | None
) -> Iterator[dict[str, Tensor]]:
    """Each batch's activations at the last token, in double precision."""
    if not texts:
        raise DataError("No texts to look at.", remedy="Give at least one.")
    for start in range(0, len(texts), AT_A_TIME):
        some = list(texts[start : start + AT_A_TIME])
        batch = subject.tokens(some)
        last = batch.mask.shape[1] - 1 - batch.mask.flip(1).int().argmax(1)
        acts = subject.read(batch, *sites)
        rows = torch.arange(len(some))
        yield {site: acts[site][rows, last.to(rows)].double() for site in sites}
        if progress is not None:
            progress(start + len(some), len(texts))


def _names(sites: Sequence[str], normal: Mapping[str, Normal], coders: Mapping[str, SparseCoder]) -> tuple[str, ...]:
    out = [f"distance at {site}" for site in sites]
    out += [f"probes at {site}" for site in sites if normal[site].probes is not None]
    return (*out, *(f"dictionary at {site}" for site in sites if site in coders))


def _scores(
    sites: Sequence[str], normal: Mapping[str, Normal], coders: Mapping[str, SparseCoder], acts: Mapping[str, Tensor]
) -> Float[np.ndarray, "text detector"]:
    """Every detector's score, in the order of `_names`; logarithms, which are nearer to a common shape."""
    out = [normal[site].distance(acts[site]) for site in sites]
    outcome = acts[sites[-1]]
    out += [normal[site].surprise(acts[site], outcome) for site in sites if normal[site].probes is not None]
    for site in sites:
        if site in coders:
            x = acts[site]
            missed = coders[site](x.to(coders[site].W_enc)).double().to(x) - x
            out.append(missed.square().sum(1) / (x - normal[site].mean).square().sum(1).clamp(min=1e-30))
    return torch.stack(out, dim=1).clamp(min=1e-30).log().cpu().numpy()


# ---- fitting


class _Sums:
    """Streamed sums of one site, whole and by the probes' halves."""

    def __init__(self, probes: int) -> None:
        self.probes = probes
        self.n = 0
        self.shift = torch.empty(0)  # of the first batch: sums of squares about it do not cancel
        self.ones, self.square = torch.empty(0), torch.empty(0)
        self.halves: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor | None, halves: Bool[Tensor, "probe text"]) -> None:
        if not self.n:
            width = x.shape[1]
            self.shift = x.mean(0)
            self.ones, self.square = x.new_zeros(width), x.new_zeros(width, width)
            if y is not None:
                self.halves = [
                    (x.new_zeros(width + 1, width + 1), x.new_zeros(width + 1, y.shape[1])) for _ in range(self.probes)
                ]
        near = x - self.shift
        self.n += len(x)
        self.ones += near.sum(0)
        self.square += near.T @ near
        if y is None:
            return
        design = torch.cat([near, near.new_ones(len(near), 1)], dim=1)
        for (gram, cross), half in zip(self.halves, halves, strict=True):
            mine = design[half]
            gram += mine.T @ mine
            cross += mine.T @ y[half]

    def normal(self, spread: Tensor | None) -> Normal:
        mean = self.ones / self.n
        covariance = self.square / self.n - torch.outer(mean, mean)
        shrunk = oas(covariance, self.n)
        factor = torch.linalg.cholesky(shrunk)
        if spread is None:
            return Normal(self.shift + mean, factor, None, None)
        level = float(covariance.diagonal().mean())
        maps = []
        for gram, cross in self.halves:
            penalty = RIDGE * level * gram[-1, -1] * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            penalty[-1, -1] = 0
            found = torch.linalg.solve(gram + penalty, cross)
            # they were fitted about `shift`, and are used about the mean
            found[-1] += mean @ found[:-1]
            maps.append(found)
        return Normal(self.shift + mean, factor, torch.stack(maps), spread)


def _fitted(batches: Iterator[dict[str, Tensor]], sites: tuple[str, ...], probes: int, seed: int) -> dict[str, Normal]:
    generator = torch.Generator().manual_seed(seed)
    sums = {site: _Sums(probes) for site in sites}
    foretold = sites[:-1] if probes else ()
    for acts in batches:
        n = len(acts[sites[0]])
        halves = (torch.rand(max(probes, 1), n, generator=generator) < 0.5)[:probes]
        for site in sites:
            y = acts[sites[-1]] if site in foretold else None
            sums[site].add(acts[site], y, halves.to(acts[site].device))
    last = sums[sites[-1]]
    # what the outcome varies by at all sets the scale; the common scale is set on inputs that were not fitted
    mean = last.ones / last.n
    spread = (last.square.diagonal() / last.n - mean.square()).clamp(min=1e-30).sqrt()
    return {site: sums[site].normal(spread if site in foretold else None) for site in sites}


def oas(covariance: Float[Tensor, "width width"], n: int) -> Float[Tensor, "width width"]:
    """The covariance shrunk towards a sphere by the oracle approximating rule (Chen et al. 2010, arXiv:0907.4698).

    Args:
        covariance: of n samples (their sum of squares about the mean, over n).
        n: samples.
    """
    width = len(covariance)
    level = covariance.diagonal().mean()
    alpha = covariance.square().mean()
    over = (n + 1) * (alpha - level.square() / width)
    share = 1.0 if float(over) <= 0 else min(1.0, float((alpha + level.square()) / over))
    out = (1 - share) * covariance
    out.diagonal().add_(share * level + 1e-12 * level)
    return out
