"""Are a stream's directions sparse features, or only correlated numbers? And are they the concepts of its world?

Two exams train a TopK dictionary on the spot, on the stream in the middle of the model.

`features.structure`: held-out activations are explained by few of many directions better than a twin of theirs, by a
dictionary trained on the twin alike. The twin has the same mean and covariance, between tokens and within a token, and
the same tokens in the same places, but is normal: what a dictionary explains of it is covariance and repetition, no
feature. The k first principal components, fitted on the same data, are the other control.

`features.concepts`: of the classes of words that the micro-world's text is made of, and of what comes next, each is
told by one feature; beside the best neuron of the MLP before and the best of as many random directions, each with the
unit and the threshold that are best on half A, measured on half B (F1).

How they can mislead: features may be there that a dictionary this small and this briefly trained misses; heavy tails
alone make a stream easier for a sparse code than its twin; a class of words is a plain concept, and one feature that
tells it may tell more besides.

Steps: texts, activations at one site, a dictionary on some texts, figures on others.
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

from tomoscope.activations import ArraySource, harvest
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import own_text, speaks
from tomoscope.exams.ready import attempt, percent
from tomoscope.features import SparseCoder, TopK
from tomoscope.features.training import TrainConfig, finished_coder, train
from tomoscope.findings.figures import bars
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.permutation import permutation_test, sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.phantoms.world import corpus, shipped_world
from tomoscope.phantoms.world.lexicon import BAD, COMPANIES, COUNTRIES, GOOD, INSTRUMENTS, PROFESSIONS
from tomoscope.phantoms.world.stories import FEMALE, MALE
from tomoscope.phantoms.world.tasks import speaks_of_the_world

BATCH = 512


class StructureOptions(Options):
    """How much text is read and how the dictionary is trained."""

    training_texts: int = Field(768, ge=16, le=1_000_000, description="Texts that it is trained on.")
    texts: int = Field(128, ge=8, le=100_000, description="Texts on which it is measured.")
    length: int = Field(32, ge=8, le=4096, description="Tokens of each text.")
    latents: int = Field(0, ge=0, description="Latents; 0: four times the width.")
    k: int = Field(0, ge=0, description="Active latents a token; 0: a sixteenth of the width.")
    steps: int = Field(500, ge=1, le=1_000_000, description="Steps of training.")


class ConceptOptions(StructureOptions):
    """The same; texts are the world's own."""

    texts: int = Field(256, ge=8, le=100_000, description="Texts on which units are chosen and measured.")
    units: int = Field(8, ge=1, le=100, description="Thresholds that are tried for each unit.")


def middle(context: Context) -> str:
    """The site that is examined: the stream in the middle of the model."""
    return f"layer.{context.subject.facts.n_layers // 2}.resid_pre"


def trained(context: Context, rows: Float[Tensor, "token width"], purpose: str) -> SparseCoder:
    """A TopK dictionary of some rows."""
    options, width = context.options, rows.shape[1]
    latents = options.latents or 4 * width
    config = TrainConfig(
        latents=latents, k=min(options.k or max(2, width // 16), latents), batch=min(BATCH, len(rows)),
        steps=options.steps, learning_rate=1e-2, warmup=min(50, options.steps), dead_after=20 * BATCH,
        precision="float32", seed=context.seed_for(purpose) % 2**31,
    )  # fmt: skip
    (done,) = train(ArraySource(rows, seed=context.seed_for(f"{purpose} order")), config)
    return finished_coder(done)


# ---- structure


def twin(rows: Float[Tensor, "token width"], tokens: Int[Tensor, " token"], seed: int) -> Float[Tensor, "token width"]:
    """Normal rows of the same mean and the same covariances between tokens and within a token, each token its own."""
    wide = rows.double()
    mean = wide.mean(0)
    kinds, which = tokens.unique(return_inverse=True)
    count = torch.bincount(which, minlength=len(kinds)).double()
    centre = torch.zeros(len(kinds), wide.shape[1], dtype=torch.float64).index_add_(0, which, wide) / count[:, None]
    between = (centre - mean).T @ ((centre - mean) * count[:, None]) / len(wide)
    apart = wide - centre[which]
    within = apart.T @ apart / len(wide)
    draw = torch.Generator().manual_seed(seed % 2**63)
    drawn = torch.randn(len(kinds), wide.shape[1], generator=draw, dtype=torch.float64) @ _root(between)
    noise = torch.randn(wide.shape, generator=draw, dtype=torch.float64) @ _root(within)
    return (mean + drawn[which] + noise).to(rows)


def _root(covariance: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def unexplained(
    made: Tensor, rows: Float[Tensor, "token width"], text: Int[np.ndarray, " token"], n: int
) -> Float[np.ndarray, " text"]:
    """Each text's mean squared error as a share of all rows' variance."""
    variance = float((rows - rows.mean(0)).square().sum(1).mean())
    lost = (made - rows).square().sum(1).double().numpy() / max(variance, 1e-30)
    return np.bincount(text, weights=lost, minlength=n) / np.bincount(text, minlength=n)


def principal(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean and the first k principal directions [width, k]."""
    mean = rows.mean(0)
    return mean, torch.linalg.eigh((rows - mean).T @ (rows - mean))[1][:, -k:]


def run_structure(context: Context) -> Iterator[Finding]:
    """One claim: the stream is made of sparse features."""
    claim = "The stream in the middle of the model is made of sparse features."
    yield attempt(context, "structure", claim, lambda: _structure(context))


def _structure(context: Context) -> Finding:
    options, site = context.options, middle(context)
    n, m = options.training_texts, options.texts
    texts = own_text(context.subject, n=n + m, length=options.length, seed=context.seed_for("text"))
    # each text's first token is left out: attention rests there, and its norm is like no other's
    slabs = list(harvest(context.subject, texts, [site], skip=1))
    rows = torch.cat([slab.values[site] for slab in slabs]).float()
    place = torch.cat([slab.places for slab in slabs])
    text = torch.cat([slab.text.documents for slab in slabs])[place]
    tokens = torch.cat([slab.text.ids for slab in slabs])[place]
    first = len(texts) - min(m, len(texts) // 2)
    known, fresh = text < first, text >= first
    normal = twin(rows, tokens, context.seed_for("twin"))
    coder = trained(context, rows[known], "real")
    other = trained(context, normal[known], "twin")
    owners = (text[fresh] - first).numpy()
    kept = np.unique(owners, return_inverse=True)
    owners, count = kept[1], len(kept[0])
    real = unexplained(coder(rows[fresh]), rows[fresh], owners, count)
    null = unexplained(other(normal[fresh]), normal[fresh], owners, count)
    assert isinstance(coder.activation, TopK)  # as the exam trains them
    k = coder.activation.k
    mean, axes = principal(rows[known], k)
    projected = mean + (rows[fresh] - mean) @ axes @ axes.T
    linear = unexplained(projected, rows[fresh], owners, count)
    seed, unit = context.seed_for("interval"), "share of variance unexplained"
    p = max(
        permutation_test(real, null, seed=context.seed_for("test"), alternative="less"),
        sign_flip_test(linear - real, seed=context.seed_for("test")),
    )
    return context.claim(
        "structure",
        f"The stream at {site} is made of sparse features: {k} of {coder.n_features:,} directions leave "
        f"{percent(float(real.mean()))} of its variance unexplained.",
        estimate=bootstrap_interval(real, seed=seed, unit=unit),
        controls=[
            Control(
                name="a normal twin", estimate=bootstrap_interval(null, seed=seed, unit=unit),
                description="Normal rows of equal mean and covariance, between tokens and within, trained on alike.",
            ),
            Control(
                name=f"{k} principal components", estimate=bootstrap_interval(linear, seed=seed, unit=unit),
                description="As many directions as are active at a token, the same for all, fitted on the same texts.",
            ),
        ],
        p_value=p, test="the larger p of a permutation test over texts against the twin, and of a paired one",
        sites=[site], positions="all but the first",
        chosen_on=DataNote(name="the model's own text, training", n=first),
        measured_on=DataNote(name="the model's own text, held out", n=count),
    )  # fmt: skip


# ---- concepts


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


def _read_world(context: Context, layer: int) -> Reading:
    options, tokenizer = context.options, context.subject.tokenizer
    stream = corpus(shipped_world(), seed=context.seed_for("text"), split="exam")
    texts = list(islice(stream, options.training_texts + options.texts))
    ids = [row[: options.length] for row in tokenizer(texts, verbose=False)["input_ids"]]
    sites = [f"layer.{layer}.resid_post", f"layer.{layer}.mlp.post"]
    slabs = list(harvest(context.subject, [row for row in ids if len(row) > 1], sites, skip=1))
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


def _concepts(context: Context, claim: str) -> Finding:
    layer = max(0, context.subject.facts.n_layers // 2 - 1)
    reading = _read_world(context, layer)
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
    enough = reading.concepts[chosen].sum(0).minimum(reading.concepts[measured].sum(0)) >= 20
    if not bool(enough.any()):
        return context.not_measured("concepts", claim, "no concept stands in 20 places of either half of the texts")
    concepts = reading.concepts[:, enough]
    names = [name for name, kept in zip(concept_names(), enough.tolist(), strict=True) if kept]
    owners = np.unique(reading.text[measured].numpy(), return_inverse=True)[1]
    scores = {}
    for name, values in units.items():
        unit, limit = best_units(values[chosen], concepts[chosen], context.options.units)
        told = values[measured][:, unit] > limit
        scores[name] = f1_by_text(told, concepts[measured], owners, owners.max() + 1)
    mine = scores["features"].mean(0)
    seed, test = context.seed_for("interval"), context.seed_for("test")
    others = {name: rows.mean(0) for name, rows in scores.items() if name != "features"}
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
                description=f"The best of {units[name].shape[1]:,} {name}, chosen alike.",
            )
            for name, values in others.items()
        ],
        p_value=max(sign_flip_test(mine - values, seed=test) for values in others.values()),
        test="the larger p of paired sign-flip tests over texts, against each control",
        sites=[f"layer.{layer}.resid_post"], positions="all but the first",
        figures=[context.figure("concepts", picture)],
        chosen_on=DataNote(name="the micro-world's text, half A", n=len(chosen)),
        measured_on=DataNote(name="the micro-world's text, half B", n=len(measured)),
    )  # fmt: skip


def _of_the_world(subject: object) -> str:
    why = speaks(subject)
    if why or speaks_of_the_world(getattr(subject, "tokenizer", None)):
        return why
    return "the model does not speak of the micro-world, whose concepts are known"


QUICK = {"training_texts": 256, "texts": 64, "steps": 250}
DEEP = {"training_texts": 4096, "steps": 2000}

STRUCTURE = Exam(
    name="features.structure",
    title="Sparse features in the stream",
    question="Is the stream made of sparse features, or only of correlated numbers?",
    run=run_structure,
    rule=Rule(direction="less", minimum=0.02),
    options=StructureOptions,
    presets={"quick": QUICK, "deep": DEEP},
    applies=speaks,
    method=(
        "A TopK dictionary (Gao et al. 2024) is trained on the stream of texts that the model wrote, and one like it "
        "on a normal twin with the same covariance between tokens and within a token; both are measured on held-out "
        "texts."
    ),
    cost=4.0,
)
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
