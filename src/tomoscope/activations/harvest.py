"""Activations of any sites of a model over a corpus, as a stream of rows that know which token they stand on.

    for slab in harvest(subject, corpus, ["layer.3.resid_post"], tokens=100_000):
        slab.values["layer.3.resid_post"]        [row, width]
        slab.text.ids[slab.places - slab.text.first]

The corpus is cut into windows of at most `window` tokens that never cross a document's end, so attention never does
either. Rows of padding are dropped. A row's *place* is the number of its token in the stream of all tokens that were
read, in reading order; from it come token id, document, position and neighbours. How it can mislead: the first token
of a text (attention rests there) has norms far above all others and is a feature by itself; `skip=1` leaves it out. A
window after a document's first sees none of what stood before it.

Steps: windows of token ids; chunks of windows of about `chunk` tokens (the unit of a job, and of resuming); each chunk
in batches of windows of like length; the values of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope import axes
from tomoscope.data.text import Corpus, Document
from tomoscope.errors import DataError, SiteError, TokenizerError
from tomoscope.model import Subject
from tomoscope.model.batch import Encoded
from tomoscope.model.sites import Site

Texts = Corpus | Iterable[str | Document | Sequence[int] | Tensor]
"""A corpus, or texts, or sequences of token ids."""
AT_A_TIME = 32
CHUNK = 65_536
"""Tokens of a chunk."""
WINDOW = 1_024
"""Tokens of a window at most, where the model's context allows it."""


@dataclass(frozen=True)
class Window:
    """Some consecutive tokens of one document; `start` is the position of the first."""

    ids: tuple[int, ...]
    document: int
    start: int


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of one chunk in reading order.

    Attributes:
        first: place of the first token.
        ids: [token].
        documents: [token], index of the document.
        positions: [token], in the document.
    """

    first: int
    ids: Int[Tensor, " token"]
    documents: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Chunk:
    """Windows that are harvested together: the unit of a job.

    Attributes:
        index: from 0.
        first: place of its first token.
        windows: in reading order.
    """

    index: int
    first: int
    windows: tuple[Window, ...] = field(repr=False)

    def text(self) -> Text:
        """Its tokens."""
        flat = [(token, w.document, w.start + i) for w in self.windows for i, token in enumerate(w.ids)]
        ids, documents, positions = torch.tensor(flat, dtype=torch.int64).reshape(-1, 3).unbind(1)
        return Text(self.first, ids.int(), documents.clone(), positions.int())


@dataclass(frozen=True, eq=False)
class Slab:
    """The activations of one chunk.

    Attributes:
        values: by site, [row, width], in the model's type; heads and their coordinates are one axis.
        places: [row], place of each row's token, rising.
        text: the chunk's tokens.
    """

    values: dict[str, Float[Tensor, "row width"]]
    places: Int[Tensor, " row"]
    text: Text

    def __len__(self) -> int:
        return len(self.places)


def windows(
    subject: Subject, texts: Texts, *, window: int | None = None, tokens: int | None = None
) -> Iterator[Window]:
    """Token ids of a corpus in windows, up to `tokens` tokens in all.

    Raises:
        DataError: a window under one token, or text that is none.
        TokenizerError: text for a model without a tokenizer.
    """
    length = window_length(subject, window)
    left = tokens
    for document, ids in _documents(subject, texts):
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            piece = piece if left is None else piece[:left]
            if left is not None:
                left -= len(piece)
            if piece:
                yield Window(tuple(piece), document, start)
            if left == 0:
                return


def window_length(subject: Subject, window: int | None) -> int:
    """Tokens of a window: what was asked for, or the smaller of the model's context and `WINDOW`."""
    context = subject.facts.context
    length = window or min(context or WINDOW, WINDOW)
    if length < 1 or (context and length > context):
        raise DataError(f"Windows of {length} tokens do not fit a context of {context}.", remedy="Give fewer tokens.")
    return length


def _documents(subject: Subject, texts: Texts) -> Iterator[tuple[int, list[int]]]:
    stream = iter(texts.documents() if isinstance(texts, Corpus) else texts)
    counted = 0
    while some := list(islice(stream, AT_A_TIME)):
        where = [item.index if isinstance(item, Document) else counted + i for i, item in enumerate(some)]
        counted += len(some)
        said = [item.text if isinstance(item, Document) else item for item in some]
        if all(isinstance(item, str) for item in said):
            if subject.tokenizer is None:
                raise TokenizerError("A corpus of texts needs a tokenizer, and the model was opened without one.")
            encoded = subject.tokenizer(said, verbose=False)["input_ids"]
        elif any(isinstance(item, str) for item in said):
            raise DataError("The corpus mixes texts and token ids.", remedy="Give one or the other.")
        else:
            encoded = [[int(token) for token in item] for item in said]
        yield from zip(where, encoded, strict=True)


def chunks(stream: Iterable[Window], *, chunk: int = CHUNK) -> Iterator[Chunk]:
    """Windows gathered until there are at least `chunk` tokens; the last may have fewer."""
    held: list[Window] = []
    index = first = count = 0
    for one in stream:
        held.append(one)
        count += len(one.ids)
        if count >= chunk:
            yield Chunk(index, first, tuple(held))
            index, first, count, held = index + 1, first + count, 0, []
    if held:
        yield Chunk(index, first, tuple(held))


def harvest_sites(subject: Subject, sites: Iterable[str | Site]) -> list[Site]:
    """Sites that have one value a token, in the order asked for.

    Raises:
        SiteError: the model reads no tokens, or a site has another shape (a pattern).
    """
    if subject.input_name != "input_ids":
        raise SiteError("Activations are harvested from models that read tokens.", remedy="Read images by `read`.")
    found = subject.resolve(sites)
    if not found:
        raise SiteError("No site was asked for.", remedy="Name one, for example layer.3.resid_post.")
    for site in found:
        if site.part != "module" and (len(site.axes) < 3 or site.axes[1] != axes.POSITION):
            raise SiteError(
                f"{site.name} has the axes {', '.join(site.axes)}: it has no value a token.",
                remedy="Harvest streams, MLPs or attention's q, k, v, z.",
            )
    return found


@torch.no_grad()
def harvest_chunk(subject: Subject, chunk: Chunk, sites: Sequence[Site], *, skip: int = 0) -> Slab:
    """The activations of one chunk; rows stand in reading order.

    Args:
        subject: the model.
        chunk: what is read.
        sites: from `harvest_sites`.
        skip: leave out tokens at positions before this one of their document.
    """
    text = chunk.text()
    lengths = torch.tensor([len(window.ids) for window in chunk.windows])
    starts = lengths.cumsum(0) - lengths
    # windows of like length lie together, so that little is padded
    order = lengths.argsort(descending=True, stable=True).tolist()
    values: dict[str, Tensor] = {}
    at = 0
    while at < len(order):
        step = subject.rows_per_call(int(lengths[order[at]]), sites)
        rows = order[at : at + step]
        at += step
        acts = subject.read([Encoded(chunk.windows[i].ids) for i in rows], *sites)
        mask = acts.mask.cpu()
        places = torch.cat([torch.arange(int(starts[i]), int(starts[i] + lengths[i])) for i in rows])
        for site in sites:
            value = acts[site.name]
            if value.dim() < 3 or value.shape[:2] != mask.shape:
                raise SiteError(f"{site.name} gave {list(value.shape)}: it has no value a token.")
            flat = value.flatten(2)[mask]
            if site.name not in values:
                values[site.name] = flat.new_empty(len(text), flat.shape[1])
            values[site.name][places] = flat
    kept = (text.positions >= skip).nonzero()[:, 0]
    if len(kept) < len(text):
        values = {name: value[kept] for name, value in values.items()}
    for name, value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                f"{name} is not finite on a token of document {int(text.documents[0])} or after it.",
                remedy="Open the model in a wider type (--dtype float32).",
            )
    return Slab(values, kept + chunk.first, text)


def harvest(
    subject: Subject,
    texts: Texts,
    sites: Iterable[str | Site],
    *,
    tokens: int | None = None,
    window: int | None = None,
    chunk: int = CHUNK,
    skip: int = 0,
) -> Iterator[Slab]:
    """Activations of a corpus, a chunk at a time.

    Args:
        subject: a model that reads tokens.
        texts: a corpus, texts, or token ids.
        sites: names or patterns of sites with one value a token.
        tokens: read at most so many; all by default.
        window: tokens of a window.
        chunk: tokens of a chunk.
        skip: leave out each document's first tokens.
    """
    found = harvest_sites(subject, sites)
    for one in chunks(windows(subject, texts, window=window, tokens=tokens), chunk=chunk):
        yield harvest_chunk(subject, one, found, skip=skip)


def decode_tokens(tokenizer: Any, ids: Sequence[int] | Tensor) -> str:
    """Token ids as text, or as numbers where there is no tokenizer."""
    listed = [int(token) for token in ids]
    return " ".join(map(str, listed)) if tokenizer is None else tokenizer.decode(listed)
