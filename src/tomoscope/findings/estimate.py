"""A number with its interval, or why it is missing; and how a number is written.

A number that is not known is `None` together with the reason (`Estimate.unknown("...")`); it is never 0, and never NaN.
"""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from tomoscope.findings.record import Record


class Estimate(Record):
    """A number with its unit, its 95 % interval, and how many observations it stands on; or why it is missing."""

    value: float | None
    """The number; None only together with `missing`."""
    unit: str = ""
    """What one of it is: "nats", "logit difference", "share of heads"; "" for a bare ratio."""
    low: float | None = None
    """The lower end of the interval; None where no interval can be given (one observation, an exact number)."""
    high: float | None = None
    n: int = Field(default=0, ge=0)
    """Independent observations behind the number (prompts, not tokens of one prompt)."""
    method: str = ""
    """How the interval was made: "BCa bootstrap, 2000 resamples"."""
    missing: str | None = None
    """Why there is no number."""

    @model_validator(mode="after")
    def _whole(self) -> Estimate:
        if (self.value is None) != bool(self.missing):
            raise ValueError("an estimate has either a value or the reason why it is missing, never both or neither")
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has both ends or none")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval's low end {self.low} lies above its high end {self.high}")
        return self

    @classmethod
    def unknown(cls, why: str, *, unit: str = "") -> Estimate:
        """An estimate that could not be made, and why."""
        return cls(value=None, unit=unit, missing=why)

    @classmethod
    def exact(cls, value: float, *, unit: str = "", n: int = 1, method: str = "exact") -> Estimate:
        """A number without sampling error (a count, a property of the weights); not finite becomes missing."""
        if not math.isfinite(value):
            return cls.unknown(f"the computed value is {value}", unit=unit)
        return cls(value=float(value), unit=unit, n=n, method=method)

    def __str__(self) -> str:
        if self.value is None:
            return f"not measured: {self.missing}"
        interval = "" if self.low is None else f" [{format_number(self.low)}, {format_number(self.high)}]"
        return f"{format_number(self.value)}{interval}{' ' + self.unit if self.unit else ''}"


def format_number(value: float | None, *, digits: int = 3) -> str:
    """Three significant digits, plain where that is readable: 0.0312, 12.5, 1,204, −3.1e-07; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        text = f"{size:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    else:
        rounded = float(f"{size:.{digits}g}")  # 0.00998 to two digits is 0.010, not 0.0100
        decimals = max(0, digits - 1 - math.floor(math.log10(rounded)))
        text = f"{size:,.{decimals}f}"
    return ("−" if value < 0 else "") + text
