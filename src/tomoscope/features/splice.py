"""A dictionary put into the model: a site's activation becomes its reconstruction, with or without what it misses.

    subject.run(prompts, edits=splice(coder, "layer.3.resid_post"))            the error is lost
    subject.run(prompts, edits=splice(coder, "layer.3.resid_post", errors=True))

With `errors` the model computes what it did (to rounding), but through the features, so that edits of them and
gradients can be read; without, the loss says what the dictionary misses. A transcoder reads one site and is written to
another in the same forward: two edits, the first of which changes nothing and keeps what it saw.

How it can mislead: the model was not trained on reconstructions; a loss recovered says nothing about which features
matter. A transcoder's second edit must run in the same forward as its first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tomoscope.errors import EditError
from tomoscope.features.coder import SparseCoder
from tomoscope.model.edits import At, Edit


@dataclass(eq=False)
class Seen:
    """What a transcoder's reading edit saw in this forward."""

    value: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SpliceEdit(Edit):
    """One end of a spliced dictionary; make it with `splice`.

    Attributes:
        coder: the dictionary.
        errors: keep what it misses.
        seen: where the reading end leaves its value; None where one site is read and written.
        reading: this is the reading end.
    """

    coder: SparseCoder | None = None
    errors: bool = False
    seen: Seen | None = field(default=None, repr=False)
    reading: bool = False

    def apply(self, region: Tensor) -> Tensor:
        """The region's reconstruction; at a reading end, the region."""
        assert self.coder is not None  # `splice` sees to it
        if self.reading:
            assert self.seen is not None
            self.seen.value = region
            return region
        if self.seen is not None:
            if self.seen.value is None:
                raise EditError(f"The transcoder at {self.site} was reached before what it reads.")
            given, self.seen.value = self.seen.value, None
        else:
            given = region
        wide = _flat(given, self.coder.d_in)
        wide = wide if wide.dtype.itemsize == 8 else wide.float()
        made = self.coder(wide)
        if self.errors:
            own = _flat(region, made.shape[-1]).to(made)
            made = made + (own - made).detach()
        return made.reshape(region.shape).to(region.dtype)

    def describe(self) -> dict[str, Any]:
        """As plain values for a record."""
        out = super().describe()
        del out["seen"]
        out["coder"] = repr(self.coder)
        return out


def _flat(value: Tensor, width: int) -> Tensor:
    """Heads and their coordinates as one axis, where the dictionary was trained so."""
    if value.shape[-1] != width and value.dim() > 1 and value.shape[-1] * value.shape[-2] == width:
        return value.flatten(-2)
    if value.shape[-1] != width:
        raise EditError(f"The dictionary reads {width} numbers, and the site has {list(value.shape)}.")
    return value


def splice(coder: SparseCoder, reads: str = "", writes: str = "", *, errors: bool = False, at: At = None) -> list[Edit]:
    """Edits that put a dictionary's reconstruction in the place of what it reconstructs.

    Args:
        coder: the dictionary.
        reads: the site that is encoded; the dictionary's own by default.
        writes: the site that is replaced; the dictionary's own, or `reads`, by default.
        errors: add what the dictionary misses (as a constant: gradients go through the features).
        at: positions.

    Raises:
        EditError: no site is named, or several are (a crosscoder).
    """
    reads = reads or coder.reads
    writes = writes or (reads if coder.reads == coder.writes or coder.centred else coder.writes) or reads
    if not reads or "+" in reads or "+" in writes:
        raise EditError(
            "A dictionary is spliced at one site." if reads else "The dictionary does not say what it reads.",
            remedy="Name the site that it reads and the one that it writes.",
        )
    if reads == writes:
        return [SpliceEdit(reads, "splice", at=at, coder=coder, errors=errors)]
    seen = Seen()
    return [
        SpliceEdit(reads, "splice", at=at, coder=coder, seen=seen, reading=True),
        SpliceEdit(writes, "splice", at=at, coder=coder, errors=errors, seen=seen),
    ]
