from __future__ import annotations

import numpy as np
import pytest

from tests.dummies import DummySubject, make_exam
from tomoscope.errors import ProtocolError
from tomoscope.exams import EXAMS, Context, Exam, examine, register
from tomoscope.exams.registry import Registry
from tomoscope.findings import Control, DataNote, Estimate, Rule, figures

NOTE = DataNote(name="data", n=3)
ONE = Estimate(value=1.0, low=0.8, high=1.2, n=9)


def context(**changes):
    return Context(DummySubject(), make_exam(**changes))


def test_an_exam_runs_by_itself_and_finds_what_was_planted():
    (finding,) = examine(make_exam(), DummySubject(), seed=4)
    assert finding.verdict == "confirmed"
    assert finding.sites == ("layer.0.attn.z[head=3]",)
    assert examine(make_exam(), DummySubject(), seed=4) == [finding]
    assert examine(make_exam(), DummySubject(), seed=5) != [finding]


def test_it_finds_nothing_where_nothing_is():
    (finding,) = examine(make_exam(), DummySubject(), options={"effect": 0.0}, seed=1)
    assert finding.verdict in ("refuted", "inconclusive")


def test_a_subject_it_does_not_apply_to():
    (finding,) = examine(make_exam(applies=lambda subject: "it has no heads"), DummySubject())
    assert (finding.verdict, finding.reason) == ("not measured", "it has no heads")


def test_seeds_differ_by_purpose_exam_and_scan_and_nothing_else():
    one = context()
    assert one.seed_for("a") != one.seed_for("b")
    assert one.seed_for("a") != context(name="dummy.other").seed_for("a")
    assert one.rng("x").random() == one.rng("x").random()
    chosen, measured = one.halves(10)
    assert sorted([*chosen, *measured]) == list(range(10))


def test_figures_are_kept_under_their_name():
    here = context()
    ref = here.figure("grid", figures.heatmap(np.eye(2), title="t", marks=[(np.int64(0), np.int64(1))]))
    assert ref.arrays == {"values": "grid.values"}
    assert ref.marks == ((0, 1),)
    np.testing.assert_array_equal(here.arrays["grid.values"], np.eye(2))
    with pytest.raises(ProtocolError, match="is taken"):
        here.figure("grid", figures.text("x", title="t"))
    with pytest.raises(ProtocolError, match="lower-case"):
        here.figure("Grid 1", figures.text("x", title="t"))


def test_claims_follow_the_rule_that_is_named():
    rules = {"strict": Rule(minimum=5.0, alpha=None), "loose": Rule(minimum=0.1, alpha=None)}
    here = context(rule=rules)
    control = [Control(name="chance", estimate=Estimate(value=0.0))]
    loose = here.claim("a", "c", estimate=ONE, controls=control, measured_on=NOTE, rule="loose")
    strict = here.claim("b", "c", estimate=ONE, controls=control, measured_on=NOTE, rule="strict")
    assert (loose.verdict, strict.verdict) == ("confirmed", "refuted")
    assert loose.rule == rules["loose"].sentence()
    assert loose.chosen_on.name == "nothing was chosen"
    with pytest.raises(ProtocolError, match="two claims"):
        here.claim("a", "c", estimate=ONE, measured_on=NOTE, rule="loose")
    with pytest.raises(ProtocolError, match="declared no rule"):
        here.claim("z", "c", estimate=ONE, measured_on=NOTE, rule="invented afterwards")


def test_progress_is_reported():
    heard = []
    here = Context(DummySubject(), make_exam(), report=lambda *event: heard.append(event))
    assert list(here.track("ab", "letters")) == ["a", "b"]
    assert list(here.track(iter("c"), "more")) == ["c"]
    assert heard == [(0, 2, "letters"), (1, 2, "letters"), (2, 2, "letters"), (0, None, "more"), (1, None, "more")]
    assert here.remaining() is None


def test_names_and_options_are_checked():
    with pytest.raises(ProtocolError, match="cannot name an exam"):
        make_exam("Bad name")
    exam = make_exam()
    assert exam.configure({"prompts": "12"}).prompts == 12
    with pytest.raises(ProtocolError, match=r"'prompts'.*greater than or equal to 4.*How many prompts"):
        exam.configure({"prompts": 1})
    with pytest.raises(ProtocolError, match="It has no options"):
        Exam(name="a", title="t", question="q", run=exam.run, rule=Rule()).configure({"x": 1})


def test_the_registry_refuses_two_of_one_name_and_skips_absent_modules():
    made = Registry(modules=("tomoscope.exams.not_written_yet",))
    assert dict(made) == {}
    exam = made.register(make_exam())
    assert made.register(exam) is exam
    with pytest.raises(ProtocolError, match="two exams"):
        made.register(make_exam())
    with pytest.raises(ProtocolError, match=r"no exam 'dummy.head'.*'dummy.heads'"):
        made.find("dummy.head")
    register(make_exam("dummy.public"))
    assert "dummy.public" in EXAMS
    EXAMS.unregister("dummy.public")
    assert "dummy.public" not in EXAMS


def test_every_exam_here_is_declared_whole():
    for name, exam in EXAMS.items():
        assert exam.name == name
        assert exam.question.endswith("?"), name
        assert exam.rules, name
        for preset, options in exam.presets.items():
            exam.configure(options, where=f"preset {preset} of {name}")
        for option, info in exam.options.model_fields.items():
            assert info.description, f"the option {option} of {name} has no description"
