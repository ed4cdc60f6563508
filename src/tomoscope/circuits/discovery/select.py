"""Circuits from scores: the top n edges, greedily from the logits, above a threshold; and random ones of equal size.

    top_edges(scores, 100)             the 100 largest, dead ends pruned
    greedy_edges(scores, 100)          100 edges grown from the logits: each new edge ends in a node already reached
    edges_above(scores, 0.01)
    random_circuit(graph, 100, seed=0) as many edges, each on a way from an embedding to the logits
    with_heads_exchanged(circuit, seed=0) the same pattern with other heads

`scores` is anything with a `graph` and `scores` [source, destination] (`EdgeScores`, a `Circuit`).

How it can mislead: with absolute values an edge that works against the behaviour is part of the circuit; without them,
dropping those edges can make a circuit "more faithful" than the model. Top-n edges need not hang together: of n asked
for, far fewer can be left after pruning, and `how` says both numbers. A random circuit without the demand to be
connected is a weak control, because pruning leaves next to nothing of it; a connected one is the one to beat.

Steps: keys of the allowed edges; a stable sort, or a heap that grows from the logits; pruning.
"""

from __future__ import annotations

import heapq
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.circuit import Circuit, inputs_matrix, prune, starts
from tomoscope.circuits.graph import LOGITS, Graph
from tomoscope.errors import DataError

TRIES = 1000


class Scored(Protocol):
    """Something with a score for each edge of a graph."""

    @property
    def graph(self) -> Graph:
        """The graph."""
        ...

    @property
    def scores(self) -> Any:
        """[source, destination]; NaN for edges without a score, which are never chosen."""
        ...


def top_edges(scores: Scored, n: int, *, absolute: bool = True, pruned: bool = True) -> Circuit:
    """The n edges with the largest scores, in the model's order where they are equal.

    Args:
        scores: of the edges.
        n: how many edges to choose.
        absolute: by absolute value, so that edges against the behaviour belong to it.
        pruned: without dead ends, so fewer than n may be left.
    """
    keys = _keys(scores, absolute)
    _check(scores.graph, n)
    order = torch.argsort(keys.flatten(), descending=True, stable=True)[:n]
    mask = torch.zeros_like(scores.graph.allowed)
    mask.view(-1)[order] = True
    mask &= keys > -torch.inf
    return _made(scores, mask, pruned, selection="top", asked=n, absolute=absolute)


def edges_above(scores: Scored, threshold: float, *, absolute: bool = True, pruned: bool = True) -> Circuit:
    """The edges with a score of at least a threshold."""
    mask = _keys(scores, absolute) >= threshold
    return _made(scores, mask & scores.graph.allowed, pruned, selection="threshold", asked=threshold, absolute=absolute)


def greedy_edges(scores: Scored, n: int, *, absolute: bool = True, pruned: bool = True) -> Circuit:
    """Grow n edges from the logits: always the largest score among edges into nodes already reached.

    Every edge so leads to the logits; nodes that no edge leads into are pruned.
    """
    graph, keys = scores.graph, _keys(scores, absolute)
    _check(graph, n)
    order = torch.argsort(keys, dim=0, descending=True, stable=True).T.tolist()  # [destination][place] -> source
    lists = keys.T.tolist()
    inputs = [torch.nonzero(row)[:, 0].tolist() for row in inputs_matrix(graph)]
    heap: list[tuple[float, int, int]] = []
    opened: set[int] = set()

    def offer(column: int, place: int) -> None:
        key = lists[column][order[column][place]] if place < len(order[column]) else -float("inf")
        if key > -float("inf"):
            heapq.heappush(heap, (-key, column, place))

    def reach(columns: list[int]) -> None:
        # a group's keys and values are the inputs of several heads: they are offered once
        for column in columns:
            if column not in opened:
                opened.add(column)
                offer(column, 0)

    reach([column for column, node in enumerate(graph.readers) if node.kind == LOGITS])
    mask = torch.zeros_like(graph.allowed)
    for _ in range(n):
        if not heap:
            break
        _, column, place = heapq.heappop(heap)
        row = order[column][place]
        mask[row, column] = True
        offer(column, place + 1)
        reach(inputs[row])
    return _made(scores, mask, pruned, selection="greedy", asked=n, absolute=absolute)


def random_circuit(graph: Graph, n: int, *, seed: int, connected: bool = True) -> Circuit:
    """Draw n edges at random.

    Args:
        graph: of the model.
        n: how many edges.
        seed: of the draw.
        connected: every edge on a way from an embedding to the logits, so that all n count: edges are drawn uniformly
            one after another, and one whose ends hang in the air brings a random way to the circuit with it; else any n
            edges.

    Raises:
        DataError: n is larger than the graph, or no connected circuit of that size was found.
    """
    _check(graph, n)
    generator = np.random.default_rng(seed)
    how = {"method": "random", "seed": seed, "connected": connected, "asked": n}
    if not connected:
        places = torch.nonzero(graph.allowed.flatten())[:, 0].numpy()
        mask = torch.zeros_like(graph.allowed)
        mask.view(-1)[torch.from_numpy(generator.permutation(places)[:n])] = True
        return Circuit(graph, mask, how=how)
    growth = _Growth(graph)
    for _ in range(TRIES):
        mask = growth.grow(n, generator)
        if mask is not None:
            return Circuit(graph, mask, how=how)
    raise DataError(
        f"No connected circuit of exactly {n} edges was found in {TRIES} tries.", remedy="Ask for another size."
    )


def with_heads_exchanged(circuit: Circuit, *, seed: int) -> Circuit:
    """The same circuit with other heads: those of each layer change places at random, all else stays.

    As many edges, of the same kinds, between the same layers, in the same pattern: what is left to tell the two apart
    is which heads it names. Where heads share keys and values, groups change places, and heads inside them.
    """
    graph, generator = circuit.graph, np.random.default_rng(seed)
    shared = graph.n_heads // max(1, graph.n_kv_heads)
    rows, columns = list(range(len(graph.writers))), list(range(len(graph.readers)))
    for layer in range(graph.n_layers):
        groups = generator.permutation(graph.n_kv_heads)
        inside = [generator.permutation(shared) for _ in range(graph.n_kv_heads)]
        heads = [int(groups[h // shared] * shared + inside[h // shared][h % shared]) for h in range(graph.n_heads)]
        places = {
            node.head: row for row, node in enumerate(graph.writers) if (node.kind, node.layer) == ("head", layer)
        }
        for head, row in places.items():
            rows[row] = places[heads[head]]
        for which in ("q", "k", "v"):
            there = {
                node.head: column for column, node in enumerate(graph.readers)
                if (node.kind, node.layer, node.input) == ("head", layer, which)
            }  # fmt: skip
            order = heads if len(there) == graph.n_heads else groups.tolist()
            for head, column in there.items():
                columns[column] = there[order[head]]
    mask = torch.zeros_like(circuit.mask)
    mask[torch.tensor(rows)[:, None], torch.tensor(columns)[None]] = circuit.mask
    return Circuit(graph, mask, how={"method": "heads exchanged", "seed": seed, "of": dict(circuit.how)})


class _Growth:
    """Random connected circuits of a graph, by adding ways from an embedding to the logits."""

    def __init__(self, graph: Graph) -> None:
        self.allowed = graph.allowed.numpy()
        self.inputs = inputs_matrix(graph).numpy()
        self.starts = starts(graph).numpy()
        self.ends = np.array([node.kind == LOGITS for node in graph.readers])
        self.edges = np.argwhere(self.allowed)

    def grow(self, n: int, generator: np.random.Generator) -> Bool[Tensor, "source destination"] | None:
        """A mask of exactly n edges, or None where this attempt ran into a dead end."""
        mask = np.zeros_like(self.allowed)
        # sources with a way from the start, and destinations with one to the end
        fed, read = self.starts.copy(), self.ends.copy()
        left, order = n, self.edges[generator.permutation(len(self.edges))]
        for place, (row, column) in enumerate(order):
            if left == 0:
                break
            if fed.all() and read.all():
                rest = order[place:]
                rest = rest[~mask[rest[:, 0], rest[:, 1]]][:left]
                mask[rest[:, 0], rest[:, 1]] = True
                left -= len(rest)
                break
            if mask[row, column]:
                continue
            way = [(row, column)]
            way = way if fed[row] else self._back(row, fed, generator) + way
            way = way if read[column] else way + self._on(column, read, generator)
            if len(way) > left:
                continue
            rows, columns = (list(part) for part in zip(*way, strict=True))
            mask[rows, columns] = True
            left -= len(way)
            # a group's keys and values feed several heads, and an edge out of a head lets all its inputs be read
            fed |= self.inputs[:, columns].any(1)
            read |= self.inputs[rows].any(0)
        return torch.from_numpy(mask) if left == 0 else None

    def _back(self, row: int, fed: np.ndarray, generator: np.random.Generator) -> list[tuple[int, int]]:
        """A random way from a source that is fed to a source that is not, as edges."""
        way: list[tuple[int, int]] = []
        while not fed[row]:
            column = generator.choice(np.flatnonzero(self.inputs[row]))
            before = generator.choice(np.flatnonzero(self.allowed[:, column]))
            way.insert(0, (int(before), int(column)))
            row = int(before)
        return way

    def _on(self, column: int, read: np.ndarray, generator: np.random.Generator) -> list[tuple[int, int]]:
        """A random way from a destination that is not read to one that is, as edges."""
        way: list[tuple[int, int]] = []
        while not read[column]:
            row = generator.choice(np.flatnonzero(self.inputs[:, column]))
            column = generator.choice(np.flatnonzero(self.allowed[row]))
            way.append((int(row), int(column)))
        return way


def _keys(scores: Scored, absolute: bool) -> Float[Tensor, "source destination"]:
    values = torch.as_tensor(scores.scores).double().cpu()
    keys = (values.abs() if absolute else values).nan_to_num(-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return keys.masked_fill(~scores.graph.allowed, -torch.inf)


def _check(graph: Graph, n: int) -> None:
    if not 0 <= n <= graph.n_edges:
        raise DataError(f"{n} edges were asked for; the graph has {graph.n_edges:,}.", remedy="Ask for fewer.")


def _made(scores: Scored, mask: Tensor, pruned: bool, **selection: Any) -> Circuit:
    """The circuit, with what the scores say of themselves."""
    how = described(scores) | selection
    chosen = int(mask.sum())
    graph = scores.graph
    kept = prune(graph, mask) if pruned else mask
    if int(kept.sum()) != chosen:
        how["before pruning"] = chosen
    return Circuit(graph, kept, torch.as_tensor(scores.scores), how)


def described(scores: Any) -> dict[str, Any]:
    """What scores say of themselves: method, metric, ablation, number of prompts."""
    told = getattr(scores, "how", None)
    if told is not None:
        return dict(told)
    out = {key: getattr(scores, key) for key in ("method", "metric", "steps") if hasattr(scores, key)}
    out |= {"prompts": scores.n} if hasattr(scores, "n") else {}
    return out | ({"choices": scores.choices.to_json()} if hasattr(scores, "choices") else {})
