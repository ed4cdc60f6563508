"""What a sweep multiplies by: weights with the frozen norms folded in, and what each MLP's sources write.

Folding: a norm's weight and centring go into the weights beside it, its scale at each position into the attention
pattern's columns (before the values) or rows (at the branch's end), a factor into W_O.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.circuits.attribution.patterns import SHARE
from tomoscope.circuits.attribution.replacement import LocalReplacement
from tomoscope.model.memory import free_bytes

WASTE = 4
"""How many times larger than itself a block's sources may be padded to, so that one product meets them all."""


class Folded:
    """Folded weights of a replacement model, kept where they fit in memory.

    Args:
        replacement: the local replacement model.
    """

    def __init__(self, replacement: LocalReplacement) -> None:
        self.replacement = replacement
        self.n_kv = len(replacement.blocks[0].skeleton.W_V)
        first = replacement.blocks[0].skeleton
        heads, positions = len(first.W_O), replacement.n_positions
        each = first.W_V.numel() + first.W_O.numel() + heads * positions**2
        bytes_needed = each * replacement.tokens.element_size() * replacement.n_layers
        self.keeps = bytes_needed <= SHARE * free_bytes(replacement.tokens.device)
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._skips: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def attention(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """W_O [head, d_model, head_dim], W_V [kv_head, head_dim, d_model] and pattern [head, query, key], folded.

        A direction g in the stream after attention is pulled back to g + sum over heads of pattern^T (g W_O) W_V.
        """
        if layer not in self._kept:
            if not self.keeps:
                self._kept.clear()
            self._kept[layer] = self._fold(layer)
        return self._kept[layer]

    def _fold(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        block, like = self.replacement.blocks[layer], self.replacement.tokens
        parts = block.skeleton
        W_O = parts.W_O.to(like).transpose(1, 2) * parts.factor  # [head, d_model, head_dim]
        pattern = self.replacement.pattern(layer) * block.attention.scale
        if block.end is not None:
            W_O = block.end.fold(W_O.transpose(1, 2)).transpose(1, 2)
            pattern = pattern * block.end.scale[:, None]
        W_V = block.attention.fold(parts.W_V.to(like).transpose(1, 2))
        return W_O.contiguous(), W_V.contiguous(), pattern

    @cached_property
    def tokens(self) -> Float[Tensor, "query d_model key"] | None:
        """What a direction in the stream after the lowest attention reads of each token, at each of its positions.

        None where the prompt is so long that going through the heads takes fewer products, or less memory.
        """
        like, positions = self.replacement.tokens, self.replacement.n_positions
        W_O, W_V, pattern = self.attention(0)
        bytes_needed = (positions**2 + 2 * len(W_O) * positions) * like.shape[1] * like.element_size()
        if positions > len(W_O) * W_O.shape[2] or bytes_needed > SHARE * free_bytes(like.device):
            return None
        values = like @ W_V.transpose(1, 2)  # [kv_head, key, head_dim]: what each token gives the heads
        given = values.repeat_interleave(len(W_O) // len(W_V), 0) @ W_O.transpose(1, 2)  # [head, key, d_model]
        read = torch.bmm(given.permute(1, 2, 0), pattern.permute(2, 0, 1))  # [key, d_model, query]
        own = torch.arange(positions, device=like.device)
        read[own, :, own] += like
        return read.permute(2, 1, 0).contiguous()

    def skip(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """A skip path [d_model, d_model] from what is written to what is read, and its scale by position; or Nones."""
        if layer not in self._skips:
            skip, reads = self.replacement.transcoders.coder(layer).W_skip, self.replacement.blocks[layer].reads
            folded = None if skip is None else reads.fold(skip.to(self.replacement.tokens)).contiguous()
            self._skips[layer] = (folded, None if folded is None else reads.scale)
        return self._skips[layer]


def in_order(replacement: LocalReplacement) -> tuple[Int[Tensor, " source"], Int[Tensor, " source"]]:
    """The order in which a sweep meets the sources, so that what one MLP writes are neighbours.

    Returns:
        [source], which source of the graph each column is; and its inverse. By layer, position, then features before
        the error; the tokens last.
    """
    device, positions = replacement.tokens.device, replacement.n_positions
    errors = torch.arange(replacement.n_layers * positions, device=device)
    layer = torch.cat([replacement.layer, errors // positions])
    position = torch.cat([replacement.position, errors % positions])
    order = (layer * positions + position).argsort(stable=True)
    columns = torch.cat([order, len(order) + torch.arange(positions, device=device)])
    return columns, columns.argsort()


@dataclass(frozen=True, eq=False)
class Writes:
    """What the sources write to one MLP's output, in the order of positions.

    Attributes:
        vectors: [source, d_model], features times their activation, and errors.
        starts: [position + 1], where each position's sources begin.
        columns: [source], their columns in a result of the sweep.
        padded: [position, most, d_model], the sources of each position, padded with zeros; None where too uneven.
        real: [source], which places of the padded ones they have.
        shared: whether these features write to other layers too, so that effects add up over layers.
    """

    vectors: Float[Tensor, "source d_model"]
    starts: list[int]
    columns: Int[Tensor, " source"]
    padded: Float[Tensor, "position most d_model"] | None
    real: Int[Tensor, " source"]
    shared: bool

    @classmethod
    def of(cls, replacement: LocalReplacement, layer: int, places: Int[Tensor, " column"]) -> Writes:
        """The sources that write to a layer's MLP output.

        Args:
            replacement: the local replacement model.
            layer: the layer.
            places: the column of every source of the graph.
        """
        vectors, positions, sources = [], [], []
        like, n_positions = replacement.tokens, replacement.n_positions
        transcoders = replacement.transcoders
        layers = [source for source in range(layer + 1) if layer in transcoders.targets(source)]
        for source in layers:
            mine = torch.nonzero(replacement.layer == source)[:, 0]
            rows = transcoders.decoder_rows(source, replacement.feature[mine], layer, like)
            vectors.append(rows * replacement.activation[mine][:, None])
            positions.append(replacement.position[mine])
            sources.append(mine)
        every = torch.arange(n_positions, device=like.device)
        vectors.append(replacement.errors[layer])
        positions.append(every)
        sources.append(replacement.n_active + layer * n_positions + every)
        where = torch.cat(positions)
        order = where.argsort(stable=True)
        where, written = where[order], torch.cat(vectors)[order]
        counts = torch.bincount(where, minlength=n_positions)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        most = int(counts.max())
        real = where * most + torch.arange(len(where), device=where.device) - starts[where]
        padded = None
        if most * n_positions <= WASTE * len(where):
            padded = like.new_zeros(n_positions * most, like.shape[1]).index_copy(0, real, written)
            padded = padded.view(n_positions, most, -1)
        columns = places[torch.cat(sources)[order]]
        shared = any(len(transcoders.targets(source)) > 1 for source in layers)
        return cls(written, starts.tolist(), columns, padded, real, shared)

    def add(self, out: Float[Tensor, "row column"], g: Float[Tensor, "position row d_model"]) -> None:
        """Add what the sources at g's positions write, as read by g, to their columns of `out`."""
        count = self.starts[len(g)]
        if self.padded is not None:
            found = torch.bmm(g, self.padded[: len(g)].transpose(1, 2)).transpose(0, 1).flatten(1)
            found = found.index_select(1, self.real[:count])
        else:
            found = out.new_empty(len(out), count)
            for place in range(len(g)):
                some = slice(self.starts[place], self.starts[place + 1])
                found[:, some] = g[place] @ self.vectors[some].T
        self._put(out, slice(0, count), found)

    def add_at(self, out: Float[Tensor, "row column"], v: Float[Tensor, "row d_model"], place: int) -> None:
        """The same for rows that stand at one position."""
        some = slice(self.starts[place], self.starts[place + 1])
        self._put(out, some, v @ self.vectors[some].T)

    def _put(self, out: Tensor, some: slice, found: Tensor) -> None:
        if self.shared:
            out.index_add_(1, self.columns[some], found)
        elif found.shape[1]:
            first = self.first + some.start
            out[:, first : first + found.shape[1]] = found

    @cached_property
    def first(self) -> int:
        """The first column, where they are neighbours."""
        return int(self.columns[0])
