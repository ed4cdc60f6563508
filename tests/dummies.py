"""A subject and exams that need no model, for the tests of everything above the methods."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from tomoscope.exams import Context, Exam, Options
from tomoscope.findings import Control, DataNote, Rule, bootstrap_interval, figures, null_interval, null_p_value
from tomoscope.findings.finding import Finding


@dataclass(frozen=True)
class DummyFacts:
    family: str = "dummy"
    kind: str = "decoder"
    n_layers: int = 4
    d_model: int = 8
    n_heads: int = 2
    parity: float = 0.0


@dataclass
class DummySubject:
    name: str = "dummy"
    device: str = "cpu"
    dtype: str = "float32"
    facts: DummyFacts = field(default_factory=DummyFacts)


class HeadOptions(Options):
    prompts: int = Field(default=40, ge=4, description="How many prompts to draw.")
    heads: int = Field(default=12, ge=2)
    effect: float = 1.0
    fail_at: str = ""


def run_heads(context: Context) -> Iterator[Finding]:
    options = context.options
    rng = context.rng("data")
    scores = rng.normal(0, 0.5, (options.prompts, options.heads))
    scores[:, 3 % options.heads] += options.effect
    for _ in context.track(range(3), "prompts"):
        pass
    chosen, measured = context.halves(options.prompts)
    head = int(scores[chosen].mean(0).argmax())
    others = np.delete(scores[measured].mean(0), head)
    estimate = bootstrap_interval(scores[measured, head], seed=context.seed_for("interval"), unit="score")
    picture = context.figure("heads", figures.bars(scores.mean(0), labels=range(options.heads), title="Scores"))
    data = context.figure("scores", figures.table({"head": list(range(options.heads))}, title="Heads"))
    yield context.claim(
        "strongest",
        f"Head {head} stands out.",
        estimate=estimate,
        controls=[Control(name="other heads", estimate=null_interval(others), description="All other heads.")],
        p_value=null_p_value(estimate.value or 0.0, rng.normal(0, 0.2, 999)),
        test="against draws of other heads",
        chosen_on=DataNote(name="half A", n=len(chosen)),
        measured_on=DataNote(name="half B", n=len(measured)),
        sites=[f"layer.0.attn.z[head={head}]"],
        positions="last",
        figures=[picture, data],
    )
    if options.fail_at:
        raise ValueError(options.fail_at)


def make_exam(name: str = "dummy.heads", **changes: Any) -> Exam:
    values: dict[str, Any] = {
        "name": name,
        "title": "Heads that stand out",
        "question": "Does one head score higher than the others?",
        "run": run_heads,
        "rule": Rule(direction="greater", minimum=0.2),
        "options": HeadOptions,
        "presets": {"quick": {"prompts": 20}},
        "method": "Scores of each head, averaged over prompts.",
    }
    return Exam(**(values | changes))
