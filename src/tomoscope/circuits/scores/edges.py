"""Which edges matter: the effect of ablating each alone, exactly or estimated from gradients.

    scores = edge_scores(subject, pairs)                                     EAP-IG-inputs, the logit difference
    scores = edge_scores(subject, pairs, method="exact", metric=KL(clean))
    scores.top(20)                                                           the largest by size

A score is the metric of the clean run less the metric with that edge alone carrying its ablated value (mean over
pairs): positive where the edge works for the metric. Methods, from exact to cheap:

- "exact": edge activation patching, one row of a batch an edge.
- "EAP-IG-activations": for each source, gradients averaged on the way from its clean to its ablated output; sums over a
  source's edges to the effect of ablating it whole. One path a source.
- "EAP-IG-inputs": gradients averaged while the token embeddings go from ablated to clean.
- "clean-corrupted": the two ends of that path alone. "EAP": the clean end alone.
- "information-flow-routes": how near each source is to the stream that a destination reads; no metric, no ablation.
- "EAP-IG-activations (EAP-IG)": the public code's variant, which gives all edges the gradients of every source's path.

How it can mislead: estimates miss what a saturated softmax or norm hides (EAP gives 0 where the gradient is 0) and what
backup heads take over; where experts are chosen the metric jumps, which no gradient sees; a score says what one edge
does with all others intact. Compare with "exact" on a few edges.

Sources: Syed et al. 2023 (arXiv:2310.10348, EAP); Hanna et al. 2024 (arXiv:2403.17806, EAP-IG); Marks et al. 2024
(arXiv:2403.19647, per-source paths); Ferrando & Voita 2024 (arXiv:2403.00824, information flow routes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.graph import Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs, encode_pairs
from tomoscope.circuits.scores import methods
from tomoscope.circuits.scores.gradients import Norms
from tomoscope.circuits.wiring.ablation import Ablation, Choices
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.errors import DataError
from tomoscope.model import Subject

Method = Literal[
    "exact",
    "EAP",
    "EAP-IG-inputs",
    "EAP-IG-activations",
    "EAP-IG-activations (EAP-IG)",
    "clean-corrupted",
    "information-flow-routes",
]
METHODS: tuple[str, ...] = get_args(Method)
"""The ways to score edges."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """A score for every edge.

    Attributes:
        graph: whose edges.
        scores: [source, destination], mean over pairs of the metric that is lost without the edge (or its estimate);
            0 where there can be no edge.
        method: one of `METHODS`.
        metric: the metric's name; "" where the method has none.
        choices: the six choices of the ablation.
        n: pairs.
        steps: of the path, for methods that have one.
        clean: mean metric of the clean run; NaN where the method has none.
        by_position: [source, destination, position] (counted from a prompt's first token), if asked for; sums to
            `scores`.
    """

    graph: Graph
    scores: Float[Tensor, "source destination"]
    method: str
    metric: str
    choices: Choices
    n: int
    steps: int = 1
    clean: float = float("nan")
    by_position: Float[Tensor, "source destination position"] | None = None

    def __getitem__(self, edge: tuple[str, str]) -> float:
        """The score of an edge named by its source and destination."""
        return float(self.scores[self.graph.edge(*edge)])

    def ranked(self, *, signed: bool = False) -> list[tuple[str, str, float]]:
        """(source, destination, score) of all edges: largest first, by size or (signed) by value."""
        rows, columns = torch.nonzero(self.graph.allowed, as_tuple=True)
        values = self.scores[rows, columns]
        order = (values if signed else values.abs()).argsort(descending=True, stable=True).tolist()
        names = self.graph.sources, self.graph.destinations
        return [(names[0][rows[i]], names[1][columns[i]], float(values[i])) for i in order]

    def top(self, n: int, *, signed: bool = False) -> Tensor:
        """[source, destination] mask of the n edges of the largest size (signed: of the largest value)."""
        values = self.scores if signed else self.scores.abs()
        flat = values.masked_fill(~self.graph.allowed, -torch.inf).flatten()
        keep = torch.zeros(flat.shape, dtype=torch.bool)
        keep[flat.argsort(descending=True, stable=True)[: min(n, self.graph.n_edges)]] = True
        return keep.reshape(values.shape)

    def __repr__(self) -> str:
        of = f" of {self.metric}" if self.metric else ""
        return f"EdgeScores({self.method}{of}, {self.graph.n_edges:,} edges, {self.n} pairs, {self.choices.value})"


def edge_scores(
    subject: Subject,
    pairs: Any,
    *,
    method: Method = "EAP-IG-inputs",
    graph: Graph | None = None,
    metric: Metric | None = None,
    ablation: Ablation | None = None,
    steps: int = 5,
    by_position: bool = False,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EdgeScores:
    """Score every edge of a model.

    Args:
        subject: the model.
        pairs: a `data.PairSet`, or `Pairs`; streamed through in batches that fit memory.
        method: see the module's docstring.
        graph: `Graph.of(subject)` by default.
        metric: of the pairs, derivable by torch; their logit difference by default.
        ablation: what an ablated edge carries; the corrupted prompt's value by default.
        steps: of the path of integrated gradients.
        by_position: also keep positions apart (methods of one gradient a destination: not exact, not per source).
        batch_size: pairs a batch; as many as fit by default. It does not change the scores.
        progress: called with work done and in all.

    Raises:
        DataError: an unknown method, or positions asked of a method that has none.
        SiteError: the model has no graph of edges.
    """
    if method not in METHODS:
        raise DataError(f"The method {method!r} is unknown.", remedy=f"It is one of {', '.join(METHODS)}.")
    if by_position and method in ("exact", "EAP-IG-activations"):
        raise DataError(f"{method!r} gives no scores by position.", remedy="Take EAP or EAP-IG-inputs.")
    if steps < 1:
        raise DataError(f"A path needs at least one step, not {steps}.")
    made = pairs if isinstance(pairs, Pairs) else encode_pairs(subject, pairs)
    ablation = ablation or Ablation.paired(made.corrupted)
    metric, ports = metric or made.metric(), Ports.of(subject, graph)
    work = methods.Work(subject, ports, Norms(subject), made.clean, ablation, metric, batch_size, progress)
    run = {
        "exact": methods.exact,
        "EAP": lambda w: methods.along_inputs(w, (1.0,), (1.0,), by_position),
        "clean-corrupted": lambda w: methods.along_inputs(w, (1.0, 0.0), (0.5, 0.5), by_position),
        "EAP-IG-inputs": lambda w: methods.along_inputs(
            w, tuple(k / steps for k in range(steps)), (1 / steps,) * steps, by_position
        ),
        "EAP-IG-activations": lambda w: methods.along_sources(w, steps),
        "EAP-IG-activations (EAP-IG)": lambda w: methods.along_layers_added(w, steps, by_position),
        "information-flow-routes": lambda w: methods.flow(w, by_position),
    }[method]
    total, clean = run(work)
    n = len(made)
    mean = total / n
    scores = mean.sum(0)
    flows = method == "information-flow-routes"
    choices = ablation.choices(set="one edge at a time")
    if flows:
        choices = Choices(value="none (nearness of activations)", set="none", direction="none", component="none")
    return EdgeScores(
        ports.graph,
        scores,
        method,
        "" if flows else metric.name,
        choices,
        n,
        steps if "IG" in method else 1,
        clean / n,
        mean.permute(1, 2, 0) if by_position else None,
    )
