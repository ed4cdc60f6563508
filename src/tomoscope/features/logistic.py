"""Logistic regression as the sparse-probing benchmarks fit it: ridge on the weights, none on the intercept.

Minimises |w|^2 / 2 + C sum log(1 + exp(-y (x w + b))): scikit-learn's `LogisticRegression`, in doubles, by Newton steps
(L-BFGS where there are many inputs). Many probes at once, of every layer, are `tomoscope.concepts`'.
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
    from sklearn.linear_model import LogisticRegression

    solver, tolerance = ("newton-cholesky", 1e-8) if x.shape[1] <= WIDE else ("lbfgs", 1e-6)
    found = LogisticRegression(
        C=C, solver=solver, tol=tolerance, max_iter=10_000, class_weight="balanced" if balanced else None
    ).fit(x, y)
    return Logistic(found.coef_[0], float(found.intercept_[0]))


def f1_score(predicted: Bool[np.ndarray, " item"], y: Bool[np.ndarray, " item"]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing right was found."""
    hits = float((predicted & y).sum())
    return 2 * hits / max(1.0, float(predicted.sum() + y.sum()))
