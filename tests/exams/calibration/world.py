"""Exams and phantoms that need no model: an oracle, one that always confirms, one that flips coins."""

from __future__ import annotations

from typing import Any

from tests.dummies import DummySubject
from tomoscope.exams import Exam, Options
from tomoscope.exams.calibration import Expected, Place, Truth
from tomoscope.findings import Control, DataNote, Estimate, Rule
from tomoscope.phantoms import Card, Known, Phantom, Specimen

RULE = Rule(direction="greater", minimum=0.1, alpha=None)


class ThingOptions(Options):
    claims: int = 1


def expect(card: Card, options: Any):
    for known in card.of("thing"):
        for i in range(options.claims):
            head = known.value.get("head")
            places = () if head is None else (Place(0, "attn", head),)
            yield Expected(key=f"thing{i}", holds=known.holds, places=places, named=known.value.get("named", False))


def thing_exam(answer, name: str = "test.thing", *, claims: int = 1, **changes: Any) -> Exam:
    """An exam whose `answer(subject, rng)` gives (effect, named head), or a reason for not measuring."""

    def run(context):
        for i in range(claims):
            said = answer(context.subject, context.rng(f"{i} {context.subject.name}"))
            if isinstance(said, str):
                yield context.not_measured(f"thing{i}", "There is a thing.", said)
                continue
            effect, head = said
            yield context.claim(
                f"thing{i}", "There is a thing.", measured_on=DataNote(name="nothing"),
                estimate=Estimate(value=effect, low=effect - 0.05, high=effect + 0.05, n=9, method="made up"),
                controls=[Control(name="none", estimate=Estimate.exact(0.0))], sites=[f"layer.0.attn.z[head={head}]"],
            )  # fmt: skip

    values: dict[str, Any] = {
        "name": name, "title": "A thing", "question": "Is there a thing?", "run": run, "rule": RULE,
        "options": ThingOptions, "presets": {"quick": {"claims": claims}, "deep": {"claims": claims}},
        "truth": Truth(lambda card, options: expect(card, ThingOptions(claims=claims))),
    }  # fmt: skip
    return Exam(**(values | changes))


def phantom(name: str = "thing", *, head: int | None = None, named: bool = False, varies: bool = True) -> Phantom:
    """A phantom whose subject is named "with" or "without", and its seed."""

    def make(seed: int, holds: bool) -> Specimen:
        value = {} if head is None else {"head": head, "named": named}
        known = (Known("thing", value, holds), Known("other", {}))
        return Specimen(DummySubject(name=f"{'with' if holds else 'without'} {seed}"), Card(name, seed, "", known))

    return Phantom(
        name, "planted", f"A {name}", build=lambda seed: make(seed, True), null=lambda seed: make(seed, False),
        varies=varies,
    )  # fmt: skip


def oracle(subject, rng):
    return (0.5 if subject.name.startswith("with ") else 0.0), 3


def always(subject, rng):
    return 0.5, 3


def never(subject, rng):
    return 0.0, 3


def coin(subject, rng):
    return float(rng.choice([0.5, 0.0])) + rng.normal(0, 0.01), 3
