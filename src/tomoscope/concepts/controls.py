"""What a probe's accuracy must be compared with before it says anything of the model.

- selectivity (Hewitt and Liang 2019, arXiv:1909.03368): accuracy less that of the same probe on a control task, in
  which each type of item (word, entity, template) has a random label. A probe that can learn anything has none.
- surface: what the length of the item, its tokens, or its embeddings tell without the model. `token_states` is a bag of
  tokens, `surface_states` the length.
- description length (Voita and Titov 2020, arXiv:2003.12298): bits of the labels when each portion of the data is coded
  with a probe that has seen the portions before it; compression is the uniform code's length over that.
- transfer: learned on one group of items (a data set, a template), measured on each other.
- distractor: which of some other labels the scores follow better than their own (Farquhar et al. 2023,
  arXiv:2312.10029: an unsupervised probe follows the most salient feature, whatever that is).

How they can mislead: types must be shared between the learning and the measuring part, or nothing can be learned of a
control task and every probe looks selective; where items have no types, selectivity is not defined.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.linear import Method, fit
from tomoscope.concepts.measures import areas, bits, right
from tomoscope.concepts.probes import Normalise, scaling
from tomoscope.concepts.splits import cluster_index, control_labels, folds_of
from tomoscope.concepts.states import States
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import difference_interval

PORTIONS: tuple[float, ...] = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Shares of the data after which the online code learns again (Voita and Titov's)."""


@dataclass(frozen=True, eq=False)
class Selectivity:
    """A task beside its control tasks, at equal probe and data.

    Attributes:
        sites: site names.
        task: [site, test item] right.
        control: [site, test item] mean of right over the control tasks.
        types: [test item] numbers of the types.
        seed: of intervals.
    """

    sites: tuple[str, ...]
    task: Float[np.ndarray, "site item"]
    control: Float[np.ndarray, "site item"]
    types: Int[np.ndarray, " item"]
    seed: int

    def at(self, site: str) -> Estimate:
        """Accuracy less control accuracy, clustered by type."""
        i = self.sites.index(site)
        return difference_interval(
            self.task[i], self.control[i], paired=True, clusters=self.types, seed=self.seed, unit="accuracy"
        )


def selectivity(
    states: States,
    labels: Int[np.ndarray, " item"],
    types: Sequence[Hashable] | np.ndarray,
    n_classes: int = 2,
    *,
    method: Method = "logistic",
    strength: float = 1e-2,
    draws: int = 5,
    normalise: Normalise = "standard",
    seed: int = 0,
) -> Selectivity | str:
    """Task and control accuracy of the same probe at every site.

    Args:
        states: what was read.
        labels: of the task.
        types: the type of each item; most must come several times.
        n_classes: number of classes.
        method: of the probe.
        strength: of its regularisation.
        draws: control tasks.
        normalise: of the activations.
        seed: of the tasks and the split.

    Returns:
        The figures, or in words why there are none (items without types that come again).
    """
    index = cluster_index(types)
    sizes = np.bincount(index)
    if (sizes[index] > 1).mean() < 0.9:
        share = f"{(sizes[index] > 1).mean():.0%}"
        return f"only {share} of the items have a type that comes again, so selectivity is undefined"
    generator = np.random.default_rng(seed)
    test = np.zeros(len(index), dtype=bool)
    for one in range(len(sizes)):  # of each type, half to learn from (at least one) and half to measure on
        members = generator.permutation(np.flatnonzero(index == one))
        test[members[: len(members) // 2]] = True
    labels = np.asarray(labels)
    rows = torch.as_tensor(np.concatenate([labels[None], control_labels(index, labels, n=draws, seed=seed + 1)]))
    strengths = torch.full((len(rows),), strength)
    task, control = [], []
    for value in states.by_site.values():
        scale = scaling(value[~test], normalise)
        fitted = fit(scale(value[~test]), rows[:, ~test], n_classes, method=method, strengths=strengths)
        hits = right(fitted.scores(scale(value[test])), rows[:, test].T, n_classes).numpy()
        task.append(hits[:, 0])
        control.append(hits[:, 1:].mean(1))
    return Selectivity(tuple(states), np.stack(task), np.stack(control), index[test], seed)


def surface_states(prompts: Sequence[Any], token_ids: Sequence[Sequence[int]]) -> States:
    """What needs no model: the item's length in tokens and characters ("length"), and its bag of tokens ("tokens").

    Args:
        prompts: the items.
        token_ids: their tokens.
    """
    texts = [getattr(prompt, "text", prompt) for prompt in prompts]
    length = torch.tensor(
        [[float(len(ids)), float(len(str(text)))] for ids, text in zip(token_ids, texts, strict=True)]
    )
    known = {token: i for i, token in enumerate(sorted({int(token) for ids in token_ids for token in ids}))}
    bag = torch.zeros(len(token_ids), len(known))
    places = torch.tensor([(row, known[int(token)]) for row, ids in enumerate(token_ids) for token in ids])
    bag.index_put_((places[:, 0], places[:, 1]), torch.ones(len(places)), accumulate=True)
    return States({"length": length, "tokens": bag}, "all")


@dataclass(frozen=True)
class DescriptionLength:
    """Bits that the labels take.

    Attributes:
        online: by the online code.
        uniform: by the uniform code, items x log2 classes.
        portions: [portion] bits of each portion.
    """

    online: float
    uniform: float
    portions: tuple[float, ...]

    @property
    def compression(self) -> float:
        """Uniform over online; 1 where nothing was learned."""
        return self.uniform / self.online


def description_length(
    x: Float[Tensor, "item width"],
    labels: Int[np.ndarray, " item"],
    n_classes: int = 2,
    *,
    strength: float = 1e-2,
    orders: int = 3,
    normalise: Normalise = "standard",
    seed: int = 0,
) -> DescriptionLength:
    """The online code of the labels given the activations, averaged over some orders of the items.

    The first portion is sent uniformly; every later one with the logistic probe of all before it, or uniformly as long
    as those are of one class only.
    """
    y = torch.as_tensor(np.asarray(labels))
    ends = sorted({max(2, math.ceil(share * len(y))) for share in PORTIONS})
    uniform_bit = math.log2(n_classes)
    lengths = []
    for one in range(orders):
        order = torch.from_numpy(np.random.default_rng(seed + one).permutation(len(y)))
        portions = [ends[0] * uniform_bit]
        for start, end in itertools.pairwise(ends):
            seen, coming = order[:start], order[start:end]
            if len(y[seen].unique()) < n_classes:
                portions.append(len(coming) * uniform_bit)
                continue
            scale = scaling(x[seen], normalise)
            fitted = fit(scale(x[seen]), y[None, seen], n_classes, strengths=torch.tensor([max(strength, 1 / start)]))
            portions.append(float(bits(fitted.scores(scale(x[coming]))[:, 0], y[coming]).sum()))
        lengths.append(portions)
    mean = np.mean(lengths, axis=0)
    return DescriptionLength(float(mean.sum()), len(y) * uniform_bit, tuple(map(float, mean)))


@dataclass(frozen=True, eq=False)
class Transfer:
    """Probes of one group measured on another.

    Attributes:
        sites: site names.
        groups: names.
        right: [site, learned from, measured on] share right; on the diagonal, on held-out items of the same group.
        n: [group] items of each.
    """

    sites: tuple[str, ...]
    groups: tuple[str, ...]
    right: Float[np.ndarray, "site from to"]
    n: tuple[int, ...]


def transfer(
    states: States,
    labels: Int[np.ndarray, " item"],
    groups: Sequence[str],
    clusters: Sequence[Hashable] | np.ndarray,
    n_classes: int = 2,
    *,
    method: Method = "logistic",
    strength: float = 1e-2,
    normalise: Normalise = "standard",
    folds: int = 2,
    seed: int = 0,
) -> Transfer:
    """Share right of probes that learned on one group, on every group; sources never stand on both sides.

    Each group's probe learns on a part of the sources and is measured on the others (in every group), in turn for each
    part.

    Raises DataError for fewer than two groups, or a group that lacks a class.
    """
    names = tuple(dict.fromkeys(groups))
    if len(names) < 2:
        raise DataError(
            "Transfer needs items of two groups or more.", remedy="Name a column of templates or data sets."
        )
    of_item = np.array([names.index(group) for group in groups])
    fold = folds_of(clusters, folds, seed=seed)
    y = np.asarray(labels)
    for i, name in enumerate(names):
        for part in range(folds):
            if len(np.unique(y[(of_item == i) & (fold != part)])) < n_classes:
                raise DataError(f"The group {name!r} lacks a class in a part of its items.", remedy="Give more of it.")
    hits = np.zeros((len(states), len(names), len(names)))
    seen = np.zeros((len(names), len(names)))
    for part in range(folds):
        for i in range(len(names)):
            learn = np.flatnonzero((of_item == i) & (fold != part))
            asks = [np.flatnonzero((of_item == j) & (fold == part)) for j in range(len(names))]
            seen[i] += [len(rows) for rows in asks]
            for s, value in enumerate(states.by_site.values()):
                scale = scaling(value[learn], normalise)
                fitted = fit(
                    scale(value[learn]), torch.as_tensor(y[None, learn]), n_classes, method=method,
                    strengths=torch.tensor([strength]),
                )  # fmt: skip
                outcome = right(fitted.scores(scale(value))[:, 0], torch.as_tensor(y), n_classes).numpy()
                hits[s, i] += [outcome[rows].sum() for rows in asks]
    return Transfer(
        tuple(states), names, hits / np.maximum(seen, 1), tuple(int((of_item == i).sum()) for i in range(len(names)))
    )


def distractors(scores: Float[np.ndarray, " item"], others: Mapping[str, Int[np.ndarray, " item"]]) -> dict[str, float]:
    """How well scores tell each other labelling of the same items: ROC areas, folded so that 0.5 is nothing.

    The first is the most salient. A probe whose scores tell another label better than its own has found that one.
    """
    found = {}
    for name, given in others.items():
        values = np.asarray(given)
        for one in np.unique(values)[1:] if len(np.unique(values)) == 2 else np.unique(values):
            is_it = values == one
            if 0 < is_it.sum() < len(is_it):
                area = float(areas(np.asarray(scores, dtype=float), is_it))
                key = name if len(np.unique(values)) == 2 else f"{name} = {one}"
                found[key] = max(area, 1 - area)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def median_split(values: Sequence[float] | np.ndarray) -> Int[np.ndarray, " item"]:
    """A number (length, say) as two classes, for `distractors`."""
    array = np.asarray(values, dtype=float)
    return (array > np.median(array)).astype(int)
