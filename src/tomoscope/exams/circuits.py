"""Where is what decides the answer, shown by patching? Heads, blocks and the stream; causal tracing of facts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.circuits import PatchGrid, activation_patching, attribution_patching, causal_trace, noise_scale
from tomoscope.errors import SiteError
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import Ready, ready, speaks_text
from tomoscope.findings.figures import curve, heatmap
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval, null_interval
from tomoscope.findings.verdict import Rule

TASKS = ("ioi", "induction", "agreement", "gendered_pronoun", "facts")
ROWS = ("first subject token", "middle subject tokens", "last subject token", "further tokens", "last token")


class PatchingOptions(Options):
    """Which tasks and what is patched."""

    tasks: tuple[str, ...] = Field(TASKS, description="Names of tasks; those the model does not do are not measured.")
    n: int = Field(64, ge=8, le=100_000, description="Pairs of each task.")
    denoising: bool = Field(True, description="Clean activations into the corrupted run (false: the reverse).")


class TracingOptions(Options):
    """How many facts are traced, and how."""

    facts: int = Field(32, ge=4, le=100_000, description="Facts that the model knows.")
    draws: int = Field(10, ge=2, le=1000, description="Noise draws a fact.")
    window: int = Field(3, ge=1, le=200, description="Layers restored together for MLP and attention.")
    factor: float = Field(3.0, gt=0, description="Noise in standard deviations of the subjects' embeddings.")


def run_patching(context: Context) -> Iterator[Finding]:
    """For each task: heads, MLPs and the stream at its labelled positions."""
    names = context.options.tasks
    for done, name in enumerate(names):
        context.progress(done, len(names), name)
        claim = f"A single head carries the answer of {name.replace('_', ' ')}."
        task = ready(context, name, context.options.n)
        why = task if isinstance(task, str) else task.why_not
        if why:
            yield context.not_measured(f"{name}_head", claim, why)
            continue
        assert isinstance(task, Ready)
        labels = [s for s in task.spec.spans if all(s in p.spans for p in task.pairs.clean.prompts)]
        try:
            yield from _task(context, name, task, labels or ["last"])
        except SiteError as error:
            yield context.not_measured(f"{name}_head", claim, error.what)
    context.progress(len(names), len(names))


def _task(context: Context, name: str, task: Ready, labels: list[str]) -> Iterator[Finding]:
    def grid(part: str) -> PatchGrid:
        return activation_patching(
            context.subject, task.pairs, part=part, metric=task.metric, positions=labels,
            denoising=context.options.denoising, seed=context.seed_for("check"),
        )  # fmt: skip

    heads, stream, mlp = grid("attn.z"), grid("resid_pre"), grid("mlp.out")
    context.log(f"{name}: patches ran in the mode {heads.mode!r}")
    gap = float(heads.clean.mean() - heads.corrupted.mean())
    if abs(gap) < 1e-6:
        why = "clean and corrupted prompts give the same answer, so there is no gap to restore"
        yield context.not_measured(f"{name}_head", f"A single head carries the answer of {name}.", why)
        return
    sign = 1.0 if context.options.denoising else -1.0
    effect = sign * heads.effect.double().numpy() / gap  # [layer, position, head, pair], share of the gap
    yield _cell(context, name, task, labels, "head", effect, heads)
    yield _cell(context, name, task, labels, "mlp", sign * mlp.effect.double().numpy()[:, :, None] / gap, mlp)
    yield _handover(context, name, task, labels, sign * stream.effect.double().numpy() / gap)
    yield _estimate(context, name, task, labels, heads)


def _cell(
    context: Context, name: str, task: Ready, labels: list[str], kind: str, effect: np.ndarray, grid: PatchGrid
) -> Finding:
    """The strongest single place, chosen on half of the pairs and measured on the other, against all other places."""
    chosen, measured = context.halves(task.clusters)
    lead = np.nan_to_num(effect[..., chosen].mean(-1), nan=-np.inf)
    layer, place, unit = (int(i) for i in np.unravel_index(int(lead.argmax()), lead.shape))
    mine = effect[layer, place, unit, measured]
    others = effect[..., measured].reshape(-1, len(measured))
    others = np.delete(others, int(np.ravel_multi_index((layer, place, unit), lead.shape)), axis=0)
    others = others[np.isfinite(others).all(-1)]
    mean = others.mean(0)
    clusters = [task.clusters[i] for i in measured]
    seed, verb = context.seed_for(f"{name} {kind}"), "restores" if grid.denoising else "removes"
    what = f"head {layer}.{unit}" if kind == "head" else f"the MLP of layer {layer}"
    site = f"layer.{layer}.attn.z[head={unit}]" if kind == "head" else f"layer.{layer}.mlp.out"
    shown = effect.mean(-1)[:, place] if kind == "head" else effect.mean(-1)[:, :, 0]
    columns = range(shown.shape[1]) if kind == "head" else labels
    picture = context.figure(
        f"{name}_{kind}_patching",
        heatmap(
            shown, row_axis="layer", column_axis=f"head, at {labels[place]}" if kind == "head" else "position",
            columns=columns, marks=[(layer, unit if kind == "head" else place)], value_axis="share of the gap",
            title=f"{name}: {'every head' if kind == 'head' else 'every MLP'} patched alone",
            caption=f"Share of the clean-corrupted gap that one patch {verb}; mean over {effect.shape[-1]} pairs.",
        ),
    )  # fmt: skip
    return context.claim(
        f"{name}_{kind}",
        f"Of all {'heads' if kind == 'head' else 'MLPs'}, {what} at {labels[place]!r} {verb} most of the answer of "
        f"{name.replace('_', ' ')}.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="share of the gap"),
        controls=[
            Control(
                name=f"the other {len(others)} places", estimate=null_interval(others.mean(-1), unit="share of the gap"),
                description="Every other cell of the same grid, patched alone on the same pairs.",
            )
        ],
        p_value=sign_flip_test(mine - mean, seed=context.seed_for(f"{name} {kind} test"), clusters=clusters),
        test="paired sign-flip test over pairs", rule="place", sites=[site], positions=labels[place],
        figures=[picture], chosen_on=task.note("half A", chosen), measured_on=task.note("half B", measured),
    )  # fmt: skip


def _handover(context: Context, name: str, task: Ready, labels: list[str], effect: np.ndarray) -> Finding:
    """The layer by which the last position's stream alone restores half of the answer."""
    chosen, measured = context.halves(task.clusters)
    last = len(labels) - 1
    means = effect[:, last, chosen].mean(-1)
    half = np.flatnonzero(means >= 0.5)
    layer = int(half[0]) if len(half) else int(means.argmax())
    mine, before = effect[layer, last, measured], effect[max(layer - 1, 0), last, measured]
    series, low, high = {}, {}, {}
    for place, label in enumerate(labels):
        made = [bootstrap_interval(row, seed=context.seed_for("curve"), n_resamples=1000) for row in effect[:, place]]
        series[label] = np.array([e.value for e in made])
        low[label], high[label] = (np.array([getattr(e, end) for e in made]) for end in ("low", "high"))
    figure = context.figure(
        f"{name}_stream",
        curve(
            series, low=low, high=high, title=f"{name}: where the information is, layer by "
                                              f"layer", x_axis="stream into layer",
            y_axis="share of the gap", caption="The residual stream at one position patched alone; bootstrap bands.",
            references={"all of it": 1.0, "none": 0.0},
        ),
    )  # fmt: skip
    clusters, seed = [task.clusters[i] for i in measured], context.seed_for(f"{name} stream")
    start = effect[0, last, measured]
    return context.claim(
        f"{name}_handover",
        f"Into layer {layer}, the stream at {labels[last]!r} already holds "
        f"{'half or more' if len(half) else 'less than half'} of the answer of {name.replace('_', ' ')}.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="share of the gap"),
        controls=[
            Control(
                name="the same position before any block", description="The embedding at that position, patched alone.",
                estimate=bootstrap_interval(start, seed=seed, clusters=clusters, unit="share of the gap"),
            )
        ],
        p_value=sign_flip_test(mine - start, seed=context.seed_for(f"{name} stream test"), clusters=clusters),
        test=f"paired sign-flip test over pairs (layer before: {before.mean():.2g})", rule="place",
        sites=[f"layer.{layer}.resid_pre"], positions=labels[last], figures=[figure],
        chosen_on=task.note("half A", chosen), measured_on=task.note("half B", measured),
    )  # fmt: skip


def _estimate(context: Context, name: str, task: Ready, labels: list[str], exact: PatchGrid) -> Finding:
    """How far the linear estimate of all heads agrees with patching them one by one."""
    guess = attribution_patching(
        context.subject, task.pairs, part="attn.z", metric=task.metric, positions=labels,
        denoising=context.options.denoising,
    )  # fmt: skip
    left = exact.effect.double().numpy().reshape(-1, len(task.raw))
    right = guess.effect.double().numpy().reshape(-1, len(task.raw))
    there = np.isfinite(left).all(-1) & np.isfinite(right).all(-1)
    left, right = left[there], right[there]
    order = context.rng(f"{name} cells").permutation(len(left))
    mine, other = _correlation(left, right), _correlation(left, right[order])
    seed, clusters = context.seed_for(f"{name} estimate"), task.clusters
    return context.claim(
        f"{name}_linear", f"For {name.replace('_', ' ')}, attribution patching ranks heads much as patching does.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit="correlation over places"),
        controls=[
            Control(
                name="shuffled places", description="The estimate of another head for each head.",
                estimate=bootstrap_interval(other, seed=seed, clusters=clusters, unit="correlation over places"),
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{name} estimate test"), clusters=clusters),
        test="paired sign-flip test over pairs", rule="linear", sites=["layer.*.attn.z"], positions=", ".join(labels),
        measured_on=task.note(),
    )  # fmt: skip


def _correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[place, pair] twice -> [pair] correlation over places; 0 where one side is constant."""
    a, b = left - left.mean(0), right - right.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros_like(size), where=size > 0)


def run_tracing(context: Context) -> Iterator[Finding]:
    """Trace known facts, align them at their subject, and claim the strongest MLP window."""
    options, subject = context.options, context.subject
    claim = "MLPs at the subject's last token recall the fact."
    task = ready(context, "facts", 4 * options.facts)
    why = task if isinstance(task, str) else task.why_not
    if why:
        yield context.not_measured("facts", claim, why)
        return
    assert isinstance(task, Ready)
    logits = subject.last_logits(task.pairs.clean)
    answers = task.pairs.answers[:, 0]
    known, seen = [], set()
    for row in np.flatnonzero((logits.argmax(-1).cpu() == answers).numpy()):
        text = task.raw[int(row)].clean.text
        if text not in seen:
            seen.add(text)
            known.append(int(row))
    known = known[: options.facts]
    if len(known) < 4:
        yield context.not_measured(
            "facts", claim, f"only {len(known)} of {len(answers)} facts are the model's first answer"
        )
        return
    prompts = [task.pairs.clean.prompts[row] for row in known]
    sigma = noise_scale(subject, prompts, factor=options.factor)
    effects = {
        kind: np.full((len(known), len(ROWS), subject.facts.n_layers), np.nan) for kind in ("hidden", "mlp", "attn")
    }
    for fact in context.track(range(len(known)), "facts"):
        for kind, out in effects.items():
            trace = causal_trace(
                subject, prompts[fact], int(answers[known[fact]]), kind=kind, sigma=sigma, draws=options.draws,
                window=options.window, seed=context.seed_for("noise") % 2**31,
            )  # fmt: skip
            out[fact] = _aligned(trace.effect.double().numpy(), *trace.subject)
    yield _traced(context, task, known, effects, sigma)


def _aligned(effect: np.ndarray, first: int, end: int) -> np.ndarray:
    """[token, layer] -> [row, layer]: first, middle and last subject token, further tokens, last token."""
    groups = [[first], range(first + 1, end - 1), [end - 1], range(end, len(effect) - 1), [len(effect) - 1]]
    if end - first == 1:
        groups[0] = []
    blank = np.full(effect.shape[1], np.nan)
    return np.stack([effect[list(group)].mean(0) if len(group) else blank for group in groups])


def _traced(context: Context, task: Ready, known: list[int], effects: dict[str, np.ndarray], sigma: float) -> Finding:
    chosen, measured = context.halves(len(known))
    figures = []
    for kind, title in (
        ("hidden", "one state restored"),
        ("mlp", "a window of MLPs"),
        ("attn", "a window of attentions"),
    ):
        there = [i for i in range(len(ROWS)) if np.isfinite(effects[kind][:, i]).any()]
        figures.append(
            context.figure(
                f"trace_{kind}",
                heatmap(
                    np.nanmean(effects[kind][:, there], axis=0),
                    rows=[ROWS[i] for i in there],
                    row_axis="",
                    column_axis="layer",
                    title=f"Causal tracing: {title}",
                    value_axis="probability regained",
                    caption=f"Mean over {len(known)} facts; noise of {sigma:.2g} on the subject's embeddings.",
                ),
            )
        )
    mlp = effects["mlp"]
    layer = int(np.nanmean(mlp[chosen, 2], axis=0).argmax())
    mine = mlp[measured, 2, layer]
    other = mlp[measured, 4, layer]
    seed, unit = context.seed_for("tracing"), "probability of the answer"
    context.log(f"noise of {sigma:.3g}; windows of {context.options.window} layers; {len(known)} facts known")
    return context.claim(
        "facts", f"Restoring MLPs around layer {layer} at the subject's last token brings back the fact.",
        estimate=bootstrap_interval(mine, seed=seed, unit=unit),
        controls=[
            Control(
                name="the same MLPs at the last token", estimate=bootstrap_interval(other, seed=seed, unit=unit),
                description="The same window restored at the prompt's last token instead.",
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for("tracing test")),
        test="paired sign-flip test over facts", rule="tracing", sites=[f"layer.{layer}.mlp.out"],
        positions="last subject token", figures=figures,
        chosen_on=DataNote(name="known facts, half A", n=len(chosen)),
        measured_on=DataNote(name="known facts, half B", n=len(measured), hash=task.raw.digest()),
    )  # fmt: skip


PATCHING = Exam(
    name="circuits.patching",
    title="What carries the answer",
    question="Which head, which MLP and which stream position carry what decides the answer?",
    run=run_patching,
    rule={
        "place": Rule(direction="greater", minimum=0.1),
        "linear": Rule(direction="greater", minimum=0.3),
    },
    options=PatchingOptions,
    presets={"quick": {"n": 32}, "deep": {"n": 192}},
    applies=speaks_text,
    method=(
        "One activation of the clean run is put into the corrupted run (denoising), at one place alone, and the "
        "recovered "
        "share of the clean-corrupted gap is measured. The place is chosen on half of the pairs and measured on the "
        "other."
    ),
    cost=5.0,
)

TRACING = Exam(
    name="circuits.causal_tracing",
    title="Where facts are recalled",
    question="At which token and layer is a fact about a subject recalled?",
    run=run_tracing,
    rule={"tracing": Rule(direction="greater", minimum=0.02)},
    options=TracingOptions,
    presets={"quick": {"facts": 24, "draws": 4}, "deep": {"facts": 64, "draws": 10}},
    applies=speaks_text,
    method=(
        "Noise on the subject's embeddings destroys the answer; one clean state, or a window of MLP or attention "
        "outputs, is "
        "put back, and the regained probability is averaged over noise draws and facts (Meng et al. 2022)."
    ),
    cost=5.0,
)

EXAMS = (PATCHING, TRACING)
