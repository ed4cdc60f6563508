"""Proportions with their intervals, for cards."""

from __future__ import annotations

from tomoscope.findings.statistics import wilson_interval


def share(successes: int, n: int) -> dict[str, float]:
    """A proportion with its 95 % Wilson interval."""
    estimate = wilson_interval(successes, n)
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    rounded = {name: round(getattr(estimate, name), 4) for name in ("value", "low", "high")}
    return {**rounded, "n": n}
