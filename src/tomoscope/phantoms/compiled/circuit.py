"""The true circuit of a compiled network: who reads what whom has written, edge by edge.

Nodes: "embed" (tokens and BOS), "position", "a0.h1" (layer 0 head 1), "m0", "logits". An edge goes from a node to a
node's input; a head's inputs are apart: "a0.h1<q>", "a0.h1<k>", "a0.h1<v>". There is an edge where the source writes
directions that the destination reads, and the destination's own output reaches the logits. Distractors (heads and
neurons that write where nobody reads) have none.

How it can mislead: a true edge need not show. *Constant* edges carry what is the same in every prompt of one length
(BOS, positions, the length), so no patch from another prompt of that length can find them. *Idle* edges keep a head
clean in a case that its readers could cope with: putting nothing in place of what they carry (BOS alone) changes no
answer; found by doing that on every input. Both are listed, so that a method is not blamed for missing them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tomoscope.phantoms.compiled.lower import Network
from tomoscope.phantoms.compiled.parts import Head, Variable
from tomoscope.phantoms.compiled.rasp import Indices, Tokens, order

Edge = tuple[str, str]


@dataclass(frozen=True)
class Circuit:
    """Nodes, edges with the names of the variables each carries, and where each operation is computed."""

    edges: Mapping[Edge, tuple[str, ...]]
    places: Mapping[str, str]
    """Variable -> the node that writes it."""
    idle: tuple[Edge, ...] = ()
    """True edges in whose place nothing does as well, on every input."""
    constant: tuple[Edge, ...] = ()
    """True edges that carry the same in every prompt of one length."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node of an edge, heads without their inputs, in the order of the forward pass."""
        names = {source for source, _ in self.edges} | {node_of(destination) for _, destination in self.edges}
        return tuple(sorted(names, key=node_order))

    def to_json(self) -> dict[str, Any]:
        """The value of a card's "circuit"."""
        return {
            "nodes": list(self.nodes),
            "edges": [list(edge) for edge in self.edges],
            "idle": [list(edge) for edge in self.idle],
            "constant": [list(edge) for edge in self.constant],
        }


def node_of(place: str) -> str:
    """The node of a head's input: "a0.h1" of "a0.h1<q>"."""
    return place.partition("<")[0]


def node_order(node: str) -> tuple[float, str]:
    """Sorts nodes by the forward pass: embeddings, attention and MLP layer by layer, logits."""
    ends = {"embed": -2.0, "position": -1.0, "logits": float("inf")}
    if node in ends:
        return ends[node], node
    layer, _, head = node[1:].partition(".h")
    return 2.0 * int(layer) + (node[0] == "m"), head.zfill(4)


def only_bos(circuit: Circuit, network: Network) -> list[Edge]:
    """Edges that carry BOS and nothing else into scores or neurons: those that could be idle."""
    return [
        (source, place)
        for (source, place), carried in circuit.edges.items()
        if carried == (network.bos.name,) and not place.endswith("<v>")
    ]


def trace_circuit(network: Network, placed: Mapping[Head, tuple[int, int]]) -> Circuit:
    """The circuit of a network whose heads have been given places (layer, head)."""
    writers: dict[Variable, str] = {network.bos: "embed"}
    writers[network.variables[Tokens()]] = "embed"
    writers[network.variables[Indices()]] = "position"
    found: dict[Edge, list[str]] = defaultdict(list)
    reads: list[tuple[str, tuple[Variable, ...]]] = []
    for head in network.heads:
        layer, index = placed[head]
        name = f"a{layer}.h{index}"
        writers[head.writes] = name
        reads += [(f"{name}<q>", head.query.variables), (f"{name}<k>", head.key.variables)]
        reads.append((f"{name}<v>", (head.value,)))
    for neurons in network.neurons:
        writers[neurons.writes] = f"m{neurons.time // 2}"
        reads.append((writers[neurons.writes], neurons.reading.variables))
    assert network.output is not None
    reads.append(("logits", (network.output,)))
    for destination, variables in reads:
        for variable in variables:
            found[writers[variable], destination].append(variable.name)
    varying = {variable.name for sop, variable in network.variables.items() if Tokens() in order(sop)}
    varying |= {head.writes.name for head in network.heads if Tokens() in order(head.sop)}
    ordered = sorted(found, key=lambda edge: (node_order(node_of(edge[1])), edge[1], node_order(edge[0])))
    edges = {edge: tuple(sorted(set(found[edge]))) for edge in ordered}
    constant = tuple(edge for edge, carried in edges.items() if not varying & set(carried))
    return Circuit(edges, {variable.name: node for variable, node in writers.items()}, constant=constant)
