"""Where in depth does the prediction form? The logit lens and the tuned lens, as claims.

Both are read on texts that the model itself wrote; a text is one observation, its tokens are not. The dumb baselines
are: the lens before any block, the one token that is predicted most often (logit lens), and the model's average
distribution, which reads nothing of the text (tuned lens). How they can mislead: see `observe.lens`; that a stream can
be decoded does not say that later layers decode it so, and an untrained residual network has a lens curve too.

Steps: write texts, read the lens at every depth, choose the depth on one half of the texts, measure it on the other;
for the tuned lens, train on some texts and compare on others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field

from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import speaks, texts_for
from tomoscope.exams.ready import attempt, percent
from tomoscope.findings.figures import curve
from tomoscope.findings.finding import Control, DataNote, FigureRef, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.observe import LensReading, logit_lens, train_tuned_lens


class LensOptions(Options):
    """How much text the model writes for itself to be read."""

    texts: int = Field(64, ge=8, le=100_000, description="Texts to read.")
    length: int = Field(32, ge=8, le=4096, description="Tokens of each text.")
    corpus: str = Field("", description="A text file, directory or dataset id; else the model's own texts.")


class TunedOptions(LensOptions):
    """And how long the lens is trained."""

    steps: int = Field(150, ge=1, le=100_000, description="Optimiser steps.")
    training_texts: int = Field(256, ge=8, le=1_000_000, description="Texts that it is trained on.")
    learning_rate: float = Field(0.1, gt=0, description="Of SGD with momentum, at the start.")


def by_prompt(values: np.ndarray, prompt: np.ndarray, n: int) -> np.ndarray:
    """Means over each prompt's tokens, [.., sample] -> [.., prompt]: prompts are independent, their tokens are not."""
    counts = np.bincount(prompt, minlength=n)
    out = np.stack([np.bincount(prompt, weights=row, minlength=n) for row in values.reshape(-1, values.shape[-1])])
    return (out / counts).reshape(*values.shape[:-1], n)


def bands(context: Context, per_prompt: np.ndarray, purpose: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high over prompts for each row."""
    seed = context.seed_for(purpose)
    made = [bootstrap_interval(row, seed=seed, n_resamples=1000) for row in per_prompt]
    mean, low, high = (np.array([getattr(e, part) for e in made]) for part in ("value", "low", "high"))
    return mean, low, high


def _depth(reading: LensReading) -> list[str]:
    return ["in", *(site.split(".")[1] for site in reading.sites[1:])]


def run_logit_lens(context: Context) -> Iterator[Finding]:
    """The first block after which half of the final predictions are decodable, chosen on one half of the texts."""
    claim = "The final prediction can be read from the stream before the last block."
    yield attempt(context, "formed", claim, lambda: _formed(context, claim))


def _formed(context: Context, claim: str) -> Finding:
    options = context.options
    if context.subject.facts.n_layers < 2:
        return context.not_measured("formed", claim, "the model has one block: there is no depth between in and out")
    prompts, source = texts_for(context, options.texts)
    reading = logit_lens(context.subject, prompts, at=None)
    n, prompt = len(prompts), reading.prompt.numpy()
    agreement = by_prompt(reading.agreement.double().numpy(), prompt, n)
    kl = by_prompt(reading.kl.double().numpy(), prompt, n)
    figures = [
        _figure(
            context, "agreement", agreement, reading, "Share of tokens whose lens prediction is the final one", "share"
        ),
        _figure(
            context, "kl", kl, reading, "Distance of the lens from the final distribution", "KL(final || lens), nats"
        ),
    ]
    chosen, measured = context.halves(n)
    means = agreement[:, chosen].mean(1)
    # the last site is the model's own output and agrees by construction, the first is the control: neither can be it
    half = 1 + np.flatnonzero(means[1:-1] >= 0.5)
    at = int(half[0]) if len(half) else 1 + int(means[1:-1].argmax())
    commonest = by_prompt(_commonest(reading, prompt, chosen)[None], prompt, n)[0]
    seed, mine = context.seed_for("interval"), agreement[at, measured]
    baselines = {
        "before any block": (agreement[0, measured], "The lens on the embedding alone, on the same tokens."),
        "the commonest prediction": (
            commonest[measured],
            "Always the token that the model predicts most often on the other half of the texts.",
        ),
    }
    test, unit = context.seed_for("test"), "share of tokens"
    return context.claim(
        "formed",
        f"After block {at - 1} of {len(reading.sites) - 1}, counted from 0, the stream already decodes to the final "
        f"prediction for {percent(float(mine.mean()))} of tokens.",
        estimate=bootstrap_interval(mine, seed=seed, unit=unit),
        controls=[
            Control(name=name, estimate=bootstrap_interval(values, seed=seed, unit=unit), description=description)
            for name, (values, description) in baselines.items()
        ],
        p_value=max(sign_flip_test(mine - values, seed=test) for values, _ in baselines.values()),
        test="the larger p of two paired sign-flip tests over texts, against each control",
        sites=[reading.sites[at]], positions="all", figures=figures,
        chosen_on=DataNote(name=f"{source}, half A", n=len(chosen)),
        measured_on=DataNote(name=f"{source}, half B", n=len(measured)),
    )  # fmt: skip


def _commonest(reading: LensReading, prompt: np.ndarray, chosen: np.ndarray) -> Float[np.ndarray, " sample"]:
    """Whether the final prediction is the one that is commonest on the chosen texts."""
    final = reading.top[-1].numpy()
    tokens, counts = np.unique(final[np.isin(prompt, chosen)], return_counts=True)
    return (final == tokens[counts.argmax()]).astype(float)


def _figure(context: Context, name: str, values: np.ndarray, reading: LensReading, title: str, axis: str) -> FigureRef:
    mean, low, high = bands(context, values, name)
    return context.figure(
        name,
        curve(
            {"logit lens": mean}, low={"logit lens": low}, high={"logit lens": high}, title=title,
            caption="Mean over texts with bootstrap band; 'in' is the stream before any block.",
            x_axis="after layer", y_axis=axis, ticks=_depth(reading),
        ),
    )  # fmt: skip


def run_tuned_lens(context: Context) -> Iterator[Finding]:
    """Train the translators on some texts, compare both lenses on others."""
    claim = "A tuned lens reads the final prediction from the stream nearer than the plain logit lens does."
    yield attempt(context, "gain", claim, lambda: _gain(context))


def _gain(context: Context) -> Finding:
    options, subject = context.options, context.subject
    texts, source = texts_for(context, options.training_texts + options.texts)
    held, training = texts[: options.texts], texts[options.texts :]
    lens = train_tuned_lens(subject, training, held, steps=options.steps, learning_rate=options.learning_rate)
    plain, tuned = logit_lens(subject, held, at=None), logit_lens(subject, held, at=None, lens=lens)
    prompt, n = plain.prompt.numpy(), len(held)
    before = by_prompt(plain.kl.double().numpy(), prompt, n)
    after = by_prompt(tuned.kl.double().numpy(), prompt, n)
    blind = average_kl(subject, training, held)
    series = {"logit lens": bands(context, before, "before"), "tuned lens": bands(context, after, "after")}
    figure = context.figure(
        "kl",
        curve(
            {k: v[0] for k, v in series.items()}, low={k: v[1] for k, v in series.items()},
            high={k: v[2] for k, v in series.items()}, title="What a trained affine translator adds to the logit lens",
            caption="Mean over held-out texts with bootstrap bands.", x_axis="after layer",
            y_axis="KL(final || lens), nats", ticks=_depth(plain),
            references={"average prediction": float(blind.mean())},
        ),
    )  # fmt: skip
    # the distance is the claim's number, and both lenses' and the blind one's lie on its scale
    lenses = {
        "logit lens": (before[:-1].mean(0), "The plain lens, on the same texts and layers."),
        "average prediction": (
            blind,
            "The model's mean distribution over the training texts, whatever the text: what a translator can learn "
            "without reading the stream.",
        ),
    }
    mine, unit = after[:-1].mean(0), "nats of KL, mean over layers"
    seed, test = context.seed_for("interval"), context.seed_for("test")
    return context.claim(
        "gain",
        f"A tuned lens reads the final prediction nearer than the plain logit lens does: {mine.mean():.2f} nats from "
        f"it instead of {lenses['logit lens'][0].mean():.2f}, mean over layers.",
        estimate=bootstrap_interval(mine, seed=seed, unit=unit),
        controls=[
            Control(name=name, estimate=bootstrap_interval(values, seed=seed, unit=unit), description=description)
            for name, (values, description) in lenses.items()
        ],
        p_value=max(sign_flip_test(values - mine, seed=test) for values, _ in lenses.values()),
        test="the larger p of two paired sign-flip tests over held-out texts, against each control",
        sites=lens.sites, positions="all", figures=[figure],
        chosen_on=DataNote(name=f"{source}, training", n=len(training)),
        measured_on=DataNote(name=f"{source}, held out", n=n),
    )  # fmt: skip


@torch.no_grad()
def average_kl(
    subject: Any, training: list[tuple[int, ...]], held: list[tuple[int, ...]]
) -> Float[np.ndarray, " text"]:
    """KL in nats from the model's mean distribution over all tokens of some texts to its own on others, per text."""
    total, count = None, 0
    for activations in subject.stream(training, "logits"):
        said = activations["logits"][activations.batch.mask.to(activations["logits"].device)].float().softmax(-1)
        total = said.sum(0) if total is None else total + said.sum(0)
        count += len(said)
    if total is None:
        return np.zeros(len(held))
    average = (total / count).clamp(min=1e-30).log()
    out = []
    for activations in subject.stream(held, "logits"):
        final, mask = activations["logits"].float().log_softmax(-1), activations.batch.mask.to(average.device)
        kl = (final.exp() * (final - average)).sum(-1)
        out.append(((kl * mask).sum(1) / mask.sum(1)).double().cpu())
    return torch.cat(out).numpy()


LOGIT_LENS = Exam(
    name="observe.logit_lens",
    title="Where the prediction forms",
    question="At which depth can the final prediction already be read from the residual stream?",
    run=run_logit_lens,
    rule=Rule(direction="greater", minimum=0.1),
    options=LensOptions,
    presets={"quick": {"texts": 32}, "deep": {"texts": 256, "length": 64}},
    applies=speaks,
    method=(
        "Texts are sampled from the model itself (or taken from a corpus). After each block the stream is passed "
        "through the model's own final norm and unembedding (nostalgebraist 2020) and compared with the final "
        "distribution at every token."
    ),
)

TUNED_LENS = Exam(
    name="observe.tuned_lens",
    title="What the logit lens misses",
    question="How much of the final prediction do early layers hold in another basis?",
    run=run_tuned_lens,
    rule=Rule(direction="less", minimum=0.02),
    options=TunedOptions,
    presets={"quick": {"steps": 20, "training_texts": 64, "texts": 32}, "deep": {"steps": 500, "training_texts": 1024}},
    applies=speaks,
    method=(
        "An affine translator per layer, started at the identity, is trained to bring the lens's distribution to the "
        "final one (Belrose et al. 2023), on texts that the model wrote (or a corpus); both lenses are then compared "
        "on held-out texts."
    ),
    cost=4.0,
)
