"""An attribution graph as a picture that a person can read: tokens below, logits above, features where they fire.

Nodes stand on their layer, over their token. A feature that fires at many tokens is drawn once for each. How it can
mislead: of the pruned graph only the most influential nodes are drawn, and into each only its strongest edges from
other drawn nodes; the caption says how many were left out, and how much of the influence is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tomoscope.circuits.attribution import AttributionGraph, Pruned
from tomoscope.findings.figures import Figure, graph

SHOWN, INPUTS = 30, 5
"""The most nodes of a picture besides tokens and logits, and the most edges into one node."""


def graph_figure(pruned: Pruned, heading: str, *, labels: Mapping[int, str] | None = None, most: int = SHOWN) -> Figure:
    """The pruned graph's most influential nodes on their layers.

    Args:
        pruned: what is kept of the graph.
        heading: of the picture.
        labels: what nodes mean, by their number.
        most: nodes to draw besides tokens and logits.
    """
    whole, labels = pruned.graph, labels or {}
    kept = torch.nonzero(pruned.nodes)[:, 0].tolist()
    inner = [n for n in kept if whole.node(n).kind in ("feature", "error")]
    drawn_inner = sorted(inner, key=lambda n: -float(pruned.influence[n]))[:most]
    ends = {n for n in kept if whole.node(n).kind in ("token", "logit")}
    candidates = {*drawn_inner, *ends}
    into: dict[int, list[tuple[int, float]]] = {}
    targets = whole.row_nodes[whole.edge_rows[pruned.edges]].tolist()
    sources, weights = whole.columns[pruned.edges].tolist(), whole.weights[pruned.edges].double().tolist()
    for source, target, weight in zip(sources, targets, weights, strict=True):
        if source in candidates and target in candidates:
            into.setdefault(target, []).append((source, weight))
    links = [
        (source, target, weight)
        for target, some in into.items()
        for source, weight in sorted(some, key=lambda one: -abs(one[1]))[:INPUTS]
    ]
    # every token of a short prompt stands there, so that the picture reads as the prompt does
    linked = {node for link in links for node in link[:2]}
    tokens = whole.range_of("token") if whole.n_positions <= SHOWN else ()
    drawn = sorted({*drawn_inner, *tokens, *(n for n in ends if n in linked)})
    at = {number: place for place, number in enumerate(drawn)}
    edges = [(at[source], at[target], weight) for source, target, weight in links]
    levels = ["tokens", *(f"layer {layer}" for layer in range(whole.n_layers)), "logits"]
    places = _places(whole, drawn)
    held = float(
        pruned.influence[drawn_inner].sum() / pruned.influence[: whole.range_of("token").start].sum().clamp(min=1e-30)
    )
    return graph(
        np.array(places, dtype=float).reshape(-1, 2), np.array([edge[:2] for edge in edges], dtype=int).reshape(-1, 2),
        np.array([edge[2] for edge in edges], dtype=float), nodes=[_name(whole, n, labels) for n in drawn],
        levels=levels, title=f"{heading}: attribution graph", value_axis="direct effect",
        caption=f"{len(drawn_inner)} of {len(inner)} features and errors of the pruned graph are drawn, which hold "
                f"{100 * held:.0f} % of what features and errors pass on; {whole.n_nodes:,} nodes and "
                f"{whole.n_edges:,} edges in all. An edge is what the lower node adds to the upper one with attention "
                f"and norms as they were; the second colour takes away. Into each node at most its {INPUTS} strongest.",
    )  # fmt: skip


def _places(whole: AttributionGraph, drawn: list[int]) -> list[tuple[int, float]]:
    """Level and place from 0 to 1 of each node: its layer, over its token; those of one token side by side."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number in drawn:
        node = whole.node(number)
        groups.setdefault((_level(whole, number), node.position), []).append(number)
    # a token's column is as wide as the most that stand in it on one level
    wide = [0] * whole.n_positions
    for (_, position), group in groups.items():
        wide[position] = max(wide[position], len(group))
    starts = np.concatenate([[0], np.cumsum(wide)])
    found: dict[int, tuple[int, float]] = {}
    for (level, position), group in groups.items():
        for place, number in enumerate(group):
            across = (starts[position] + (place + 0.5) / len(group) * wide[position]) / starts[-1]
            found[number] = (level, float(across))
    return [found[number] for number in drawn]


def _level(whole: AttributionGraph, number: int) -> int:
    node = whole.node(number)
    return {"token": 0, "logit": whole.n_layers + 1}.get(node.kind, node.layer + 1)


def _name(whole: AttributionGraph, number: int, labels: Mapping[int, str]) -> str:
    node = whole.node(number)
    if number in labels:
        return labels[number]
    if node.kind == "token":
        return whole.tokens[node.position]
    if node.kind == "logit":
        return node.name.removeprefix("logit ").strip("'")
    return "error" if node.kind == "error" else f"f{node.index}"
