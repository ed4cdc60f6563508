"""Are the concepts of the micro-world single features of the stream?

Its text is made of known classes of words. For each class, and for some that come next, the best feature of a TopK
dictionary trained on the spot, the best neuron of the MLP before, and the best of as many random directions are chosen
with the threshold that is best on half A of the texts, and measured on half B (F1); and so is the best feature of a
dictionary of the same model with untrained weights, which knows nothing but which token it stands on.

How it can mislead: a class of words is a plain concept, and one feature that tells it may tell more besides; a concept
that several features share is missed.

Steps: the world's texts, activations, a dictionary of some of them; units chosen on half of the others, measured on the
rest; the same on untrained weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from tomoscope.activations import harvest
from tomoscope.circuits.proof.controls import untrained_like
from tomoscope.exams.dictionaries import DEEP, QUICK, StructureOptions, trained
from tomoscope.exams.exam import Context, Exam
from tomoscope.exams.prompts import speaks
from tomoscope.exams.ready import attempt
from tomoscope.findings.figures import bars
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.model import Subject
from tomoscope.phantoms.world import corpus, shipped_world
from tomoscope.phantoms.world.lexicon import BAD, COMPANIES, COUNTRIES, GOOD, INSTRUMENTS, PROFESSIONS
from tomoscope.phantoms.world.stories import FEMALE, MALE
from tomoscope.phantoms.world.tasks import speaks_of_the_world

LEAST = 20
"""Places in which a concept must stand, in each half."""


class ConceptOptions(StructureOptions):
    """The same; texts are the world's own."""

    texts: int = Field(256, ge=8, le=100_000, description="Texts on which units are chosen and measured.")
    units: int = Field(8, ge=1, le=100, description="Thresholds that are tried for each unit.")


@dataclass(frozen=True, eq=False)
class Reading:
    """Tokens of the world's text.

    Attributes:
        stream: [token, width].
        neurons: [token, neuron], of the MLP whose output the stream has just got.
        text: [token].
        concepts: [token, concept].
    """

    stream: Float[Tensor, "token width"]
    neurons: Float[Tensor, "token neuron"]
    text: Int[Tensor, " token"]
    concepts: Bool[Tensor, "token concept"]

    def after(self, text: int) -> Reading:
        """The tokens of the texts from one on."""
        kept = self.text >= text
        return Reading(self.stream[kept], self.neurons[kept], self.text[kept], self.concepts[kept])


def vocabularies() -> dict[str, frozenset[str]]:
    """Concept -> its words."""
    lists: dict[str, Sequence[str]] = {
        "a city": [city for row in COUNTRIES for city in row[2:]], "a country": [row[0] for row in COUNTRIES],
        "a company": COMPANIES, "an instrument": INSTRUMENTS, "a profession": PROFESSIONS, "a woman's name": FEMALE,
        "a man's name": MALE, "a good word": GOOD, "a bad word": BAD,
    }  # fmt: skip
    return {name: frozenset(words) for name, words in lists.items()}


NEXT = ("a city", "a company", "a profession")
"""Concepts that are also looked for one token ahead."""


def concept_names() -> list[str]:
    """Columns of `Reading.concepts`."""
    return [*vocabularies(), *(f"next: {name}" for name in NEXT)]


def run_concepts(context: Context) -> Iterator[Finding]:
    """One claim: the world's concepts are features."""
    claim = "Concepts of the world are single features of the stream."
    yield attempt(context, "concepts", claim, lambda: _concepts(context, claim))


def _layer(subject: Subject) -> int:
    """The block after which the stream is read: about the middle."""
    return max(0, subject.facts.n_layers // 2 - 1)


def _read_world(context: Context, subject: Subject) -> Reading:
    options, tokenizer, layer = context.options, subject.tokenizer, _layer(subject)
    stream = corpus(shipped_world(), seed=context.seed_for("text"), split="exam")
    texts = list(islice(stream, options.training_texts + options.texts))
    ids = [row[: options.length] for row in tokenizer(texts, verbose=False)["input_ids"]]
    sites = [f"layer.{layer}.resid_post", f"layer.{layer}.mlp.post"]
    slabs = list(harvest(subject, [row for row in ids if len(row) > 1], sites, skip=1))
    place = torch.cat([slab.places for slab in slabs])
    text = torch.cat([slab.text.documents for slab in slabs])
    tokens = torch.cat([slab.text.ids for slab in slabs]).long()
    said = [tokenizer.decode([token]).strip() for token in range(len(tokenizer))]
    columns = {name: torch.tensor([word in words for word in said])[tokens] for name, words in vocabularies().items()}
    for name in NEXT:
        ahead = torch.zeros_like(columns[name])
        ahead[:-1] = columns[name][1:] & (text[1:] == text[:-1])
        columns[f"next: {name}"] = ahead
    concepts = torch.stack([columns[name] for name in concept_names()], 1)[place]
    streams, neurons = (torch.cat([slab.values[site] for slab in slabs]).float() for site in sites)
    return Reading(streams, neurons, text[place], concepts)


def best_units(
    units: Float[Tensor, "token unit"], concepts: Bool[Tensor, "token concept"], thresholds: int
) -> tuple[Int[Tensor, " concept"], Float[Tensor, " concept"]]:
    """Each concept's unit and threshold of the best F1: a token is told where the unit lies above."""
    wanted = concepts.float()
    positive = wanted.sum(0)
    best, unit, limit = torch.full_like(positive, -1), torch.zeros_like(positive).long(), torch.zeros_like(positive)
    shares = torch.linspace(0.5, 0.995, thresholds)
    # a threshold at 0 first: that a feature fires at all
    for cut in (torch.zeros(units.shape[1]), *torch.quantile(_sample(units), shares, dim=0)):
        told = (units > cut).float()
        f1 = 2 * told.T @ wanted / (told.sum(0)[:, None] + positive)
        value, which = f1.max(0)
        better = value > best
        best, unit = torch.where(better, value, best), torch.where(better, which, unit)
        limit = torch.where(better, cut[which], limit)
    return unit, limit


def _sample(units: Tensor) -> Tensor:
    return units[:: max(1, len(units) // 4000)]


def f1_by_text(told: Tensor, concepts: Tensor, text: Int[np.ndarray, " token"], n: int) -> Float[np.ndarray, "c text"]:
    """For each concept a number a text whose mean is F1 (a ratio of means, linearised)."""
    out = []
    for mine, right in zip(told.T.numpy(), concepts.T.numpy(), strict=True):
        top = np.bincount(text, weights=2.0 * (mine & right), minlength=n)
        bottom = np.bincount(text, weights=mine.astype(float) + right, minlength=n)
        ratio = top.sum() / max(bottom.sum(), 1e-30)
        out.append(ratio + (top - ratio * bottom) / max(bottom.mean(), 1e-30))
    return np.array(out)


def concept_scores(
    context: Context, subject: Subject
) -> tuple[dict[str, np.ndarray], list[str], dict[str, int]] | None:
    """F1 by text of each concept's best unit of each sort, [concept, text]; the concepts; how many units of each sort.

    None where no concept stands in 20 places of either half of the texts.
    """
    reading = _read_world(context, subject)
    split = min(context.options.training_texts, int(reading.text.max()) // 2)
    coder = trained(context, reading.stream[reading.text < split], "world")
    reading = reading.after(split)
    draw = torch.Generator().manual_seed(context.seed_for("directions") % 2**63)
    directions = torch.randn(reading.stream.shape[1], coder.n_features, generator=draw)
    units = {
        "features": coder.encode(reading.stream), "neurons": reading.neurons,
        "random directions": (reading.stream - reading.stream.mean(0)) @ directions,
    }  # fmt: skip
    chosen, measured = context.halves(reading.text.tolist())
    enough = reading.concepts[chosen].sum(0).minimum(reading.concepts[measured].sum(0)) >= LEAST
    if not bool(enough.any()):
        return None
    concepts = reading.concepts[:, enough]
    names = [name for name, kept in zip(concept_names(), enough.tolist(), strict=True) if kept]
    owners = np.unique(reading.text[measured].numpy(), return_inverse=True)[1]
    scores = {}
    for name, values in units.items():
        unit, limit = best_units(values[chosen], concepts[chosen], context.options.units)
        told = values[measured][:, unit] > limit
        scores[name] = f1_by_text(told, concepts[measured], owners, int(owners.max()) + 1)
    return scores, names, {name: values.shape[1] for name, values in units.items()}


def _concepts(context: Context, claim: str) -> Finding:
    subject, layer = context.subject, _layer(context.subject)
    found = concept_scores(context, subject)
    kind = "initial" if subject.config is not None else "shuffled"
    blank = untrained_like(subject, seed=context.seed_for("untrained") % 2**63, kind=kind)
    empty = concept_scores(context, blank)
    if found is None or empty is None:
        return context.not_measured(
            "concepts", claim, f"no concept stands in {LEAST} places of either half of the texts"
        )
    scores, names, counts = found
    mine = scores["features"].mean(0)
    others = {f"the best of {counts[name]:,} {name}": scores[name].mean(0) for name in ("neurons", "random directions")}
    others["features of untrained weights"] = empty[0]["features"].mean(0)
    seed, test = context.seed_for("interval"), context.seed_for("test")
    made = [bootstrap_interval(row, seed=seed, n_resamples=1000) for row in scores["features"]]
    low, high = (np.array([e.value if end is None else end for e, end in zip(made, ends, strict=True)])
                 for ends in ([e.low for e in made], [e.high for e in made]))  # fmt: skip
    picture = bars(
        scores["features"].mean(1), labels=names, low=low, high=high,
        title="How well one feature tells a concept", value_axis="F1 on half B",
        references={f"{name}, mean": float(values.mean()) for name, values in others.items()},
        caption="Unit and threshold are the best on half A of the texts. Bootstrap intervals over texts.",
    )  # fmt: skip
    return context.claim(
        "concepts",
        f"Concepts of the world are single features of the stream after layer {layer}: the best feature tells each of "
        f"{len(names)} with a mean F1 of {float(mine.mean()):.2f}.",
        estimate=bootstrap_interval(mine, seed=seed, unit="F1"),
        controls=[
            Control(
                name=name, estimate=bootstrap_interval(values, seed=seed, unit="F1"),
                description="Unit and threshold chosen and measured alike, on the same texts.",
            )
            for name, values in others.items()
        ],
        p_value=max(sign_flip_test(mine - values, seed=test) for values in others.values()),
        test="the largest p of paired sign-flip tests over texts, against each control",
        sites=[f"layer.{layer}.resid_post"], positions="all but the first",
        figures=[context.figure("concepts", picture)],
        chosen_on=DataNote(name="the micro-world's text, half A", n=len(mine)),
        measured_on=DataNote(name="the micro-world's text, half B", n=len(mine)),
    )  # fmt: skip


def _of_the_world(subject: object) -> str:
    why = speaks(subject)
    if why or speaks_of_the_world(getattr(subject, "tokenizer", None)):
        return why
    return "the model does not speak of the micro-world, whose concepts are known"


CONCEPTS = Exam(
    name="features.concepts",
    title="The world's concepts as features",
    question="Are the concepts of the micro-world single features, more than single neurons?",
    run=run_concepts,
    rule=Rule(direction="greater", minimum=0.05),
    options=ConceptOptions,
    presets={"quick": QUICK, "deep": DEEP},
    applies=_of_the_world,
    method=(
        "A TopK dictionary is trained on the stream of the world's text. For each class of words, and for what comes "
        "next, the unit and threshold of the best F1 are chosen on one half of other texts and measured on the rest."
    ),
    cost=3.0,
)
