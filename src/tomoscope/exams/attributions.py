"""Which parts write the answer, and which tokens it rests on.

Direct logit attribution says what a head writes towards the answer, read through the final norm with its scale frozen;
integrated gradients say which tokens the answer depends on along a straight path from the mean embedding. How they can
mislead: what a head writes need not be what decides (heads before it may have found it); attributions along a path off
the data need not be what a change of the prompt would do. Patching (`circuits.patching`) is the test of both.

Steps: score every head (label) on all prompts, choose on one half, measure on the other against the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from tomoscope.exams.exam import Context, Exam
from tomoscope.exams.places import place_name, shown_pattern
from tomoscope.exams.prompts import speaks_text, words
from tomoscope.exams.ready import Ready, TaskOptions, able, attempt, heading, title
from tomoscope.findings.estimate import format_number as number
from tomoscope.findings.figures import bars, heatmap, tokens
from tomoscope.findings.finding import Control, FigureRef, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.observe import TokenAttribution, by_head, direct_logit_attribution, integrated_gradients

PILOT = 8
"""Prompts that are tried first."""
TASKS = ("ioi", "induction", "agreement", "gendered_pronoun", "facts")


class AttributionOptions(TaskOptions):
    """Which tasks, and how many prompts of each."""

    tasks: tuple[str, ...] = Field(TASKS, description="Names of tasks; those the model does not do are not measured.")
    n: int = Field(64, ge=8, le=100_000, description="Prompts of each task.")


class TokenOptions(AttributionOptions):
    """And how finely the path is integrated."""

    steps: int = Field(32, ge=2, le=10_000, description="Points on the path from the baseline, at first.")
    most_steps: int = Field(128, ge=2, le=10_000, description="Points are doubled up to this until the parts sum.")
    tolerance: float = Field(0.1, gt=0, le=1, description="How far the parts may be from the whole, as a share.")


def each_task(context: Context, claim: str, make: Callable[[Context, str, Ready], Finding]) -> Iterator[Finding]:
    """One finding a task that the model does; "not measured" with the reason for the others."""
    for name in context.track(context.options.tasks, "tasks"):
        said = claim.format(title(name))
        task = able(context, name, context.options.n)
        if isinstance(task, str):
            yield context.not_measured(name, said, task)
        else:
            yield attempt(context, name, said, lambda name=name, task=task: make(context, name, task))


def run_direct(context: Context) -> Iterator[Finding]:
    """For each task that the model does: the head that writes most of the logit difference directly."""
    yield from each_task(context, "In {}, one head writes the answer directly into the logits.", _direct)


def _direct(context: Context, name: str, task: Ready) -> Finding:
    subject, batch = context.subject, task.pairs.clean
    answers, wrong = task.pairs.answers[:, 0], task.pairs.wrong[:, 0]
    parts = direct_logit_attribution(subject, batch.prompts, answers, wrong)
    heads = by_head(subject, batch.prompts, answers, wrong)
    order = context.rng(f"{name} other answers").permutation(len(answers))
    shuffled = by_head(subject, batch.prompts, answers[order], wrong[order]).values.double().numpy()
    values = heads.values.double().numpy()
    chosen, measured = context.halves(task.clusters)
    means = values[..., chosen].mean(-1)
    row, head = (int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    layer, clusters = heads.layers[row], [task.clusters[i] for i in measured]
    context.log(f"{name}: parts sum to the logit difference within {parts.error:.2g}")
    seed = context.seed_for(name)
    mine, other = values[row, head, measured], shuffled[row, head, measured]
    lead = float(parts.total.double().numpy()[measured].mean())
    grid = context.figure(
        f"{name}_heads",
        heatmap(
            values.mean(-1), rows=heads.layers, columns=range(values.shape[1]), row_axis="layer", column_axis="head",
            title=f"{heading(name)}: direct effect of every head", value_axis="logits", marks=[(row, head)],
            caption="What each head writes at the last token into the right answer's lead; the claim's is outlined.",
        ),
    )  # fmt: skip
    figures = [_parts(context, name, parts, seed), grid, *shown_pattern(context, name, task, layer, head, measured)]
    return context.claim(
        name,
        f"In {title(name)}, head {layer}.{head} writes the answer directly: {number(float(mine.mean()))} of the "
        f"{number(lead)} logits by which the right answer leads.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="logits"),
        controls=[
            Control(
                name="another prompt's answers", estimate=bootstrap_interval(
                    other, seed=seed, clusters=clusters, unit="logits"
                ),
                description="The same head's write, read for the answers of a prompt drawn at random.",
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{name} test"), clusters=clusters),
        test="paired sign-flip test over prompts", sites=[f"layer.{layer}.attn.result[head={head}]"],
        positions="last token", figures=figures, chosen_on=task.note("half A", chosen),
        measured_on=task.note("half B", measured), rule="direct",
    )  # fmt: skip


def _parts(context: Context, name: str, parts, seed: int) -> FigureRef:
    whole = [bootstrap_interval(p, seed=seed, n_resamples=1000) for p in parts.values.double().numpy()]
    capped = " before the soft-cap" if parts.softcapped else ""
    return context.figure(
        f"{name}_parts",
        bars(
            np.array([e.value for e in whole]), labels=parts.names, low=np.array([e.low for e in whole]),
            high=np.array([e.high for e in whole]), value_axis="logits",
            title=f"{heading(name)}: what each part writes into the right answer's lead",
            caption=f"Mean over prompts with bootstrap intervals; the parts sum to the model's own logit difference"
                    f"{capped} within {parts.error:.1g}.",
        ),
    )  # fmt: skip


def run_tokens(context: Context) -> Iterator[Finding]:
    """For each task: the labelled part of the prompt with most attribution, against tokens outside every label."""
    yield from each_task(context, "In {}, the answer rests on one labelled part of the prompt.", _tokens)


def _tokens(context: Context, name: str, task: Ready) -> Finding:
    batch = task.pairs.clean
    out, whole, run, steps, lead = _complete(context, task)
    if len(whole) < max(8, len(batch) // 2):
        why = (
            f"integrated gradients sum to the answer's lead (mean {number(lead)} logits) within "
            f"{context.options.tolerance:.0%} on only {len(whole)} of {len(run)} prompts, with {steps} steps"
        )
        return context.not_measured(name, f"In {title(name)}, the answer rests on one part.", why)
    context.log(
        f"{name}: {len(whole)} of {len(batch)} prompts are complete within the tolerance, in {steps} steps at most"
    )
    values, mask = out.values.double().numpy()[whole], out.mask.numpy()[whole]
    prompts = [batch.prompts[row] for row in whole]
    keys = [task.clusters[row] for row in whole]
    labels = [s for s in task.spec.spans if all(s in p.spans for p in prompts)]
    # the token that is read from is heavy whatever the task: it can't be the finding where another label can
    labels = [label for label in labels if label != "end"] or labels
    if not labels:
        return context.not_measured(name, f"In {title(name)}, the answer rests on one part.", "no part has a label")
    inside, rest = _inside(values, mask, prompts, labels)
    if not np.isfinite(rest).all():
        why = "every token of a prompt is labelled, so there is nothing to compare with"
        return context.not_measured(name, f"In {title(name)}, the answer rests on one part.", why)
    chosen, measured = context.halves(keys)
    best = int(inside[:, chosen].mean(1).argmax())
    clusters = [keys[i] for i in measured]
    ids = prompts[int(measured[0])].ids
    figure = context.figure(
        f"{name}_tokens",
        tokens(
            words(context.subject, ids), values[int(measured[0]), : len(ids)], value_axis="logits",
            title=f"{heading(name)}: integrated gradients of the right answer's lead on one prompt",
            caption=f"From the mean embedding in at most {steps} steps; the parts sum to the lead within "
                    f"{context.options.tolerance:.0%} on each of {len(whole)} prompts.",
        ),
    )  # fmt: skip
    seed = context.seed_for(name)
    mine, other = inside[best, measured], rest[measured]
    return context.claim(
        name,
        f"In {title(name)}, the answer rests on {place_name(labels[best])} more than on unlabelled tokens: "
        f"{number(float(mine.mean()))} against {number(float(other.mean()))} logits a token.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="logits a token"),
        controls=[
            Control(
                name="unlabelled tokens of the prompts", description="Mean magnitude on tokens without any label.",
                estimate=bootstrap_interval(other, seed=seed, clusters=clusters, unit="logits a token"),
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{name} test"), clusters=clusters),
        test="paired sign-flip test over prompts", sites=["embed"], positions=labels[best], figures=[figure],
        chosen_on=task.note("half A", chosen), measured_on=task.note("half B", measured), rule="tokens",
    )  # fmt: skip


def _complete(context: Context, task: Ready) -> tuple[TokenAttribution, np.ndarray, Int[Tensor, " prompt"], int, float]:
    """Integrated gradients on a path that is refined until the parts sum to the whole on nearly every prompt.

    A few prompts go first: where the parts do not sum on them, the others would cost much and show nothing.

    Returns:
        The attributions, the rows that are complete within the tolerance, which prompts were run, the most steps, and
        the mean lead in logits.
    """
    options = context.options
    every = torch.arange(len(task.pairs))
    some = every[:: max(1, len(every) // PILOT)][:PILOT]
    out, done, steps, lead = _refined(context, task, some, options.steps)
    if len(done) < len(some) / 2 or len(some) == len(every):
        return out, done, some, steps, lead
    out, done, steps, lead = _refined(context, task, every, steps)
    return out, done, every, steps, lead


def _refined(
    context: Context, task: Ready, rows: Int[Tensor, " prompt"], steps: int
) -> tuple[TokenAttribution, np.ndarray, int, float]:
    """Twice the steps, again and again, for the prompts whose parts do not sum yet."""
    prompts = [task.pairs.clean.prompts[row] for row in rows.tolist()]
    answers, wrong = task.pairs.answers[rows, 0], task.pairs.wrong[rows, 0]
    out = integrated_gradients(context.subject, prompts, answers, wrong, steps=steps)
    while True:
        assert out.completeness_error is not None
        assert out.baseline_metric is not None
        lead = float((out.metric - out.baseline_metric).abs().mean())
        done = out.completeness_error <= context.options.tolerance * lead
        if done.float().mean() >= 0.95 or 2 * steps > context.options.most_steps:
            return out, np.flatnonzero(done.numpy()), steps, lead
        steps *= 2
        left = torch.nonzero(~done)[:, 0]
        again = [prompts[row] for row in left.tolist()]
        finer = integrated_gradients(context.subject, again, answers[left], wrong[left], steps=steps)
        assert finer.completeness_error is not None
        values, errors = out.values.clone(), out.completeness_error.clone()
        values[left, : finer.values.shape[1]], errors[left] = finer.values, finer.completeness_error
        out = replace(out, values=values, completeness_error=errors)


def _inside(values: np.ndarray, mask: np.ndarray, prompts, labels: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean magnitude a token in each label [label, prompt] and outside all spans [prompt]."""
    inside, rest = np.zeros((len(labels), len(prompts))), np.full(len(prompts), np.nan)
    for row, prompt in enumerate(prompts):
        free = mask[row].copy()
        for first, end in prompt.spans.values():
            free[first:end] = False
        for place, label in enumerate(labels):
            first, end = prompt.spans[label]
            inside[place, row] = np.abs(values[row, first:end]).mean()
        if free.any():
            rest[row] = np.abs(values[row][free]).mean()
    return inside, rest


DIRECT = Exam(
    name="observe.direct_attribution",
    title="Which heads write the answer",
    question="Which head adds most of the right answer's lead directly to the logits?",
    run=run_direct,
    rule={"direct": Rule(direction="greater", minimum=0.1)},
    options=AttributionOptions,
    presets={"deep": {"n": 256}},
    applies=speaks_text,
    method=(
        "The logit difference is a sum over what every part adds to the stream, read through the final norm with its "
        "scale frozen (direct logit attribution). The head is chosen on one half of the prompts and measured on the "
        "other."
    ),
    cost=2.0,
)

TOKEN_ATTRIBUTION = Exam(
    name="observe.token_attribution",
    title="Which tokens the answer rests on",
    question="Which part of the prompt does the answer rest on?",
    run=run_tokens,
    rule={"tokens": Rule(direction="greater", minimum=0.02)},
    options=TokenOptions,
    presets={"quick": {"n": 24, "steps": 16, "most_steps": 32}, "deep": {"n": 128, "steps": 64, "most_steps": 512}},
    applies=speaks_text,
    method=(
        "Integrated gradients (Sundararajan et al. 2017) of the logit difference from the mean embedding; the "
        "magnitude on a labelled part is compared with that on unlabelled tokens of the same prompts."
    ),
    cost=3.0,
)
