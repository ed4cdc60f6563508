"""Where are facts recalled? Causal tracing of facts that the model knows, as two claims of Meng et al. 2022.

Noise on the subject's tokens takes the answer away; clean MLP outputs (or attention outputs) of a few layers at one
token bring some of it back. Meng et al. found two sites in GPT-2 XL: MLPs of middle layers at the subject's last token
recall the fact, attention of late layers at the last token moves it. Each is a claim here, with the same layers at the
other token as its control.

How it can mislead: noise takes the model off its distribution; a window of layers restores more than one does; where
tracing points need not be where an edit works (Hase et al. 2023, arXiv:2301.04213). One prompt a subject, so that no
subject counts twice; each fact has its own noise.

Steps: keep the facts whose answer is the model's first, one a subject; trace states, MLPs and attention; align traces
at the subject; restore states at the subject's last token once more with its MLPs (or attention) severed, that is held
at what they were under noise; choose the layer on half of the facts and measure on the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import Field

from tomoscope.circuits import causal_trace, noise_scale, severed_trace
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import UNABLE, Ready, able
from tomoscope.findings.estimate import format_number as number
from tomoscope.findings.figures import curve, heatmap
from tomoscope.findings.finding import Control, DataNote, FigureRef, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule

ROWS = ("first subject token", "middle subject tokens", "last subject token", "further tokens", "last token")
SUBJECT, LAST = 2, 4
FEWEST = 8
LEAST_LOST = 0.02
"""Probability of the answer that the noise must take, with its whole interval, for anything to be brought back."""
KINDS = {"hidden": "one state restored", "mlp": "a window of MLPs", "attn": "a window of attentions"}
PARTS = {"mlp": "MLPs", "attn": "attention"}
CLAIMS = {
    "mlp": ("facts", "The MLPs'", SUBJECT, LAST),
    "attn": ("facts_attention", "The attention's", LAST, SUBJECT),
}
"""Kind -> (key, word, row of the claim, row of the control)."""


class TracingOptions(Options):
    """How many facts are traced, and how."""

    facts: int = Field(32, ge=8, le=100_000, description="Facts that the model knows, one a subject.")
    draws: int = Field(10, ge=2, le=1000, description="Noise draws a fact.")
    window: int = Field(3, ge=1, le=200, description="Layers restored together for MLP and attention.")
    factor: float = Field(3.0, gt=0, description="Noise in standard deviations of the subjects' embeddings.")


@dataclass(frozen=True)
class Traces:
    """Traces of some facts.

    Attributes:
        effects: kind -> [fact, row, layer] probability regained; NaN where a prompt has no such token.
        severed: part held ("mlp", "attn") -> [fact, layer] probability that a state restored at the subject's last
            token regains all the same.
        lost: [fact], probability that the noise took.
        sigma: standard deviation of the noise.
        missing: kind -> why it could not be traced.
    """

    effects: dict[str, Float[np.ndarray, "fact row layer"]]
    severed: dict[str, Float[np.ndarray, "fact layer"]]
    lost: Float[np.ndarray, " fact"]
    sigma: float
    missing: dict[str, str]


def run_tracing(context: Context) -> Iterator[Finding]:
    """Trace known facts, align them at their subject, and claim both sites."""
    options = context.options
    task = able(context, "facts", 4 * options.facts)
    why = task if isinstance(task, str) else ""
    if isinstance(task, Ready):
        known = _known(context, task)[: options.facts]
        if len(known) >= FEWEST:
            yield from _claims(context, task, known)
            return
        why = f"the model's first answer is right for only {len(known)} subjects; {FEWEST} are needed"
    yield from _absent(context, why)


def _absent(context: Context, why: str) -> Iterator[Finding]:
    for kind, (key, *_) in CLAIMS.items():
        yield context.not_measured(key, f"{_sentence(kind)}.", why)


def _sentence(kind: str, layer: int | None = None) -> str:
    _, whose, row, _ = CLAIMS[kind]
    return f"{whose} output{'' if layer is None else f' around layer {layer}'} at the {ROWS[row]} brings back the fact"


def _known(context: Context, task: Ready) -> list[int]:
    """Rows of facts whose answer is the model's first, the first row of each subject."""
    first = context.subject.last_logits(task.pairs.clean).argmax(-1).cpu().numpy()
    right = np.flatnonzero(first == task.pairs.answers[:, 0].numpy())
    return list({task.clusters[row]: int(row) for row in right[::-1]}.values())[::-1]


def _claims(context: Context, task: Ready, known: list[int]) -> Iterator[Finding]:
    try:
        traces = _trace(context, task, known)
    except UNABLE as error:
        yield from _absent(context, error.what)
        return
    lost = bootstrap_interval(traces.lost, seed=context.seed_for("lost"), unit="probability of the answer")
    context.log(
        f"noise of {traces.sigma:.3g} takes {lost}; windows of {context.options.window} layers; "
        f"{len(known)} subjects known"
    )
    figures = [_picture(context, kind, values, traces) for kind, values in traces.effects.items()]
    figures += _lines(context, traces)
    for kind, (key, *_) in CLAIMS.items():
        claim = f"{_sentence(kind)}."
        if lost.low is None or lost.low <= LEAST_LOST:
            yield context.not_measured(key, claim, f"the noise on the subject hardly takes the answer away ({lost})")
        elif kind in traces.missing:
            yield context.not_measured(key, claim, traces.missing[kind])
        else:
            yield _claim(context, task, known, traces, kind, figures)


def _trace(context: Context, task: Ready, known: list[int]) -> Traces:
    options, subject = context.options, context.subject
    prompts, answers = [task.pairs.clean.prompts[row] for row in known], task.pairs.answers[:, 0]
    sigma = noise_scale(subject, prompts, factor=options.factor)
    shape = (len(known), len(ROWS), subject.facts.n_layers)
    effects = {kind: np.full(shape, np.nan) for kind in KINDS}
    severed = {part: np.full((len(known), shape[2]), np.nan) for part in CLAIMS}
    lost, missing = np.zeros(len(known)), _untraceable(subject)
    for fact in context.track(range(len(known)), "facts"):
        seed = context.seed_for(f"noise {task.clusters[known[fact]]}") % 2**31
        for kind, out in effects.items():
            if kind in missing:
                continue
            try:
                trace = causal_trace(
                    subject, prompts[fact], int(answers[known[fact]]), kind=kind, sigma=sigma, draws=options.draws,
                    window=options.window, seed=seed,
                )  # fmt: skip
            except UNABLE as error:
                missing[kind] = error.what
                continue
            out[fact] = aligned(trace.effect.double().numpy(), *trace.subject)
            lost[fact] = trace.clean - float(trace.corrupted.mean())
        for part in [part for part in severed if part not in missing and "hidden" not in missing]:
            held = severed_trace(
                subject, prompts[fact], int(answers[known[fact]]), sever=part, sigma=sigma, draws=options.draws,
                seed=seed,
            )  # fmt: skip
            severed[part][fact] = (held.mean(-1) - float(trace.clean)).numpy() + lost[fact]
    measured = {part: values for part, values in severed.items() if np.isfinite(values).all()}
    return Traces({kind: out for kind, out in effects.items() if kind not in missing}, measured, lost, sigma, missing)


def _untraceable(subject: Any) -> dict[str, str]:
    """Kind -> why, where a layer does not give the part that is restored."""
    known, parts = subject.sites(), {"mlp": "mlp.out", "attn": "attn.out"}
    sites = {kind: [f"layer.{layer}.{part}" for layer in range(subject.facts.n_layers)] for kind, part in parts.items()}
    out = {}
    for kind, names in sites.items():
        lacking = [name for name in names if not known[name].available]
        if lacking:
            out[kind] = f"{lacking[0]} can't be restored: {known[lacking[0]].reason or 'the model does not give it'}"
    return out


def aligned(effect: Float[np.ndarray, "token layer"], first: int, end: int) -> Float[np.ndarray, "row layer"]:
    """[token, layer] -> [row, layer]: first, middle and last subject token, further tokens, last token (see `ROWS`).

    Rows without a token are NaN; a subject of one token has no first one, only its last.
    """
    groups = [[first], range(first + 1, end - 1), [end - 1], range(end, len(effect) - 1), [len(effect) - 1]]
    if end - first == 1:
        groups[0] = []
    blank = np.full(effect.shape[1], np.nan)
    return np.stack([effect[list(group)].mean(0) if len(group) else blank for group in groups])


def _picture(context: Context, kind: str, values: np.ndarray, traces: Traces) -> FigureRef:
    there = [i for i in range(len(ROWS)) if np.isfinite(values[:, i]).any()]
    return context.figure(
        f"trace_{kind}",
        heatmap(
            np.nanmean(values[:, there], axis=0), rows=[ROWS[i] for i in there], row_axis="token restored",
            column_axis="layer" if kind == "hidden" else "middle layer of the window",
            title=f"Causal tracing: {KINDS[kind]}", value_axis="probability regained",
            caption=f"Mean over {len(values)} facts; noise of {traces.sigma:.2g} on the subject's embeddings takes "
                    f"{traces.lost.mean():.2g} of the answer's probability.",
        ),
    )  # fmt: skip


def _lines(context: Context, traces: Traces) -> list[FigureRef]:
    """The paper's two figures with intervals: each row's indirect effect by layer, and the severed traces."""
    hidden = traces.effects.get("hidden")
    if hidden is None:
        return []
    there = [row for row in range(len(ROWS)) if np.isfinite(hidden[:, row]).any()]
    by_row = {ROWS[row]: hidden[np.isfinite(hidden[:, row]).all(-1)][:, row] for row in there}
    pictures = [("trace_rows", "Causal tracing: one state restored, by token", by_row)]
    if traces.severed:
        whole = {"nothing severed": hidden[:, SUBJECT]}
        whole |= {f"{PARTS[part]} severed": values for part, values in traces.severed.items()}
        pictures.append(("trace_severed", f"What the {ROWS[SUBJECT]}'s state works through", whole))
    out = []
    for name, title, series in pictures:
        ends = {label: _interval(values, context.seed_for(f"{name} {label}")) for label, values in series.items()}
        out.append(
            context.figure(
                name,
                curve(
                    {label: values.mean(0) for label, values in series.items()}, title=title,
                    low={label: low for label, (low, _) in ends.items()},
                    high={label: high for label, (_, high) in ends.items()}, x_axis="layer restored",
                    y_axis="probability regained", caption=f"Mean over {len(hidden)} facts, 95 % intervals over facts.",
                ),
            )
        )  # fmt: skip
    return out


def _interval(values: Float[np.ndarray, "fact layer"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[layer] low and high of each layer's mean over facts (percentile bootstrap, the same draws for every layer)."""
    rows = np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975], axis=0)
    return low, high


def _claim(
    context: Context, task: Ready, known: list[int], traces: Traces, kind: str, figures: list[FigureRef]
) -> Finding:
    key, _, row, apart = CLAIMS[kind]
    chosen, measured = context.halves(len(known))
    values = traces.effects[kind]
    layer = int(np.nanmean(values[chosen, row], axis=0).argmax())
    mine, other = values[measured, row, layer], values[measured, apart, layer]
    seed, unit = context.seed_for(f"tracing {kind}"), "probability of the answer"
    back, lost = (number(float(x.mean())) for x in (mine, traces.lost[measured]))
    return context.claim(
        key,
        f"{_sentence(kind, layer)}: {back} of the {lost} of probability that noise on the subject took.",
        estimate=bootstrap_interval(mine, seed=seed, unit=unit),
        controls=[
            Control(
                name=f"the same layers at the {ROWS[apart]}", estimate=bootstrap_interval(other, seed=seed, unit=unit),
                description=f"The same window of {'MLPs' if kind == 'mlp' else 'attention'} restored there instead.",
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"tracing {kind} test")),
        test="paired sign-flip test over facts", rule="tracing",
        sites=[f"layer.{layer}.{'mlp' if kind == 'mlp' else 'attn'}.out"], positions=ROWS[row], figures=figures,
        chosen_on=DataNote(name="known facts, half A", n=len(chosen)),
        measured_on=DataNote(name="known facts, half B", n=len(measured), hash=task.raw.digest()),
    )  # fmt: skip


TRACING = Exam(
    name="circuits.causal_tracing",
    title="Where facts are recalled",
    question="At which token and layer is a fact about a subject recalled?",
    run=run_tracing,
    rule={"tracing": Rule(direction="greater", minimum=0.02)},
    options=TracingOptions,
    presets={"quick": {"facts": 16, "draws": 3}, "deep": {"facts": 64, "draws": 10}},
    applies=speaks_text,
    method=(
        "Noise on the subject's embeddings destroys the answer; one clean state, or a window of MLP or attention "
        "outputs, is put back, and the regained probability is averaged over noise draws and facts (Meng et al. 2022)."
    ),
    cost=5.0,
)
