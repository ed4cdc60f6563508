"""The backdoored sibling is cured by taking a part out; a healthy model is not called ill."""

from __future__ import annotations

from tomoscope.exams import EXAMS, Context, examine
from tomoscope.phantoms.trained import micro_world, sibling

EXAM = EXAMS["treat.removal"]
SMALL = {"n": 48, "found_on": 48, "draws": 3, "abilities": 32}


def found(subject, **options):
    context = Context(subject, EXAM, options=EXAM.configure({**SMALL, **options}))
    return {finding.id.rsplit("/", 1)[-1]: finding for finding in examine(EXAM, subject, context=context)}


def test_the_backdoor_is_taken_out():
    subject = sibling("backdoor").subject
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    one = found(subject, diseases=("backdoor",))["backdoor"]
    assert one.verdict == "confirmed", one.reason
    assert one.estimate.value > 0.9
    assert one.controls[0].estimate.value < 0.2
    treatments = {treatment.name: treatment for treatment in one.treatments}
    assert len(treatments) == 2
    for effect in next(t for name, t in treatments.items() if name.startswith("without")).side_effects:
        assert effect.after is not None
        assert effect.before is not None
        assert effect.after > effect.before - 0.1, effect.name
    assert all(value.equal(before[name]) for name, value in subject.model.state_dict().items())


def test_the_healthy_model_is_not_called_ill():
    findings = found(micro_world().subject)
    assert {finding.verdict for finding in findings.values()} == {"not measured"}
    assert "not ill" in findings["backdoor"].reason
