"""Held-out scores of every item under every strength: all folds, strengths and a site's items in one program.

    held = crossfit(Principal.of(x), labels, fold, 2, strengths)
    held.scores        [strength, item, output]

Each item is scored by a reader that learned from the other folds alone.

- logistic: folds x strengths are problems of one batch on the same items, a held-out item weighing nothing.
- ridge: the whole data's fit, from which a fold is taken out in closed form: the held-out errors are
  (1 - H)^-1 (errors of the whole fit), with H the block of the hat matrix (Cook 1977); exactly what a fit without the
  fold gives.
- others: one fit a fold.

How it can mislead: the items' normalisation is that of all folds together; it sees no label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tomoscope.concepts.linear import Method, codes, fit, shares
from tomoscope.concepts.logistic import logistic
from tomoscope.concepts.principal import Principal

_BLOCK = 4
"""Folds larger than so many times the axes are fitted anew: their block of the hat matrix would be the larger work."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What came of it.

    Attributes:
        scores: of each item, by a reader that did not see its fold.
        mean: weights on the coordinates and biases, each strength's mean over folds: where a fit of all items may
            start; None where fits are in closed form.
    """

    scores: Float[Tensor, "strength item output"]
    mean: tuple[Float[Tensor, "strength axis output"], Float[Tensor, "strength output"]] | None = None


def crossfit(
    items: Principal,
    labels: Shaped[Tensor, " item"],
    fold: Int[Tensor, " item"],
    n_classes: int,
    strengths: Float[Tensor, " strength"],
    *,
    method: Method = "logistic",
    tolerance: float = 1e-4,
) -> HeldOut:
    """Scores of each item by readers that did not see its fold.

    Args:
        items: in their principal axes.
        labels: classes, or numbers where `n_classes` is 0.
        fold: of each item.
        n_classes: number of classes.
        strengths: of regularisation.
        method: of the readers.
        tolerance: of the logistic fit.
    """
    x, folds, which = items.coordinates, fold.unique(), len(strengths)
    strengths = strengths.to(x)
    if method == "logistic":
        inside = (fold[:, None] != folds).to(x)  # [item, fold]
        share = (inside / inside.sum(0)).repeat(1, which)
        target = shares(labels[None], n_classes, x).expand(-1, share.shape[1], -1)
        weight, bias, _, _ = logistic(
            items, target, strengths.repeat_interleave(len(folds)), share, tolerance=tolerance
        )
        scores = torch.einsum("ia,pao->ipo", x, weight) + bias
        mine = (1 - inside)[:, None, :, None]  # the one fold that an item is held out of
        scores = (scores.unflatten(1, (which, len(folds))) * mine).sum(2).transpose(0, 1)
        by_fold = (weight.unflatten(0, (which, len(folds))), bias.unflatten(0, (which, len(folds))))
        return HeldOut(scores, (by_fold[0].mean(1), by_fold[1].mean(1)))
    sizes = torch.stack([(fold == one).sum() for one in folds])
    if method == "ridge" and int(sizes.max()) <= _BLOCK * len(items.squares):
        return HeldOut(_ridge(items, codes(labels[None], n_classes, x)[0], fold, strengths))
    rows = labels[None].expand(which, -1)
    out = []
    for one in folds:
        inside = (fold != one).nonzero()[:, 0]
        reader = fit(x[inside], rows[:, inside], n_classes, method=method, strengths=strengths)
        out.append((fold == one)[:, None, None] * reader.scores(x))
    return HeldOut(torch.stack(out).sum(0).transpose(0, 1))


def _ridge(items: Principal, target: Tensor, fold: Tensor, strengths: Tensor) -> Tensor:
    x, n = items.coordinates, len(fold)
    level = target.mean(0)
    out = x.new_empty(len(strengths), n, target.shape[1])
    for one in fold.unique():
        held, kept = (fold == one).nonzero()[:, 0], (fold != one).nonzero()[:, 0]
        rest = x[kept] - x[kept].mean(0)
        unit = rest.square().sum() / min(len(kept), items.axes.shape[0])  # what `fit` would measure by without them
        unit = unit if float(unit) > 1e-20 else torch.ones_like(unit)
        for i, strength in enumerate(strengths):
            inverse = items.inverse(strength * unit)
            whole = x[held] @ (inverse[:, None] * (x.T @ (target - level))) + level
            hat = (x[held] * inverse) @ x[held].T + 1 / n
            errors = torch.linalg.solve(torch.eye(len(held), dtype=x.dtype) - hat, target[held] - whole)
            out[i, held] = target[held] - errors
    return out
