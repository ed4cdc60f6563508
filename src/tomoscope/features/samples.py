"""Activations of a text as samples: one row a token, with where it stands, in bounded memory.

What every measure of a dictionary reads: `samples` runs the model over prompts (texts, or rows of token ids) and gives
what some sites hold at each token, flattened to vectors, with the prompt, the position and the token. `decoded` decodes
codes that are not zero without ever making the dense ones.

How it can mislead: the first token of a text has an activation unlike all others in most models (an attention sink);
dictionaries are often trained without it, and then `skip_first` leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tomoscope.errors import DataError
from tomoscope.features.coder import Codes, SparseCoder
from tomoscope.model import Subject


@dataclass(frozen=True, eq=False)
class Samples:
    """Some tokens and what sites hold at them.

    Attributes:
        values: site -> [sample, width]; heads are laid side by side.
        prompt: [sample], which prompt, counted over the whole stream.
        position: [sample], from the prompt's first token.
        token: [sample], token ids.
    """

    values: Mapping[str, Float[Tensor, "sample width"]]
    prompt: Int[Tensor, " sample"]
    position: Int[Tensor, " sample"]
    token: Int[Tensor, " sample"]

    def __len__(self) -> int:
        return len(self.prompt)


def sites_of(coder: SparseCoder, reads: str = "", writes: str = "") -> tuple[str, str]:
    """The sites that a dictionary reads and writes: as said here, or as it says itself.

    Raises:
        DataError: neither says.
    """
    reads = reads or coder.reads
    writes = writes or coder.writes or reads
    if not reads:
        raise DataError(
            f"{coder!r} does not say which site it reads.", remedy='Name it, for example "layer.3.resid_post".'
        )
    return reads, writes


def samples(
    subject: Subject, prompts: Iterable, *sites: str, skip_first: bool = False, batch_size: int | None = None
) -> Iterator[Samples]:
    """What sites hold at every token of some prompts, piece by piece in their order.

    Args:
        subject: the model.
        prompts: texts, rows of token ids, or labelled prompts; may be a generator.
        sites: names of single sites with a position axis.
        skip_first: leave each prompt's first token out.
        batch_size: prompts at once; by the memory where not given.
    """
    done = 0
    for acts in subject.stream(prompts, *sites, batch_size=batch_size):
        mask = acts.mask.clone()
        row, column = mask.nonzero(as_tuple=True)
        position = column - acts.batch.pads.to(column.device)[row]
        if skip_first:
            keep = position > 0
            row, column, position = row[keep], column[keep], position[keep]
        assert acts.batch.input_ids is not None
        ids = acts.batch.input_ids.cpu()
        rows, columns = row.cpu(), column.cpu()
        values = {name: value[rows, columns].flatten(1).float() for name, value in acts.items()}
        yield Samples(values, rows + done, position.cpu(), ids[rows, columns])
        done += len(acts.batch)


def decoded(
    coder: SparseCoder, codes: Codes, x: Float[Tensor, "sample d_in"] | None = None
) -> Float[Tensor, "sample d_out"]:
    """The reconstruction from codes that are not zero: rows of the decoder, gathered and summed."""
    counts = torch.bincount(codes.sample, minlength=codes.n_samples)
    starts = counts.cumsum(0) - counts
    rows = coder.W_dec if coder.W_dec.dtype == codes.value.dtype else coder.W_dec.to(codes.value.dtype)
    out = functional.embedding_bag(codes.feature, rows.contiguous(), starts, mode="sum", per_sample_weights=codes.value)
    out = out + coder.b_dec.to(out)
    if coder.W_skip is None:
        return out
    if x is None:
        raise DataError("This dictionary has a skip path, so decoding needs what was encoded.")
    return out + x @ coder.W_skip.to(x).T
