"""Where in depth does the prediction form? The logit lens and the tuned lens, as claims."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import own_text, speaks
from tomoscope.findings.figures import curve
from tomoscope.findings.finding import Control, DataNote, Estimate, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.observe import LensReading, logit_lens, train_tuned_lens


class LensOptions(Options):
    """How much text the model writes for itself to be read."""

    texts: int = Field(64, ge=8, le=100_000, description="Texts sampled from the model.")
    length: int = Field(32, ge=8, le=4096, description="Tokens of each text.")


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
    return tuple(np.array([getattr(e, part) for e in made]) for part in ("value", "low", "high"))  # type: ignore[return-value]


def _depth(reading: LensReading) -> list[str]:
    return ["in", *(site.split(".")[1] for site in reading.sites[1:])]


def run_logit_lens(context: Context) -> Iterator[Finding]:
    """The first layer at which half of the final predictions are decodable, chosen on one half of the texts."""
    options = context.options
    prompts = own_text(context.subject, n=options.texts, length=options.length, seed=context.seed_for("text"))
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
    # the last site is the model's own output and agrees by construction, so it can't be the finding
    half = np.flatnonzero(means[:-1] >= 0.5)
    at = int(half[0]) if len(half) else len(means) - 2
    seed = context.seed_for("interval")
    start = Control(
        name="before any block", estimate=bootstrap_interval(agreement[0, measured], seed=seed),
        description="The lens on the embedding alone, on the same tokens.",
    )  # fmt: skip
    p = sign_flip_test(agreement[at, measured] - agreement[0, measured], seed=context.seed_for("test"))
    where = reading.sites[at]
    share = "half" if len(half) else "less than half"
    yield context.claim(
        "formed", f"By {where} the stream already decodes to the final prediction for {share} of the tokens.",
        estimate=bootstrap_interval(agreement[at, measured], seed=seed, unit="share of tokens"), controls=[start],
        p_value=p, test="paired sign-flip test over texts", sites=[where], positions="all", figures=figures,
        chosen_on=DataNote(name="the model's own text, half A", n=len(chosen)),
        measured_on=DataNote(name="the model's own text, half B", n=len(measured)),
    )  # fmt: skip


def _figure(context: Context, name: str, values: np.ndarray, reading: LensReading, title: str, axis: str):
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
    options, subject = context.options, context.subject
    texts = own_text(
        subject, n=options.training_texts + options.texts, length=options.length, seed=context.seed_for("text")
    )
    held, training = texts[: options.texts], texts[options.texts :]
    lens = train_tuned_lens(subject, training, held, steps=options.steps, learning_rate=options.learning_rate)
    plain, tuned = logit_lens(subject, held, at=None), logit_lens(subject, held, at=None, lens=lens)
    prompt, n = plain.prompt.numpy(), len(held)
    before = by_prompt(plain.kl.double().numpy(), prompt, n)
    after = by_prompt(tuned.kl.double().numpy(), prompt, n)
    series = {"logit lens": bands(context, before, "before"), "tuned lens": bands(context, after, "after")}
    figure = context.figure(
        "kl",
        curve(
            {k: v[0] for k, v in series.items()}, low={k: v[1] for k, v in series.items()},
            high={k: v[2] for k, v in series.items()}, title="What a trained affine translator adds to the logit lens",
            caption="Mean over held-out texts with bootstrap bands.", x_axis="after layer",
            y_axis="KL(final || lens), nats", ticks=_depth(plain),
        ),
    )  # fmt: skip
    gain = (before[:-1] - after[:-1]).mean(0)
    seed = context.seed_for("interval")
    control = Control(
        name="logit lens",
        estimate=Estimate.exact(0.0, unit="nats"),
        description="No translator: no gain by definition.",
    )
    yield context.claim(
        "gain", "Layers hold more of the final prediction than the plain logit lens shows: a tuned lens reads it nearer.",
        estimate=bootstrap_interval(gain, seed=seed, unit="nats of KL, mean over layers"), controls=[control],
        p_value=sign_flip_test(gain, seed=context.seed_for("test")), test="sign-flip test over held-out texts",
        sites=lens.sites, positions="all", figures=[figure],
        chosen_on=DataNote(name="the model's own text, training", n=len(training)),
        measured_on=DataNote(name="the model's own text, held out", n=n),
    )  # fmt: skip


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
        "Texts are sampled from the model itself. After each block the stream is passed through the model's own final "
        "norm "
        "and unembedding (nostalgebraist 2020) and compared with the final distribution at every token."
    ),
)

TUNED_LENS = Exam(
    name="observe.tuned_lens",
    title="What the logit lens misses",
    question="How much of the final prediction do early layers hold in another basis?",
    run=run_tuned_lens,
    rule=Rule(direction="greater", minimum=0.02),
    options=TunedOptions,
    presets={"quick": {"steps": 40, "training_texts": 96, "texts": 32}, "deep": {"steps": 500, "training_texts": 1024}},
    applies=speaks,
    method=(
        "An affine translator per layer, started at the identity, is trained to bring the lens's distribution to the "
        "final "
        "one (Belrose et al. 2023), on texts that the model wrote; both lenses are then compared on held-out texts."
    ),
    cost=4.0,
)
