"""Is a concept represented, where, is what a probe found of the model's making, and does the model use it?

For each concept a logistic probe is fitted at every layer's stream, at the last token. Layer and regularisation are
chosen on folds of one half of the words; the claim is measured on the other half. Three claims a concept:

- probe: the chosen layer's probe beats the best layer under shuffled labels, the same architecture with random weights,
  the length of the text and the embedding of the last token;
- selective: it beats its control task, in which each word has a random label;
- used: one step along the direction and one step back moves the model's own answer more than the strongest of some
  random directions of equal norm, with the covariance that the activations have beside the concept.

How it can mislead: see `concepts.probes`, `concepts.controls`, `concepts.use`. That a probe reads a concept at the last
token says nothing of other tokens; a concept that is written anew at a later layer is not moved by a step at this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from tomoscope.circuits.proof.controls import untrained_like
from tomoscope.concepts import Probes, States, collect, train_probes
from tomoscope.concepts.controls import Selectivity, distractors, selectivity, surface_states
from tomoscope.concepts.use import causal_effect
from tomoscope.data.tasks import single_tokens
from tomoscope.exams.concept_data import MAKERS, ConceptItems, concept_items
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import attempt, percent
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.figures import curve
from tomoscope.findings.finding import Control, DataNote, FigureRef, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval, null_interval
from tomoscope.findings.verdict import Rule

SITES = ("layer.*.resid_post",)


class ProbeOptions(Options):
    """Which concepts, and how many texts."""

    concepts: tuple[str, ...] = Field(tuple(MAKERS), min_length=1, description=f"Of {', '.join(MAKERS)}.")
    n: int = Field(400, ge=48, le=20_000, description="Texts of each concept.")
    draws: int = Field(9, ge=2, le=200, description="Random directions beside the probe's.")
    nulls: int = Field(39, ge=5, le=999, description="Labellings that mean nothing.")


@dataclass(frozen=True, eq=False)
class Probed:
    """One concept's probes and what stands beside them."""

    items: ConceptItems
    states: States
    probes: Probes
    untrained: Probes | str
    surface: dict[str, Probes]


def run(context: Context) -> Iterator[Finding]:
    """Three claims a concept."""
    options = context.options
    for name in context.track(list(dict.fromkeys(options.concepts)), "concepts"):
        claims = {
            f"{name}_probe": f"The model's stream tells {name}, in words that the probe never saw.",
            f"{name}_selective": f"A probe of {name} reads what the model made, not what a probe can learn by heart.",
            f"{name}_used": f"The model uses the direction that tells {name}.",
        }
        items = concept_items(context.subject, name, options.n, context.scan_seed)
        if isinstance(items, str):
            for key, claim in claims.items():
                yield context.not_measured(key, claim, items)
            continue
        made: list[Probed] = []

        def probe(items: ConceptItems = items, made: list[Probed] = made, key: str = f"{name}_probe") -> Finding:
            made.append(_probed(context, items))
            return _represented(context, made[0], key)

        yield attempt(context, f"{name}_probe", claims[f"{name}_probe"], probe)
        for key, make in ((f"{name}_selective", _selective), (f"{name}_used", _used)):
            if not made:
                yield context.not_measured(key, claims[key], "no probe could be fitted")
                continue
            yield attempt(context, key, claims[key], lambda make=make, key=key, one=made[0]: make(context, one, key))


def _probed(context: Context, items: ConceptItems) -> Probed:
    subject, seed = context.subject, context.seed_for(f"{items.name} probes") % 2**31
    states = collect(subject, items.texts, ("embed", *SITES))
    layers = States({site: value for site, value in states.items() if site != "embed"})
    shared: dict[str, Any] = {
        "clusters": items.clusters,
        "seed": seed,
        "concept": items.name,
        "fitted_on": f"{items.name}, half A",
    }
    probes = train_probes(layers, items.labels, nulls=context.options.nulls, **shared)
    rows = (probes.train, probes.test)
    others = {"embedding of the last token": states["embed"]}
    ids = [prompt.ids for prompt in subject.tokens(list(items.texts)).prompts]
    others |= {
        "length": surface_states(items.texts, ids)["length"],
        "bag of tokens": surface_states(items.texts, ids)["tokens"],
    }
    surface = {
        key: train_probes(States({key: value}), items.labels, nulls=0, held_out=rows, **shared)
        for key, value in others.items()
    }
    kind = "initial" if subject.config is not None else "shuffled"
    blank = untrained_like(subject, seed=seed % 2**31, kind=kind)
    untrained = train_probes(collect(blank, items.texts, SITES), items.labels, nulls=0, held_out=rows, **shared)
    return Probed(items, layers, probes, untrained, surface)


def _note(items: ConceptItems, half: str, n: int) -> DataNote:
    return DataNote(name=f"texts of {items.name}, {half}", n=n, description=f"classes {' and '.join(items.classes)}")


def _represented(context: Context, one: Probed, key: str) -> Finding:
    probes, items = one.probes, one.items
    estimate = probes.accuracy()
    unit = estimate.unit
    controls = [
        Control(
            name="shuffled labels", estimate=null_interval(probes.null_best(), unit=unit),
            description="The best layer's probe, fitted to labels shuffled by word: it pays for the search of layers.",
        ),
    ]  # fmt: skip
    if not isinstance(one.untrained, str):
        controls.append(Control(
            name="untrained model", estimate=one.untrained.accuracy(),
            description="The best layer of the same architecture with random weights, on the same texts.",
        ))  # fmt: skip
    for name in ("length", "embedding of the last token"):
        controls.append(Control(
            name=name, estimate=one.surface[name].accuracy(), description="The same probe without the model's layers.",
        ))  # fmt: skip
    bag = one.surface["bag of tokens"].accuracy().value or 0.0
    scores = probes.scores[probes.sites.index(probes.best), :, 0].double().numpy()
    test = probes.test
    found = distractors(scores, {items.name: items.labels[test], **{k: v[test] for k, v in items.others.items()}})
    loudest = next(iter(found))
    context.log(
        f"{items.name}: a bag of the text's tokens tells it in {percent(bag)} of held-out texts; the scores follow "
        f"{loudest} most (ROC area {found[loudest]:.2f})."
    )
    figure = _figure(context, one, key)
    area = probes.roc_area()
    area_said = "" if area.value is None else f" (ROC area {area.value:.2f})"
    return context.claim(
        key,
        f"The model's stream tells {items.name} at {probes.best}: a linear probe is right on "
        f"{percent(float(estimate.value or 0))} of texts with words that it never saw{area_said}.",
        estimate=estimate, controls=controls, p_value=probes.p_value(), rule="probe",
        test="permutation of held-out labels by word, against the best of all layers (max-T)", sites=[probes.best],
        positions="last token", figures=[figure], chosen_on=_note(items, "half A", len(probes.train)),
        measured_on=_note(items, "half B", len(probes.test)),
    )  # fmt: skip


def _figure(context: Context, one: Probed, key: str) -> FigureRef:
    probes = one.probes
    estimates = [probes.accuracy(site) for site in probes.sites]
    series = {"model": np.array([e.value for e in estimates])}
    low = {"model": np.array([e.low if e.low is not None else e.value for e in estimates])}
    high = {"model": np.array([e.high if e.high is not None else e.value for e in estimates])}
    if not isinstance(one.untrained, str):
        series["untrained model"] = one.untrained.right.mean(1)
    band = np.quantile(probes.null_best(), 0.95)
    return context.figure(
        key,
        curve(
            series, low=low, high=high, title=f"Where {one.items.name} can be read",
            caption="Share of held-out texts that a linear probe of each layer tells rightly; bootstrap by word.",
            x_axis="after layer", y_axis="share right", ticks=[str(i) for i in range(len(probes.sites))],
            references={"best layer, shuffled labels (95 %)": float(band), "commonest class": probes.majority},
        ),
    )  # fmt: skip


def _selective(context: Context, one: Probed, key: str) -> Finding:
    items, site = one.items, one.probes.best
    found: Selectivity | str = selectivity(
        States({site: one.states[site]}), items.labels, items.clusters, seed=context.seed_for(key) % 2**31
    )
    claim = f"A probe of {items.name} reads what the model made, not what a probe can learn by heart"
    if isinstance(found, str):
        return context.not_measured(key, f"{claim}.", found)
    seed = context.seed_for(f"{key} interval")
    estimate, control = (
        bootstrap_interval(values[0], seed=seed, clusters=found.types, unit="share of items")
        for values in (found.task, found.control)
    )
    values = (found.task - found.control)[0]
    return context.claim(
        key,
        f"{claim}: right on {percent(float(found.task.mean()))} of texts, and on "
        f"{percent(float(found.control.mean()))} where each word has a random label.",
        estimate=estimate, rule="selective", sites=[site], positions="last token",
        controls=[Control(
            name="control task", estimate=control,
            description="The same probe on the same texts, each word with a random label (Hewitt and Liang 2019).",
        )],
        p_value=sign_flip_test(values, seed=context.seed_for(f"{key} test"), clusters=found.types),
        test="paired sign-flip test by word, task against control task",
        chosen_on=_note(items, "half A", len(one.probes.train)),
        measured_on=_note(items, "other texts of each word", found.task.shape[1]),
    )  # fmt: skip


def _used(context: Context, one: Probed, key: str) -> Finding:
    subject, items, probes = context.subject, one.items, one.probes
    claim = f"The model uses the direction that tells {items.name}"
    ids = single_tokens(subject.tokenizer, [answer.strip() for answer in items.answers])
    if len(ids) < 2:
        return context.not_measured(key, f"{claim}.", f"{' or '.join(items.answers)} is no single token here")
    low, high = (ids[answer.strip()] for answer in items.answers)
    texts = [items.texts[i] for i in probes.test]
    effect = causal_effect(
        subject, texts, lambda logits: logits[:, high] - logits[:, low], probes.directions[probes.best],
        draws=context.options.draws, removal=False, clusters=probes.clusters.tolist(),
        seed=context.seed_for(key) % 2**31,
    )  # fmt: skip
    strongest = int(effect.random_steerings.argmax())
    other = effect.random_added[strongest]
    other = other * (1.0 if other.mean() >= 0 else -1.0)
    seed = context.seed_for(f"{key} interval")
    control = Control(
        name="random directions",
        estimate=bootstrap_interval(other, seed=seed, clusters=probes.clusters, unit="logits"),
        description=(
            f"The strongest of {len(effect.random_added)} of equal norm, drawn with the stream's covariance once what "
            "the probe reads is taken out."
        ),
    )  # fmt: skip
    estimate: Estimate = bootstrap_interval(effect.added, seed=seed, clusters=probes.clusters, unit="logits")
    return context.claim(
        key,
        f"{claim}: from one step down to one step up, {items.answers[1].strip()!r} gains "
        f"{float(estimate.value or 0):.2f} logits over {items.answers[0].strip()!r}.",
        estimate=estimate, controls=[control], rule="used", sites=[probes.best], positions="last token",
        p_value=sign_flip_test(effect.added - other, seed=seed, clusters=probes.clusters),
        test="paired sign-flip test by word, against the strongest random direction",
        chosen_on=_note(items, "half A", len(probes.train)), measured_on=_note(items, "half B", len(texts)),
    )  # fmt: skip


PROBES = Exam(
    name="concepts.probes",
    title="What the stream represents",
    question="Which concepts can be read from the model's stream, where, and does it use them?",
    run=run,
    rule={
        "probe": Rule(direction="greater", minimum=0.05),
        "selective": Rule(direction="greater", minimum=0.05),
        "used": Rule(direction="greater", minimum=0.1),
    },
    options=ProbeOptions,
    presets={
        "quick": {"n": 200, "draws": 5, "nulls": 19, "concepts": ("number", "truth")},
        "deep": {"n": 1200, "draws": 19, "nulls": 99},
    },
    applies=speaks_text,
    method=(
        "A logistic probe at every layer's stream, at the last token; words are split in two halves, regularisation "
        "and layer are chosen on folds of the first, and all figures are of the second (Alain and Bengio 2016; control "
        "tasks of Hewitt and Liang 2019)."
    ),
    cost=2.0,
)
