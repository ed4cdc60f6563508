"""Logistic regression as the sparse-probing benchmarks fit it: ridge on the weights, none on the intercept.

Minimises |w|^2 / 2 + C sum log(1 + exp(-y (x w + b))) by Newton steps in doubles (L-BFGS where there are many inputs),
which is scikit-learn's `LogisticRegression(C=C)`; the tests compare them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from tomoscope.errors import DataError

WIDE = 600
"""Inputs beyond which L-BFGS takes over from Newton."""


@dataclass(frozen=True, eq=False)
class Logistic:
    """A linear classifier.

    Attributes:
        weight: [input].
        bias: the intercept.
    """

    weight: Float[np.ndarray, " input"]
    bias: float

    def scores(self, x: Float[np.ndarray, "item input"]) -> Float[np.ndarray, " item"]:
        """Log odds."""
        return x @ self.weight + self.bias


def fit_logistic(
    x: Float[np.ndarray, "item input"], y: Bool[np.ndarray, " item"], *, C: float = 1.0, balanced: bool = False
) -> Logistic:
    """Fit a classifier.

    Args:
        x: inputs.
        y: labels.
        C: inverse strength of the ridge.
        balanced: weigh both classes alike.

    Raises:
        DataError: one class only.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=bool)
    positive = int(y.sum())
    if not 0 < positive < len(y):
        raise DataError("A probe needs examples with the label and examples without.", remedy="Give both.")
    share = np.where(y, len(y) / (2 * positive), len(y) / (2 * (len(y) - positive))) if balanced else np.ones(len(y))
    weights = C * share
    inputs = np.concatenate([x, np.ones((len(x), 1))], 1)
    ridge = np.append(np.ones(x.shape[1]), 0.0)
    solve = _newton if x.shape[1] <= WIDE else _quasi_newton
    found = solve(inputs, y.astype(float), weights, ridge)
    return Logistic(found[:-1], float(found[-1]))


def f1_score(predicted: Bool[np.ndarray, " item"], y: Bool[np.ndarray, " item"]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing right was found."""
    hits = float((predicted & y).sum())
    return 2 * hits / max(1.0, float(predicted.sum() + y.sum()))


def _loss(z: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ (np.logaddexp(0.0, z) - y * z))


def _newton(x: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    theta = np.zeros(x.shape[1])
    best = _loss(np.zeros(len(x)), y, weights)
    for _ in range(100):
        p = 0.5 * (1 + np.tanh(0.5 * (x @ theta)))
        gradient = x.T @ (weights * (p - y)) + ridge * theta
        curvature = (x * (weights * p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        # a tiny ridge on the intercept keeps the system solvable where the classes are separated
        step = np.linalg.solve(curvature + 1e-10 * np.eye(len(theta)), gradient)
        size = 1.0
        while size > 1e-8:
            moved = theta - size * step
            value = _loss(x @ moved, y, weights) + 0.5 * float(ridge @ moved**2)
            if value <= best:
                break
            size /= 2
        else:
            break
        done = best - value < 1e-12 * max(1.0, abs(best))
        theta, best = moved, value
        if done:
            break
    return theta


def _quasi_newton(x: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: np.ndarray) -> np.ndarray:
    from scipy.optimize import minimize

    def both(theta: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ theta
        p = 0.5 * (1 + np.tanh(0.5 * z))
        return (
            _loss(z, y, weights) + 0.5 * float(ridge @ theta**2),
            x.T @ (weights * (p - y)) + ridge * theta,
        )

    return minimize(both, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
