"""One top-down sweep through the frozen model: what every source adds to each of many readings of the stream.

A row is a direction that is read from the stream at one place (a feature's encoder, a logit's unembedding). Carried
down through the frozen attention it meets, at each MLP's output and at the embeddings, what the sources wrote there:
the products are the direct effects. No autograd and no replica of the model: for a tile of rows the state is one array
[position, row, d_model], and a block costs three matrix products,

    g @ W_O per head,   pattern^T @ .,   . @ W_V per head,

with norms, their scales and factors folded into the weights and the patterns beforehand.

What is saved: a row enters at its own layer, and its first block is done at its single position; rows are tiled by
position, so that a tile's state ends at its last position (causality: half the work); below the first block only the
tokens are left, which are carried up to the heads' values instead. Memory is that of one tile, whatever the number of
rows; attention patterns are read again for every tile where they do not fit in memory.

Steps: sort and tile the rows; per tile and block from the top: meet the block's MLP, let rows in, pass the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.folded import Folded, Writes, in_order
from tomoscope.circuits.attribution.replacement import LocalReplacement

TILE = 2**20
"""Numbers in a tile's state on a CPU: it should stay in the cache."""
TILE_ON_DEVICE = 2**26
BUCKETS = 8
LEAST_ROWS = 8


@dataclass(frozen=True, eq=False)
class Rows:
    """Directions to be read from the stream.

    Attributes:
        depth: [row], 2 l for the stream into block l, 2 l + 1 between its attention and its MLP, 2 x layers at the end.
        position: [row].
        directions: the rows' [row, d_model] directions in the stream for some rows' numbers; made a tile at a time.
    """

    depth: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    directions: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.depth)


class Sweep:
    """Sweeps of one replacement model; what all tiles share is made once.

    Args:
        replacement: the local replacement model.
        tile: numbers in a tile's state; bounds the memory and sets the products' size.

    Attributes:
        columns: [source], which source of the graph each column of a result is: active features first, then errors by
            layer and position, then tokens.
    """

    def __init__(self, replacement: LocalReplacement, *, tile: int | None = None) -> None:
        self.replacement = replacement
        on_cpu = replacement.tokens.device.type == "cpu"
        self.tile = tile or (TILE if on_cpu else TILE_ON_DEVICE)
        self.folded = Folded(replacement)
        self.columns, places = in_order(replacement)
        self.writes = [Writes.of(replacement, layer, places) for layer in range(replacement.n_layers)]

    @torch.no_grad()
    def run(self, rows: Rows) -> Iterator[tuple[Int[Tensor, " some"], Float[Tensor, "some source"]]]:
        """The direct effects of every source on every row, a tile of rows at a time in any order.

        Yields:
            The rows' numbers, and [row, source]; what source a column is says `columns`.
        """
        for some in self._tiles(rows):
            yield some, self._tile(rows, some)

    def _tiles(self, rows: Rows) -> list[Tensor]:
        """Rows in tiles of near positions, the topmost first."""
        width = self.replacement.tokens.shape[1]
        total = max(1, len(rows) * self.replacement.n_positions * width)
        buckets = max(1, min(BUCKETS, self.replacement.n_positions, total // (2 * self.tile)))
        bucket = rows.position * buckets // self.replacement.n_positions
        deepest = 2 * self.replacement.n_layers + 1
        key = (bucket * deepest + (deepest - 1 - rows.depth)) * self.replacement.n_positions + rows.position
        order = key.argsort()
        out = []
        for one in range(buckets):
            mine = order[bucket[order] == one]
            if len(mine):
                columns = int(rows.position[mine].max()) + 1
                # neither the state nor the rows that come out of it may grow beyond a few tiles
                fitting = min(self.tile // (columns * width), 4 * self.tile // self.replacement.n_sources)
                out += list(mine.split(max(LEAST_ROWS, fitting)))
        return out

    def _tile(self, rows: Rows, some: Tensor) -> Tensor:
        state = _State(self, rows, some)
        for layer in reversed(range(self.replacement.n_layers)):
            parallel = self.replacement.blocks[layer].skeleton.parallel
            state.enter(2 * layer + 2)
            state.meet(layer)
            if parallel:
                state.attend(layer)
                state.add_skipped(lowest=layer == 0)
            else:
                state.add_skipped()
                state.enter(2 * layer + 1)
                state.attend(layer)
        return state.finish()


class _State:
    """A tile on its way down: rows that have passed a block (dense) and rows that stand at one position still."""

    def __init__(self, sweep: Sweep, rows: Rows, some: Tensor) -> None:
        self.sweep, self.folded = sweep, sweep.folded
        self.depth, self.position = rows.depth[some], rows.position[some]
        self.columns = int(self.position.max()) + 1
        self.vectors = rows.directions(some)
        like = sweep.replacement.tokens
        self.dense = like.new_zeros(self.columns, 0, like.shape[1])
        self.out = like.new_zeros(len(some), sweep.replacement.n_sources)
        self.entered = 0  # rows that are in, a prefix of the tile
        self.passed = 0  # rows that are dense, a prefix of those
        self.skipped: tuple[Tensor | None, Tensor | None] = (None, None)

    # ---- rows come in

    def enter(self, depth: int) -> None:
        """Let in the rows of a depth; they stand at their own position."""
        self.entered += int((self.depth[self.entered :] == depth).sum())

    @property
    def points(self) -> slice:
        """Rows that stand at one position."""
        return slice(self.passed, self.entered)

    def _groups(self) -> Iterator[tuple[int, slice]]:
        """Runs of point rows at one position."""
        places = self.position[self.points]
        if not len(places):
            return
        values, counts = torch.unique_consecutive(places, return_counts=True)
        start = self.passed
        for place, count in zip(values.tolist(), counts.tolist(), strict=True):
            yield place, slice(start, start + count)
            start += count

    # ---- an MLP

    def meet(self, layer: int) -> None:
        """Add what the sources wrote to an MLP's output; keep what its skip path reads."""
        writes = self.sweep.writes[layer]
        if self.passed:
            writes.add(self.out[: self.passed], self.dense)
        for place, group in self._groups():
            writes.add_at(self.out[group], self.vectors[group], place)
        skip, scale = self.folded.skip(layer)
        self.skipped = (None, None)
        if skip is not None and scale is not None:
            dense = (self.dense.flatten(0, 1) @ skip).view_as(self.dense) * scale[: self.columns, None, None]
            at = self.position[self.points]
            self.skipped = (dense, self.vectors[self.points] @ skip * scale[at][:, None])
            self.skipping = (self.passed, self.entered)

    def add_skipped(self, *, lowest: bool = False) -> None:
        """Add what the skip path of the MLP last met reads from the stream; at the lowest block that is tokens."""
        dense, points = self.skipped
        if dense is None or points is None:
            return
        first, last = self.skipping
        if lowest:
            self._meet_tokens(slice(0, first), dense)
            self._meet_tokens(slice(first, last), points)
            return
        if self.passed == first:  # no attention since: the points still stand where they were
            self.dense += dense
            self.vectors[first:last] += points
            return
        self.dense[:, :first] += dense
        rows = torch.arange(first, last, device=self.position.device)
        self.dense[self.position[first:last], rows] += points

    # ---- attention

    def attend(self, layer: int) -> None:
        """Carry all rows through a block's attention; at the lowest block only to what the tokens give its heads."""
        if layer == 0:
            self._attend_tokens()
            return
        W_O, W_V, pattern = self.folded.attention(layer)
        columns, width = self.columns, self.dense.shape[2]
        if self.passed:
            flat = self.dense.view(columns * self.passed, width)
            mixed = self._mixed(flat, W_O, pattern, self.passed)
            flat.addmm_(_side_by_side(mixed), W_V.flatten(0, 1))
        if self.entered == self.passed:
            return
        new = self.dense.new_empty(columns, self.entered - self.passed, width)
        group = W_O.shape[0] // W_V.shape[0]
        for place, rows in self._groups():
            v = self.vectors[rows]
            each = (v @ W_O).unflatten(0, (W_V.shape[0], group)) @ W_V[:, None]  # [kv, group, row, d_model]
            spread = pattern[:, place, :columns].T @ each.reshape(W_O.shape[0], -1)
            spread = spread.view(columns, len(v), width)
            spread[place] += v
            new[:, rows.start - self.passed : rows.stop - self.passed] = spread
        self.dense = torch.cat([self.dense, new], dim=1) if self.passed else new
        self.passed = self.entered

    def _mixed(self, flat: Tensor, W_O: Tensor, pattern: Tensor, count: int) -> Tensor:
        """[kv_head, position x row, head_dim]: through W_O, then to the positions that each head read."""
        z = torch.matmul(flat, W_O)  # [head, position x row, head_dim]
        back = pattern[:, : self.columns, : self.columns].transpose(1, 2)
        mixed = torch.bmm(back, z.view(len(W_O), self.columns, -1)).view(len(W_O), self.columns * count, -1)
        kv = self.folded.n_kv
        return mixed if kv == len(W_O) else mixed.unflatten(0, (kv, -1)).sum(1)

    def _attend_tokens(self) -> None:
        """The lowest attention: only the tokens lie below it, so they are met here."""
        read = self.folded.tokens
        if read is not None:
            if self.passed:
                met = torch.bmm(self.dense, read[: self.columns, :, : self.columns])
                self._token_columns[: self.passed] += met.sum(0)
            for place, rows in self._groups():
                self._token_columns[rows] += self.vectors[rows] @ read[place, :, : self.columns]
            return
        W_O, W_V, pattern = self.folded.attention(0)
        tokens = self.sweep.replacement.tokens[: self.columns]
        values = tokens @ W_V.transpose(1, 2)  # [kv_head, position, head_dim]: what each token gives the heads
        found = self._token_columns
        self._meet_tokens(slice(0, self.passed), self.dense)
        self._meet_tokens(self.points, self.vectors[self.points])
        if self.passed:
            flat = self.dense.flatten(0, 1)
            mixed = self._mixed(flat, W_O, pattern, self.passed)
            each = mixed.unflatten(1, (self.columns, self.passed)) @ values[..., None]
            found[: self.passed] += each.sum(0)[..., 0].T
        shared = values.repeat_interleave(len(W_O) // len(W_V), 0).transpose(1, 2)  # [head, head_dim, position]
        for place, rows in self._groups():
            each = (self.vectors[rows] @ W_O) @ shared  # [head, row, position]
            found[rows] += (each * pattern[:, place, None, : self.columns]).sum(0)

    @property
    def _token_columns(self) -> Tensor:
        first = self.out.shape[1] - self.sweep.replacement.n_positions
        return self.out[:, first : first + self.columns]

    def _meet_tokens(self, rows: slice, read: Tensor) -> None:
        """Add what rows read from the embeddings: [position, row, d_model], or [row, d_model] at their own position."""
        tokens = self.sweep.replacement.tokens[: self.columns]
        if read.dim() == 3:
            self._token_columns[rows] += torch.bmm(read, tokens[:, :, None])[..., 0].T
            return
        at = self.position[rows]
        numbers = torch.arange(rows.start, rows.stop, device=at.device)
        self._token_columns[numbers, at] += (read * tokens[at]).sum(1)

    def finish(self) -> Tensor:
        """The tile's effects; rows that enter below the lowest attention read the embeddings themselves."""
        late = slice(self.entered, len(self.depth))
        self._meet_tokens(late, self.vectors[late])
        return self.out


def _side_by_side(values: Float[Tensor, "kv_head some head_dim"]) -> Float[Tensor, "some width"]:
    """Heads next to each other, so that one product over all of them adds them up."""
    return values[0] if len(values) == 1 else values.transpose(0, 1).flatten(1)
