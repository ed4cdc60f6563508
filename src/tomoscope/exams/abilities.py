"""Which of the field's tasks does the model do? The ground for every exam of a task.

The claim is that the right answer beats every wrong one more often than a guess among the same candidates would, and
because of what the prompt says: the same answers must do worse after the corrupted prompt. How it can mislead: see
`ready`; being right on generated prompts is not being right on people's text.

Steps: make and score each task, one figure and one table of all, one claim a task.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.exams.exam import Context, Exam
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import STANDARD_TASKS, Ready, TaskOptions, most, percent, title
from tomoscope.findings.figures import bars, table
from tomoscope.findings.finding import Control, Estimate, FigureRef, Finding
from tomoscope.findings.verdict import Rule
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS
from tomoscope.phantoms.world.tasks import speaks_of_the_world


class AbilityOptions(TaskOptions):
    """Which tasks, and how many prompts of each."""

    tasks: tuple[str, ...] = Field(STANDARD_TASKS, description="Names of tasks (tomoscope.data.TASKS).")
    world: bool = Field(True, description="Ask a model that knows the micro-world's names of that world too.")
    n: int = Field(128, ge=8, le=100_000, description="Prompts of each task, or as many as it can make.")


def run(context: Context) -> Iterator[Finding]:
    """One claim a task."""
    found: dict[str, Ready | str] = {}
    tasks = dict.fromkeys(context.options.tasks)
    if context.options.world and speaks_of_the_world(context.subject.tokenizer):
        tasks |= dict.fromkeys(WORLD_TASKS)
    for name in context.track(list(tasks), "tasks"):
        found[name] = most(context, name, context.options.n)
    figures = _figures(context, {name: one for name, one in found.items() if isinstance(one, Ready)})
    for name, one in found.items():
        claim = f"In {title(name)}, the model does better than chance"
        if isinstance(one, str):
            yield context.not_measured(name, f"{claim}.", one)
        else:
            yield _claim(context, name, one, claim, figures)


def _claim(context: Context, name: str, one: Ready, claim: str, figures: list[FigureRef]) -> Finding:
    unit = "share of prompts"
    controls = [
        Control(
            name="chance", estimate=Estimate.exact(one.chance, unit=unit),
            description="A guess among the right and the wrong answers of each prompt.",
        ),
        Control(
            name="shuffled answers", estimate=one.share(one.right_shuffled),
            description="The same logits, scored with the answers of another prompt.",
        ),
    ]  # fmt: skip
    if one.comparable:
        corrupted = "The same answers after the corrupted prompt: high where words are liked whatever was said."
        share = one.share(one.right_corrupted)
        controls.append(Control(name="corrupted prompts", estimate=share, description=corrupted))
    return context.claim(
        name, f"{claim}: right on {percent(float(one.right.mean()))} of {len(one.right)} prompts.",
        estimate=one.accuracy, controls=controls, p_value=one.p_value, positions="last token",
        test="the largest p of a binomial test against chance and paired sign-flip tests of scores against controls",
        measured_on=one.note(), figures=figures,
    )  # fmt: skip


def _figures(context: Context, made: dict[str, Ready]) -> list[FigureRef]:
    if not made:
        return []
    shares = [one.accuracy for one in made.values()]
    low, high = (np.array([getattr(e, end) for e in shares]) for end in ("low", "high"))
    labels = [title(name) for name in made]
    chances = {one.chance for one in made.values()}
    said = {"chance": chances.pop()} if len(chances) == 1 else {}
    chart = context.figure(
        "accuracy",
        bars(
            np.array([e.value for e in shares]), labels=labels, low=low, high=high,
            references=said or {"one half": 0.5}, title="Share of prompts answered rightly",
            value_axis="share of prompts",
            caption="The right answer beats every wrong one at the last token; Wilson intervals. A guess is right half "
                    "of the time, less often where a task has several wrong answers (see the table).",
        ),
    )  # fmt: skip
    numbers = context.figure(
        "tasks",
        table(
            {
                "task": list(made),
                "prompts": [len(one.right) for one in made.values()],
                "right": [round(float(one.right.mean()), 3) for one in made.values()],
                "corrupted": [round(float(one.right_corrupted.mean()), 3) for one in made.values()],
                "chance": [round(one.chance, 3) for one in made.values()],
            },
            title="The tasks in numbers",
            caption="Right: share answered rightly; corrupted: the same answers after the corrupted prompts.",
        ),
    )
    return [chart, numbers]


ABILITIES = Exam(
    name="observe.abilities",
    title="What the model can do",
    question="Which of the field's standard tasks does the model do better than chance?",
    run=run,
    rule=Rule(direction="greater", minimum=0.1),
    options=AbilityOptions,
    presets={"deep": {"n": 512}},
    applies=speaks_text,
    method=(
        "Each task generates prompts from names and words that are single tokens for this tokenizer. A prompt counts "
        "as answered rightly where the right answer's logit is above every wrong one's at the last token (for years: "
        "where the later ones' total probability is above the others')."
    ),
    cost=1.0,
)
