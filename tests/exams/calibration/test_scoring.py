"""Scores of exams whose worth is known: an oracle, one that always confirms, one that never does, a coin."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.exams.calibration.world import always, coin, never, oracle, phantom, thing_exam
from tomoscope.exams.calibration import Expected, Place, Truth, calibrate, evidence
from tomoscope.exams.calibration.runner import plan_calibration, read_lines
from tomoscope.exams.calibration.scoring import outcomes
from tomoscope.findings import Control, DataNote, Estimate, Finding, Rule, wilson_interval


def row(tmp_path, exam, *, seeds=12, phantoms=(), kind=""):
    table = calibrate(tmp_path / exam.name, exams=[exam], phantoms=phantoms or [phantom()], seeds=seeds)
    return table.row(exam.name, kind)


def test_an_oracle_is_always_right(tmp_path):
    one = row(tmp_path, thing_exam(oracle))
    wilson = wilson_interval(12, 12)
    for share in (one.sensitivity, one.specificity):
        assert (share.value, share.low, share.high) == pytest.approx((1, wilson.low, 1), abs=1e-4)
    assert one.area.value == 1
    assert 0.7 < one.area.low < 1
    assert (one.planted.claims, one.planted.right, one.nulls.claims, one.nulls.right) == (12, 12, 12, 12)
    assert one.sources == {"thing": 24}
    assert one.concerns() == []
    assert one.sentence().startswith("finds 12 of 12 planted [0.76, 1.00], silent on 12 of 12 nulls [0.76, 1.00]")


def test_one_that_always_confirms_knows_nothing(tmp_path):
    one = row(tmp_path, thing_exam(always))
    assert (one.sensitivity.value, one.specificity.value, one.area.value) == (1, 0, 0.5)
    assert one.area.low < 0.5 < one.area.high
    assert len(one.concerns()) == 2
    assert "confirms what is not there more often than 5 %" in one.concerns()


def test_one_that_never_confirms_knows_nothing_either(tmp_path):
    one = row(tmp_path, thing_exam(never))
    assert (one.sensitivity.value, one.specificity.value, one.area.value) == (0, 1, 0.5)
    assert "misses more than it finds" in one.concerns()


@pytest.mark.parametrize("claims", [1, 4])
def test_a_coin_is_not_better_than_chance(tmp_path, claims):
    one = row(tmp_path, thing_exam(coin, claims=claims), seeds=20)
    assert one.area.low < 0.5 < one.area.high
    assert one.planted.claims == 20 * claims
    assert one.planted.specimens == one.sensitivity.n == 20


def test_the_area_is_scikit_learns_over_the_scores(tmp_path):
    def weak(subject, rng):
        return rng.normal(0.3 if subject.name.startswith("with ") else 0.0, 0.3), 3

    exam = thing_exam(weak, claims=3)
    one = row(tmp_path, exam, seeds=15)
    known = outcomes(read_lines(tmp_path / exam.name / "lines.jsonl").values())
    want = roc_auc_score([o.expected.holds for o in known], [o.score for o in known])
    assert one.area.value == pytest.approx(want, abs=1e-4)
    by_hand = np.mean([o.confirmed for o in known if o.expected.holds])
    assert one.sensitivity.value == pytest.approx(by_hand, abs=1e-4)


def test_what_was_not_measured_is_missed_and_silent_and_counted_apart(tmp_path):
    one = row(tmp_path, thing_exam(lambda subject, rng: "too few prompts"))
    assert (one.sensitivity.value, one.specificity.value, one.area.value) == (0, 1, 0.5)
    assert (one.planted.not_measured, one.nulls.not_measured, one.planted.failed) == (12, 12, 0)


def test_an_exam_that_fails_misses_what_is_there_and_one_that_does_not_apply_is_not_asked(tmp_path):
    def broken(subject, rng):
        raise ValueError("the roof fell in")

    one = row(tmp_path, thing_exam(broken, "test.broken"))
    assert (one.sensitivity.value, one.planted.failed, one.planted.not_measured) == (0, 12, 12)
    two = row(tmp_path, thing_exam(oracle, "test.shy", applies=lambda subject: "no"))
    assert (two.planted.claims, two.inapplicable) == (0, 24), "it counts neither way"
    assert two.sensitivity.missing == "no phantom, of those it applies to, says that it is true"


def test_places_are_scored_apart_unless_the_claim_is_of_the_place(tmp_path):
    right = row(tmp_path, thing_exam(oracle, "test.right"), phantoms=[phantom(head=3)])
    assert (right.sensitivity.value, right.located.value) == (1, 1)
    wrong = row(tmp_path, thing_exam(oracle, "test.wrong"), phantoms=[phantom(head=2)])
    assert (wrong.sensitivity.value, wrong.located.value, wrong.area.value) == (1, 0, 1)
    assert "wrong place" in wrong.concerns()[0]
    named = row(tmp_path, thing_exam(oracle, "test.named"), phantoms=[phantom(head=2, named=True)])
    assert (named.sensitivity.value, named.located.value, named.area.value) == (0, 0, 0)
    unplaced = row(tmp_path, thing_exam(oracle, "test.unplaced"))
    assert unplaced.located.missing == "no phantom knows the place"


def test_what_no_phantom_decides_is_missing_with_its_reason(tmp_path):
    exam = thing_exam(oracle, truth=Truth(lambda card, options: (), unknowable={"": "it can't be known"}))
    one = row(tmp_path, exam)
    assert one.sensitivity.missing == "it can't be known"
    assert one.specificity.missing == "no phantom says that it is false"
    assert one.area.value is None
    assert "undecided" in (tmp_path / exam.name / "lines.jsonl").read_text()
    assert not one.measured
    none = row(tmp_path, thing_exam(oracle, "test.none", truth=None))
    assert none.sensitivity.missing == "no card speaks of this exam's claims"


def test_kinds_have_rows_and_the_exam_has_all_of_them(tmp_path):
    def kinds(card, options):
        for known in card.of("thing"):
            yield Expected(key="thing0", kind="first", holds=known.holds)
            if not known.holds:
                yield Expected(key="thing1", kind="second", holds=False)

    truth = Truth(kinds, kind=lambda key: "first" if key == "thing0" else "second", unknowable={"second": "why"})
    exam = thing_exam(oracle, claims=2, truth=truth)
    table = calibrate(tmp_path / "run", exams=[exam], phantoms=[phantom()], seeds=5)
    assert [one.kind for one in table.rows] == ["", "first", "second"]
    whole, first, second = table.rows
    assert (whole.planted.claims, whole.nulls.claims) == (5, 10)
    assert (first.planted.claims, first.nulls.claims) == (5, 5)
    assert second.sensitivity.missing == "why"
    assert second.specificity.value == 1
    assert (second.undecided, first.undecided, whole.undecided) == (5, 0, 5)
    assert table.row(exam.name, "unheard of") == whole


def test_p_values_are_corrected_over_all_claims_about_a_specimen(tmp_path):
    def run(context):
        for i in range(context.options.claims):
            yield context.claim(
                f"thing{i}", "There is a thing.", measured_on=DataNote(name="nothing"), p_value=0.02, test="made up",
                estimate=Estimate(value=0.5, low=0.4, high=0.6, n=9), controls=[
                    Control(name="none", estimate=Estimate.exact(0.0))],
            )  # fmt: skip

    for claims, share in ((1, 1), (4, 0)):
        exam = thing_exam(oracle, f"test.p{claims}", claims=claims, run=run, rule=Rule(minimum=0.1))
        plan = plan_calibration(exams=[exam], phantoms=[phantom()], seeds=3, preset="quick")
        assert plan.exams[0][1].claims == claims
        table = calibrate(tmp_path / exam.name, exams=[exam], phantoms=[phantom()], seeds=3, preset="quick")
        assert table.row(exam.name).sensitivity.value == share


def finding(rule: Rule, estimate: Estimate, *controls: float) -> Finding:
    note = DataNote(name="x")
    return Finding(
        id="e/x", exam="e", claim="x", estimate=estimate, chosen_on=note, measured_on=note, rule="", criterion=rule,
        controls=tuple(Control(name=str(c), estimate=Estimate.exact(c)) for c in controls), reason="",
        verdict="inconclusive",
    )  # fmt: skip


def test_evidence_is_the_nearer_end_beyond_the_strongest_control_in_the_rules_unit():
    estimate = Estimate(value=0.5, low=0.4, high=0.6)
    assert evidence(finding(Rule(minimum=0.1), estimate, 0.0, 0.2)) == pytest.approx(2)
    assert evidence(finding(Rule(direction="less", minimum=0.1), estimate, 0.9, 0.8)) == pytest.approx(2)
    assert evidence(finding(Rule(direction="different", minimum=0.1), estimate, 0.0)) == pytest.approx(4)
    assert evidence(finding(Rule(minimum=0.0, reference=0.1), estimate, 0.3)) == pytest.approx(0.3)
    assert evidence(finding(Rule(minimum=0.1), Estimate.exact(0.5), 0.2)) == pytest.approx(3)
    assert evidence(finding(Rule(minimum=0.1), Estimate.unknown("why"), 0.2)) == -math.inf
    assert evidence(finding(Rule(minimum=0.1), estimate)) == -math.inf


def test_places_match_by_part_layer_head_and_window():
    one = Expected(key="k", holds=True, places=(Place(1, "attn", 3), Place(2, "mlp")), within=1)
    assert one.right(["layer.1.attn.z[head=3]"], "")
    assert one.right(["layer.2.attn.pattern[head=3]"], "")
    assert one.right(["layer.0.attn.out"], "")
    assert not one.right(["layer.3.attn.out"], "")
    assert not one.right(["layer.1.attn.z[head=2]"], "")
    assert one.right(["layer.3.mlp.out"], "")
    assert not one.right(["layer.0.mlp.out", "embed"], "")
    assert Expected(key="k", holds=True, places=(Place(4, "block"),)).right(["layer.4.resid_pre"], "")
    assert Expected(key="k", holds=True).right(["layer.0.mlp.out"], "") is None
    assert Expected(key="k", holds=True, positions=("subject",)).right(["embed"], "subject")
