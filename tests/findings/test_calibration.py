"""What is said of an exam beside its findings."""

from __future__ import annotations

import pytest

from tests.dummies import make_exam
from tomoscope.exams import EXAMS
from tomoscope.exams.calibration import calibration_of, shipped_calibration
from tomoscope.findings import Calibration, CalibrationRow, CalibrationTable, Estimate, Rule
from tomoscope.findings.calibration import Tally, said_share


def share(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=20, method="Wilson interval")


def row(**changes) -> CalibrationRow:
    values = {
        "exam": "dummy.heads", "signature": make_exam().signature, "options": make_exam().options().model_dump(),
        "sensitivity": share(0.95, 0.76, 0.99), "specificity": share(59 / 60, 0.91, 1.0),
        "located": share(1.0, 0.83, 1.0), "area": share(0.97, 0.93, 0.99),
        "planted": Tally(specimens=20, claims=20, right=19), "nulls": Tally(specimens=60, claims=60, right=59),
    }  # fmt: skip
    return CalibrationRow(**(values | changes))


def test_a_row_in_words():
    assert str(Calibration(status="calibrated", row=row())) == (
        "calibrated: finds 19 of 20 planted [0.76, 0.99], silent on 59 of 60 nulls [0.91, 1.00]; "
        "right place 1.00 [0.83, 1.00]; ROC area 0.97 [0.93, 0.99]"
    )
    many = row(planted=Tally(specimens=5, claims=40, right=30, not_measured=4))
    assert "finds 30 of 40 claims on 5 planted [0.76, 0.99] (4 not measured)" in many.sentence()
    missing = row(sensitivity=Estimate.unknown("no phantom says that it is true"), located=Estimate.unknown("none"))
    assert missing.sentence().startswith("sensitivity not measured (no phantom says that it is true), silent on 59")
    assert "right place" not in missing.sentence()
    assert said_share(Estimate.unknown("why")) == "not measured: why"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"sensitivity": share(0.49, 0.3, 0.7)}, "misses more than it finds"),
        ({"specificity": share(0.8, 0.7, 0.94)}, "confirms what is not there more often than 5 %"),
        ({"specificity": share(0.9, 0.7, 0.97)}, None),  # 5 % false alarms are not excluded
        ({"area": share(0.7, 0.49, 0.9)}, "is not shown to be better than chance"),
        ({"located": share(0.3, 0.1, 0.5)}, "names the wrong place more often than the right one"),
        ({"area": Estimate.unknown("x"), "specificity": Estimate.unknown("x")}, None),
    ],
)
def test_what_does_badly_is_said(changes, said):
    one = Calibration(status="calibrated", row=row(**changes))
    assert one.row.concerns() == ([said] if said else [])
    assert one.doubtful is bool(said)
    if said:
        assert str(one).endswith(f". It {said}")


def test_a_row_is_stale_when_rule_or_options_are_others():
    table = CalibrationTable(rows=(row(),))
    exam = make_exam(calibration=table)
    assert calibration_of(exam).status == "calibrated"
    assert calibration_of(exam, "strongest", exam.options()).note == ""
    assert calibration_of(exam, "x", exam.configure({"prompts": 8})).note == "with prompts 40"
    for changes in ({"rule": Rule(minimum=0.3)}, {"rule": {"": exam.rule, "b": exam.rule}}):
        other = make_exam(calibration=table, **changes)
        assert other.signature != exam.signature
        assert calibration_of(other).status == "stale"
        assert calibration_of(other).doubtful
    assert make_exam(title="Another title", method="x").signature == exam.signature

    class More(exam.options):
        more: int = 3

    assert calibration_of(make_exam(calibration=table, options=More)).status == "stale"


def test_what_was_never_tried_is_uncalibrated_with_its_reason():
    assert str(calibration_of(make_exam("dummy.never"))) == "uncalibrated (never run on phantoms)"
    nothing = row(sensitivity=Estimate.unknown("no phantom says so"), specificity=Estimate.unknown("nor not"))
    exam = make_exam(calibration=CalibrationTable(rows=(nothing,)))
    assert (calibration_of(exam).status, calibration_of(exam).note) == ("uncalibrated", "no phantom says so")
    assert not calibration_of(exam).doubtful


def test_the_shipped_table_is_of_these_exams():
    table = shipped_calibration()
    for exam in EXAMS.values():
        known = table.row(exam.name)
        if known is not None:
            assert known.signature == exam.signature, f"{exam.name} changed: run `tomoscope calibrate` again"
