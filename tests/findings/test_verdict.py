from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from tomoscope.errors import DataError
from tomoscope.findings import (
    Control,
    DataNote,
    Estimate,
    Finding,
    Rule,
    benjamini_hochberg,
    correct,
    format_number,
    holm,
    judge,
)

p_lists = st.lists(st.floats(0, 1), min_size=1, max_size=20)


def estimate(value, low, high):
    return Estimate(value=value, low=low, high=high, n=20, method="test")


def control(value, name="chance"):
    return Control(name=name, estimate=Estimate(value=value, n=5))


def finding(key, p, rule=None, value=1.0):
    rule = rule or Rule()
    number = estimate(value, value - 0.5, value + 0.5)
    verdict, reason = judge(rule, number, [control(0.0)], p_value=p)
    note = DataNote(name="x")
    return Finding(
        id=f"e/{key}", exam="e", claim="c", estimate=number, controls=(control(0.0),), p_value=p, chosen_on=note,
        measured_on=note, rule=rule.sentence(), criterion=rule, verdict=verdict, reason=reason,
    )  # fmt: skip


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(p_lists)
def test_benjamini_hochberg_agrees_with_scipy(p):
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p), atol=1e-12)


@given(p_lists)
def test_corrections_are_ordered(p):
    h, b = np.array(holm(p)), np.array(benjamini_hochberg(p))
    assert np.all(h >= b - 1e-12)
    assert np.all(b >= np.array(p) - 1e-12)
    assert np.all(np.diff(h[np.argsort(p, kind="stable")]) >= -1e-12)


def test_corrections_refuse_what_is_no_p_value():
    with pytest.raises(DataError):
        holm([1.2])


@pytest.mark.parametrize(
    ("rule", "number", "p", "verdict"),
    [
        (Rule(minimum=0.2), (1.0, 0.8, 1.2), 0.001, "confirmed"),
        (Rule(minimum=0.2), (1.0, 0.8, 1.2), 0.2, "inconclusive"),
        (Rule(minimum=0.2), (1.0, 0.8, 1.2), None, "inconclusive"),
        (Rule(minimum=0.2, alpha=None), (1.0, 0.8, 1.2), None, "confirmed"),
        (Rule(minimum=0.2), (0.3, -0.1, 0.7), 0.001, "inconclusive"),
        (Rule(minimum=2.0), (1.0, 0.8, 2.2), 0.001, "inconclusive"),
        (Rule(minimum=2.0), (1.0, 0.8, 1.2), 0.001, "refuted"),
        (Rule(minimum=0.2), (0.0, -0.1, 0.1), 0.6, "refuted"),
        (Rule(), (-0.5, -0.7, -0.3), 0.99, "refuted"),
        (Rule(direction="less"), (-0.5, -0.7, -0.3), 0.01, "confirmed"),
        (Rule(direction="less", minimum=0.1), (0.5, 0.3, 0.7), 0.01, "refuted"),
        (Rule(direction="different"), (-0.5, -0.7, -0.3), 0.01, "confirmed"),
        (Rule(direction="different", minimum=0.2), (0.0, -0.1, 0.1), 0.9, "refuted"),
        (Rule(direction="different"), (0.0, -0.1, 0.1), 0.9, "inconclusive"),
        (Rule(reference=0.9, alpha=None), (1.0, 0.8, 1.2), None, "inconclusive"),
    ],
)
def test_verdicts(rule, number, p, verdict):
    given_verdict, reason = judge(rule, estimate(*number), [control(0.0)], p_value=p)
    assert given_verdict == verdict
    assert reason.endswith(".")


def test_the_strongest_control_counts():
    weak, strong = control(0.0), control(0.9, "dumb baseline")
    verdict, reason = judge(Rule(alpha=None), estimate(1.0, 0.8, 1.2), [weak, strong])
    assert verdict == "inconclusive"
    assert "dumb baseline" in reason


def test_missing_is_never_zero():
    assert judge(Rule(), Estimate.unknown("no tokenizer"))[0] == "not measured"
    verdict, reason = judge(Rule(), estimate(1, 0.5, 1.5), [Control(name="c", estimate=Estimate.unknown("too few"))])
    assert verdict == "not measured"
    assert "too few" in reason
    assert judge(Rule(), Estimate(value=1.0, n=1, method="one value"), [control(0)])[0] == "inconclusive"
    for bad in (
        {"value": None},
        {"value": 1.0, "missing": "why"},
        {"value": float("nan")},
        {"value": 1.0, "low": 1.0},
        {"value": 1.0, "low": 2.0, "high": 1.0},
    ):
        with pytest.raises(ValidationError):
            Estimate(**bad)
    assert Estimate.exact(float("inf")).value is None


def test_an_exact_number_needs_no_interval():
    assert judge(Rule(alpha=None), Estimate.exact(3.0), [control(0.0)])[0] == "confirmed"


def test_correction_judges_again_and_keeps_the_raw_p():
    findings = [finding("a", 0.03), finding("b", 0.04), finding("c", None, Rule(alpha=None))]
    assert [item.verdict for item in findings] == ["confirmed"] * 3
    after = correct(findings)
    assert [item.p_value for item in after] == [0.03, 0.04, None]
    assert [item.p_adjusted for item in after] == [0.06, 0.06, None]
    assert [item.verdict for item in after] == ["inconclusive", "inconclusive", "confirmed"]
    bh = correct(findings, method="benjamini-hochberg")
    assert [item.verdict for item in bh] == ["confirmed"] * 3
    assert [item.p_adjusted for item in correct(findings, method="none")] == [0.03, 0.04, None]


def test_the_family_wise_error_of_a_scan_is_bounded():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        scan = [finding(str(i), float(p)) for i, p in enumerate(rng.uniform(size=8))]
        wrong += any(item.verdict == "confirmed" for item in correct(scan))
    assert wrong / 300 < 0.085


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.03124, "0.0312"), (12.34, "12.3"), (1204.4, "1,204"), (-3.1e-7, "−3.1e-7"), (None, "–"),
     (0.00999999, "0.0100"), (2.5e7, "2.5e7"), (999.9, "1,000")],
)  # fmt: skip
def test_numbers_read_well(value, text):
    assert format_number(value) == text
