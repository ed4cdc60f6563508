"""Where training gets its rows: batches in random order, from memory, from a store, or from the model at work.

    for batch in source.batches(4096, start=step):
        batch.values["layer.3.resid_post"]       [row, width]

Every source is cut into *groups* that fit memory, and the rows of a group leave in random order. Batch number `step` is
a function of the seed and the step, so that a run that was stopped goes on with the very batches it would have had. The
last rows of a group that fill no batch are left out in that epoch (another permutation leaves out others in the next).
"""

from __future__ import annotations

import hashlib
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.activations.harvest import CHUNK, Texts, Window, chunks, harvest_chunk, harvest_sites, windows
from tomoscope.activations.statistics import Moments
from tomoscope.errors import DataError
from tomoscope.model import Subject

Item = TypeVar("Item")
MIX = 2**18
"""Rows that are mixed in memory at a time."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of every site, aligned, and the places of their tokens."""

    values: dict[str, Float[Tensor, "row width"]]
    places: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def first(self) -> int:
        """The place of the first row."""
        return int(self.places[0])

    def take(self, which: Tensor | slice) -> Rows:
        """Some of the rows, in that order."""
        return Rows({name: _rows(value, which) for name, value in self.values.items()}, _rows(self.places, which))


def _rows(value: Tensor, which: Tensor | slice) -> Tensor:
    # index_select copies whole rows, where indexing goes through them number by number: six times as fast
    return value[which] if isinstance(which, slice) else value.index_select(0, which.to(value.device))


class Group(Protocol):
    """Rows that fit memory, of which batches are taken: `Rows`, or what a store has mapped."""

    def __len__(self) -> int: ...

    @property
    def first(self) -> int:
        """The place of the first row, from which the order of the group follows."""
        ...

    def take(self, which: Tensor) -> Rows:
        """Some of the rows; a batch's rows may come in any order."""
        ...


def generator(*parts: object) -> torch.Generator:
    """A generator whose seed follows from what is named."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Source(ABC):
    """Rows in random order, by groups."""

    seed: int = 0

    @property
    @abstractmethod
    def widths(self) -> Mapping[str, int]:
        """Width of each site."""

    @abstractmethod
    def moments(self) -> Mapping[str, Moments]:
        """Mean, spread and norm of each site."""

    @abstractmethod
    def groups(self, epoch: int, batch: int, skip: int) -> Iterator[Group]:
        """The groups of one epoch, in that epoch's order, without those that `skip` batches have used up whole.

        A group whose batches are used up in part is given whole.
        """

    @abstractmethod
    def batches_an_epoch(self, batch: int) -> int:
        """Whole batches of an epoch."""

    @abstractmethod
    def batches_before(self, epoch: int, batch: int, skip: int) -> int:
        """Batches in the groups that `groups` leaves out for `skip`."""

    def batches(self, batch: int, *, start: int = 0, epochs: int | None = None, ahead: int = 2) -> Iterator[Rows]:
        """Batches of `batch` rows, from batch number `start` on.

        Args:
            batch: rows.
            start: batches of this sequence that have been used already.
            epochs: passes over the data; without end by default.
            ahead: batches that a thread makes ready; 0 makes them when they are asked for.

        Raises:
            DataError: there are fewer rows than one batch.
        """
        each = self.batches_an_epoch(batch)
        if each < 1:
            raise DataError(
                f"There are too few activations for one batch of {batch} rows.", remedy="Give a smaller batch."
            )
        made = self._batches(batch, start, each, epochs)
        return prefetch(made, ahead) if ahead else made

    def _batches(self, batch: int, start: int, each: int, epochs: int | None) -> Iterator[Rows]:
        first, skip = divmod(start, each)
        for epoch in count(first) if epochs is None else range(first, epochs):
            left = skip - self.batches_before(epoch, batch, skip)
            for number, group in enumerate(self.groups(epoch, batch, skip)):
                order = torch.randperm(len(group), generator=generator(self.seed, "rows", epoch, group.first))
                begin = left if number == 0 else 0
                for i in range(begin, len(group) // batch):
                    yield group.take(order[i * batch : (i + 1) * batch])
            skip = 0


class ArraySource(Source):
    """Rows that are in memory: one group.

    Args:
        values: by site, [row, width]; a tensor alone has the name "".
        seed: of the order.
        places: [row]; the rows' numbers by default.
    """

    def __init__(self, values: Mapping[str, Tensor] | Tensor, *, seed: int = 0, places: Tensor | None = None) -> None:
        held = {"": values} if isinstance(values, Tensor) else dict(values)
        sizes = {len(value) for value in held.values()}
        if len(sizes) != 1 or any(value.dim() != 2 for value in held.values()):
            raise DataError("The sites' rows do not align.", remedy="Give [row, width] tensors of as many rows.")
        self.rows = Rows(held, torch.arange(sizes.pop()) if places is None else places)
        self.seed = seed

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of each site."""
        return {name: value.shape[1] for name, value in self.rows.values.items()}

    def moments(self) -> Mapping[str, Moments]:
        """See `Source`."""
        return {name: Moments.of(value) for name, value in self.rows.values.items()}

    def groups(self, epoch: int, batch: int, skip: int) -> Iterator[Rows]:
        """All rows."""
        yield self.rows

    def batches_an_epoch(self, batch: int) -> int:
        """See `Source`."""
        return len(self.rows) // batch

    def batches_before(self, epoch: int, batch: int, skip: int) -> int:
        """None."""
        return 0


class LiveSource(Source):
    """Rows from the model at work, with nothing on disk: harvested, mixed, and handed on while a thread harvests more.

    Mixing is within `mix` rows of the corpus' own order, so a corpus sorted by topic should be shuffled before.
    An epoch reads the corpus, and runs the model, once.

    Args:
        subject: the model.
        texts: a corpus or a sequence that can be read again.
        sites: names or patterns.
        tokens: read at most so many an epoch.
        window, skip: as for `harvest`.
        mix: rows that are mixed.
        seed: of the order.
        sample: tokens from which the moments are taken.
    """

    def __init__(
        self, subject: Subject, texts: Texts, sites: Sequence[str], *, tokens: int | None = None,
        window: int | None = None, skip: int = 0, mix: int = MIX, seed: int = 0, sample: int = CHUNK,
    ) -> None:  # fmt: skip
        once = not hasattr(texts, "documents") and iter(texts) is texts
        if once:
            raise DataError("A corpus that can be read only once can't be resumed.", remedy="Give a list or a Corpus.")
        self.subject, self.texts, self.sites = subject, texts, harvest_sites(subject, sites)
        self.tokens, self.window, self.skip, self.mix, self.seed = tokens, window, skip, mix, seed
        self.chunk = min(CHUNK, mix)
        self._n: int | None = None
        first = next(chunks(self._windows(), chunk=min(sample, self.chunk)), None)
        if first is None:
            raise DataError("The corpus holds no token.", remedy="Give one with text.")
        slab = harvest_chunk(subject, first, self.sites, skip=skip)
        self._moments = {name: Moments.of(value) for name, value in slab.values.items()}

    def _windows(self) -> Iterator[Window]:
        return windows(self.subject, self.texts, window=self.window, tokens=self.tokens)

    def _rows_of(self, window: Window) -> int:
        return max(0, len(window.ids) - max(0, self.skip - window.start))

    @property
    def n(self) -> int:
        """Rows of an epoch; the corpus is tokenized once to know it."""
        if self._n is None:
            self._n = sum(map(self._rows_of, self._windows()))
        return self._n

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of each site."""
        return {name: len(moments.mean) for name, moments in self._moments.items()}

    def moments(self) -> Mapping[str, Moments]:
        """Of the corpus' first tokens."""
        return self._moments

    def _sizes(self) -> list[int]:
        return [min(self.mix, self.n - start) for start in range(0, self.n, self.mix)]

    def batches_an_epoch(self, batch: int) -> int:
        """See `Source`."""
        return sum(size // batch for size in self._sizes())

    def _groups_before(self, batch: int, skip: int) -> int:
        done = 0
        for index, size in enumerate(self._sizes()):
            done += size // batch
            if done > skip:
                return index
        return len(self._sizes())

    def batches_before(self, epoch: int, batch: int, skip: int) -> int:
        """See `Source`."""
        return sum(size // batch for size in self._sizes()[: self._groups_before(batch, skip)])

    def groups(self, epoch: int, batch: int, skip: int) -> Iterator[Rows]:
        """Groups of `mix` rows; what lies before the first is tokenized and not run."""
        target = self._groups_before(batch, skip) * self.mix
        seen, held, size = 0, [], 0
        for chunk in chunks(self._windows(), chunk=self.chunk):
            rows = sum(map(self._rows_of, chunk.windows))
            if seen + rows <= target:
                seen += rows
                continue
            slab = harvest_chunk(self.subject, chunk, self.sites, skip=self.skip)
            piece = Rows(slab.values, slab.places).take(slice(max(0, target - seen), None))
            seen += rows
            held.append(piece)
            size += len(piece)
            while size >= self.mix:
                whole = _joined(held)
                yield whole.take(slice(0, self.mix))
                held, size = [whole.take(slice(self.mix, None))], size - self.mix
        if size:
            yield _joined(held)


def _joined(pieces: Sequence[Rows]) -> Rows:
    names = pieces[0].values
    return Rows({n: torch.cat([p.values[n] for p in pieces]) for n in names}, torch.cat([p.places for p in pieces]))


_END = object()


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The items, made ready by a thread, at most `depth` ahead; its error is raised here, and closing ends it."""
    held: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                held.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = held.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()


def first_rows(source: Source, n: int, batch: int = 4096) -> Rows:
    """About `n` random rows, for starting values; fewer where there are not as many."""
    each = source.batches_an_epoch(batch)
    if each == 0:
        batch = 1
        each = source.batches_an_epoch(1)
        return _joined(list(islice(source.batches(1, ahead=0), min(n, each))))
    return _joined(list(islice(source.batches(batch, ahead=0), min(max(1, -(-n // batch)), each))))
