"""Corrections for the number of claims: Holm (1979) and Benjamini-Hochberg (1995).

Holm bounds the chance of a single false confirmation in the scan, whatever the dependence between claims;
Benjamini-Hochberg bounds the share of false ones among those confirmed (for independent or positively dependent
claims), and confirms more. Both mislead if claims that were looked at and not reported are left out: give them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tomoscope.errors import DataError


def _checked(p_values: Sequence[float]) -> np.ndarray:
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise DataError(
            "p-values must be one row of numbers between 0 and 1.", remedy="Leave out the claims without a p-value."
        )
    return p


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (family-wise error rate)."""
    p = _checked(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg's step-up adjusted p-values, in the order given (false discovery rate)."""
    p = _checked(p_values)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    stepped = np.minimum.accumulate(scaled[::-1])[::-1]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()
