"""Swept rows on their way into a graph: checked, thinned, and put into compressed rows.

A row is kept whole, or only its largest edges that together have a share of its absolute mass (`keep`); what is left
out is kept as two numbers, its sum and its mass, so that every row still sums up and every share is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Compressed:
    """Rows with their edges one after the other.

    Attributes:
        starts: [row + 1].
        columns: [edge], int32.
        weights: [edge].
        rest: [row], the sum of what was left out.
        mass: [row], absolute sum of all, left out or not.
    """

    starts: Int[Tensor, " bound"]
    columns: Int[Tensor, " edge"]
    weights: Float[Tensor, " edge"]
    rest: Float[Tensor, " row"]
    mass: Float[Tensor, " row"]


def largest(block: Float[Tensor, "row column"], share: float) -> Float[Tensor, " row"]:
    """For each row the smallest absolute value that must be kept so that `share` of its absolute sum is."""
    size = block.abs()
    ordered = size.sort(dim=1, descending=True).values
    total = ordered.cumsum(1)
    enough = (total < share * total[:, -1:]).sum(1).clamp(max=size.shape[1] - 1)
    return ordered.gather(1, enough[:, None])[:, 0]


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).to(dtype) if parts else torch.empty(0, dtype=dtype)


@dataclass(eq=False)
class Collector:
    """Takes tiles of rows in any order and gives compressed rows in theirs.

    Attributes:
        n_rows: how many there will be.
        keep: share of each row's absolute mass that is kept as edges.
    """

    n_rows: int
    keep: float = 1.0
    _pieces: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _counts: Tensor = field(init=False)
    _rest: Tensor | None = None
    _mass: Tensor | None = None

    def __post_init__(self) -> None:
        self._counts = torch.zeros(self.n_rows, dtype=torch.long)

    def add(
        self,
        rows: Int[Tensor, " some"],
        block: Float[Tensor, "some column"],
        *,
        rest: Float[Tensor, " some"] | None = None,
        mass: Float[Tensor, " some"] | None = None,
    ) -> None:
        """Take some rows.

        Args:
            rows: their numbers.
            block: their edges.
            rest: [some], the sum of edges that are not in the block.
            mass: [some], the absolute sum of all edges, where some are not in the block.
        """
        if self._rest is None or self._mass is None:
            self._rest = torch.zeros(self.n_rows, dtype=block.dtype)
            self._mass = torch.zeros(self.n_rows, dtype=block.dtype)
        mine, kept = rows.cpu(), block
        left = block.new_zeros(len(block)) if rest is None else rest
        if self.keep < 1 and block.shape[1]:
            small = block.abs() < largest(block, self.keep)[:, None]
            kept = block.masked_fill(small, 0)
            left = left + (block - kept).sum(1)
        # where the edges are in the block, as numbers in order: rows follow from a search, columns from a remainder
        width, flat = block.shape[1], kept.flatten()
        place = flat.nonzero()[:, 0]
        bounds = torch.searchsorted(place, torch.arange(len(block) + 1, device=place.device) * width)
        self._counts[mine] = bounds.diff().cpu()
        self._rest[mine] = left.cpu()
        self._mass[mine] = (block.abs().sum(1) if mass is None else mass).cpu()
        column = (place.int() % width if len(flat) < 2**31 else place % width).int()
        self._pieces.append((mine, column.cpu(), flat.index_select(0, place).cpu()))

    def done(self, dtype: torch.dtype) -> Compressed:
        """The rows in their order."""
        starts = torch.cat([torch.zeros(1, dtype=torch.long), self._counts.cumsum(0)])
        columns: list[Tensor] = [torch.empty(0, dtype=torch.int32)] * self.n_rows
        weights: list[Tensor] = [torch.empty(0, dtype=dtype)] * self.n_rows
        for rows, column, weight in self._pieces:
            counts = self._counts[rows].tolist()
            for row, some, their in zip(rows.tolist(), column.split(counts), weight.split(counts), strict=True):
                columns[row], weights[row] = some, their
        empty = torch.zeros(self.n_rows, dtype=dtype)
        self._pieces.clear()
        return Compressed(
            starts, _joined(columns, torch.int32), _joined(weights, dtype),
            empty if self._rest is None else self._rest, empty if self._mass is None else self._mass,
        )  # fmt: skip
