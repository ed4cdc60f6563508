"""What several exams share: the field's tasks for a subject, whether it does them, and text that the subject itself
writes.

A task on which the model is not above chance says nothing about the model's inside: exams of such a task are "not
measured: the model does not do it", with the accuracy. Text for exams that need no answer (lenses, attention) is
sampled from the model: it is on its own distribution, for any language or vocabulary, and needs no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from tomoscope.circuits import LogitDifference, Metric, Pairs, Probability, encode_pairs
from tomoscope.data import TASKS, PairSet, TaskSpec
from tomoscope.errors import AlignmentError, DataError, PromptError, TokenizerError
from tomoscope.exams.exam import Context
from tomoscope.findings.finding import DataNote, Estimate
from tomoscope.findings.statistics import wilson_interval

STANDARD_TASKS = ("ioi", "induction", "agreement", "gendered_pronoun", "greater_than", "docstring", "facts", "colours")
CHANCE = 0.5


@dataclass(frozen=True)
class Ready:
    """A task made for a subject, and how the subject does.

    Attributes:
        spec: the task.
        raw: its pairs as text.
        pairs: its pairs as batches.
        scores: [pair] metric of the clean prompts.
        corrupted: [pair] of the corrupted ones.
        shuffled: [pair] metric of the clean prompts with another pair's answers.
    """

    spec: TaskSpec
    raw: PairSet
    pairs: Pairs
    metric: Metric
    scores: np.ndarray
    corrupted: np.ndarray
    shuffled: np.ndarray

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of the prompts on which the right answer is preferred to the wrong one."""
        return wilson_interval(int((self.scores > 0).sum()), len(self.scores), unit="share of prompts")

    @cached_property
    def p_value(self) -> float:
        """Of an accuracy above one half, by the binomial test."""
        return float(binomtest(int((self.scores > 0).sum()), len(self.scores), CHANCE, alternative="greater").pvalue)

    @property
    def done(self) -> bool:
        """Whether the subject is above chance."""
        return self.accuracy.low is not None and self.accuracy.low > CHANCE

    @property
    def why_not(self) -> str:
        """The reason that exams of this task give where the subject does not do it."""
        return "" if self.done else f"the model does not do this task: it is right on {self.accuracy} (chance is 0.5)"

    @property
    def clusters(self) -> list[str]:
        """One key a pair: pairs with one clean text are one observation."""
        return [pair.clean.text for pair in self.raw]

    def note(self, part: str = "", rows: Sequence[int] | np.ndarray | None = None) -> DataNote:
        """The data, for a record."""
        n = len(self.raw) if rows is None else len(rows)
        name = f"{self.spec.name}{', ' + part if part else ''}"
        description = f"{self.spec.description} Corruption: {self.raw.corruption}; seed {self.raw.seed}."
        return DataNote(name=name, n=n, description=description, hash=self.raw.digest())


def ready(context: Context, name: str, n: int) -> Ready | str:
    """A task for the subject, scored; or why it can't be made for it (no tokenizer, too few single-token names)."""
    subject, spec = context.subject, TASKS[name]
    try:
        raw = spec.make(subject.tokenizer, n, seed=context.scan_seed)
        pairs = encode_pairs(subject, raw)
    except (DataError, AlignmentError, PromptError, TokenizerError) as error:
        return error.what
    answers, wrong = pairs.answers, pairs.wrong
    metric: Metric = LogitDifference(answers, wrong)
    if spec.metric == "probability_difference":
        metric = Probability(answers, wrong, name="probability difference")
    clean = subject.last_logits(pairs.clean)
    corrupted = subject.last_logits(pairs.corrupted)
    order = torch.from_numpy(_derangement(context.rng(f"{name} shuffled answers"), raw))
    rows = torch.arange(len(raw))

    def score(logits: torch.Tensor, of: torch.Tensor) -> np.ndarray:
        return metric(logits if metric.tokens is None else logits[:, metric.tokens.to(logits.device)], of).cpu().numpy()

    return Ready(spec, raw, pairs, metric, score(clean, rows), score(corrupted, rows), score(clean, order))


def _derangement(generator: np.random.Generator, raw: PairSet) -> np.ndarray:
    """Another pair for each pair, with another answer wherever there is one."""
    order = generator.permutation(len(raw))
    for i in range(len(raw)):
        options = [j for j in range(len(raw)) if raw[j].answers != raw[i].answers]
        if options and raw[int(order[i])].answers == raw[i].answers:
            order[i] = options[int(generator.integers(len(options)))]
    return order


def own_text(subject: Any, *, n: int, length: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids that the subject itself writes at temperature 1, each from the start-of-text token (or a random token).

    Returns:
        n prompts of `length` tokens or fewer where the context is shorter.
    """
    from tomoscope.model.generation import generate_tokens

    start = next(
        (
            token
            for holder in (subject.tokenizer, subject.config)
            for token in (getattr(holder, "bos_token_id", None),)
            if isinstance(token, int)
        ),
        None,
    )
    vocab = subject.facts.d_vocab or 2
    generator = np.random.default_rng(seed)
    first = np.full(n, start) if start is not None and start < vocab else generator.integers(0, vocab, n)
    length = min(length, subject.facts.context or length)
    made = generate_tokens(subject, [[int(t)] for t in first], max_new_tokens=length - 1, temperature=1.0, seed=seed)
    prompts = [(int(t), *row) for t, row in zip(first, made, strict=True)]
    kept = [row for row in prompts if len(row) >= 4]
    if len(kept) < 4:
        raise DataError(
            f"The model wrote only {len(kept)} texts of 4 tokens or more out of {n}.", remedy="Give a text."
        )
    return kept


def speaks(subject: Any) -> str:
    """Why an exam of a language model does not apply; "" where it does."""
    facts = subject.facts
    if facts.kind != "decoder" or not facts.n_layers:
        return f"the model is no decoder over tokens (it is of kind {facts.kind!r})"
    return ""


def speaks_text(subject: Any) -> str:
    """Why an exam that needs text does not apply."""
    return speaks(subject) or (
        "the model was opened without a tokenizer" if getattr(subject, "tokenizer", None) is None else ""
    )


def words(subject: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as text, for figures."""
    if subject.tokenizer is None:
        return [str(i) for i in ids]
    return [subject.tokenizer.decode([int(i)]) for i in ids]
