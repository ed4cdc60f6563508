"""Linear readers of one site, many problems at once: ridge, logistic, difference of means, discriminant.

A *problem* is one labelling of the same items at one strength of regularisation: other concepts, shuffled labels,
control labels, a whole path of strengths. All of them share the products with the activations and their principal axes
(`concepts.principal`), which is where the time of a fit goes.

- ridge: least squares of class codes (or numbers) with a penalty strength x (mean square of a coordinate) x items.
- logistic: mean log-loss + strength / 2 |w|^2, the bias free; the same minimum as scikit-learn's LogisticRegression
  with C = 1 / (strength x items). See `concepts.logistic`.
- means: the nearest class mean; for two classes the difference of means ("mass mean", Marks and Tegmark 2023,
  arXiv:2310.06824) with the threshold half way.
- discriminant: linear discriminant analysis with the pooled covariance inside classes, shrunk by `strength` of its mean
  eigenvalue; for two classes the covariance-corrected mass mean.

Scores are [item, problem, output]: one output for two classes (above 0 is the second) and for numbers, one a class for
more. How they can mislead: on fewer items than coordinates every labelling of the training items can be fitted; only
held-out items count.

Steps: centre; turn into principal axes; solve; come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.logistic import logistic
from tomoscope.concepts.principal import Principal
from tomoscope.errors import DataError

Method = Literal["logistic", "ridge", "means", "discriminant"]
METHODS: tuple[Method, ...] = ("logistic", "ridge", "means", "discriminant")
STRENGTHS: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""From which the folds choose, for logistic and ridge on activations of unit mean square."""
_SHRINK = 1e-3  # of the mean eigenvalue: what a discriminant adds where nothing is asked for


@dataclass(frozen=True)
class Linear:
    """Fitted readers.

    Attributes:
        weight: [problem, width, output].
        bias: [problem, output].
        steps: iterations that the slowest problem took; 0 for a closed form.
        converged: whether every problem's gradient came below the tolerance.
    """

    weight: Float[Tensor, "problem width output"]
    bias: Float[Tensor, "problem output"]
    steps: int = 0
    converged: bool = True

    def scores(self, x: Float[Tensor, "item width"]) -> Float[Tensor, "item problem output"]:
        """Of any items."""
        problems, width, outputs = self.weight.shape
        flat = x.to(self.weight) @ self.weight.permute(1, 0, 2).reshape(width, -1)
        return flat.reshape(len(x), problems, outputs) + self.bias


def n_outputs(n_classes: int) -> int:
    """Outputs of a reader: one for numbers (0 classes) and for two classes, else one a class."""
    return 1 if n_classes <= 2 else n_classes


def fit(
    x: Float[Tensor, "item width"],
    labels: Int[Tensor, "problem item"] | Float[Tensor, "problem item"],
    n_classes: int,
    *,
    method: Method = "logistic",
    strengths: Float[Tensor, " problem"] | None = None,
    weights: Float[Tensor, "problem item"] | None = None,
    items: Principal | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 100,
) -> Linear:
    """Fit every problem.

    Args:
        x: activations.
        labels: class indices, or numbers where `n_classes` is 0 (ridge only).
        n_classes: number of classes.
        method: see the module.
        strengths: one a problem; 1e-2 (logistic, ridge), 1e-3 (discriminant) by default.
        weights: of items, 0 or 1, one row a problem (few-shot draws); logistic and means only.
        items: `Principal.of(x)`, where it has been made already.
        start: of logistic, see there.
        tolerance: largest entry of the gradient, for logistic, with activations of unit mean square.
        max_steps: of logistic.

    Raises:
        DataError: an unknown method, labels that do not fit, activations that are not finite.
    """
    if method not in METHODS:
        raise DataError(f"There is no probe method {method!r}.", remedy=f"It is one of {', '.join(METHODS)}.")
    if labels.dim() != 2 or labels.shape[1] != len(x):
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} for {len(x)} items.", remedy="They are [problem, item]."
        )
    if n_classes == 0 and method != "ridge":
        raise DataError("Numbers are read by ridge alone.", remedy='Give method="ridge", or classes.')
    if weights is not None and method in ("ridge", "discriminant"):
        raise DataError(f"The {method} probe takes no weights of items.", remedy="Give the items themselves.")
    items = Principal.of(x) if items is None else items
    if strengths is None:
        strengths = torch.full((len(labels),), _SHRINK if method == "discriminant" else 1e-2)
    strengths = strengths.to(x)
    steps, converged = 0, True
    if method == "ridge":
        weight, bias = _ridge(items, codes(labels, n_classes, x), strengths)
    elif method == "logistic":
        share = torch.ones(len(labels), len(x), dtype=x.dtype) if weights is None else weights.to(x)
        share = (share / share.sum(1, keepdim=True)).T
        target = shares(labels, n_classes, x)
        weight, bias, steps, converged = logistic(
            items, target, strengths, share, start=start, tolerance=tolerance, max_steps=max_steps
        )
    else:
        weight, bias = _means(items, labels, n_classes, weights, strengths if method == "discriminant" else None)
    weight = items.back(weight)
    return Linear(weight, bias - items.mean @ weight, steps, converged)


def codes(labels: Tensor, n_classes: int, like: Tensor) -> Float[Tensor, "problem item output"]:
    """What least squares aims at: the number itself, -1 and 1 for two classes, 1 and 0 a class for more."""
    if n_classes == 0:
        return labels[..., None].to(like)
    if n_classes == 2:
        return (2 * labels - 1)[..., None].to(like)
    return torch.nn.functional.one_hot(labels.long(), n_classes).to(like)


def shares(labels: Tensor, n_classes: int, like: Tensor) -> Float[Tensor, "item problem output"]:
    """What a logistic reader aims at: 1 and 0, for the second of two classes or one a class."""
    hot = codes(labels, n_classes, like)
    return ((hot + 1) / 2 if n_classes == 2 else hot).transpose(0, 1)


def _ridge(items: Principal, targets: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
    bias = targets.mean(1)
    seen = torch.einsum("ia,pic->pac", items.coordinates, targets - bias[:, None])
    return seen * items.inverse(strengths[:, None] * items.unit)[..., None], bias


def _means(
    items: Principal, labels: Tensor, n_classes: int, weights: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Nearest class mean, in the metric of the covariance inside classes where strengths are given."""
    x = items.coordinates
    hot = torch.nn.functional.one_hot(labels.long(), n_classes).to(x)
    hot = hot if weights is None else hot * weights.to(x)[..., None]
    counts = hot.sum(1)
    if bool((counts == 0).any()):
        raise DataError("A class has no items to be fitted on.", remedy="Give items of every class.")
    means = torch.einsum("pic,iw->pcw", hot, x) / counts[..., None]
    metric = means.transpose(1, 2)  # [problem, width, class]
    prior = torch.zeros_like(counts)
    if strengths is not None:
        metric, prior = _inside(items, means, counts, strengths), (counts / counts.sum(1, keepdim=True)).log()
    bias = prior - (means.transpose(1, 2) * metric).sum(1) / 2
    if n_classes == 2:
        return metric[..., 1:] - metric[..., :1], bias[:, 1:] - bias[:, :1]
    return metric, bias


def _inside(items: Principal, means: Tensor, counts: Tensor, strengths: Tensor) -> Tensor:
    """The class means in the inverse covariance inside classes, [problem, width, class].

    The scatter inside is the total less that between, of rank classes - 1, so one decomposition serves all labellings
    (Woodbury).
    """
    n, classes = len(items.coordinates), means.shape[1]
    inverse = items.inverse(strengths[:, None] * items.unit)[:, None]  # [problem, 1, axis]
    deviations = means * counts.sqrt()[..., None]  # items are centred: between = deviations' deviations
    solved = deviations * inverse
    inner = torch.eye(classes, dtype=means.dtype) - torch.einsum("pcw,pdw->pcd", deviations, solved)
    # inner is singular only where a class is told apart without error and nothing was added
    fix = torch.linalg.pinv(inner, hermitian=True)
    plain = means * inverse
    seen = torch.einsum("pdw,pcw->pdc", deviations, plain)
    return (plain.transpose(1, 2) + torch.einsum("pdw,pde,pec->pwc", solved, fix, seen)) * (n - classes)
