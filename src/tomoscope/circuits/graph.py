"""The graph of a model's computation: who writes to the residual stream, who reads it, and which edges there can be.

    graph = Graph.of(subject)
    graph.sources         ("embed", "a0.h0", ..., "m0", "a1.h0", ...)       rows: what is added to the stream
    graph.destinations    ("a0.h0<q>", "a0.h0<k>", "a0.h0<v>", ..., "m0", ..., "logits")     columns: what reads it
    graph.allowed         bool [source, destination]: the source is written before the destination reads

A head has three inputs (query, key, value), and where keys and values are shared between heads, those inputs belong to
the group ("a0.kv1<k>"). Names are those of the field's circuit files, with "embed" for their "input"; `formats` writes
theirs. How it can mislead: an edge is a linear path through the stream, so a norm between the two is part of the
destination; what a block adds besides its heads and MLP (the output projection's bias, a third writer) is no source and
is never ablated; where the projections do not read the stream (compressed keys and values) attention is one node "a0".

Steps: list the sources and destinations in the order in which the model computes them; number those moments; an edge is
allowed where the source's moment comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from tomoscope.errors import SiteError, UnavailableSiteError, nearest
from tomoscope.model import Subject, Weights

EMBED, POSITION, LOGITS = "embed", "position", "logits"
INPUTS = ("q", "k", "v")
"""The inputs of a head."""


@dataclass(frozen=True)
class Node:
    """One source or destination.

    Attributes:
        name: as in `Graph.sources` and `Graph.destinations`.
        kind: "embed", "position", "head", "attention" (a whole layer's), "mlp" or "logits".
        layer: block; -1 for the embedding, the number of layers for the logits.
        head: query head, or key-value head for the input of a group; -1 where it is neither.
        input: "q", "k" or "v" of a head's destination, else "".
        moment: when it is computed; it can depend on what has an earlier one.
    """

    name: str
    kind: str
    layer: int
    head: int = -1
    input: str = ""
    moment: int = 0


@dataclass(frozen=True)
class Graph:
    """Sources, destinations and the edges there can be; see the module's docstring.

    Attributes:
        writers: the sources as nodes, in the order of the rows.
        readers: the destinations as nodes, in the order of the columns.
        n_layers: blocks.
        n_heads: query heads a block.
        n_kv_heads: key-value heads a block.
    """

    writers: tuple[Node, ...]
    readers: tuple[Node, ...]
    n_layers: int
    n_heads: int
    n_kv_heads: int

    @classmethod
    def of(cls, subject: Subject, *, position: bool = False) -> Graph:
        """The graph of a model.

        Args:
            subject: a model whose blocks add to a residual stream.
            position: let learned position embeddings be a source of their own (where the model adds any); else they
                are part of the stream and never ablated.

        Raises:
            SiteError: the model is no stack of blocks, or a block's writers are not known.
        """
        facts, blocks = subject.facts, subject.structure.blocks
        if not blocks:
            raise SiteError("This model is no stack of blocks, so it has no graph of heads and MLPs.")
        if facts.renormalised or facts.unsolved:
            raise SiteError(
                f"{subject.name} does not simply add to its stream, so edges through it are not defined.",
                remedy="`tomoscope sites` says which blocks, and why.",
            )
        sites = subject.sites()
        writers = [Node(EMBED, "embed", -1, moment=-1)]
        if position and sites["pos_embed"].available:
            writers.append(Node(POSITION, "position", -1, moment=-1))
        readers: list[Node] = []
        weights = Weights(subject)
        kv_heads = facts.n_kv_heads  # attention may see keys and values repeated (Falcon): the projections tell
        for layer, block in enumerate(blocks):
            first, second = 2 * layer, 2 * layer if block.parallel else 2 * layer + 1
            if sites[f"layer.{layer}.attn.out"].available:
                heads, groups = _heads(subject, weights, layer)
                kv_heads = groups or kv_heads
                writers += [Node(f"a{layer}.h{h}", "head", layer, h, moment=first) for h in range(heads)]
                for which in INPUTS if heads else ():
                    count, stem = (heads, "h") if which == "q" or groups == heads else (groups, "kv")
                    readers += [Node(f"a{layer}.{stem}{h}<{which}>", "head", layer, h, which, first)
                                for h in range(count)]  # fmt: skip
                if not heads:
                    writers.append(Node(f"a{layer}", "attention", layer, moment=first))
                    readers.append(Node(f"a{layer}", "attention", layer, moment=first))
            if sites[f"layer.{layer}.mlp.out"].available:
                writers.append(Node(f"m{layer}", "mlp", layer, moment=second))
                readers.append(Node(f"m{layer}", "mlp", layer, moment=second))
        readers.append(Node(LOGITS, "logits", len(blocks), moment=2 * len(blocks)))
        return cls(tuple(writers), tuple(readers), len(blocks), facts.n_heads, kv_heads)

    # ---- names and numbers

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(node.name for node in self.writers)

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(node.name for node in self.readers)

    @cached_property
    def allowed(self) -> Bool[Tensor, "source destination"]:
        """Which edges there can be."""
        written = torch.tensor([node.moment for node in self.writers])
        read = torch.tensor([node.moment for node in self.readers])
        return written[:, None] < read[None, :]

    @property
    def n_edges(self) -> int:
        """How many edges there can be."""
        return int(self.allowed.sum())

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.sources)}

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.destinations)}

    def edge(self, source: str, destination: str) -> tuple[int, int]:
        """Row and column of an edge; raises SiteError where a name is unknown or the edge can't be."""
        for name, known in ((source, self._rows), (destination, self._columns)):
            if name not in known:
                raise SiteError(f"There is no node {name!r} in the graph.", remedy=nearest(name, known))
        row, column = self._rows[source], self._columns[destination]
        if not self.allowed[row, column]:
            raise SiteError(f"{source} is not computed before {destination}, so there is no such edge.")
        return row, column

    def mask(self, edges: Iterable[Sequence[str]]) -> Bool[Tensor, "source destination"]:
        """The edges named as (source, destination) pairs, or "source->destination" texts."""
        out = torch.zeros_like(self.allowed)
        for given in edges:
            source, destination = given.split("->") if isinstance(given, str) else given
            out[self.edge(source, destination)] = True
        return out

    def names(self, mask: Bool[Tensor, "source destination"]) -> list[tuple[str, str]]:
        """(source, destination) of each edge of a mask, in the model's order."""
        found = torch.nonzero(mask & self.allowed).tolist()
        return [(self.sources[row], self.destinations[column]) for row, column in found]

    def inputs_of(self, source: str) -> list[int]:
        """Columns of the inputs of the node that a source is the output of: a head's q, k, v; an MLP's one."""
        node = self.writers[self._rows[source]]
        if node.kind in ("embed", "position"):
            return []
        shared = self.n_heads // max(1, self.n_kv_heads)
        found = []
        for column, reader in enumerate(self.readers):
            if (reader.kind, reader.layer) != (node.kind, node.layer):
                continue
            grouped = ".kv" in reader.name
            if reader.head == (node.head // shared if grouped else node.head):
                found.append(column)
        return found

    def __len__(self) -> int:
        return self.n_edges

    def __repr__(self) -> str:
        return f"Graph({len(self.sources)} sources, {len(self.destinations)} destinations, {self.n_edges:,} edges)"


def _heads(subject: Subject, weights: Weights, layer: int) -> tuple[int, int]:
    """Query heads and key-value heads of a layer whose projections read the stream; (0, 0) where they don't."""
    sites = subject.sites()
    try:
        counts = [len(weights._split(layer, which)) for which in INPUTS]
    except UnavailableSiteError:
        return 0, 0
    if not sites[f"layer.{layer}.attn.result"].available:
        return 0, 0
    return counts[0], counts[1]
