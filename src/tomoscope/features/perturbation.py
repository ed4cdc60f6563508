"""Is a concept in a few features, and only there? Targeted probe perturbation and spurious correlation removal.

Marks et al. 2024 (SHIFT, arXiv:2403.19647) and Karvonen et al. 2025 (SAEBench, arXiv:2503.09532; TPP, SCR). Probes read
activations averaged over a text; features are ranked by what they add to a probe: the difference of their mean codes
between the classes times their decoder's product with the probe's weights.

    TPP    ablating the features of class i should harm the probe of class i and no other:
           mean over i of (drop of probe i - mean drop of the probes j != i)
    SCR    a probe learned where a wanted and a spurious label agree; ablating the features of the spurious label should
           make it follow the wanted one: (ablated - base) / (oracle - base), accuracies on balanced texts

Ablating features with the error kept subtracts their decoded codes, and the mean is linear, so that everything follows
from mean codes: no dictionary is run twice. How they can mislead: a label told by its own few tokens is easy to ablate;
SCR is undefined where the biased probe is already as good as the oracle, and then not measured.

Accuracies of TPP are balanced over both classes (SAEBench draws as many negatives as positives).
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
from tomoscope.features.logistic import Logistic, fit_logistic
from tomoscope.features.probing import PromptCodes, mean_difference
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, ratio_interval

COUNTS = (2, 5, 10, 20, 50)


@dataclass(frozen=True, eq=False)
class Perturbation:
    """What ablating the top features of a label does.

    Attributes:
        score: number of ablated features -> TPP or SCR.
        intended: number -> the drop of the class's own probe (TPP), or the accuracy after ablation (SCR).
        unintended: number -> the drop of the others' (TPP), or the accuracy before (SCR).
        features: label -> its features, strongest first.
    """

    score: dict[int, Estimate]
    intended: dict[int, float]
    unintended: dict[int, float]
    features: dict[str, tuple[int, ...]]


def feature_effects(
    coder: SparseCoder, difference: Float[np.ndarray, " feature"], probe: Logistic
) -> Float[np.ndarray, " feature"]:
    """What each feature adds to a probe's score when the class is there: difference x (decoder . weight)."""
    weight = torch.as_tensor(probe.weight)
    return difference * (coder.W_dec.double() @ weight).numpy()


def ablated(
    coder: SparseCoder, codes: Any, x: Float[np.ndarray, "item d"], features: Sequence[int] | np.ndarray
) -> Float[np.ndarray, "item d"]:
    """The (averaged) activation without some features, the error kept."""
    if not len(features):
        return x
    rows = coder.W_dec[torch.as_tensor(np.asarray(features))].double().numpy()
    return x - np.asarray(codes[:, list(features)] @ rows)


def targeted_perturbation(
    coder: SparseCoder,
    made: PromptCodes,
    classes: Sequence[str] | np.ndarray,
    chosen: Int[np.ndarray, " item"],
    measured: Int[np.ndarray, " item"],
    *,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
) -> Perturbation:
    """TPP of a dictionary on texts with one class each.

    Args:
        coder: the dictionary.
        made: codes and activations of the texts (`prompt_codes`).
        classes: the class of each text.
        chosen: texts for probes and ranking.
        measured: texts on which probes are judged.
        counts: how many features are ablated.
        seed: of the intervals (bootstrap over texts, probes and ranking fixed).

    Raises:
        DataError: fewer than two classes, or a class missing from a half.
    """
    listed = np.asarray(classes)
    names = sorted(set(listed.tolist()))
    if len(names) < 2:
        raise DataError("Targeted perturbation compares classes; there is one.")
    labels = {name: listed == name for name in names}
    probes = {name: fit_logistic(made.x[chosen], labels[name][chosen], balanced=True) for name in names}
    ranked = {}
    for name in names:
        gain = mean_difference(made.codes[chosen], labels[name][chosen]).clip(min=0)
        effects = feature_effects(coder, gain, probes[name])
        order = np.argsort(-effects, kind="stable")[: max(counts)]
        ranked[name] = tuple(int(i) for i in order if effects[i] > 0)
    codes, x = made.codes[measured], made.x[measured]
    weigh = {}
    for name in names:
        y = labels[name][measured]
        if not 0 < y.sum() < len(y):
            raise DataError(f"The measured half has no text of class {name!r}, or no other.")
        weigh[name] = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()) * len(y)

    def right(values: np.ndarray, name: str) -> np.ndarray:
        return ((probes[name].scores(values) > 0) == labels[name][measured]).astype(float) * weigh[name]

    clean = {name: right(x, name) for name in names}
    score, intended, unintended = {}, {}, {}
    for count in counts:
        own, others = np.zeros(len(x)), np.zeros(len(x))
        for name in names:
            changed = ablated(coder, codes, x, ranked[name][:count])
            drops = {other: clean[other] - right(changed, other) for other in names}
            own += drops[name] / len(names)
            rest = sum(drops[other] for other in names if other != name)
            others += rest / (len(names) - 1) / len(names)
        score[count] = bootstrap_interval(own - others, seed=seed, unit="accuracy")
        intended[count], unintended[count] = float(own.mean()), float(others.mean())
    return Perturbation(score, intended, unintended, ranked)


def spurious_removal(
    coder: SparseCoder,
    made: PromptCodes,
    wanted: Sequence[bool] | np.ndarray,
    spurious: Sequence[bool] | np.ndarray,
    chosen: Int[np.ndarray, " item"],
    measured: Int[np.ndarray, " item"],
    *,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
) -> Perturbation:
    """SCR of a dictionary on texts with two labels each, that of `measured` balanced over their four combinations.

    Args:
        coder: the dictionary.
        made: codes and activations of the texts.
        wanted: what the probe should tell.
        spurious: what it must not go by.
        chosen: texts for probes and ranking; the biased probe is fitted on those of them where both labels agree.
        measured: texts on which probes are judged.
        counts: how many features of the spurious label are ablated.
        seed: of the intervals.
    """
    a, b = np.asarray(wanted, dtype=bool), np.asarray(spurious, dtype=bool)
    both = np.array([((a[measured] == i) & (b[measured] == j)).sum() for i in (0, 1) for j in (0, 1)])
    if both.min() == 0 or both.max() > 1.2 * both.min() + 1:
        raise DataError(
            f"The measured texts have the four combinations of labels {both.tolist()} times.",
            remedy="Give as many of each, so that neither label tells the other.",
        )
    agree = chosen[a[chosen] == b[chosen]]
    biased = fit_logistic(made.x[agree], a[agree])
    oracle = fit_logistic(made.x[chosen], a[chosen])
    target = fit_logistic(made.x[chosen], b[chosen])
    effects = np.abs(feature_effects(coder, mean_difference(made.codes[chosen], b[chosen]), target))
    order = np.argsort(-effects, kind="stable")[: max(counts)]
    features = tuple(int(i) for i in order if effects[i] > 0)
    codes, x, y = made.codes[measured], made.x[measured], a[measured]
    base = ((biased.scores(x) > 0) == y).astype(float)
    best = ((oracle.scores(x) > 0) == y).astype(float)
    score, after, before = {}, {}, {}
    for count in counts:
        changed = ((biased.scores(ablated(coder, codes, x, features[:count])) > 0) == y).astype(float)
        if best.mean() - base.mean() < 0.02:
            why = f"the biased probe is right on {base.mean():.2f} of the texts, the oracle on {best.mean():.2f}"
            score[count] = Estimate.unknown(why, unit="share")
        else:
            score[count] = ratio_interval(changed - base, best - base, seed=seed, unit="share")
        after[count], before[count] = float(changed.mean()), float(base.mean())
    return Perturbation(score, after, before, {"spurious": features})
