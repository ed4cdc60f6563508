"""Which of the field's tasks does the model do? The ground for every exam of a task."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import CHANCE, STANDARD_TASKS, Ready, ready, speaks_text
from tomoscope.findings.figures import bars
from tomoscope.findings.finding import Control, Estimate, Finding
from tomoscope.findings.statistics import wilson_interval
from tomoscope.findings.verdict import Rule


class AbilityOptions(Options):
    """Which tasks, and how many prompts of each."""

    tasks: tuple[str, ...] = Field(STANDARD_TASKS, description="Names of tasks (tomoscope.data.TASKS).")
    n: int = Field(128, ge=8, le=100_000, description="Prompts of each task.")


def run(context: Context) -> Iterator[Finding]:
    """One claim a task: the right answer is preferred to the wrong one more often than with shuffled answers."""
    found: dict[str, Ready | str] = {}
    for name in context.track(context.options.tasks, "tasks"):
        found[name] = ready(context, name, context.options.n)
    made = {name: one for name, one in found.items() if isinstance(one, Ready)}
    figure = None
    if made:
        shares = [one.accuracy for one in made.values()]
        figure = context.figure(
            "accuracy",
            bars(
                np.array([e.value for e in shares]), labels=list(made), low=np.array([e.low for e in shares]),
                high=np.array([e.high for e in shares]), title="Share of prompts answered rightly",
                caption="Right answer preferred to the wrong one, with Wilson intervals; the line is chance.",
                value_axis="share of prompts", references={"chance": CHANCE},
            ),
        )  # fmt: skip
    for name, one in found.items():
        if isinstance(one, str):
            yield context.not_measured(name, f"The model does the task {name}.", one)
            continue
        shuffled = wilson_interval(int((one.shuffled > 0).sum()), len(one.shuffled), unit="share of prompts")
        chance = Control(
            name="chance",
            estimate=Estimate.exact(CHANCE),
            description="Two answers: a guess is right half of the time.",
        )
        other = Control(
            name="shuffled answers", estimate=shuffled,
            description="The same logits, scored with the answers of another prompt.",
        )  # fmt: skip
        yield context.claim(
            name, f"The model does {name.replace('_', ' ')}: {one.spec.description}", estimate=one.accuracy,
            controls=[chance, other], p_value=one.p_value, test="binomial test against one half",
            measured_on=one.note(), figures=[figure] if figure else [], positions="last token",
        )  # fmt: skip


ABILITIES = Exam(
    name="observe.abilities",
    title="What the model can do",
    question="Which of the field's standard tasks does the model do better than chance?",
    run=run,
    rule=Rule(direction="greater", minimum=0.1),
    options=AbilityOptions,
    presets={"quick": {"n": 64}, "deep": {"n": 512}},
    applies=speaks_text,
    method=(
        "Each task generates prompts from names and words that are single tokens for this tokenizer. A prompt "
        "counts as "
        "answered rightly where the right answer's logit (or probability) exceeds the wrong one's at the last token."
    ),
    cost=1.0,
)
