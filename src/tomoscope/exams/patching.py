"""Where is what decides the answer? Heads, MLPs and the stream of one run put into another (activation patching).

Numbers are shares of the gap between the clean and the corrupted prompts' scores. A share is a ratio of two means, so
each pair counts with its linearised share (r + (effect - r gap) / mean gap): its mean is the ratio and its spread the
ratio's own (delta method), also where gaps differ between pairs. Where the gap itself is not clearly above 0 there is
nothing to share, and nothing is measured.

How it can mislead: a place is chosen among all on one half of the pairs and measured on the other, so the search costs
nothing, but the runner-up may carry as much (see the figure); what one place restores alone need not add up with
others; a patch in the stream says where information is, not who computed it.

Steps: grids of heads, MLPs and streams; for the strongest head and MLP the same place patched from another pair (a
prompt with another answer) as the control; the block in which the answer arrives at the last token; the linear estimate
beside the exact grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from tomoscope.circuits import PatchGrid, activation_patching, attribution_patching
from tomoscope.exams.exam import Context, Exam
from tomoscope.exams.places import common_labels, place_name, shown_pattern
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import Ready, TaskOptions, able, attempt, heading, percent, title
from tomoscope.findings.figures import curve, heatmap
from tomoscope.findings.finding import Control, Estimate, FigureRef, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval, null_interval
from tomoscope.findings.verdict import Rule
from tomoscope.model import replace

TASKS = ("ioi", "induction", "agreement", "gendered_pronoun", "facts")
UNIT = "share of the gap"
SHUFFLES = 20


class PatchingOptions(TaskOptions):
    """Which tasks and what is patched."""

    tasks: tuple[str, ...] = Field(TASKS, description="Names of tasks; those the model does not do are not measured.")
    n: int = Field(64, ge=8, le=100_000, description="Pairs of each task.")
    denoising: bool = Field(True, description="Clean activations into the corrupted run (false: the reverse).")


@dataclass(frozen=True)
class Case:
    """One task under way.

    Attributes:
        name: the task's.
        task: its pairs.
        labels: the positions that are patched.
        gap: [pair], clean less corrupted score.
        chosen, measured: rows of the two halves.
        clusters: of the measured half.
    """

    name: str
    task: Ready
    labels: list[str]
    gap: Float[np.ndarray, " pair"]
    chosen: np.ndarray
    measured: np.ndarray
    clusters: list[str]

    @property
    def title(self) -> str:
        """The task in a sentence."""
        return title(self.name)


def linearised_shares(
    effect: Float[np.ndarray, "*place pair"], gap: Float[np.ndarray, " pair"]
) -> Float[np.ndarray, "*place pair"]:
    """Per pair a number whose mean is mean(effect) / mean(gap) and whose variance is that ratio's (delta method)."""
    mean = gap.mean()
    ratio = effect.mean(-1, keepdims=True) / mean
    return ratio + (effect - ratio * gap) / mean


def run_patching(context: Context) -> Iterator[Finding]:
    """For each task: heads, MLPs and the stream at its labelled positions."""
    names = context.options.tasks
    for done, name in enumerate(names):
        context.progress(done, len(names), title(name))
        task = able(context, name, context.options.n)
        if isinstance(task, str):
            yield context.not_measured(f"{name}_head", f"In {title(name)}, one head carries part of the answer.", task)
        else:
            yield from _task(context, name, task)
    context.progress(len(names), len(names))


def _task(context: Context, name: str, task: Ready) -> Iterator[Finding]:
    gap = task.scores - task.corrupted
    spread = bootstrap_interval(
        gap, seed=context.seed_for(f"{name} gap"), clusters=task.clusters, unit=task.metric.name
    )
    if spread.low is None or spread.low <= 0:
        why = f"clean prompts do not clearly score above corrupted ones ({spread}), so there is no gap to share"
        yield context.not_measured(f"{name}_head", f"In {title(name)}, one head carries part of the answer.", why)
        return
    chosen, measured = context.halves(task.clusters)
    clusters = [task.clusters[i] for i in measured]
    case = Case(name, task, common_labels(task), gap, chosen, measured, clusters)
    context.log(f"{title(name)}: the gap is {spread}")
    exact: list[PatchGrid] = []

    def heads() -> Finding:
        exact.append(_grid(context, case, "attn.z"))
        return _place(context, case, "head", exact[0])

    subject = f"In {case.title}, one"
    yield attempt(context, f"{name}_head", f"{subject} head carries part of the answer.", heads)
    yield attempt(
        context, f"{name}_mlp", f"{subject} MLP carries part of the answer.",
        lambda: _place(context, case, "mlp", _grid(context, case, "mlp.out")),
    )  # fmt: skip
    yield attempt(
        context, f"{name}_arrival", f"{subject} block brings the answer to the last token.",
        lambda: _arrival(context, case, _grid(context, case, "resid_pre")),
    )  # fmt: skip
    if exact:
        claim = f"In {case.title}, attribution patching agrees with patching."
        yield attempt(context, f"{name}_linear", claim, lambda: _linear(context, case, exact[0]))


def _grid(context: Context, case: Case, part: str) -> PatchGrid:
    grid = activation_patching(
        context.subject, case.task.pairs, part=part, metric=case.task.metric, positions=case.labels,
        denoising=context.options.denoising, seed=context.seed_for("check"),
    )  # fmt: skip
    context.log(f"{case.title}: patches of {part} ran in the mode {grid.mode!r}")
    return grid


def _effect(grid: PatchGrid) -> np.ndarray:
    """[layer, position, unit, pair]: how far towards the source run each patch moved the score."""
    values = grid.effect.double().numpy() * (1.0 if grid.denoising else -1.0)
    return values if grid.part == "attn.z" else values[:, :, None]


def _place(context: Context, case: Case, kind: str, grid: PatchGrid) -> Finding:
    """The strongest single place, chosen on half of the pairs and measured on the other."""
    effect = _effect(grid)
    means = np.nan_to_num(effect[..., case.chosen].mean(-1), nan=-np.inf)
    layer, place, unit = (int(i) for i in np.unravel_index(int(means.argmax()), means.shape))
    shares = linearised_shares(effect[..., case.measured], case.gap[case.measured])
    mine = shares[layer, place, unit]
    others = np.delete(shares.reshape(-1, mine.size), int(np.ravel_multi_index((layer, place, unit), means.shape)), 0)
    others = others[np.isfinite(others).all(-1)]
    if not len(others):
        return context.not_measured(
            f"{case.name}_{kind}", f"In {case.title}, one {kind} carries part of the answer.",
            "there is one place only, so there is no other to compare it with",
        )  # fmt: skip
    label, verb = case.labels[place], "restores" if grid.denoising else "removes"
    site = f"layer.{layer}.attn.z[head={unit}]" if kind == "head" else f"layer.{layer}.mlp.out"
    foreign = _foreign(context, case, site, label, grid.denoising)
    seed, clusters = context.seed_for(f"{case.name} {kind}"), case.clusters
    test = context.seed_for(f"{case.name} {kind} test")
    p = max(sign_flip_test(mine - other, seed=test, clusters=clusters) for other in (others.mean(0), foreign))
    what = f"head {layer}.{unit}" if kind == "head" else f"the MLP of layer {layer}"
    pictures = [_heatmap(context, case, kind, effect, (layer, place, unit), verb)]
    if kind == "head":
        pictures += shown_pattern(context, case.name, case.task, layer, unit, case.measured)
    return context.claim(
        f"{case.name}_{kind}",
        f"In {case.title}, {what} at {place_name(label)} carries part of the answer: patched alone, it {verb} "
        f"{percent(float(mine.mean()))} of the gap.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit=UNIT),
        controls=[
            Control(
                name=f"the other {len(others)} places", estimate=null_interval(others.mean(-1), unit=UNIT),
                description="Every other cell of the same grid, patched alone on the same pairs; mean and range.",
            ),
            Control(
                name="patched from another pair",
                estimate=bootstrap_interval(foreign, seed=seed, clusters=clusters, unit=UNIT),
                description="The same place, patched with the activation of a prompt with another answer.",
            ),
        ],
        p_value=p, test="the larger p of two paired sign-flip tests over pairs, against each control", rule="place",
        sites=[site], positions=label, figures=pictures, chosen_on=case.task.note("half A", case.chosen),
        measured_on=case.task.note("half B", case.measured),
    )  # fmt: skip


def _foreign(context: Context, case: Case, site: str, label: str, denoising: bool) -> Float[np.ndarray, " pair"]:
    """Shares of the gap, on the measured half, where the place is patched from a pair with another answer."""
    pairs, subject = case.task.pairs, context.subject
    source, base = (pairs.clean, pairs.corrupted) if denoising else (pairs.corrupted, pairs.clean)
    value = next(iter(subject.read(source, site, at=label).values()))
    logits = subject.last_logits(base, edits=[replace(site, value[torch.from_numpy(case.task.other)], at=label)])
    metric, rows = case.task.metric, torch.arange(len(pairs))
    score = metric(logits if metric.tokens is None else logits[:, metric.tokens.to(logits.device)], rows)
    moved = score.double().cpu().numpy() - (case.task.corrupted if denoising else case.task.scores)
    return linearised_shares((moved if denoising else -moved)[case.measured], case.gap[case.measured])


def _heatmap(
    context: Context, case: Case, kind: str, effect: np.ndarray, at: tuple[int, int, int], verb: str
) -> FigureRef:
    layer, place, unit = at
    share = effect.mean(-1) / case.gap.mean()
    heads = kind == "head"
    return context.figure(
        f"{case.name}_{kind}_patching",
        heatmap(
            share[:, place] if heads else share[:, :, 0], row_axis="layer",
            column_axis=f"head, at {place_name(case.labels[place])}" if heads else "position",
            columns=range(effect.shape[2]) if heads else case.labels, marks=[(layer, unit if heads else place)],
            title=f"{heading(case.name)}: every {'head' if heads else 'MLP'} patched alone", value_axis=UNIT,
            caption=f"Share of the gap between clean and corrupted prompts that one patch {verb}; mean over "
                    f"{effect.shape[-1]} pairs. The claim's place is outlined.",
        ),
    )  # fmt: skip


def _arrival(context: Context, case: Case, grid: PatchGrid) -> Finding:
    """The block in which most of the answer comes to the last token: the largest step of the stream's share there."""
    key, claim = f"{case.name}_arrival", f"In {case.title}, one block brings the answer to the last token."
    last = next((i for i, label in enumerate(case.labels) if label in ("end", "last")), None)
    if last is None:
        return context.not_measured(key, claim, "the task does not label the last token")
    effect = _effect(grid)[:, :, 0]
    # after the last block the last token's stream is all that the answer is read from: the share there is 1
    steps = {}
    for half, rows in (("chosen", case.chosen), ("measured", case.measured)):
        held = linearised_shares(effect[:, last, rows], case.gap[rows])
        steps[half] = np.diff(np.concatenate([held, np.ones((1, len(rows)))]), axis=0)
    if len(effect) < 2:
        return context.not_measured(key, claim, "the model has one block, which brings everything")
    layer = int(steps["chosen"].mean(-1).argmax())
    mine, others = steps["measured"][layer], np.delete(steps["measured"], layer, 0).mean(0)
    before = float(steps["measured"][:layer].sum(0).mean()) if layer else 0.0
    seed, clusters = context.seed_for(f"{case.name} arrival"), case.clusters
    return context.claim(
        key,
        f"In {case.title}, block {layer} brings the answer to the last token: what the stream holds there goes from "
        f"{percent(before)} to {percent(before + float(mine.mean()))} of the gap.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit=UNIT),
        controls=[
            Control(
                name="the other blocks", estimate=bootstrap_interval(others, seed=seed, clusters=clusters, unit=UNIT),
                description="The mean step of a block among the others.",
            )
        ],
        p_value=sign_flip_test(mine - others, seed=context.seed_for(f"{case.name} arrival test"), clusters=clusters),
        test="paired sign-flip test over pairs", rule="place",
        sites=[f"layer.{layer}.resid_pre", f"layer.{layer}.resid_post"], positions=case.labels[last],
        figures=[_curve(context, case, effect)], chosen_on=case.task.note("half A", case.chosen),
        measured_on=case.task.note("half B", case.measured),
    )  # fmt: skip


def _curve(context: Context, case: Case, effect: Float[np.ndarray, "layer position pair"]) -> FigureRef:
    series, low, high = {}, {}, {}
    for place, label in enumerate(case.labels):
        rows = linearised_shares(effect[:, place], case.gap)
        made = [
            bootstrap_interval(r, seed=context.seed_for("curve"), n_resamples=1000, clusters=case.task.clusters)
            if np.isfinite(r).all() else Estimate.unknown("no stream") for r in rows
        ]  # fmt: skip
        series[label] = np.array([np.nan if e.value is None else e.value for e in made])
        for ends, end in ((low, "low"), (high, "high")):
            ends[label] = np.array([np.nan if getattr(e, end) is None else getattr(e, end) for e in made])
    return context.figure(
        f"{case.name}_stream",
        curve(
            series, low=low, high=high, title=f"{heading(case.name)}: where the answer is held, layer by layer",
            x_axis="stream into layer", y_axis=UNIT, references={"all of it": 1.0, "none": 0.0},
            caption="The residual stream patched at one labelled position alone; 'end' is the last token, whose stream "
                    "holds everything after the last block. Bootstrap bands over pairs.",
        ),
    )  # fmt: skip


def _linear(context: Context, case: Case, exact: PatchGrid) -> Finding:
    """How far the linear estimate of all heads agrees with patching them one by one."""
    guess = attribution_patching(
        context.subject, case.task.pairs, part="attn.z", metric=case.task.metric, positions=case.labels,
        denoising=context.options.denoising,
    )  # fmt: skip
    left, right = exact.effect.double().numpy(), guess.effect.double().numpy()  # [layer, position, head, pair]
    there = np.isfinite(left).all((1, 2, 3)) & np.isfinite(right).all((1, 2, 3))
    left, right = left[there], right[there]
    mine = _correlation(left, right)
    generator = context.rng(f"{case.name} cells")
    drawn = []
    for _ in range(SHUFFLES):
        order = generator.permutation(left.shape[0] * left.shape[2])
        # heads change places within a position, so that it does not suffice to know which position matters
        moved = right.transpose(1, 0, 2, 3).reshape(right.shape[1], -1, right.shape[3])[:, order]
        drawn.append(_correlation(left.transpose(1, 0, 2, 3).reshape(moved.shape), moved))
    other = np.mean(drawn, axis=0)
    seed, clusters, unit = context.seed_for(f"{case.name} estimate"), case.task.clusters, "correlation over places"
    return context.claim(
        f"{case.name}_linear",
        f"In {case.title}, attribution patching agrees with patching heads one by one: correlation {mine.mean():.2f}.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit=unit),
        controls=[
            Control(
                name="shuffled heads", estimate=bootstrap_interval(other, seed=seed, clusters=clusters, unit=unit),
                description=f"The estimate of another head at the same position; mean of {SHUFFLES} shuffles.",
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{case.name} estimate test"), clusters=clusters),
        test="paired sign-flip test over pairs", rule="linear", sites=["layer.*.attn.z"],
        positions=", ".join(case.labels), measured_on=case.task.note(),
    )  # fmt: skip


def _correlation(left: np.ndarray, right: np.ndarray) -> Float[np.ndarray, " pair"]:
    """[..., pair] twice -> [pair] Pearson correlation over all places; 0 where one side is constant."""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (left, right))
    a, b = a - a.mean(0), b - b.mean(0)
    size = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), size, out=np.zeros_like(size), where=size > 0)


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
        "recovered share of the clean-corrupted gap is measured, as a ratio of means. The place is chosen on half of "
        "the pairs and measured on the other."
    ),
    cost=5.0,
)
