"""What is known of an exam from phantoms: how often it finds what is there, and stays silent where nothing is.

A `CalibrationTable` is one run of `tomoscope calibrate`; the one that ships with the package stands beside every
finding (as its `Calibration`). A row is for one exam, or for one kind of claim of it. What was never tried is missing
with its reason, never 0, and a row that was made with another version of the exam's rule or options is stale.

How it can mislead: an exam that finds what is planted in small models by hand may still miss what training makes, and
nulls that are easy (untrained weights) flatter the specificity: look at which phantoms stand behind a row (`sources`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from tomoscope.errors import LedgerError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.files import write_json
from tomoscope.findings.record import Record

SCHEMA = 1
FALSE_ALARMS = 0.05
"""Share of false claims that a rule of alpha 0.05 may confirm."""


class Tally(Record):
    """Claims whose truth is known, and how many came out right: confirmed where true, not confirmed where false."""

    specimens: int = 0
    """Different models (and shufflings) that the claims are about: what intervals count."""
    claims: int = 0
    right: int = 0
    not_measured: int = 0
    """Claims for which the exam gave no number: missed where true, silent where false."""
    failed: int = 0
    """Of these, where the exam ended in an error."""

    def said(self, what: str) -> str:
        """Such as "19 of 20 planted", with the specimens where a specimen has several claims."""
        about = f" claims on {self.specimens}" if self.claims != self.specimens else ""
        return f"{self.right} of {self.claims}{about} {what}"

    @property
    def apart(self) -> str:
        """How many were not measured, in words; "" where all were."""
        return f" ({self.not_measured} not measured)" if self.not_measured else ""


class CalibrationRow(Record):
    """One exam, or one kind of its claims, on all the phantoms that say something about it."""

    exam: str
    kind: str = ""
    """The kind of claim ("induction", "head"); "" for all of the exam's together."""
    signature: str = ""
    """Hash of the exam's rules and options, as they were."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The options it ran with."""
    sensitivity: Estimate
    """Share of the true claims that were confirmed."""
    specificity: Estimate
    """Share of the false claims that were not confirmed."""
    located: Estimate
    """Share of the confirmed true claims that name a right place, where the phantom knows the place."""
    area: Estimate
    """ROC area of the evidence (`tomoscope.exams.calibration.evidence`)."""
    planted: Tally = Tally()
    nulls: Tally = Tally()
    sources: dict[str, int] = Field(default_factory=dict)
    """Phantom -> specimens of it that decided a claim."""
    undecided: int = 0
    """Claims that the exam made and no phantom could decide."""
    inapplicable: int = 0
    """Claims about models to which the exam does not apply, by its own word; they count neither way."""

    @property
    def measured(self) -> bool:
        """Whether anything could be decided."""
        return self.sensitivity.value is not None or self.specificity.value is not None

    def concerns(self) -> list[str]:
        """What a reader must know before believing the exam: predicates of it, in plain words."""
        found = []
        sensitivity, specificity, area = self.sensitivity, self.specificity, self.area
        if sensitivity.value is not None and sensitivity.value < 0.5:
            found.append("misses more than it finds")
        if specificity.value is not None and (specificity.high or 0.0) < 1 - FALSE_ALARMS:
            found.append(f"confirms what is not there more often than {FALSE_ALARMS:.0%}".replace("%", " %"))
        if area.value is not None and (area.low or 0.0) <= 0.5:
            found.append("is not shown to be better than chance")
        if self.located.value is not None and self.located.value < 0.5:
            found.append("names the wrong place more often than the right one")
        return found

    def sentence(self) -> str:
        """Such as "finds 19 of 20 planted [0.76, 0.99], silent on 59 of 60 nulls [...]; ROC area 0.97 [...]"."""
        parts = []
        if self.sensitivity.value is None:
            parts.append(f"sensitivity not measured ({self.sensitivity.missing})")
        else:
            parts.append(f"finds {self.planted.said('planted')}{_interval(self.sensitivity)}{self.planted.apart}")
        if self.specificity.value is None:
            parts.append(f"specificity not measured ({self.specificity.missing})")
        else:
            parts.append(f"silent on {self.nulls.said('nulls')}{_interval(self.specificity)}{self.nulls.apart}")
        said = ", ".join(parts)
        if self.located.value is not None:
            said += f"; right place {said_share(self.located)}"
        if self.area.value is not None:
            said += f"; ROC area {said_share(self.area)}"
        return said


class Calibration(Record):
    """What stands beside a finding."""

    status: Literal["calibrated", "stale", "uncalibrated"] = "uncalibrated"
    row: CalibrationRow | None = None
    note: str = ""
    """Why it is uncalibrated or stale, or which options differed."""

    @property
    def doubtful(self) -> bool:
        """Whether a reader should be warned: the exam did badly, or another version of it was tried."""
        return self.status == "stale" or bool(self.row and self.row.concerns())

    def __str__(self) -> str:
        head = f"{self.status}{f' ({self.note})' if self.note else ''}"
        if self.row is None:
            return head
        concerns = self.row.concerns()
        return f"{head}: {self.row.sentence()}{'. It ' + '; it '.join(concerns) if concerns else ''}"


class Cost(Record):
    """What one run of an exam on one specimen took."""

    runs: int
    seconds_median: float
    seconds_max: float
    peak_memory_bytes: int | None = None
    """The largest resident size of the process over all runs; None where the system does not say."""


class SourceCount(Record):
    """What became of one phantom (or null)."""

    title: str = ""
    planted: int = 0
    """Specimens examined with the thing in them."""
    null: int = 0
    """Specimens examined without it."""
    failed: int = 0
    """Specimens that could not be made."""


class CalibrationTable(Record):
    """One run of `tomoscope calibrate`. Everything but `cost` follows from the versions and seeds."""

    schema_version: int = SCHEMA
    preset: str = ""
    seeds: int = 0
    correction: str = ""
    """How p-values of one specimen were corrected, as a scan does."""
    exams: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    sources: dict[str, SourceCount] = Field(default_factory=dict)
    rows: tuple[CalibrationRow, ...] = ()
    cost: dict[str, Cost] = Field(default_factory=dict)

    def row(self, exam: str, kind: str = "") -> CalibrationRow | None:
        """The row of an exam's kind of claim; that of the whole exam where the kind has none of its own."""
        found = {row.kind: row for row in self.rows if row.exam == exam}
        return found.get(kind) or found.get("")

    def write(self, path: str | Path) -> Path:
        """Write the table as JSON, whole or not at all. Raises LedgerError where it cannot be written."""
        place = Path(path)
        write_json(place, self.model_dump(mode="json"))
        return place

    @classmethod
    def read(cls, path: str | Path) -> CalibrationTable:
        """Read a table. Raises LedgerError where there is none, or one of another schema."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LedgerError(
                f"The calibration {path} cannot be read: {error}.", remedy="`tomoscope calibrate` makes one."
            ) from error
        return cls.parse(text, where=str(path))

    @classmethod
    def parse(cls, text: str, *, where: str) -> CalibrationTable:
        """A table from JSON text; `where` names it in messages."""
        try:
            data = json.loads(text)
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA:
                raise LedgerError(
                    f"{where} has schema version {version}; this tomoscope reads {SCHEMA}.",
                    remedy="Run `tomoscope calibrate` again.",
                )
            return cls.model_validate(data)
        except (ValueError, ValidationError) as error:
            raise LedgerError(
                f"{where} is no calibration: {error}.", remedy="Run `tomoscope calibrate` again."
            ) from error


def said_share(share: Estimate) -> str:
    """A number between 0 and 1 with its interval: "0.97 [0.93, 0.99]"; or why it is missing."""
    return f"not measured: {share.missing}" if share.value is None else f"{share.value:.2f}{_interval(share)}"


def _interval(share: Estimate) -> str:
    return "" if share.low is None else f" [{share.low:.2f}, {share.high:.2f}]"
