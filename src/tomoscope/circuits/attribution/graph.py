"""An attribution graph: which features, tokens and errors of a prompt add what to which features and logits.

    graph.features                   [feature, 3] layer, position, index
    graph.inputs(node), graph.outputs(node)         the strongest edges, named
    graph.adjacency()                [node, node], row = target, column = source, for a graph that is small enough

Nodes in order: features (by layer, position, index), errors (by layer, position), tokens, logits. Rows are the nodes
that have inputs, features and logits; a row's edges, its bias (constants of the model) and its rest (edges that were
not kept) sum to the node's pre-activation or logit. Edges are kept in compressed rows, so a graph costs as many numbers
as it has edges that are not zero.

How it can mislead: an edge is a direct effect with everything else frozen, so two edges that cancel look like two
strong ones; an edge's weight holds the source's activation, and is no weight of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.errors import DataError, SiteError

KINDS = ("feature", "error", "token", "logit")
"""The kinds of nodes, in their order."""


@dataclass(frozen=True)
class GraphNode:
    """One node of a graph.

    Attributes:
        number: its place among the nodes.
        kind: "feature", "error", "token" or "logit".
        layer: of a feature or error; -1 for a token, the number of layers for a logit.
        position: token position.
        index: the feature's number, the token's id; -1 for an error.
        name: "L3 p7 f1024", "L3 p7 error", "token ' the' p2", "logit ' Paris'".
    """

    number: int
    kind: str
    layer: int
    position: int
    index: int
    name: str


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """A prompt's attribution graph; see the module's docstring.

    Attributes:
        model: name of the model.
        scan: name of the transcoders.
        ids: the prompt's tokens.
        tokens: their texts.
        n_layers: blocks of the model.
        features: [feature, 3] layer, position, index of the features that are nodes.
        activations: [feature].
        logit_ids: token of each logit; the vocabulary's size and up for a direction that is no token.
        logit_names: their texts.
        logit_probabilities: [logit].
        starts: [row + 1], where each row's edges begin; rows are features, then logits.
        columns: [edge], the source's number.
        weights: [edge].
        values: [row], the pre-activation or demeaned logit that the row sums to.
        bias: [row], what comes from constants.
        rest: [row], the sum of edges that were not kept (small ones, and those from features that are no nodes).
        mass: [row], the sum of all edges' absolute values, kept or not.
        zeroed: first positions without features and errors.
        settings: how the graph was made, plain values.
    """

    model: str
    scan: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    n_layers: int
    features: Int[Tensor, "feature 3"]
    activations: Float[Tensor, " feature"]
    logit_ids: tuple[int, ...]
    logit_names: tuple[str, ...]
    logit_probabilities: Float[Tensor, " logit"]
    starts: Int[Tensor, " bound"]
    columns: Int[Tensor, " edge"]
    weights: Float[Tensor, " edge"]
    values: Float[Tensor, " row"]
    bias: Float[Tensor, " row"]
    rest: Float[Tensor, " row"]
    mass: Float[Tensor, " row"]
    zeroed: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.features) + len(self.logit_ids)
        sizes = {len(one) for one in (self.values, self.bias, self.rest, self.mass)}
        if sizes != {rows} or len(self.starts) != rows + 1 or int(self.starts[-1]) != len(self.columns):
            raise DataError("This graph's rows do not fit its nodes.", remedy="Was its file cut short?")

    # ---- sizes and numbers

    @property
    def n_features(self) -> int:
        """Features that are nodes."""
        return len(self.features)

    @property
    def n_positions(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids)

    @property
    def n_logits(self) -> int:
        """Logits that are nodes."""
        return len(self.logit_ids)

    @property
    def n_nodes(self) -> int:
        """Features, errors, tokens and logits."""
        return self.n_features + (self.n_layers + 1) * self.n_positions + self.n_logits

    @property
    def n_edges(self) -> int:
        """Edges kept."""
        return len(self.weights)

    def range_of(self, kind: str) -> range:
        """The numbers of the nodes of a kind."""
        bounds = [0, self.n_features, self.n_layers * self.n_positions, self.n_positions, self.n_logits]
        ends = torch.tensor(bounds).cumsum(0).tolist()
        place = KINDS.index(kind)
        return range(ends[place], ends[place + 1])

    @cached_property
    def row_nodes(self) -> Int[Tensor, " row"]:
        """The node of each row."""
        logits = self.range_of("logit")
        return torch.cat([torch.arange(self.n_features), torch.arange(logits.start, logits.stop)])

    def row_of(self, node: int) -> int:
        """The row of a node; raises SiteError for an error or token, which has no inputs."""
        self._check(node)
        logits = self.range_of("logit")
        if node < self.n_features:
            return node
        if node in logits:
            return node - logits.start + self.n_features
        raise SiteError(f"{self.node(node).name} has no inputs: it is a source only.")

    @cached_property
    def counts(self) -> Int[Tensor, " row"]:
        """Edges of each row."""
        return self.starts[1:] - self.starts[:-1]

    @cached_property
    def edge_rows(self) -> Int[Tensor, " edge"]:
        """The row of each edge."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)

    @cached_property
    def logit_weights(self) -> Float[Tensor, " node"]:
        """The logits' probabilities among all nodes, 0 elsewhere: where influence starts."""
        out = torch.zeros(self.n_nodes, dtype=self.weights.dtype)
        out[self.range_of("logit").start :] = self.logit_probabilities.to(out)
        return out

    @property
    def gap(self) -> float:
        """By how much the worst row fails to sum to its value, relative to what is summed."""
        edges = torch.segment_reduce(self.weights, "sum", lengths=self.counts)  # ty: ignore
        total = edges + self.rest + self.bias
        size = self.mass + self.bias.abs() + self.values.abs()
        return float(((total - self.values).abs() / size.clamp(min=1e-30)).max()) if len(total) else 0.0

    # ---- nodes and edges

    def _check(self, node: int) -> None:
        if not 0 <= node < self.n_nodes:
            raise SiteError(f"There is no node {node}; the graph has {self.n_nodes}.")

    def node(self, number: int) -> GraphNode:
        """A node by its number."""
        self._check(number)
        kind = next(kind for kind in KINDS if number in self.range_of(kind))
        at = number - self.range_of(kind).start
        if kind == "feature":
            layer, position, index = self.features[at].tolist()
            return GraphNode(number, kind, layer, position, index, f"L{layer} p{position} f{index}")
        if kind == "error":
            layer, position = divmod(at, self.n_positions)
            return GraphNode(number, kind, layer, position, -1, f"L{layer} p{position} error")
        if kind == "token":
            return GraphNode(number, kind, -1, at, self.ids[at], f"token {self.tokens[at]!r} p{at}")
        name = f"logit {self.logit_names[at]!r}"
        return GraphNode(number, kind, self.n_layers, self.n_positions - 1, self.logit_ids[at], name)

    @cached_property
    def _feature_numbers(self) -> dict[tuple[int, int, int], int]:
        return {(a, b, c): number for number, (a, b, c) in enumerate(self.features.tolist())}

    def number_of(self, layer: int, position: int, index: int) -> int:
        """A feature's number; raises SiteError where it is no node."""
        found = self._feature_numbers.get((layer, position, index))
        if found is None:
            raise SiteError(
                f"Feature {index} of layer {layer} at position {position} is no node of this graph.",
                remedy="It is not active there, or the graph was made with fewer features.",
            )
        return found

    def row(self, node: int) -> tuple[Int[Tensor, " edge"], Float[Tensor, " edge"]]:
        """The sources and weights of a node's inputs."""
        row = self.row_of(node)
        some = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return self.columns[some], self.weights[some]

    def inputs(self, node: int, n: int = 10) -> list[tuple[GraphNode, float]]:
        """The n inputs of a node with the largest weights, whatever their sign."""
        columns, weights = self.row(node)
        best = weights.abs().topk(min(n, len(weights))).indices
        return [(self.node(int(columns[i])), float(weights[i])) for i in best]

    def outputs(self, node: int, n: int = 10) -> list[tuple[GraphNode, float]]:
        """The n nodes that a node adds most to, whatever the sign."""
        self._check(node)
        mine = torch.nonzero(self.columns == node)[:, 0]
        best = mine[self.weights[mine].abs().topk(min(n, len(mine))).indices]
        return [(self.node(int(self.row_nodes[self.edge_rows[i]])), float(self.weights[i])) for i in best]

    def weight(self, source: int, target: int) -> float:
        """An edge's weight, 0 where there is none."""
        columns, weights = self.row(target)
        found = weights[columns == source]
        return float(found[0]) if len(found) else 0.0

    def adjacency(self) -> Float[Tensor, "target source"]:
        """[node, node], row = target; as large as nodes squared."""
        out = torch.zeros(self.n_nodes, self.n_nodes, dtype=self.weights.dtype)
        out[self.row_nodes[self.edge_rows], self.columns] = self.weights
        return out

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({self.model}, {self.n_positions} tokens: {self.n_features:,} features, "
            f"{self.n_logits} logits, {self.n_edges:,} edges)"
        )


def names(graph: AttributionGraph, nodes: Sequence[int]) -> list[str]:
    """Names of some nodes."""
    return [graph.node(number).name for number in nodes]
