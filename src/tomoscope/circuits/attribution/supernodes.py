"""Supernodes: nodes of a graph that mean one thing, seen as one node.

    merged = merge(graph, [Supernode("Texas", (3, 17)), Supernode("say a capital", (40, 41))])
    merged.weights[target, source]      summed direct effects
    merged.shares[target, source]       of what the target takes in, weighted by its nodes' influence

How it can mislead: which nodes belong together is the reader's judgement, and effects inside a group are not seen;
effects of opposite sign cancel in the sum (`shares` are of absolute values).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.attribution.graph import AttributionGraph
from tomoscope.circuits.attribution.influence import node_influence, shares
from tomoscope.errors import DataError

OTHERS = ("other features", "errors", "other tokens", "other logits")
"""What is in no group, by the kind of node."""


@dataclass(frozen=True)
class Supernode:
    """Nodes that mean one thing: a label and the nodes' numbers."""

    label: str
    nodes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Merged:
    """A graph of groups.

    Attributes:
        labels: of each group; the nodes in none of those given are in `OTHERS`.
        weights: [target, source] summed direct effects.
        shares: [target, source] of what the target takes in, 0 to 1.
        influence: [group], of their nodes together.
    """

    labels: tuple[str, ...]
    weights: Float[Tensor, "target source"]
    shares: Float[Tensor, "target source"]
    influence: Float[Tensor, " group"]

    def __repr__(self) -> str:
        return f"Merged({', '.join(self.labels)})"


def merge(graph: AttributionGraph, groups: Sequence[Supernode]) -> Merged:
    """Sum a graph's edges over groups of nodes.

    Args:
        graph: the graph.
        groups: disjoint; nodes in none go into groups of their kind.

    Raises:
        DataError: a node is in two groups, or two groups have one label.
    """
    labels = [group.label for group in groups]
    if len({*labels, *OTHERS}) < len(labels) + len(OTHERS):
        raise DataError("Each supernode needs a label of its own.", remedy=f"{', '.join(OTHERS)} are taken.")
    of = torch.full((graph.n_nodes,), -1)
    for place, group in enumerate(groups):
        nodes = torch.tensor(group.nodes, dtype=torch.long)
        if bool((nodes < 0).any() | (nodes >= graph.n_nodes).any()) or bool((of[nodes] >= 0).any()):
            raise DataError(f"Supernode {group.label!r} holds a node that is not there, or that another group holds.")
        of[nodes] = place
    for place, kind in enumerate(("feature", "error", "token", "logit")):
        numbers = torch.tensor(list(graph.range_of(kind)), dtype=torch.long)
        of[numbers[of[numbers] < 0]] = len(groups) + place
    count = len(groups) + len(OTHERS)
    target = graph.row_nodes[graph.edge_rows]
    pair = of[target] * count + of[graph.columns]
    weights = torch.zeros(count * count, dtype=graph.weights.dtype).index_add_(0, pair, graph.weights)
    influence = node_influence(graph) + graph.logit_weights
    taken = torch.zeros_like(weights).index_add_(0, pair, shares(graph) * influence[target])
    rows = graph.row_nodes
    given = torch.zeros(count, dtype=weights.dtype).index_add_(0, of[rows], influence[rows])
    every = torch.zeros(count, dtype=weights.dtype).index_add_(0, of, influence)
    part = taken.view(count, count) / given.clamp(min=1e-30)[:, None]
    return Merged((*labels, *OTHERS), weights.view(count, count), part, every)


def same_features(graph: AttributionGraph, nodes: Sequence[int] | None = None) -> list[Supernode]:
    """Groups of one feature at several positions.

    Args:
        graph: the graph.
        nodes: among these; all features by default.
    """
    found: dict[tuple[int, int], list[int]] = {}
    for number in range(graph.n_features) if nodes is None else nodes:
        node = graph.node(number)
        if node.kind == "feature":
            found.setdefault((node.layer, node.index), []).append(number)
    return [Supernode(f"L{layer} f{index}", tuple(some)) for (layer, index), some in found.items() if len(some) > 1]
