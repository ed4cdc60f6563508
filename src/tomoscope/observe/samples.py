"""Positions of padded batches as one flat axis of samples, so that padding never enters a mean.

A sample is one (prompt, position): with `at="last"` one per prompt, with `at=None` every token. Used by every method
here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tomoscope.errors import DataError

At = int | str | Sequence[int | str] | None


@dataclass(frozen=True)
class Samples:
    """One batch's samples.

    Attributes:
        prompt: [sample], index of the prompt in the whole data set.
        position: [sample], counted from the prompt's first token.
        take: from a site's value as it was read ([batch, ...] or [batch, position, ...]) to [sample, ...].
    """

    prompt: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]
    take: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.prompt)


def samples_of(batch: Any, at: At, *, offset: int = 0) -> Samples:
    """The samples of one batch that was read with `at`; `offset` is the number of prompts in the batches before it."""
    columns, single = batch.columns(at)
    pads = batch.pads.cpu()
    if columns is None:
        rows, where = batch.mask.cpu().nonzero(as_tuple=True)
        return Samples(rows + offset, where - pads[rows], lambda value: value[rows, where])
    columns = columns.cpu()
    rows = torch.arange(len(columns)).repeat_interleave(columns.shape[1])
    where = columns.reshape(-1)

    def take(value: Tensor) -> Tensor:
        return value if single else value.flatten(0, 1)

    return Samples(rows + offset, where - pads[rows], take)


def stream_samples(subject: Any, prompts: Any, *sites: str, at: At) -> Iterator[tuple[Any, Samples]]:
    """Stream activations with their samples, prompts numbered in the order given."""
    seen = 0
    for activations in subject.stream(prompts, *sites, at=at):
        yield activations, samples_of(activations.batch, at, offset=seen)
        seen += len(activations.batch)


def token_ids(tokens: Any, count: int, *, what: str, vocab: int | None) -> Int[Tensor, " prompt"]:
    """Check one token id per prompt.

    Raises:
        DataError: another number of ids than prompts, or an id outside the vocabulary.
    """
    ids = torch.as_tensor(tokens, dtype=torch.long).reshape(-1).cpu()
    if len(ids) != count:
        raise DataError(f"{len(ids)} {what} for {count} prompts.", remedy="Give one token id per prompt.")
    outside = ids[(ids < 0) | (ids >= (vocab if vocab is not None else torch.iinfo(torch.long).max))]
    if len(outside):
        raise DataError(
            f"Token id {int(outside[0])} among the {what} is outside the vocabulary of {vocab}.",
            remedy="Encode the answers with the model's own tokenizer.",
        )
    return ids
