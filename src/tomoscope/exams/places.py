"""Places in a prompt as words and pictures: what exams of a task have in common when they name a position or a head."""

from __future__ import annotations

import numpy as np

from tomoscope.errors import SiteError
from tomoscope.exams.exam import Context
from tomoscope.exams.prompts import words
from tomoscope.exams.ready import Ready, heading
from tomoscope.findings.figures import attention
from tomoscope.findings.finding import FigureRef


def place_name(label: str) -> str:
    """A labelled position in a sentence."""
    return "the last token" if label in ("end", "last") else f"{label!r}"


def common_labels(task: Ready) -> list[str]:
    """The labels that every prompt of a task has, in the task's order; the last token alone where there are none."""
    prompts = (*task.pairs.clean.prompts, *task.pairs.corrupted.prompts)
    return [s for s in task.spec.spans if all(s in p.spans for p in prompts)] or ["last"]


def shown_pattern(context: Context, name: str, task: Ready, layer: int, head: int, rows: np.ndarray) -> list[FigureRef]:
    """The head's attention on the first of some prompts, with its tokens; nothing where patterns can't be read."""
    prompt = task.pairs.clean.prompts[int(rows[0])]
    try:
        read = context.subject.read([list(prompt.ids)], f"layer.{layer}.attn.pattern[head={head}]")
    except SiteError as error:
        context.log(f"{name}: no attention pattern is shown ({error.what})")
        return []
    pattern = next(iter(read.values())).float().cpu().numpy()
    picture = attention(
        pattern.reshape(1, *pattern.shape[-2:]), tokens=words(context.subject, prompt.ids), heads=[f"{layer}.{head}"],
        title=f"{heading(name)}: where head {layer}.{head} attends on one prompt",
        caption="Rows are queries, columns keys; one clean prompt of the half that was measured on.",
    )  # fmt: skip
    return [context.figure(f"{name}_pattern", picture)]
