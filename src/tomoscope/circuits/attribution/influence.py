"""How much each node matters for the logits, what can be left out of a graph, and how much of it is explained.

Influence: rows of absolute weights are made to sum to 1, and a node's influence is what of the logits' probability
reaches it over all paths, w (A + A^2 + ...). Edges only go up the layers, so this is one triangular solve: rows are
taken from the top, each passing on what has reached it. Pruning keeps the nodes that hold a share of the influence,
then the edges that hold a share of what passes over edges, then drops nodes that lead nowhere or have no inputs.

Scores: *replacement*, the influence that tokens have, of that of tokens and errors; *completeness*, the share of inputs
that are no errors, weighted by influence. A graph that leaves out edges or features knows how much influence goes there
(`unexpanded`), and the replacement score then has bounds.

How it can mislead: absolute weights count a path that cancels another twice; the scores say how much of the computation
is in features, not whether the features mean anything. Source: Ameisen et al. 2025 (as in circuit-tracer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.attribution.graph import AttributionGraph
from tomoscope.circuits.attribution.threshold import holding
from tomoscope.errors import DataError

NODES, EDGES = 0.80, 0.98


@dataclass(frozen=True)
class Scores:
    """How much of a graph is explained.

    Attributes:
        replacement: influence of tokens / (tokens + errors), each as known.
        completeness: influence-weighted share of inputs that are no errors.
        unexpanded: influence that goes into edges and features that were left out.
        low, high: bounds of the replacement score, whatever was left out.
    """

    replacement: float
    completeness: float
    unexpanded: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is kept of a graph.

    Attributes:
        graph: the whole one.
        nodes: [node].
        edges: [edge].
        influence: [node].
        cumulative: [node], the share of all influence held by the node and those with more.
    """

    graph: AttributionGraph
    nodes: Bool[Tensor, " node"]
    edges: Bool[Tensor, " edge"]
    influence: Float[Tensor, " node"]
    cumulative: Float[Tensor, " node"]


def node_influence(graph: AttributionGraph, edges: Bool[Tensor, " edge"] | None = None) -> Float[Tensor, " node"]:
    """Influence of every node on the logits.

    Args:
        graph: the graph.
        edges: only these, rows then summing to 1 over them; by default all, over the rows' whole mass.
    """
    return _influence(graph, shares(graph, edges))


def shares(graph: AttributionGraph, edges: Bool[Tensor, " edge"] | None = None) -> Float[Tensor, " edge"]:
    """Each edge's share of its row's absolute mass (0 for edges that are not asked for)."""
    size = graph.weights.abs()
    if edges is None:
        mass = graph.mass
    else:
        size = size * edges
        mass = torch.zeros_like(graph.mass).index_add_(0, graph.edge_rows, size)
    return size / mass.clamp(min=1e-30)[graph.edge_rows]


def _influence(graph: AttributionGraph, share: Tensor) -> Tensor:
    """What has reached each node: rows from the top, a layer at a time, pass on what they have."""
    reached = graph.logit_weights.clone()
    layers = torch.cat([graph.features[:, 0], torch.full((graph.n_logits,), graph.n_layers)])
    bounds = torch.searchsorted(layers, torch.arange(graph.n_layers + 2)).tolist()
    for layer in reversed(range(graph.n_layers + 1)):
        rows = slice(bounds[layer], bounds[layer + 1])
        some = slice(int(graph.starts[rows.start]), int(graph.starts[rows.stop]))
        given = reached[graph.row_nodes[rows]].repeat_interleave(graph.counts[rows])
        reached.index_add_(0, graph.columns[some], given * share[some])
    return reached - graph.logit_weights


def prune(graph: AttributionGraph, *, nodes: float = NODES, edges: float = EDGES) -> Pruned:
    """The part of a graph that holds most of the influence.

    Args:
        graph: the graph.
        nodes: share of the nodes' influence to keep; tokens and logits are always kept.
        edges: share of what passes over the edges between these.

    Raises:
        DataError: a share outside [0, 1].
    """
    if not (0 <= nodes <= 1 and 0 <= edges <= 1):
        raise DataError("What pruning keeps is a share between 0 and 1.", remedy=f"The field uses {NODES} and {EDGES}.")
    influence = node_influence(graph)
    node_mask = influence >= holding(influence, nodes)
    node_mask[graph.range_of("token").start :] = True
    target = graph.row_nodes[graph.edge_rows]
    between = node_mask[target] & node_mask[graph.columns]
    share = shares(graph, between)
    passed = share * (_influence(graph, share) + graph.logit_weights)[target]
    edge_mask = between & (passed >= holding(passed, edges)) & (passed > 0)
    node_mask, edge_mask = _connected(graph, node_mask, edge_mask)
    order = influence.argsort(descending=True, stable=True)
    cumulative = torch.empty_like(influence)
    cumulative[order] = influence[order].cumsum(0) / influence.sum().clamp(min=1e-30)
    return Pruned(graph, node_mask, edge_mask, influence, cumulative)


def _connected(graph: AttributionGraph, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Drop features and errors that lead nowhere and features without inputs, until none is left."""
    nodes, edges = nodes.clone(), edges.clone()
    target = graph.row_nodes[graph.edge_rows]
    sources, features = graph.range_of("token").start, graph.n_features
    while True:
        leads, fed = torch.zeros_like(nodes), torch.zeros_like(nodes)
        leads[graph.columns[edges].long()], fed[target[edges]] = True, True
        kept = nodes.clone()
        kept[:sources] &= leads[:sources]
        kept[:features] &= fed[:features]
        if bool((kept == nodes).all()):
            return nodes, edges
        nodes = kept
        edges &= nodes[target] & nodes[graph.columns]


def scores(graph: AttributionGraph) -> Scores:
    """Replacement and completeness scores of a whole (unpruned) graph."""
    share = shares(graph)
    influence = _influence(graph, share)
    out = influence + graph.logit_weights
    token, error = (influence[list(graph.range_of(kind))].sum() for kind in ("token", "error"))
    errors = graph.range_of("error")
    wrong = (graph.columns >= errors.start) & (graph.columns < errors.stop)
    lost = torch.zeros_like(out).index_add_(0, graph.row_nodes[graph.edge_rows], share * wrong)
    kept = torch.zeros_like(graph.mass).index_add_(0, graph.edge_rows, share)
    unexpanded = ((1 - kept).clamp(min=0) * out[graph.row_nodes]).sum()
    every = (token + error + unexpanded).clamp(min=1e-30)
    return Scores(
        float(token / (token + error).clamp(min=1e-30)), float(((1 - lost) * out).sum() / out.sum()),
        float(unexpanded), float(token / every), float((token + unexpanded) / every),
    )  # fmt: skip
