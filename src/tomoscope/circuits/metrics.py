"""What a patch is judged by: one number a row, from the logits at the prompt's last token.

A metric is a value made for some pairs; it is called with logits [row, vocab] and which pair each row belongs to. A
metric that needs only some tokens' logits says so (`tokens`), and the engines then compute no others.

How it can mislead: a probability saturates (a patch that moves a logit from 9 to 5 may not show), a logit difference
can rise because the wrong answer falls; KL says how much changed, not what. Zhang & Nanda 2024 (arXiv:2309.16042)
compare them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError
from tomoscope.model import Edit, Encoded, Subject


@runtime_checkable
class Metric(Protocol):
    """A number a row from the logits at the last token."""

    @property
    def name(self) -> str:
        """As in reports: "logit difference"."""
        ...

    @property
    def tokens(self) -> Int[Tensor, " token"] | None:
        """The tokens whose logits are needed, sorted; None for all."""
        ...

    def __call__(self, logits: Float[Tensor, "row token"], rows: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The metric of each row; `logits` hold `tokens` (or the whole vocabulary), `rows` the index of each row's
        pair.
        """
        ...


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or float64 where they are, so that a softmax over them does not round."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _table(ids: Any, what: str) -> Tensor:
    table = torch.as_tensor(ids, dtype=torch.long)
    table = table[:, None] if table.dim() == 1 else table
    if table.dim() != 2 or bool((table < 0).all(dim=1).any()):
        raise DataError(f"{what} must be token ids [pair, answer] with at least one a pair.", remedy="Give answers.")
    return table


@dataclass(frozen=True, eq=False)
class LogitDifference:
    """Mean logit of the right answers less mean logit of the wrong ones.

    Args:
        answers: [pair, answer] token ids, -1 where a pair has fewer.
        wrong: [pair, answer] likewise.
    """

    answers: Any
    wrong: Any
    name: str = "logit difference"

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", _table(self.answers, "answers"))
        object.__setattr__(self, "wrong", _table(self.wrong, "wrong answers"))

    @property
    def tokens(self) -> Tensor:
        """The answers' tokens."""
        both = torch.cat([self.answers.flatten(), self.wrong.flatten()])
        return both[both >= 0].unique()

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """See `Metric`."""
        tokens = self.tokens if logits.shape[1] == len(self.tokens) else None
        return _mean(logits, self.answers[rows], tokens) - _mean(logits, self.wrong[rows], tokens)


def _mean(logits: Tensor, ids: Tensor, tokens: Tensor | None) -> Tensor:
    there = (ids >= 0).to(logits.device)
    columns = ids.clamp(min=0) if tokens is None else torch.searchsorted(tokens, ids.clamp(min=int(tokens[0])))
    values = logits.gather(1, columns.to(logits.device)) * there
    return values.sum(1) / there.sum(1)


@dataclass(frozen=True, eq=False)
class Probability:
    """Total probability of the right answers, less that of the wrong ones where `wrong` is given."""

    answers: Any
    wrong: Any = None
    name: str = "probability"
    tokens: None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", _table(self.answers, "answers"))
        if self.wrong is not None:
            object.__setattr__(self, "wrong", _table(self.wrong, "wrong answers"))

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """See `Metric`."""
        probabilities = wide(logits).softmax(-1)
        total = _sum(probabilities, self.answers[rows])
        return total if self.wrong is None else total - _sum(probabilities, self.wrong[rows])


def _sum(values: Tensor, ids: Tensor) -> Tensor:
    there = (ids >= 0).to(values.device)
    return (values.gather(1, ids.clamp(min=0).to(values.device)) * there).sum(1)


@dataclass(frozen=True, eq=False)
class KL:
    """KL divergence in nats from reference distributions, KL(reference || row): how much changed, whatever it is.

    Args:
        reference: [pair, vocab] logits.
    """

    reference: Tensor
    name: str = "KL divergence"
    tokens: None = None

    def __call__(self, logits: Tensor, rows: Tensor) -> Tensor:
        """See `Metric`."""
        wanted = wide(self.reference[rows.to(self.reference.device)].to(logits.device)).log_softmax(-1)
        return (wanted.exp() * (wanted - wide(logits).log_softmax(-1))).sum(-1)


def normalised(values: Tensor, *, clean: Tensor, corrupted: Tensor) -> Tensor:
    """Share of the clean-corrupted gap: 0 is the corrupted run, 1 the clean one.

    Means over pairs (the last axis) are taken before the ratio: a pair whose gap is nearly zero would otherwise
    dominate.
    """
    gap = clean.mean() - corrupted.mean()
    return (values.mean(-1) - corrupted.mean()) / gap


def answer_log_probabilities(
    subject: Subject, prompts: Sequence[Any], answers: Sequence[Sequence[int]], *, edits: Sequence[Edit] = ()
) -> Float[Tensor, " prompt"]:
    """Log-probability in nats of an answer of any number of tokens after each prompt (teacher forced).

    Args:
        subject: a decoder.
        prompts: as for `Subject.tokens`.
        answers: token ids, one sequence a prompt.
        edits: written in the same run; positions count within prompt and answer.
    """
    heads = subject.tokens(prompts).prompts
    if len(heads) != len(answers) or any(not len(answer) for answer in answers):
        raise DataError(
            f"There are {len(heads)} prompts and {len(answers)} answers; each needs one of a token or more."
        )
    joined = [Encoded((*p.ids, *map(int, a)), p.spans) for p, a in zip(heads, answers, strict=True)]
    run = subject.run(joined, edits=edits)
    scores = wide(run.logits).log_softmax(-1)
    out = []
    for row, answer in enumerate(answers):
        last = int(run.batch.last[row])
        places = torch.arange(last - len(answer), last)
        out.append(scores[row, places, torch.as_tensor(list(answer))].sum())
    return torch.stack(out).cpu()
