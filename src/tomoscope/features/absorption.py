"""Splitting and absorption: does a concept's feature fall silent where a more special one fires?

Chanin et al. 2024 (arXiv:2409.14507) with SAEBench's fraction (arXiv:2503.09532), for any labelled set: first letters,
relations, sorts. For each class a linear probe on activations is the truth of what the model knows.

    splitting     features are added to a sparse probe one by one while each raises F1 by more than 0.03; those taken
                  are the class's main features (1: not split)
    absorption    on tokens of the class that the probe tells: the share of the probe's projection that at most 3
                  features besides the main ones account for, where they account for at least 0.4 of it
    full          no main feature fires, and one other feature aligned with the probe gives at least 0.4 of it

A feature's part is its code times its decoder's product with the probe's unit direction (SAEBench multiplies by the
cosine, which is the same for decoders of norm 1 only). Main features are chosen by the difference of means, as in
sparse probing (SAEBench: by the weights of an L1 probe over all features).

How it can mislead: a probe that is poor (F1 below 0.6) tells nothing, and the class is then not measured; small models
and narrow dictionaries absorb little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.features.logistic import f1_score, fit_logistic
from tomoscope.features.probing import PromptCodes, columns, mean_difference
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval

JUMP, PROBE_F1, SHARE = 0.03, 0.6, 0.4
ALIGNED, ABSORBING, ABSORBERS = 0.025, 0.1, 3
MOST = 10


@dataclass(frozen=True, eq=False)
class ClassAbsorption:
    """One class.

    Attributes:
        name: the class.
        probe_f1: of the probe on activations, on the measured items.
        features: the main features, in the order in which they were taken.
        f1: of the sparse probe after each, on the chosen items.
        fraction: mean absorbed share over the items that the probe tells.
        full: share of those that are fully absorbed.
    """

    name: str
    probe_f1: float
    features: tuple[int, ...]
    f1: tuple[float, ...]
    fraction: Estimate
    full: Estimate


@dataclass(frozen=True, eq=False)
class Absorption:
    """All classes, and the means over those that were measured.

    Attributes:
        classes: one each.
        fraction, full: means over classes, with intervals over classes.
        split: mean number of main features.
    """

    classes: tuple[ClassAbsorption, ...]
    fraction: Estimate
    full: Estimate
    split: Estimate


def measure_absorption(
    coder: SparseCoder,
    made: PromptCodes,
    classes: Sequence[str] | np.ndarray,
    chosen: Int[np.ndarray, " item"],
    measured: Int[np.ndarray, " item"],
    *,
    most: int = MOST,
    seed: int = 0,
) -> Absorption:
    """Splitting and absorption over the classes of a labelled set.

    Args:
        coder: the dictionary.
        made: codes and activations of the items at the labelled token (`prompt_codes(..., at=...)`).
        classes: one a item.
        chosen: items for probes and main features.
        measured: items on which absorption is counted.
        most: main features at most.
        seed: of the intervals.

    Raises:
        DataError: fewer than two classes.
    """
    listed = np.asarray(classes)
    names = sorted(set(listed.tolist()))
    if len(names) < 2:
        raise DataError("Absorption compares classes; there is one.")
    found = tuple(
        _class(coder, made, str(name), listed == name, chosen, measured, most, seed)
        for name in names
        if (listed[chosen] == name).sum() > 0 and (listed[measured] == name).sum() > 0
    )
    good = [one for one in found if one.fraction.value is not None]
    if not good:
        none = Estimate.unknown("no class is told by its probe")
        return Absorption(found, none, none, none)

    def mean(values: list[float], unit: str) -> Estimate:
        return bootstrap_interval(values, seed=seed, unit=unit)

    return Absorption(
        found,
        mean([float(one.fraction.value or 0.0) for one in good], "share"),
        mean([float(one.full.value or 0.0) for one in good], "share"),
        mean([float(len(one.features)) for one in good], "features"),
    )


def _class(
    coder: SparseCoder,
    made: PromptCodes,
    name: str,
    labels: np.ndarray,
    chosen: np.ndarray,
    measured: np.ndarray,
    most: int,
    seed: int,
) -> ClassAbsorption:
    probe = fit_logistic(made.x[chosen], labels[chosen])
    y, there = labels[measured], made.x[measured]
    told = probe.scores(there) > 0
    probe_f1 = f1_score(told, y)
    features, scores = main_features(made.codes[chosen], labels[chosen], most=most)
    true = np.flatnonzero(told & y)
    if probe_f1 < PROBE_F1 or not len(true):
        why = f"the probe's own F1 is {probe_f1:.2f}, under {PROBE_F1}"
        none = Estimate.unknown(why, unit="share")
        return ClassAbsorption(name, probe_f1, features, scores, none, none)
    fraction, full = absorbed_shares(coder, made.codes[measured][true], there[true], probe.weight, features)
    return ClassAbsorption(
        name, probe_f1, features, scores, bootstrap_interval(fraction, seed=seed, unit="share"),
        bootstrap_interval(full.astype(float), seed=seed, unit="share"),
    )  # fmt: skip


def main_features(codes: Any, labels: np.ndarray, *, most: int = MOST) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Features that tell a class, taken while each raises the sparse probe's F1 by more than 0.03."""
    gain = mean_difference(codes, labels)
    order = np.argsort(-gain, kind="stable")[:most]
    taken, scores, best = 0, [], -1.0
    for k in range(1, len(order) + 1):
        inputs = columns(codes, order[:k])
        score = f1_score(fit_logistic(inputs, labels).scores(inputs) > 0, labels)
        if score <= best + JUMP:
            break
        taken, best = k, score
        scores.append(score)
    return tuple(int(i) for i in order[:taken]), tuple(scores)


def absorbed_shares(
    coder: SparseCoder,
    codes: Any,
    x: Float[np.ndarray, "item d_in"],
    weight: Float[np.ndarray, " d_in"],
    features: Sequence[int],
) -> tuple[Float[np.ndarray, " item"], np.ndarray]:
    """The absorbed share of each item, and whether it is fully absorbed, by SAEBench's rules."""
    direction = weight / np.linalg.norm(weight)
    products = (coder.W_dec.double() @ torch.as_tensor(direction)).numpy()
    norms = coder.W_dec.double().norm(dim=-1).clamp(min=1e-30).numpy()
    cosines = products / norms
    projection = x @ direction
    main = np.asarray(codes[:, list(features)] @ products[list(features)]).ravel()
    silent = np.asarray(abs(codes[:, list(features)]).sum(1)).ravel() < 1e-8
    parts = codes.multiply(products[None]).tocsr()
    others = products.copy()
    others[list(features)] = 0.0
    others[cosines < ABSORBING] = 0.0
    rivals = codes.multiply(others[None]).tocsr()
    absorbing, best, aligned = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x), dtype=bool)
    for row in range(len(x)):
        inside = rivals.data[rivals.indptr[row] : rivals.indptr[row + 1]]
        absorbing[row] = np.sort(inside[inside > 0])[-ABSORBERS:].sum()
        span = slice(parts.indptr[row], parts.indptr[row + 1])
        if span.stop > span.start:
            top = int(parts.data[span].argmax())
            best[row] = parts.data[span][top]
            aligned[row] = cosines[parts.indices[span][top]] >= ALIGNED
    with np.errstate(divide="ignore", invalid="ignore"):
        enough = absorbing / projection >= SHARE
        missing = np.minimum(absorbing, projection - main)
        share = np.clip(missing / (missing + main), 0.0, 1.0)
        full = silent & aligned & (projection > 0) & (best / projection >= SHARE)
    share = np.where((main >= projection) | ~enough, 0.0, np.where(main <= 0, 1.0, share))
    return np.nan_to_num(share), full
