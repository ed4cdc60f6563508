"""Linear readers of one site, many problems at once: ridge, logistic, difference of means, discriminant.

A *problem* is one labelling of the same items at one strength of regularisation: other concepts, shuffled labels,
control labels, a whole path of strengths. All of them share the products with the activations and the factorisation of
their Gram matrix, which is where the time of a fit goes.

- ridge: least squares of class codes (or numbers) with a penalty strength x (mean square of a coordinate) x items.
- logistic: mean log-loss + strength / 2 |w|^2, the bias free; the same minimum as scikit-learn's LogisticRegression
  with C = 1 / (strength x items). Solved by L-BFGS from Bohning's (1992) bound on the Hessian, which makes its first
  step already a good one; all problems in step, each with its own step length and end.
- means: the nearest class mean; for two classes the difference of means ("mass mean", Marks and Tegmark 2023,
  arXiv:2310.06824) with the threshold half way.
- discriminant: linear discriminant analysis with the pooled covariance inside classes, shrunk by `strength` of its mean
  eigenvalue; for two classes the covariance-corrected mass mean.

Scores are [item, problem, output]: one output for two classes (above 0 is the second) and for numbers, one a class for
more. How they can mislead: on fewer items than coordinates every labelling of the training items can be fitted; only
held-out items count.

Steps: centre; go to the span of the items where these are fewer than coordinates; solve; come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError

Method = Literal["logistic", "ridge", "means", "discriminant"]
METHODS: tuple[Method, ...] = ("logistic", "ridge", "means", "discriminant")
STRENGTHS: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""From which the folds choose, for logistic and ridge on activations of unit mean square."""
_SHRINK = 1e-3  # of the mean eigenvalue: what a discriminant adds where nothing is asked for
_MEMORY = 10  # pairs that L-BFGS keeps
_BISECTIONS = 20


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
    tolerance: float = 1e-4,
    max_steps: int = 500,
) -> Linear:
    """Fit every problem.

    Args:
        x: activations.
        labels: class indices, or numbers where `n_classes` is 0 (ridge only).
        n_classes: number of classes.
        method: see the module.
        strengths: one a problem; 1e-2 (logistic, ridge), 1e-3 (discriminant) by default.
        weights: of items, 0 or 1, one row a problem (few-shot draws); logistic and means only.
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
    if not torch.isfinite(x).all():
        raise DataError("An activation is not finite.", remedy="Look at the model in float32.")
    mean = x.mean(0)
    centred = x - mean
    basis = None
    if len(x) < x.shape[1]:  # nothing is learned outside the span of the items
        basis = torch.linalg.qr(centred.T)[0]
        centred = centred @ basis
    if strengths is None:
        strengths = torch.full((len(labels),), _SHRINK if method == "discriminant" else 1e-2)
    strengths = strengths.to(centred)
    steps, converged = 0, True
    if method == "ridge":
        weight, bias = _ridge(centred, codes(labels, n_classes, centred), strengths)
    elif method == "logistic":
        weight, bias, steps, converged = _logistic(centred, labels, n_classes, strengths, weights, tolerance, max_steps)
    else:
        weight, bias = _means(centred, labels, n_classes, weights, strengths if method == "discriminant" else None)
    if basis is not None:
        weight = basis @ weight
    return Linear(weight, bias - mean @ weight, steps, converged)


def codes(labels: Tensor, n_classes: int, like: Tensor) -> Float[Tensor, "problem item output"]:
    """What least squares aims at: the number itself, -1 and 1 for two classes, 1 and 0 a class for more."""
    if n_classes == 0:
        return labels[..., None].to(like)
    if n_classes == 2:
        return (2 * labels - 1)[..., None].to(like)
    return torch.nn.functional.one_hot(labels.long(), n_classes).to(like)


def _ridge(x: Tensor, targets: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[1]
    bias = targets.mean(1)
    gram, seen = x.T @ x, torch.einsum("iw,pic->wpc", x, targets - bias[:, None])
    unit = _size(gram.diagonal().mean())
    weight = torch.empty(len(targets), width, targets.shape[-1], dtype=x.dtype)
    for strength in strengths.unique():
        which = (strengths == strength).nonzero()[:, 0]
        factor = _cholesky(gram, float(strength * unit))
        solved = torch.cholesky_solve(seen[:, which].reshape(width, -1), factor)
        weight[which] = solved.reshape(width, len(which), -1).transpose(0, 1)
    return weight, bias


def _size(value: Tensor) -> Tensor:
    """A size to measure by; 1 where there is nothing to measure."""
    return torch.where(value > 1e-20, value, torch.ones_like(value))


def _cholesky(gram: Tensor, penalty: float) -> Tensor:
    """The factor of gram + penalty; where rounding makes that indefinite, with the least more that helps."""
    unit = float(_size(gram.diagonal().mean()))
    eye = torch.eye(len(gram), dtype=gram.dtype)
    for more in (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        factor, failed = torch.linalg.cholesky_ex(gram + (penalty + more * unit) * eye)
        if not int(failed):
            return factor
    raise DataError("The activations' Gram matrix is not positive.", remedy="Give activations that are finite.")


def _means(
    x: Tensor, labels: Tensor, n_classes: int, weights: Tensor | None, strengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Nearest class mean, in the metric of the covariance inside classes where strengths are given."""
    hot = torch.nn.functional.one_hot(labels.long(), n_classes).to(x)
    hot = hot if weights is None else hot * weights.to(x)[..., None]
    counts = hot.sum(1)
    if bool((counts == 0).any()):
        raise DataError("A class has no items to be fitted on.", remedy="Give items of every class.")
    means = torch.einsum("pic,iw->pcw", hot, x) / counts[..., None]
    metric = means.transpose(1, 2)  # [problem, width, class]
    prior = torch.zeros_like(counts)
    if strengths is not None:
        metric, prior = _inside(x, means, counts, strengths), (counts / counts.sum(1, keepdim=True)).log()
    bias = prior - (means.transpose(1, 2) * metric).sum(1) / 2
    if n_classes == 2:
        return metric[..., 1:] - metric[..., :1], bias[:, 1:] - bias[:, :1]
    return metric, bias


def _inside(x: Tensor, means: Tensor, counts: Tensor, strengths: Tensor) -> Tensor:
    """The class means in the inverse covariance inside classes, [problem, width, class].

    The scatter inside is the total less that between, of rank classes - 1, so one factorisation serves all labellings
    (Woodbury).
    """
    n, classes = len(x), means.shape[1]
    total = x.T @ x
    out = torch.empty(len(means), x.shape[1], classes, dtype=x.dtype)
    unit = float(_size(total.diagonal().mean()))
    for strength in strengths.unique():
        which = (strengths == strength).nonzero()[:, 0]
        factor = _cholesky(total, float(strength) * unit)
        deviations = means[which] * counts[which].sqrt()[..., None]  # x is centred: between = deviations' deviations
        flat = deviations.reshape(-1, x.shape[1]).T
        solved = torch.cholesky_solve(flat, factor).T.reshape(len(which), classes, -1)
        inner = torch.eye(classes, dtype=x.dtype) - torch.einsum("pcw,pdw->pcd", deviations, solved)
        # inner is singular only where a class is told apart without error and nothing was added
        fix = torch.linalg.pinv(inner, hermitian=True)
        plain = solved / counts[which].sqrt()[..., None]
        seen = torch.einsum("pdw,pcw->pdc", deviations, plain)
        whole = plain.transpose(1, 2) + torch.einsum("pdw,pde,pec->pwc", solved, fix, seen)
        out[which] = whole * (n - classes)
    return out


# ---- logistic


def _logistic(
    x: Tensor,
    labels: Tensor,
    n_classes: int,
    strengths: Tensor,
    weights: Tensor | None,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, int, bool]:
    """Minimise mean log-loss + strength / 2 |w|^2 for every problem, all in step."""
    n, width = x.shape
    problems, outputs = len(labels), n_outputs(n_classes)
    scale = _size(x.square().mean().sqrt())  # so that the tolerance means the same for every site
    x, strengths = x / scale, strengths / scale**2
    share = torch.full((problems, n), 1.0 / n, dtype=x.dtype) if weights is None else weights.to(x)
    share = share / share.sum(1, keepdim=True)
    hot = codes(labels, n_classes, x)
    hot = (hot + 1) / 2 if outputs == 1 else hot
    bound = 0.25 if outputs == 1 else 0.5
    groups = [(strengths == one).nonzero()[:, 0] for one in strengths.unique()]
    gram = x.T @ x * (bound / n)
    factors = [_cholesky(gram, float(strengths[which[0]])) for which in groups]

    def precondition(gradient: Tensor) -> Tensor:
        out = gradient / bound
        for which, factor in zip(groups, factors, strict=True):
            body = gradient[which, :width].transpose(0, 1).reshape(width, -1)
            out[which, :width] = torch.cholesky_solve(body, factor).reshape(width, len(which), -1).transpose(0, 1)
        return out

    def forward(theta: Tensor) -> Tensor:
        """[item, problem, output]."""
        flat = x @ theta[:, :width].permute(1, 0, 2).reshape(width, -1)
        return flat.reshape(n, problems, outputs) + theta[:, width]

    target = hot.transpose(0, 1)
    share_ = share.T

    def loss(z: Tensor, theta: Tensor) -> Tensor:
        if outputs == 1:
            each = torch.nn.functional.softplus(z[..., 0]) - z[..., 0] * target[..., 0]
        else:
            each = z.logsumexp(-1) - (z * target).sum(-1)
        return (each * share_).sum(0) + strengths / 2 * theta[:, :width].square().sum((1, 2))

    def slope(z: Tensor, theta: Tensor) -> Tensor:
        probability = z.sigmoid() if outputs == 1 else z.softmax(-1)
        rest = (probability - target) * share_[..., None]
        body = (x.T @ rest.reshape(n, -1)).reshape(width, problems, outputs).transpose(0, 1)
        body = body + strengths[:, None, None] * theta[:, :width]
        return torch.cat([body, rest.sum(0)[:, None]], dim=1)

    theta = torch.zeros(problems, width + 1, outputs, dtype=x.dtype)
    theta, steps, converged = minimise(theta, forward, loss, slope, precondition, tolerance, max_steps)
    return theta[:, :width] / scale, theta[:, width], steps, converged


def minimise(theta, forward, loss, slope, precondition, tolerance: float, max_steps: int):
    """L-BFGS for many problems in step, of functions of linear outputs.

    Args:
        theta: [problem, ...] the start.
        forward: theta -> outputs z, linear, with the problem on z's axis 1.
        loss: (z, theta) -> [problem].
        slope: (z, theta) -> gradient like theta.
        precondition: gradient -> the inverse of a fixed bound of the Hessian times it.
        tolerance: largest entry of the gradient at which a problem rests.
        max_steps: most iterations.

    Returns:
        theta, the iterations taken, and whether all problems came to rest.
    """
    z = forward(theta)
    value, gradient = loss(z, theta), slope(z, theta)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    dims = tuple(range(1, theta.dim()))
    wide = (slice(None), *[None] * (theta.dim() - 1))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims)

    for step in range(max_steps):
        moving = gradient.abs().amax(dims) > tolerance
        if not bool(moving.any()):
            return theta, step, True
        direction = gradient.clone()
        alphas = []
        for s, y, rho in reversed(pairs):
            alpha = rho * inner(s, direction)
            direction -= alpha[wide] * y
            alphas.append(alpha)
        direction = precondition(direction)
        for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            direction += (alpha - rho * inner(y, direction))[wide] * s
        downhill = inner(direction, gradient)
        poor = downhill <= 0  # rounding has spoilt the memory: the plain bound's step is always downhill
        if bool(poor.any()):
            direction = torch.where(poor[wide], precondition(gradient), direction)
            downhill = inner(direction, gradient)
        change = forward(direction)
        length = moving.to(theta)
        across = (None, slice(None), *[None] * (z.dim() - 2))
        slack = 1e-6 * value.abs() if theta.dtype == torch.float32 else 1e-13 * value.abs()
        for _ in range(_BISECTIONS):
            new_theta = theta - length[wide] * direction
            new_z = z - length[across] * change
            new_value = loss(new_z, new_theta)
            bad = moving & ~(new_value <= value - 1e-4 * length * downhill + slack)
            if not bool(bad.any()):
                break
            length = torch.where(bad, length / 2, length)
        else:  # no length helps: the floor of this arithmetic
            length = torch.where(bad, torch.zeros_like(length), length)
            new_theta, new_z = theta - length[wide] * direction, z - length[across] * change
            new_value = loss(new_z, new_theta)
            if not bool((length > 0).any()):
                return theta, step, False
        new_gradient = slope(new_z, new_theta)
        s, y = new_theta - theta, new_gradient - gradient
        curved = inner(s, y)
        rho = torch.where(curved > 1e-12 * inner(y, y).clamp(min=1e-30), 1 / curved.clamp(min=1e-30), 0 * curved)
        pairs = [*pairs[-_MEMORY + 1 :], (s, y, rho)]
        theta, z, value, gradient = new_theta, new_z, new_value, new_gradient
    return theta, max_steps, not bool((gradient.abs().amax(dims) > tolerance).any())
