"""What is known of an exam's claim, from the calibration that ships with the package or from the exam's own.

A row whose rule and options are no longer the exam's is stale; a run with other options than the row's says so.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from tomoscope.exams.calibration.truth import kind_of
from tomoscope.findings.calibration import Calibration, CalibrationTable

if TYPE_CHECKING:
    from tomoscope.exams.exam import Exam

SHIPPED = "calibration.json"


@cache
def shipped_calibration() -> CalibrationTable:
    """The table that ships with the package; an empty one where none was made."""
    file = resources.files("tomoscope.exams") / SHIPPED
    if not file.is_file():
        return CalibrationTable()
    return CalibrationTable.parse(file.read_text(encoding="utf-8"), where=SHIPPED)


def calibration_of(exam: Exam, key: str = "", options: Any = None) -> Calibration:
    """What is known of the claim `key` of an exam that runs with these options."""
    table = exam.calibration if exam.calibration is not None else shipped_calibration()
    row = table.row(exam.name, kind_of(exam, key))
    if row is None:
        return Calibration(note="never run on phantoms")
    if not row.measured:
        return Calibration(row=None, note=row.sensitivity.missing or "no phantom decides it")
    if row.signature != exam.signature:
        return Calibration(status="stale", row=row, note="another version of its rule or options")
    return Calibration(status="calibrated", row=row, note=_differences(row.options, options))


def _differences(calibrated: dict[str, Any], options: Any) -> str:
    """The options in which a run differs from its calibration, in words."""
    if options is None:
        return ""
    here = options.model_dump(mode="json")
    other = [f"{key} {value}" for key, value in calibrated.items() if key in here and here[key] != value]
    return f"with {', '.join(other)}" if other else ""
