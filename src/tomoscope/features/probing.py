"""Sparse probing: can a concept be told from one, two or five features?

Gurnee et al. 2023 (arXiv:2305.01610) with SAEBench's protocol (arXiv:2503.09532): codes are averaged over a text's
tokens (or read at one token); the k features whose means differ most between texts with and without the label are
chosen, a logistic regression is fitted on them, and both are judged on other texts.

How it can mislead: a concept that a dictionary splits in many features scores low at k = 1 and high at 5; neurons and a
dense probe are often as good (arXiv:2502.16681), so both stand beside the score, with labels shuffled as the floor.

Steps: `prompt_codes` runs the model; `sparse_probe` chooses and fits on one half and measures on the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from tomoscope.errors import DataError
from tomoscope.features.coder import SparseCoder
from tomoscope.features.logistic import f1_score, fit_logistic
from tomoscope.features.samples import samples, sites_of
from tomoscope.findings.control import shuffled_labels
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.roc import roc_area
from tomoscope.findings.statistics import null_interval, wilson_interval
from tomoscope.model import Subject

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Half = Int[np.ndarray, " item"]


@dataclass(frozen=True, eq=False)
class PromptCodes:
    """One vector of codes a prompt.

    Attributes:
        codes: [prompt, feature], sparse rows.
        x: [prompt, d_in], what was encoded, averaged (or read) in the same way.
    """

    codes: csr_matrix
    x: Float[np.ndarray, "prompt d_in"]


def prompt_codes(
    subject: Subject,
    coder: SparseCoder,
    prompts: Sequence[Any],
    *,
    reads: str = "",
    at: int | str | None = None,
    skip_first: bool = False,
) -> PromptCodes:
    """Codes of each prompt: the mean over its tokens, or those at one place.

    Args:
        subject: the model.
        coder: the dictionary.
        prompts: texts, labelled prompts or token ids.
        reads: the site; as the dictionary says where not given.
        at: a position as in `Subject.read` ("last", a span's label, an index); None averages over all tokens.
        skip_first: leave the first token out of the mean.
    """
    from scipy.sparse import csr_matrix

    site, _ = sites_of(coder, reads)
    rows, features, values, means = [], [], [], []
    if at is not None:
        done = 0
        for acts in subject.stream(prompts, site, at=at):
            x = acts[site].float().flatten(1)
            codes = coder.sparse(x)
            rows.append(codes.sample + done)
            features.append(codes.feature)
            values.append(codes.value)
            means.append(x)
            done += len(x)
        x = torch.cat(means)
    else:
        total = torch.zeros(len(prompts), coder.d_in)
        count = torch.zeros(len(prompts))
        for piece in samples(subject, prompts, site, skip_first=skip_first):
            codes = coder.sparse(piece.values[site])
            rows.append(piece.prompt[codes.sample])
            features.append(codes.feature)
            values.append(codes.value)
            total.index_add_(0, piece.prompt, piece.values[site])
            count.index_add_(0, piece.prompt, torch.ones(len(piece)))
        count = count.clamp(min=1)
        x = total / count[:, None]
        values = [value / count[row] for value, row in zip(values, rows, strict=True)]
    where = (torch.cat(rows).numpy(), torch.cat(features).numpy())
    codes = csr_matrix((torch.cat(values).double().numpy(), where), shape=(len(prompts), coder.n_features))
    return PromptCodes(codes, x.double().numpy())


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """How well k inputs tell a label, on texts that were not used to choose or fit them.

    Attributes:
        features: the chosen inputs, most different first.
        accuracy: share right.
        f1: of the label.
        area: ROC area.
        chance: accuracy with the labels shuffled before choosing and fitting.
    """

    features: tuple[int, ...]
    accuracy: Estimate
    f1: float
    area: float
    chance: Estimate


def mean_difference(units: Any, labels: Bool[np.ndarray, " item"]) -> Float[np.ndarray, " unit"]:
    """Mean with the label less mean without it; units [item, unit], dense or sparse."""
    return np.asarray(units[labels].mean(0)).ravel() - np.asarray(units[~labels].mean(0)).ravel()


def columns(units: Any, chosen: Sequence[int] | np.ndarray) -> Float[np.ndarray, "item k"]:
    """Some columns, dense."""
    some = units[:, list(chosen)]
    return np.asarray(some.todense() if hasattr(some, "todense") else some, dtype=float)


def sparse_probe(
    units: Any,
    labels: Bool[np.ndarray, " item"] | Sequence[bool],
    chosen: Half,
    measured: Half,
    *,
    ks: Sequence[int] = (1, 2, 5),
    shuffles: int = 10,
    seed: int = 0,
) -> Mapping[int, ProbeScore]:
    """Probes of the k most different features, for each k.

    Args:
        units: [item, unit] codes (sparse rows), or activations themselves (the neuron baseline).
        labels: one a item.
        chosen: items on which inputs are chosen and the probe is fitted.
        measured: items on which it is judged.
        ks: how many features.
        shuffles: of the labels of the chosen half, for the floor.
        seed: of the shuffles.

    Raises:
        DataError: a half without one of the classes, or halves that overlap.
    """
    y = np.asarray(labels, dtype=bool)
    if set(chosen.tolist()) & set(measured.tolist()):
        raise DataError("A probe is judged on items that it was not fitted on.", remedy="Give disjoint halves.")
    for half in (chosen, measured):
        if not 0 < y[half].sum() < len(half):
            raise DataError("Each half needs items with the label and items without.")
    here, there = units[chosen], units[measured]
    draws = [y[chosen], *shuffled_labels(y[chosen], n=shuffles, seed=seed)]
    orders = [np.argsort(-np.abs(mean_difference(here, draw)), kind="stable")[: max(ks)] for draw in draws]
    found = {}
    for k in ks:
        right = []
        for draw, order in zip(draws, orders, strict=True):
            probe = fit_logistic(columns(here, order[:k]), draw)
            right.append(probe.scores(columns(there, order[:k])))
        scores, truth = right[0], y[measured]
        chance = [float(((score > 0) == truth).mean()) for score in right[1:]]
        found[k] = ProbeScore(
            tuple(int(i) for i in orders[0][:k]),
            wilson_interval(int(((scores > 0) == truth).sum()), len(truth), unit="share right"),
            f1_score(scores > 0, truth), roc_area(scores[truth], scores[~truth]),
            null_interval(chance, unit="share right"),
        )  # fmt: skip
    return found


def dense_probe(
    x: Float[np.ndarray, "item d_in"], labels: Bool[np.ndarray, " item"], chosen: Half, measured: Half
) -> Estimate:
    """Accuracy of a logistic regression on the whole activation: what sparse features are to come near to."""
    y = np.asarray(labels, dtype=bool)
    mean, scale = x[chosen].mean(0), x[chosen].std(0) + 1e-12
    probe = fit_logistic((x[chosen] - mean) / scale, y[chosen])
    right = (probe.scores((x[measured] - mean) / scale) > 0) == y[measured]
    return wilson_interval(int(right.sum()), len(right), unit="share right")
