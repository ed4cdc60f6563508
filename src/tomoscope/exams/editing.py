"""Can a fact be rewritten, where, and by which method? Facts of the micro-world that the model knows, edited.

Each fact has other wordings, neighbours that share its old answer, and two-hop facts that follow from it. A fact's
score is the mean of three successes: the prompt itself (efficacy), its other wordings (paraphrase), its neighbours
(neighbourhood); of two answers the right one must have the lower loss.

1. Where: MEMIT at each single layer, at the subject's last token and at the prompt's, on half A; the best place is then
   used on half B. Does editing where causal tracing points beat editing elsewhere (Hase et al. 2023 found it does not)?
   Tracing is done on half A, and both are compared on half B; the claim is stated either way.
2. By what: r-ROME, MEMIT, AlphaEdit, fine-tuning, FT-L and LoRA at the chosen layer on half B, for one fact up to all.
   Each against a change of the same norms in directions that have nothing to do with the facts.

How it can mislead: the micro-world's model is small and its facts are short; what wins here need not win in a large
model. Rates and bounds of the baselines are in units of the weight's own size, not tuned for each model.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from tomoscope.circuits import causal_trace, noise_scale
from tomoscope.errors import EditError, TomoscopeError
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import UNABLE
from tomoscope.exams.tracing import LAST, SUBJECT, aligned
from tomoscope.exams.world_facts import known_requests, world_requests
from tomoscope.findings.estimate import format_number as number
from tomoscope.findings.figures import curve, heatmap
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval, split_half
from tomoscope.findings.treatment import SideEffect, Treatment
from tomoscope.findings.verdict import Rule
from tomoscope.phantoms.world import corpus, shipped_world
from tomoscope.phantoms.world.tasks import speaks_of_the_world
from tomoscope.treat.edit.effects import Measures, compare, measure
from tomoscope.treat.edit.keys import Edited, contexts_of, weight_name
from tomoscope.treat.edit.memit import SETTINGS, alphaedit, memit
from tomoscope.treat.edit.moments import SecondMoments, key_layers, second_moments
from tomoscope.treat.edit.requests import PLACES, EditRequest, target_ids
from tomoscope.treat.edit.rome import rome
from tomoscope.treat.edit.targets import SCALE_FREE
from tomoscope.treat.edit.tune import TuneSettings, finetune, lora
from tomoscope.treat.treatment import Dense, LowRank
from tomoscope.treat.treatment import Treatment as WeightTreatment

FEWEST = 8
METHODS = ("r-ROME", "MEMIT", "AlphaEdit", "FT", "FT-L", "LoRA")
ROWS = {"subject": SUBJECT, "last": LAST}
WORDS = {"subject": "the subject's last token", "last": "the prompt's last token"}
SIDE_EFFECTS = ("loss on text", "essence drift", "neighbourhood exact")
UNIT = "mean of three successes"


class EditingOptions(Options):
    """How many facts are edited, and how."""

    facts: int = Field(24, ge=8, le=400, description="Facts that the model knows; half choose, half are measured on.")
    contexts: int = Field(2, ge=0, le=50, description="Sampled beginnings over which keys are averaged.")
    steps: int = Field(15, ge=2, le=200, description="Losses computed in the search for a target.")
    weight: float = Field(50.0, gt=0, description="Weight of the second moments in MEMIT.")
    tokens_per_neuron: int = Field(10, ge=2, le=10_000, description="Tokens of the second moments.")
    traced: int = Field(8, ge=2, le=400, description="Facts that are traced, of half A.")
    draws: int = Field(3, ge=2, le=100, description="Noise draws a traced fact.")
    texts: int = Field(24, ge=2, le=1000, description="Held-out texts for the loss.")


@dataclass(frozen=True, eq=False)
class Bench:
    """What every part needs.

    Attributes:
        facts: requests whose old answer the model gives.
        chosen, measured: numbers of the facts of half A and half B.
        moments: of all layers' keys.
        contexts: templates.
        texts: held out.
        layers: that can be edited.
    """

    context: Context
    facts: list[EditRequest]
    chosen: np.ndarray
    measured: np.ndarray
    moments: SecondMoments
    contexts: tuple[str, ...]
    texts: list[str]
    layers: list[int]

    def take(self, rows: Sequence[int] | np.ndarray) -> list[EditRequest]:
        """Some facts."""
        return [self.facts[int(row)] for row in rows]


def run_editing(context: Context) -> Iterator[Finding]:
    """Choose a place on half A, then measure place and methods on half B."""
    claims = {_key(method): f"{method} rewrites facts that the model knows." for method in METHODS}
    claims["where"] = "Editing where causal tracing points beats editing elsewhere."
    try:
        bench = _bench(context)
    except (*UNABLE, EditError) as error:
        bench = error.what
    if isinstance(bench, str):
        for key, claim in claims.items():
            yield context.not_measured(key, claim, bench)
        return
    scores = {half: _places(bench, rows) for half, rows in (("A", bench.chosen), ("B", bench.measured))}
    at, layer = _best(scores["A"], bench.layers)
    context.log(f"half A chose layer {layer} at {WORDS[at]} of {len(bench.layers)} layers x {len(PLACES)} places")
    yield from _methods(bench, at, layer)
    yield _where(bench, scores, claims["where"])


def _key(method: str) -> str:
    return method.lower().replace("-", "_")


def _bench(context: Context) -> Bench | str:
    subject, options = context.subject, context.options
    if subject.tokenizer is None or not speaks_of_the_world(subject.tokenizer):
        return "the model does not know the micro-world's words, whose facts are edited"
    layers = key_layers(subject)
    asked = world_requests(2 * options.facts, seed=context.seed_for("facts") % 2**31)
    facts = known_requests(subject, asked)[: options.facts]
    if len(facts) < FEWEST:
        return f"the model knows only {len(facts)} of {len(asked)} facts; {FEWEST} are needed"
    chosen, measured = split_half(len(facts), seed=context.seed_for("halves"))
    world, seed = shipped_world(), context.seed_for("text")
    tokens = options.tokens_per_neuron * (subject.facts.d_mlp or 1)
    texts = list(islice(corpus(world, seed=seed, split="held out"), 4 * options.texts))
    texts = [text for text in texts if len(subject.tokenizer(text)["input_ids"]) > 8][: options.texts]
    moments = second_moments(
        subject, corpus(world, seed=seed, split="moments"), layers=layers, tokens=tokens,
        progress=lambda done, total: context.progress(done, total, "tokens"),
    )  # fmt: skip
    if moments.curve:
        last = moments.curve[-1]
        agree = [value for value in last.agreement.values() if value is not None]
        context.log(
            f"second moments of {moments.tokens:,} tokens; the last doubling left edit directions within a cosine of "
            f"{min(agree):.2f}" if agree else f"second moments of {moments.tokens:,} tokens"
        )  # fmt: skip
    templates = contexts_of(subject, count=options.contexts, seed=context.seed_for("contexts") % 2**31)
    return Bench(context, facts, chosen, measured, moments, templates, texts, layers)


def score_of(measures: Measures) -> Float[np.ndarray, " fact"]:
    """Mean of efficacy, paraphrase and neighbourhood success of each fact."""
    kinds = ("efficacy", "paraphrase", "neighbourhood")
    return np.nanmean(np.stack([measures.per_fact(kind) for kind in kinds]), axis=0)


def _places(bench: Bench, rows: np.ndarray) -> Float[np.ndarray, "place layer fact"]:
    """Each fact's score after MEMIT at one layer and place, all facts of a half at once."""
    context, facts = bench.context, bench.take(rows)
    out = np.full((len(PLACES), len(bench.layers), len(facts)), np.nan)
    cells = [(i, k) for i in range(len(PLACES)) for k in range(len(bench.layers))]
    for i, k in context.track(cells, "layers"):
        made = _memit(bench, facts, PLACES[i], bench.layers[k])
        with made.treatment.applied(context.subject):
            out[i, k] = score_of(measure(context.subject, facts))
    return out


def _best(scores: Float[np.ndarray, "place layer fact"], layers: list[int]) -> tuple[str, int]:
    i, k = np.unravel_index(int(scores.mean(-1).argmax()), scores.shape[:2])
    return PLACES[int(i)], layers[int(k)]


def _memit(bench: Bench, facts: list[EditRequest], at: str, layer: int) -> Edited:
    options = bench.context.options
    return memit(
        bench.context.subject, facts, bench.moments, layers=[layer], at=at, weight=options.weight,
        contexts=bench.contexts, settings=replace(SETTINGS, steps=options.steps),
    )  # fmt: skip


def _edit(bench: Bench, method: str, facts: list[EditRequest], at: str, layer: int) -> Edited:
    subject, options, seed = bench.context.subject, bench.context.options, bench.context.seed_for(method) % 2**31
    search = replace(SCALE_FREE, steps=options.steps)
    weight = subject.model.get_parameter(weight_name(subject, layer)).detach().float()
    size = float(weight.square().mean().sqrt())
    training = TuneSettings(rate=0.1 * size)
    if method == "r-ROME":
        return rome(subject, facts, bench.moments, layer=layer, at=at, contexts=bench.contexts, settings=search)
    if method == "MEMIT":
        return _memit(bench, facts, at, layer)
    if method == "AlphaEdit":
        return alphaedit(
            subject, facts, bench.moments, layers=[layer], at=at, contexts=bench.contexts,
            settings=replace(search, clamp=SETTINGS.clamp),
        )  # fmt: skip
    if method == "LoRA":
        return lora(subject, facts, layers=[layer], settings=training, seed=seed)
    return finetune(
        subject, facts, layers=[layer], bound=0.3 * size if method == "FT-L" else None, settings=training, seed=seed
    )


def random_change(treatment: WeightTreatment, *, seed: int) -> WeightTreatment:
    """A treatment of the same parameters and norms (and ranks) in random directions."""
    draw = torch.Generator().manual_seed(seed)
    changes: dict[str, Any] = {}
    for name, change in treatment.changes.items():
        if isinstance(change, LowRank):
            left, right = (torch.randn(part.shape, generator=draw).to(part) for part in (change.left, change.right))
            turned: LowRank | Dense = LowRank(left, right)
        else:
            turned = Dense(torch.randn(change.shape, generator=draw))
        scale = float(change.dense().double().norm() / turned.dense().double().norm().clamp(min=1e-30))
        part = turned.left * scale if isinstance(turned, LowRank) else turned.delta * scale
        changes[name] = LowRank(part, turned.right) if isinstance(turned, LowRank) else Dense(part)
    return WeightTreatment(changes, replace(treatment.origin, method=f"random, sized as {treatment.origin.method}"))


def _methods(bench: Bench, at: str, layer: int) -> Iterator[Finding]:
    context, subject = bench.context, bench.context.subject
    facts = bench.take(bench.measured)
    counts = sorted({count for count in (1, 4, 16, 64) if count < len(facts)} | {len(facts)})
    before = measure(subject, facts, texts=bench.texts)
    curves = {method: np.full(len(counts), np.nan) for method in METHODS}
    made: dict[str, Edited] = {}
    after: dict[str, Measures] = {}
    failed: dict[str, str] = {}
    steps = [(method, place) for method in METHODS for place in range(len(counts))]
    for method, place in context.track(steps, "edits"):
        if method in failed:
            continue
        try:
            edited = _edit(bench, method, facts[: counts[place]], at, layer)
        except TomoscopeError as error:
            failed[method] = error.what
            continue
        with edited.treatment.applied(subject):
            now = measure(subject, facts[: counts[place]], texts=bench.texts if place == len(counts) - 1 else ())
        curves[method][place] = float(score_of(now).mean())
        made[method], after[method] = edited, now
    figure = context.figure(
        "by_count",
        curve(
            curves, x=np.array(counts, dtype=float), x_axis="facts written together", y_axis=UNIT,
            title="How many facts each method can write",
            caption=f"Layer {layer}, {WORDS[at]} (ROME, MEMIT, AlphaEdit); facts of half B.",
            references={"before": float(score_of(before).mean())},
        ),
    )  # fmt: skip
    final = {method: float(score_of(now).mean()) for method, now in after.items() if method not in failed}
    for method in METHODS:
        key = _key(method)
        claim = f"{method} rewrites facts that the model knows"
        if method in failed:
            yield context.not_measured(key, f"{claim}.", failed[method])
            continue
        mine = score_of(after[method])
        with random_change(made[method].treatment, seed=context.seed_for(f"random {method}") % 2**31).applied(subject):
            other = score_of(measure(subject, facts))
        seed = context.seed_for(f"interval {method}")
        scores = {score.name: score for score in compare(before, after[method], seed=seed)}
        listed = ", ".join(
            f"{name} {number(scores[name].estimate.value or 0.0)}"
            for name in ("efficacy", "paraphrase", "neighbourhood", "reasoning") if name in scores
        )  # fmt: skip
        place = 1 + sum(other > final[method] for other in final.values())  # equals share a place
        yield context.claim(
            key,
            f"{claim}: {len(facts)} of them at layer {layer} ({listed}; {place}. of {len(final)} methods).",
            estimate=bootstrap_interval(mine, seed=seed, unit=UNIT),
            controls=[
                Control(
                    name="a random change of the same norm", estimate=bootstrap_interval(other, seed=seed, unit=UNIT),
                    description="The same parameters changed by as much (and in as low a rank) in random directions.",
                )
            ],
            p_value=sign_flip_test(mine - other, seed=context.seed_for(f"test {method}")),
            test="paired sign-flip test over facts", rule="method",
            sites=[f"layer.{layer}.mlp.out"], positions=WORDS[at] if method in METHODS[:3] else "", figures=[figure],
            chosen_on=DataNote(name="known facts, half A (the layer and place)", n=len(bench.chosen)),
            measured_on=DataNote(name="known facts, half B", n=len(facts), hash=_digest(facts)),
            treatments=[
                Treatment(
                    name=f"{method}, {len(facts)} facts", edit=str(made[method].treatment), status="measured",
                    effect=listed,
                    side_effects=tuple(
                        SideEffect(
                            name=name, before=None if score.before is None else score.before.value,
                            after=score.estimate.value, unit=score.estimate.unit,
                        )
                        for name, score in scores.items() if name in SIDE_EFFECTS
                    ),
                )
            ],
        )  # fmt: skip


def _traced(bench: Bench) -> Float[np.ndarray, "place layer"]:
    """Mean probability that one restored MLP brings back, at the subject's last and the prompt's last token."""
    context, subject = bench.context, bench.context.subject
    facts = bench.take(bench.chosen)[: context.options.traced]
    prompts = [one.labelled() for one in facts]
    sigma = noise_scale(subject, prompts)
    out = np.zeros((len(facts), len(PLACES), len(bench.layers)))
    for place, (prompt, one) in enumerate(zip(prompts, facts, strict=True)):
        context.progress(place, len(facts), "facts traced")
        answer = target_ids(subject, prompt, one.target_true)[0]
        trace = causal_trace(
            subject, prompt, answer, kind="mlp", sigma=sigma, draws=context.options.draws, window=1,
            seed=context.seed_for(f"noise {one.subject}") % 2**31,
        )  # fmt: skip
        rows = aligned(trace.effect.double().numpy(), *trace.subject)
        out[place] = rows[[ROWS[at] for at in PLACES]][:, bench.layers]
    return out.mean(0)


def _where(bench: Bench, scores: dict[str, np.ndarray], claim: str) -> Finding:
    context = bench.context
    try:
        traced = _traced(bench)
    except UNABLE as error:
        return context.not_measured("where", claim, error.what)
    i, k = (int(x) for x in np.unravel_index(int(np.nanargmax(traced)), traced.shape))
    at, layer = PLACES[i], bench.layers[k]
    half = scores["B"]
    mine = half[i, k]
    apart = np.ones(half.shape[:2], dtype=bool)
    apart[i, k] = False
    other = half[apart].mean(0)
    best_i, best_k = (int(x) for x in np.unravel_index(int(half.mean(-1).argmax()), half.shape[:2]))
    means = half.mean(-1)
    rank = 1 + int((means > means[i, k]).sum())
    figures = [
        context.figure(
            "where_edited",
            heatmap(
                means, rows=[WORDS[one] for one in PLACES], columns=bench.layers, row_axis="place", column_axis="layer",
                title="Where editing works", value_axis=UNIT, marks=[(i, k)], center=0.5,
                caption=f"MEMIT at one layer, {len(bench.measured)} facts of half B at once. Marked: where tracing "
                        "points.",
            ),
        ),
        context.figure(
            "where_traced",
            heatmap(
                traced, rows=[WORDS[one] for one in PLACES], columns=bench.layers, row_axis="place",
                column_axis="layer", title="Where causal tracing points", value_axis="probability regained",
                marks=[(i, k)], caption="One MLP output restored at a time; facts of half A.",
            ),
        ),
    ]  # fmt: skip
    seed = context.seed_for("where")
    top = number(float(means[best_i, best_k]))
    best = f"the best is layer {bench.layers[best_k]} at {WORDS[PLACES[best_i]]} with {top}"
    best = "it is the best place" if (i, k) == (best_i, best_k) else best
    return context.claim(
        "where",
        f"Editing where causal tracing points (layer {layer}, {WORDS[at]}) scores {number(float(mine.mean()))}, "
        f"elsewhere {number(float(other.mean()))} on average; it is {rank}. of {means.size} places, {best}.",
        estimate=bootstrap_interval(mine, seed=seed, unit=UNIT),
        controls=[
            Control(
                name="all other layers and places", estimate=bootstrap_interval(other, seed=seed, unit=UNIT),
                description="The same method and facts, each other layer and place in turn, averaged by fact.",
            )
        ],
        p_value=sign_flip_test(mine - other, seed=context.seed_for("where test")),
        test="paired sign-flip test over facts", rule="where", sites=[f"layer.{layer}.mlp.out"], positions=WORDS[at],
        figures=figures, chosen_on=DataNote(name="known facts, half A (traced)", n=len(bench.chosen)),
        measured_on=DataNote(name="known facts, half B", n=half.shape[-1], hash=_digest(bench.take(bench.measured))),
    )  # fmt: skip


def _digest(facts: Sequence[EditRequest]) -> str:
    return f"{zlib.crc32(repr([one.plain() for one in facts]).encode()):08x}"


EDITING = Exam(
    name="facts.editing",
    title="Rewriting facts",
    question="Can a fact be rewritten without changing others, where, and by which method?",
    run=run_editing,
    rule={
        "method": Rule(direction="greater", minimum=0.1),
        "where": Rule(direction="greater", minimum=0.05),
    },
    options=EditingOptions,
    presets={
        "quick": {"facts": 16, "contexts": 1, "steps": 10, "traced": 4, "tokens_per_neuron": 5, "texts": 12},
        "deep": {"facts": 160, "contexts": 5, "steps": 20, "traced": 24, "draws": 10, "tokens_per_neuron": 40},
    },
    applies=speaks_text,
    method=(
        "Facts that the model knows are rewritten by each method; prompt, other wordings and neighbours are scored by "
        "which of two answers has the lower loss. Layer and place are chosen on one half of the facts."
    ),
    cost=6.0,
)
