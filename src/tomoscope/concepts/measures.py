"""How right scores are: share right, area under the ROC curve, calibration, log-loss; for many probes at once.

Calibration error is Roelofs et al.'s (2022) sweep: bins of equal mass, as many as keep the bins' frequencies monotone.
How it can mislead: the error of a good probe on few items is biased upward by its bins; accuracy says nothing where
classes are unequal, so the majority's share stands beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tomoscope.errors import DataError


def predicted(scores: Float[Tensor, "*batch output"], n_classes: int) -> Tensor:
    """Class indices (numbers themselves where there are no classes)."""
    if n_classes == 0:
        return scores[..., 0]
    return (scores[..., 0] > 0).long() if n_classes == 2 else scores.argmax(-1)


def right(scores: Float[Tensor, "*batch output"], labels: Shaped[Tensor, "*batch"], n_classes: int) -> Tensor:
    """Per item 1 where right, 0 where wrong; for numbers 1 - squared error / variance, whose mean is R squared."""
    said = predicted(scores, n_classes)
    if n_classes:
        return (said == labels).to(torch.float64)
    labels = labels.to(torch.float64)
    spread = (labels - labels.mean(0)).square().mean(0).clamp(min=1e-30)
    return 1 - (said.to(torch.float64) - labels).square() / spread


def areas(scores: Float[np.ndarray, "*batch item"], positive: Shaped[np.ndarray, " item"]) -> np.ndarray:
    """Areas under the ROC curve of many score rows for one labelling, ties counting half."""
    from scipy.stats import rankdata

    positive = np.asarray(positive, dtype=bool)
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        raise DataError("A ROC area needs items of both classes.", remedy="Give a larger held-out part.")
    ranks = rankdata(scores, axis=-1)
    return (ranks[..., positive].sum(-1) - m * (m + 1) / 2) / (m * n)


def probabilities(scores: Float[Tensor, "*batch output"]) -> Float[Tensor, "*batch class"]:
    """Of the classes, taking scores as logits."""
    if scores.shape[-1] == 1:
        yes = scores.double().sigmoid()
        return torch.cat([1 - yes, yes], dim=-1)
    return scores.double().softmax(-1)


def bits(scores: Float[Tensor, "item output"], labels: Shaped[Tensor, " item"]) -> Float[Tensor, " item"]:
    """-log2 of the probability given to each item's own class."""
    if scores.shape[-1] == 1:
        sign = 2.0 * labels.double() - 1
        return torch.nn.functional.softplus(-sign * scores[..., 0].double()) / np.log(2)
    picked = scores.double().log_softmax(-1).gather(-1, labels.long()[:, None])[:, 0]
    return -picked / np.log(2)


def calibration_error(probability: Float[np.ndarray, " item"], happened: Shaped[np.ndarray, " item"]) -> float:
    """Expected calibration error by the monotone sweep of equal-mass bins."""
    p, y = np.asarray(probability, dtype=float), np.asarray(happened, dtype=float)
    order = np.argsort(p, kind="stable")
    p, y, n = p[order], y[order], len(p)
    edges = np.array([0, n])
    for bins in range(2, n + 1):
        tried = np.linspace(0, n, bins + 1).astype(int)
        means = np.add.reduceat(y, tried[:-1]) / np.diff(tried)
        if (np.diff(means) < 0).any():
            break
        edges = tried
    sizes = np.diff(edges)
    gap = np.abs(np.add.reduceat(y, edges[:-1]) - np.add.reduceat(p, edges[:-1])) / sizes
    return float((gap * sizes).sum() / n)
