"""Are a stream's directions sparse features, or only correlated numbers?

A TopK dictionary is trained on the spot, on the stream in the middle of the model. Held-out activations are explained
by few of many directions better than a twin of theirs, by a dictionary trained on the twin alike. The twin has the
same mean and covariance, between tokens and within a token, and the same tokens in the same places, but is normal:
what a dictionary explains of it is covariance and repetition, no feature. The k first principal components, fitted on
the same data, are the other control.

How it can mislead: features may be there that a dictionary this small and this briefly trained misses; heavy tails
alone make a stream easier for a sparse code than its twin.

Steps: texts, activations at one site, a dictionary of some texts and one of their twin, both on other texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from tomoscope.activations import ArraySource, harvest
from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import own_text, speaks
from tomoscope.exams.ready import attempt, percent
from tomoscope.features import SparseCoder
from tomoscope.features.training import TrainConfig, finished_coder, train
from tomoscope.findings.finding import Control, DataNote, Finding
from tomoscope.findings.permutation import permutation_test, sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule

BATCH = 512


class StructureOptions(Options):
    """How much text is read and how the dictionary is trained."""

    training_texts: int = Field(768, ge=16, le=1_000_000, description="Texts that it is trained on.")
    texts: int = Field(128, ge=8, le=100_000, description="Texts on which it is measured.")
    length: int = Field(32, ge=8, le=4096, description="Tokens of each text.")
    latents: int = Field(0, ge=0, description="Latents; 0: four times the width.")
    k: int = Field(0, ge=0, description="Active latents a token; 0: a sixteenth of the width.")
    steps: int = Field(500, ge=1, le=1_000_000, description="Steps of training.")


def middle(context: Context) -> str:
    """The site that is examined: the stream in the middle of the model."""
    return f"layer.{context.subject.facts.n_layers // 2}.resid_pre"


def active_count(context: Context, width: int) -> int:
    """Active latents a token."""
    return context.options.k or max(2, width // 16)


def trained(context: Context, rows: Float[Tensor, "token width"], purpose: str) -> SparseCoder:
    """A TopK dictionary of some rows."""
    options, width = context.options, rows.shape[1]
    latents = options.latents or 4 * width
    config = TrainConfig(
        latents=latents, k=min(active_count(context, width), latents), batch=min(BATCH, len(rows)),
        steps=options.steps, learning_rate=1e-2, warmup=min(50, options.steps), dead_after=20 * BATCH,
        precision="float32", seed=context.seed_for(purpose) % 2**31,
    )  # fmt: skip
    (done,) = train(ArraySource(rows, seed=context.seed_for(f"{purpose} order")), config)
    return finished_coder(done)


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
    k = active_count(context, rows.shape[1])
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
