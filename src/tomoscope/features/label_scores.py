"""Is a label right? Scores on contexts that it was not made from.

Paulo et al. 2024 (delphi, arXiv:2410.13928) and Bills et al. 2023 (simulation):

    detection     ROC area: does the label tell texts on which the feature fires from texts on which it does not?
    fuzzing       ROC area: does it tell the tokens on which it fires from as many others of the same texts?
    simulation    correlation of the activations that the label predicts, token by token, with the true ones
    intervention  rank correlation of how far the label applies to a text with how far the model's predictions of the
                  next token move (KL) when the feature is taken away there

100 texts on which the feature fires, spread over the deciles of its activation, and 100 on which it is silent. Beside
every score stand the same for the labels of other features (shuffled labels), the entropy of the tokens it fires on and
the share of the commonest one: features of a random model score as well as those of a trained one where they are of
single tokens (arXiv:2501.17727).

How it can mislead: where 99 % of texts are silent a ROC area of 0.9 still means many false alarms; simulation needs
predictions a token, which a yes-or-no judge does not give (then: not measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float

from tomoscope.features.book import Context
from tomoscope.features.coder import SparseCoder
from tomoscope.features.edits import without_features
from tomoscope.features.label_models import DETECT, FUZZ, LanguageModel, marked, read_yes
from tomoscope.features.label_rules import Rule, Say
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.roc import roc_interval
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.model import Subject

LEAST = 8
"""Texts of each sort below which nothing is scored."""


@dataclass(frozen=True, eq=False)
class Label:
    """What a feature is called.

    Attributes:
        text: in words; "" where nothing could be said.
        rule: the rule it says, where it is one.
    """

    text: str
    rule: Rule | None = None


class Judge(Protocol):
    """Says how far a label applies."""

    def applies(self, label: Label, contexts: Sequence[Context]) -> Float[np.ndarray, " context"]:
        """How far the label applies to each text, any scale."""
        ...

    def fits(
        self, label: Label, contexts: Sequence[Context], masks: Sequence[Bool[np.ndarray, " token"]]
    ) -> Float[np.ndarray, " context"]:
        """How far it fits the marked tokens of each text."""
        ...

    def predicts(self, label: Label, contexts: Sequence[Context]) -> list[np.ndarray] | None:
        """The activation at each token; None where the judge can't say."""
        ...


class RuleJudge:
    """Judges a label by its rule alone: the same answer every time, at no cost."""

    def applies(self, label: Label, contexts: Sequence[Context]) -> np.ndarray:
        """The largest expected activation of each text."""
        return np.array([label.rule(context).max(initial=0.0) if label.rule else 0.0 for context in contexts])

    def fits(self, label: Label, contexts: Sequence[Context], masks: Sequence[np.ndarray]) -> np.ndarray:
        """Expected activation on the marked tokens less that on the others."""
        out = []
        for context, mask in zip(contexts, masks, strict=True):
            expected = label.rule(context) if label.rule else np.zeros(len(context.tokens))
            rest = expected[~mask].mean() if (~mask).any() else 0.0
            out.append(float(expected[mask].mean() - rest) if mask.any() else 0.0)
        return np.array(out)

    def predicts(self, label: Label, contexts: Sequence[Context]) -> list[np.ndarray] | None:
        """The rule's own predictions."""
        return [label.rule(context) for context in contexts] if label.rule else None


@dataclass(frozen=True, eq=False)
class ModelJudge:
    """Asks a language model, yes or no.

    Attributes:
        model: which.
        say: from a token id to its text.
    """

    model: LanguageModel
    say: Say

    def applies(self, label: Label, contexts: Sequence[Context]) -> np.ndarray:
        """1 for yes."""
        prompts = [DETECT.format(label=label.text, text=marked(context, self.say)) for context in contexts]
        return read_yes(self.model.ask(prompts, max_tokens=4))

    def fits(self, label: Label, contexts: Sequence[Context], masks: Sequence[np.ndarray]) -> np.ndarray:
        """1 for yes."""
        prompts = [
            FUZZ.format(label=label.text, text=marked(context, self.say, mask))
            for context, mask in zip(contexts, masks, strict=True)
        ]
        return read_yes(self.model.ask(prompts, max_tokens=4))

    def predicts(self, label: Label, contexts: Sequence[Context]) -> list[np.ndarray] | None:
        """Not from a judge that says yes or no."""
        return None


def detection(judge: Judge, label: Label, fire: Sequence[Context], still: Sequence[Context]) -> Estimate:
    """See the module."""
    return roc_interval(judge.applies(label, fire), judge.applies(label, still))


def fuzz_masks(
    fire: Sequence[Context], *, seed: int
) -> tuple[list[Context], list[np.ndarray], list[Context], list[np.ndarray]]:
    """Texts with the true tokens marked, and the same texts with as many others marked.

    Texts in which half or more of the tokens fire are left out: there are not as many others.
    """
    rng = np.random.default_rng(seed)
    texts, true, false = [], [], []
    for context in fire:
        mask = context.values > 0
        others = np.flatnonzero(~mask)
        if 0 < mask.sum() <= len(others):
            wrong = np.zeros_like(mask)
            wrong[rng.permutation(others)[: int(mask.sum())]] = True
            texts.append(context)
            true.append(mask)
            false.append(wrong)
    return texts, true, texts, false


def fuzzing(judge: Judge, label: Label, fire: Sequence[Context], *, seed: int) -> Estimate:
    """See the module."""
    right, true, wrong, false = fuzz_masks(fire, seed=seed)
    if len(right) < LEAST:
        return Estimate.unknown("it fires on most tokens of its texts, so there are no others to mark")
    keys = [str(context.row) for context in right]
    return roc_interval(
        judge.fits(label, right, true), judge.fits(label, wrong, false), positive_clusters=keys, negative_clusters=keys
    )


def simulation(judge: Judge, label: Label, contexts: Sequence[Context], *, seed: int) -> Estimate:
    """Pearson's correlation over all tokens, with an interval over texts."""
    predicted = judge.predicts(label, contexts)
    if predicted is None:
        return Estimate.unknown("this judge predicts no activations")
    x, y = np.concatenate(predicted), np.concatenate([context.values for context in contexts]).astype(float)
    if x.std() == 0 or y.std() == 0:
        return Estimate.unknown("the label predicts the same activation everywhere")
    lengths = np.array([len(one) for one in predicted])
    owner = np.repeat(np.arange(len(lengths)), lengths)
    # the correlation is the mean of these products; texts are the clusters
    products = (x - x.mean()) / x.std() * (y - y.mean()) / y.std()
    found = bootstrap_interval(products, seed=seed, clusters=owner.tolist(), n_resamples=1000)
    return found.model_copy(update={"unit": "correlation"})


def intervention(
    judge: Judge,
    label: Label,
    contexts: Sequence[Context],
    subject: Subject,
    coder: SparseCoder,
    latent: int,
    *,
    site: str,
    seed: int,
) -> Estimate:
    """See the module; the effect is the largest KL over a text's tokens."""
    effects = feature_effect(subject, coder, latent, contexts, site=site)
    applies = judge.applies(label, contexts)
    if np.ptp(effects) == 0 or np.ptp(applies) == 0:
        what = (
            "taking the feature away changes nothing" if np.ptp(effects) == 0 else "the label applies everywhere alike"
        )
        return Estimate.unknown(what)
    from scipy.stats import rankdata

    a, b = rankdata(effects), rankdata(applies)
    products = (a - a.mean()) / a.std() * (b - b.mean()) / b.std()
    return bootstrap_interval(products, seed=seed, n_resamples=1000, unit="rank correlation")


@torch.no_grad()
def feature_effect(
    subject: Subject, coder: SparseCoder, latent: int, contexts: Sequence[Context], *, site: str, rows: int = 32
) -> Float[np.ndarray, " context"]:
    """The largest KL over each window's tokens from the model to the model without one feature."""
    out = []
    for start in range(0, len(contexts), rows):
        batch = subject.tokens([context.tokens.tolist() for context in contexts[start : start + rows]])
        clean = subject.run(batch).logits.float().log_softmax(-1)
        other = subject.run(batch, edits=[without_features(site, coder, [latent])]).logits.float().log_softmax(-1)
        divergence = (clean.exp() * (clean - other)).sum(-1).cpu() * batch.mask.cpu()
        out.append(divergence.amax(-1).double().numpy())
    return np.maximum(np.concatenate(out), 0.0)
