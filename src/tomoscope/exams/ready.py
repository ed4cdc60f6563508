"""The field's tasks, made for a subject and scored once a scan: does the subject do them at all?

A task that the subject does not do says nothing about its inside: exams of such a task are "not measured: the model
does not do this task", with the numbers. A task counts as done where the right answer beats every wrong one clearly
more often than by chance (binomial test), and scores higher than another prompt's answers do, and than the same
answers do after the corrupted prompt (paired sign-flip tests over clusters): a model that prefers some words whatever
it reads passes none of them.

How it can mislead: prompts about one subject (a country, a name, a noun) are not independent, so they are one cluster,
and accuracy counts as many observations as there are clusters. Being right on generated prompts is not being right on
people's text.

Steps: make the pairs, run both prompts, score them, keep the result in the scan's shared state under task and number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import field_validator
from scipy.stats import binomtest
from torch import Tensor

from tomoscope.circuits import LogitDifference, Metric, Pairs, Probability, encode_pairs
from tomoscope.data import TASKS, PairSet, TaskSpec
from tomoscope.errors import AlignmentError, DataError, PromptError, SiteError, TokenizerError
from tomoscope.exams.exam import Context, Options
from tomoscope.findings.control import stable_seed
from tomoscope.findings.finding import DataNote, Estimate, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import wilson_interval
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS

STANDARD_TASKS = ("ioi", "induction", "agreement", "gendered_pronoun", "greater_than", "docstring", "facts", "colours")
TITLES = {
    "ioi": "indirect object identification",
    "induction": "induction on word lists",
    "agreement": "subject-verb agreement",
    "gendered_pronoun": "gendered pronouns",
    "greater_than": "greater-than on years",
    "docstring": "docstring arguments",
    "facts": "capitals of countries",
    "colours": "colours of things",
    "world_facts": "facts of the micro-world's people",
    "world_two_hop": "facts of the micro-world two hops deep",
    "world_claims": "true and false claims about the micro-world",
    "world_speakers": "honest and lying speakers",
    "world_opinions": "the truth against a user's opinion",
}
STAYS_RIGHT = ("greater_than", "world_opinions")
"""Tasks whose answers are right after the corrupted prompt too, so that it is no control for being right."""
CORRUPTIONS = {"ioi": "flip"}
"""Where a task's default is not what exams use: three other names (abc) would let a patch carry the names themselves
in, and a name alone moves the score by twice the gap; the flip changes the second subject only, and what it decides."""
GATE = 256
"""Pairs on which it is judged whether a subject does a task, whatever number an exam then uses. Half of greater-than's
prompts say nothing (the answers of a later start are right after an earlier one too), so that 128 are too few to tell a
model that compares weakly from one that prefers late years."""
FEWEST = 16
GATE_ALPHA = 0.001
"""Stricter than a claim's level: of eight tasks, an untrained model passes one in less than 1 % of scans."""
UNABLE = (SiteError, DataError, AlignmentError, PromptError, TokenizerError)
"""What a method raises where a model or a tokenizer can't give what it needs: a reason, not a failure."""


class TaskOptions(Options):
    """The base of options that name tasks."""

    @field_validator("tasks", check_fields=False)
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in TASKS and name not in WORLD_TASKS]
        if unknown or not names or len(set(names)) < len(names):
            raise ValueError(f"each once, of {', '.join((*TASKS, *WORLD_TASKS))}")
        return names


def title(name: str) -> str:
    """The task's name in a sentence."""
    return TITLES.get(name, name.replace("_", " "))


def heading(name: str) -> str:
    """The task's name at the head of a picture's title."""
    said = title(name)
    return said[:1].upper() + said[1:]


def percent(share: float) -> str:
    """A share in words: "56 %"; one decimal below 10 %."""
    rounded = f"{100 * share:.1f}" if abs(share) < 0.0995 else f"{100 * share:.0f}"
    return f"{rounded.replace('-', '−')} %"


@dataclass(frozen=True)
class Ready:
    """A task made for a subject, and how the subject does.

    Attributes:
        spec: the task.
        raw: its pairs as text.
        pairs: its pairs as batches.
        metric: the task's score of a row.
        scores: [pair] metric of the clean prompts.
        corrupted: [pair] of the corrupted ones, with the same answers.
        right: [pair], whether the right answer beats every wrong one after the clean prompt.
        right_corrupted: [pair], likewise after the corrupted prompt.
        shuffled: [pair] metric of the clean prompts with another pair's answers.
        right_shuffled: [pair], likewise after the clean prompt with another pair's answers.
        chance: share of right guesses among a prompt's candidates.
        other: [pair], another pair each, with another answer wherever there is one.
        whole: the set on which `accuracy` stands, where this is a part of it.
    """

    spec: TaskSpec
    raw: PairSet
    pairs: Pairs
    metric: Metric
    scores: Float[np.ndarray, " pair"]
    corrupted: Float[np.ndarray, " pair"]
    right: Bool[np.ndarray, " pair"]
    right_corrupted: Bool[np.ndarray, " pair"]
    shuffled: Float[np.ndarray, " pair"]
    right_shuffled: Bool[np.ndarray, " pair"]
    chance: float
    other: Int[np.ndarray, " pair"]
    whole: Ready | None = field(default=None, repr=False)

    @cached_property
    def clusters(self) -> list[str]:
        """One key a pair; pairs about one subject (a country, a name, a noun) are one observation."""
        return [_cluster(self.spec.name, pair) for pair in self.raw]

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of the prompts on which the right answer beats every wrong one."""
        return self.share(self.right) if self.whole is None else self.whole.accuracy

    def share(self, hits: Bool[np.ndarray, " pair"]) -> Estimate:
        """A share of the prompts with Wilson's interval, for as many observations as there are clusters."""
        n, value = len(set(self.clusters)), float(hits.mean())
        low = wilson_interval(math.floor(value * n + 1e-9), n).low
        high = wilson_interval(math.ceil(value * n - 1e-9), n).high
        said = "Wilson interval" if n == len(hits) else f"Wilson interval, {len(hits)} prompts about {n} subjects"
        return Estimate(value=value, unit="share of prompts", low=low, high=high, n=n, method=said)

    @cached_property
    def p_value(self) -> float:
        """Of doing the task: the largest p of being right by chance, and of no higher score than each control's."""
        if self.whole is not None:
            return self.whole.p_value
        n = len(set(self.clusters))
        hits = math.floor(float(self.right.mean()) * n + 1e-9)
        guess = float(binomtest(hits, n, self.chance, alternative="greater").pvalue)
        seed, controls = stable_seed("paired", self.raw.digest()), [self.shuffled]
        controls += [self.corrupted] if self.comparable else []
        return max(guess, *(sign_flip_test(self.scores - c, seed=seed, clusters=self.clusters) for c in controls))

    @property
    def comparable(self) -> bool:
        """Whether the right answers are no longer right after the corrupted prompts."""
        return self.spec.name not in STAYS_RIGHT

    @property
    def done(self) -> bool:
        """Whether the subject does the task: well above chance, and because of what the prompt says."""
        low = self.accuracy.low
        return self.p_value < GATE_ALPHA and low is not None and low > self.chance

    @property
    def why_not(self) -> str:
        """The reason that exams of this task give where the subject does not do it."""
        if self.done:
            return ""
        share = percent(self.accuracy.value or 0.0)
        return (
            f"the model does not do this task: it is right on {share} of prompts (by chance {percent(self.chance)}; "
            f"p = {self.p_value:.2g} for doing better than every control, below {GATE_ALPHA:g} is asked for)"
        )

    def note(self, part: str = "", rows: Sequence[int] | np.ndarray | None = None) -> DataNote:
        """The data, for a record."""
        n = len(self.raw) if rows is None else len(rows)
        name = f"{self.spec.name}{', ' + part if part else ''}"
        description = f"{self.spec.description} Corruption: {self.raw.corruption}; seed {self.raw.seed}."
        return DataNote(name=name, n=n, description=description, hash=self.raw.digest())

    def subset(self, subject: Any, n: int) -> Ready:
        """The first n pairs; its accuracy stays that of the whole set."""
        if n >= len(self.raw):
            return self
        raw = self.raw[:n]
        pairs = encode_pairs(subject, raw)
        arrays = (self.scores, self.corrupted, self.right, self.right_corrupted, self.shuffled, self.right_shuffled)
        other = np.random.default_rng(stable_seed("other", raw.digest()))
        return Ready(
            self.spec, raw, pairs, metric_of(self.spec, pairs), *(array[:n] for array in arrays), self.chance,
            _derangement(other, raw), self,
        )  # fmt: skip


def ready(context: Context, name: str, n: int) -> Ready | str:
    """A task of n pairs for the subject, scored; or why it can't be made for it (too few single-token names).

    Made once a scan: the result depends on the subject, the scan's seed, the task and n alone.
    """
    key = ("task", name, n, context.scan_seed)
    if key not in context.shared:
        context.shared[key] = _made(context, name, n)
    return context.shared[key]


def most(context: Context, name: str, n: int) -> Ready | str:
    """A task of n pairs, or of half as many and so on, where a small vocabulary makes fewer different prompts."""
    made = ready(context, name, n)
    while isinstance(made, str) and n // 2 >= FEWEST:
        n //= 2
        smaller = ready(context, name, n)
        made = made if isinstance(smaller, str) else smaller
    return made


def able(context: Context, name: str, n: int) -> Ready | str:
    """The first n pairs of a task that the subject does, or why there are none: judged on `GATE` pairs or more."""
    key = ("able", name, n, context.scan_seed)
    if key not in context.shared:
        whole = most(context, name, max(n, GATE))
        if isinstance(whole, str) or len(whole.raw) < n:
            whole = ready(context, name, n)
        part = whole if isinstance(whole, str) else whole.why_not or whole.subset(context.subject, n)
        context.shared[key] = part
    return context.shared[key]


def attempt(context: Context, key: str, claim: str, make: Callable[[], Finding]) -> Finding:
    """The finding, or "not measured" with the reason where the model can't give what the method needs."""
    try:
        return make()
    except UNABLE as error:
        return context.not_measured(key, claim, error.what)


def _made(context: Context, name: str, n: int) -> Ready | str:
    subject, spec = context.subject, TASKS.get(name) or WORLD_TASKS[name]
    try:
        corruption = CORRUPTIONS.get(name, spec.corruptions[0])
        raw = spec.make(subject.tokenizer, n, seed=context.scan_seed, corruption=corruption)
        pairs = encode_pairs(subject, raw)
    except UNABLE as error:
        return error.what
    metric = metric_of(spec, pairs)
    clean, corrupted = subject.last_logits(pairs.clean).float(), subject.last_logits(pairs.corrupted).float()
    other = _derangement(np.random.default_rng(stable_seed("other", raw.digest())), raw)
    rows, swapped = torch.arange(len(raw)), torch.from_numpy(other)

    def score(logits: Tensor, of: Tensor) -> np.ndarray:
        shown = logits if metric.tokens is None else logits[:, metric.tokens.to(logits.device)]
        return metric(shown, of).double().cpu().numpy()

    def right(logits: Tensor, of: Tensor) -> np.ndarray:
        answers, wrong = pairs.answers[of], pairs.wrong[of]
        if spec.metric == "probability_difference":
            return (Probability(answers, wrong)(logits, rows) > 0).cpu().numpy()
        return (_best(logits, answers) > _best(logits, wrong)).cpu().numpy()

    counts = [(pairs_ >= 0).sum(1).double() for pairs_ in (pairs.answers, pairs.wrong)]
    chance = 0.5 if spec.metric == "probability_difference" else float((counts[0] / (counts[0] + counts[1])).mean())
    return Ready(
        spec, raw, pairs, metric, score(clean, rows), score(corrupted, rows), right(clean, rows),
        right(corrupted, rows), score(clean, swapped), right(clean, swapped), chance, other,
    )  # fmt: skip


def metric_of(spec: TaskSpec, pairs: Pairs) -> Metric:
    """The task's score of these pairs."""
    if spec.metric == "probability_difference":
        return Probability(pairs.answers, pairs.wrong, name="probability difference")
    return LogitDifference(pairs.answers, pairs.wrong)


def _best(logits: Float[Tensor, "pair vocab"], ids: Int[Tensor, "pair answer"]) -> Float[Tensor, " pair"]:
    there = ids >= 0
    values = logits.cpu().gather(1, ids.clamp(min=0))
    return values.masked_fill(~there, -torch.inf).max(1).values


def _cluster(name: str, pair: Any) -> str:
    """What a pair is about: the same country, name or noun (in either number) is one."""
    if name == "facts" or name in WORLD_TASKS:
        return pair.labels.get("subject", pair.clean.text)
    label = {"gendered_pronoun": "name", "agreement": "subject"}.get(name)
    if label is None or label not in pair.clean.spans:
        return pair.clean.text
    said = [prompt.text[slice(*prompt.spans[label])] for prompt in (pair.clean, pair.corrupted)]
    return said[0] if name == "gendered_pronoun" else " / ".join(sorted(said))


def _derangement(generator: np.random.Generator, raw: PairSet) -> np.ndarray:
    """Another pair for each pair, with another answer wherever there is one."""
    order = generator.permutation(len(raw))
    for i in range(len(raw)):
        if raw[int(order[i])].answers == raw[i].answers:
            options = [j for j in range(len(raw)) if raw[j].answers != raw[i].answers]
            if options:
                order[i] = options[int(generator.integers(len(options)))]
    return order
