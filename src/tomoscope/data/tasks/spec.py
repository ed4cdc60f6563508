"""What a task is, for the registry: its generator, its metric and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from tomoscope.data.pairs import PairSet

Metric = Literal["logit_difference", "probability_difference"]


@runtime_checkable
class Make(Protocol):
    """A task's generator: `make(tokenizer, n, seed=..., corruption=...)`, with further options of its own."""

    def __call__(self, tokenizer: Any, n: int, *, seed: int = 0, corruption: str = ...) -> PairSet:
        """Make `n` pairs for this tokenizer."""
        ...


@dataclass(frozen=True)
class TaskSpec:
    """One task of the registry.

    `metric` is how its answers are scored: "logit_difference" (answer less foil) or "probability_difference" (the sum
    over all right answers less the sum over the wrong ones). `corruptions` are the names that `make` takes, the
    default first; `flips` are those after which the wrong answer becomes the right one.
    """

    name: str
    make: Make
    metric: Metric
    description: str
    source: str
    corruptions: tuple[str, ...]
    flips: tuple[str, ...] = ()
    spans: tuple[str, ...] = ()
