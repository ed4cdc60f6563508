"""Which parts write the answer, and which tokens it rests on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.errors import SiteError
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import Ready, ready, speaks_text, words
from tomoscope.findings.figures import bars, heatmap, tokens
from tomoscope.findings.finding import Control, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.observe import by_head, direct_logit_attribution, integrated_gradients

TASKS = ("ioi", "induction", "agreement", "gendered_pronoun", "facts")


class AttributionOptions(Options):
    """Which tasks, and how many prompts of each."""

    tasks: tuple[str, ...] = Field(TASKS, description="Names of tasks; those the model does not do are not measured.")
    n: int = Field(64, ge=8, le=100_000, description="Prompts of each task.")


class TokenOptions(AttributionOptions):
    """And how finely the path is integrated."""

    steps: int = Field(32, ge=2, le=10_000, description="Points on the path from the baseline.")


def run_direct(context: Context) -> Iterator[Finding]:
    """For each task that the model does: the head that writes most of the logit difference directly."""
    for name in context.track(context.options.tasks, "tasks"):
        claim = f"One head writes the answer of {name.replace('_', ' ')} directly into the logits."
        task = ready(context, name, context.options.n)
        why = task if isinstance(task, str) else task.why_not
        if why:
            yield context.not_measured(name, claim, why)
            continue
        assert isinstance(task, Ready)
        try:
            yield _direct(context, name, task)
        except SiteError as error:
            yield context.not_measured(name, claim, error.what)


def _direct(context: Context, name: str, task: Ready) -> Finding:
    subject, batch = context.subject, task.pairs.clean
    answers, wrong = task.pairs.answers[:, 0], task.pairs.wrong[:, 0]
    parts = direct_logit_attribution(subject, batch.prompts, answers, wrong)
    heads = by_head(subject, batch.prompts, answers, wrong)
    order = np.roll(np.arange(len(answers)), 1)
    shuffled = by_head(subject, batch.prompts, answers[order], wrong[order]).values.double().numpy()
    values = heads.values.double().numpy()
    chosen, measured = context.halves(task.clusters)
    means = values[..., chosen].mean(-1)
    row, head = np.unravel_index(int(means.argmax()), means.shape)
    layer, clusters = heads.layers[int(row)], [task.clusters[i] for i in measured]
    context.log(f"{name}: parts sum to the logit difference within {parts.error:.2g}")
    seed = context.seed_for(name)
    whole = [bootstrap_interval(p, seed=seed, n_resamples=1000) for p in parts.values.double().numpy()]
    figures = [
        context.figure(
            f"{name}_parts",
            bars(
                np.array([e.value for e in whole]), labels=parts.names, low=np.array([e.low for e in whole]),
                high=np.array([e.high for e in whole]), title=f"{name}: what each part writes into the logit "
                    f"difference",
                value_axis="logits", caption=f"The parts sum to the model's own difference within {parts.error:.1g}.",
            ),
        ),
        context.figure(
            f"{name}_heads",
            heatmap(
                values.mean(-1), rows=heads.layers, columns=range(values.shape[1]), row_axis="layer", column_axis="head",
                title=f"{name}: direct effect of every head", value_axis="logits", marks=[(int(row), int(head))],
            ),
        ),
    ]  # fmt: skip
    mine, other = values[row, head, measured], shuffled[row, head, measured]
    return context.claim(
        name, f"Head {layer}.{head} writes the answer of {name.replace('_', ' ')} directly into the logits.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="logits"),
        controls=[
            Control(
                name="another prompt's answer", description="The same head's write, read for the answers of another prompt.",
                estimate=bootstrap_interval(other, seed=seed, clusters=clusters, unit="logits"),
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{name} test"), clusters=clusters),
        test="paired sign-flip test over prompts", sites=[f"layer.{layer}.attn.result[head={head}]"],
        positions="last token", figures=figures, chosen_on=task.note("half A", chosen),
        measured_on=task.note("half B", measured), rule="direct",
    )  # fmt: skip


def run_tokens(context: Context) -> Iterator[Finding]:
    """For each task: the labelled span that carries most of the attribution, against other tokens of the prompt."""
    for name in context.track(context.options.tasks, "tasks"):
        claim = f"The answer of {name.replace('_', ' ')} rests on one labelled part of the prompt."
        task = ready(context, name, context.options.n)
        why = task if isinstance(task, str) else task.why_not
        if why:
            yield context.not_measured(name, claim, why)
            continue
        assert isinstance(task, Ready)
        yield _tokens(context, name, task)


def _tokens(context: Context, name: str, task: Ready) -> Finding:
    batch = task.pairs.clean
    out = integrated_gradients(
        context.subject, batch.prompts, task.pairs.answers[:, 0], task.pairs.wrong[:, 0], steps=context.options.steps
    )
    values, mask = out.values.double().numpy(), out.mask.numpy()
    labels = [s for s in task.spec.spans if all(s in p.spans for p in batch.prompts)]
    n = len(batch)
    inside = np.zeros((len(labels), n))
    marked = np.zeros_like(mask)
    for row, prompt in enumerate(batch.prompts):
        for place, label in enumerate(labels):
            first, end = prompt.spans[label]
            inside[place, row] = np.abs(values[row, first:end]).mean()
            marked[row, first:end] = True
    free = mask & ~marked
    rest = np.array([np.abs(values[r][free[r]]).mean() if free[r].any() else 0.0 for r in range(n)])
    chosen, measured = context.halves(task.clusters)
    best = int(inside[:, chosen].mean(1).argmax())
    clusters = [task.clusters[i] for i in measured]
    ids = batch.prompts[int(measured[0])].ids
    gap = float(out.completeness_error.max()) if out.completeness_error is not None else float("nan")
    figure = context.figure(
        f"{name}_tokens",
        tokens(
            words(context.subject, ids), values[int(measured[0]), : len(ids)], value_axis="logits",
            title=f"{name}: integrated gradients of the logit difference on one prompt",
            caption=f"Mean-embedding baseline; largest completeness error over prompts {gap:.2g} logits.",
        ),
    )  # fmt: skip
    seed = context.seed_for(name)
    mine, other = inside[best, measured], rest[measured]
    return context.claim(
        name, f"The answer of {name.replace('_', ' ')} rests on the token(s) labelled {labels[best]!r}.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="logits a token"),
        controls=[
            Control(
                name="other tokens of the prompt", description="Mean magnitude on tokens outside every labelled part.",
                estimate=bootstrap_interval(other, seed=seed, clusters=clusters, unit="logits a token"),
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{name} test"), clusters=clusters),
        test="paired sign-flip test over prompts", sites=["embed"], positions=labels[best], figures=[figure],
        chosen_on=task.note("half A", chosen), measured_on=task.note("half B", measured), rule="tokens",
    )  # fmt: skip


DIRECT = Exam(
    name="observe.direct_attribution",
    title="Which heads write the answer",
    question="Which head adds most of the right answer's lead directly to the logits?",
    run=run_direct,
    rule={"direct": Rule(direction="greater", minimum=0.1)},
    options=AttributionOptions,
    presets={"quick": {"n": 48}, "deep": {"n": 256}},
    applies=speaks_text,
    method=(
        "The logit difference is a sum over what every part adds to the stream, read through the final norm with its "
        "scale "
        "frozen (direct logit attribution). The head is chosen on one half of the prompts and measured on the other."
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
    presets={"quick": {"n": 32, "steps": 16}, "deep": {"n": 128, "steps": 100}},
    applies=speaks_text,
    method=(
        "Integrated gradients (Sundararajan et al. 2017) of the logit difference from the mean embedding; the "
        "magnitude on "
        "a labelled part is compared with that on unlabelled tokens of the same prompts."
    ),
    cost=3.0,
)
