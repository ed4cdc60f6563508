"""Graphs of the zoo and plain walks over them, for the tests of circuits."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch

from tests.circuits.reference_eap import SCORES, TOKENS, reference_subject
from tests.zoo import ZOO
from tomoscope import open_model
from tomoscope.circuits import Graph
from tomoscope.model import Subject

REFERENCE = Path(__file__).parents[1] / "reference" / "eap"
FAMILIES = ("gpt2", "llama", "phi", "gemma2", "deepseek_v3", "falcon_multi_query")


@cache
def subject(name: str) -> Subject:
    return open_model(ZOO[name].build())


@cache
def graph(name: str, *, position: bool = False) -> Graph:
    return Graph.of(subject(name), position=position)


@cache
def reference() -> tuple[Subject, Graph, dict[str, np.ndarray]]:
    """The reference's model, its graph and its numbers."""
    opened = reference_subject()
    return opened, Graph.of(opened), dict(SCORES)


def ours(graph: Graph, matrix: np.ndarray) -> torch.Tensor:
    """A matrix of the reference in our order of rows and columns."""
    rows = [TOKENS["sources"].index("input" if s == "embed" else s) for s in graph.sources]
    columns = [TOKENS["destinations"].index(d) for d in graph.destinations]
    return torch.from_numpy(matrix[np.ix_(rows, columns)])


def live_edges(graph: Graph, edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges on a walk from an embedding to the logits, by walking from both ends over names."""
    inputs = {source: {graph.destinations[c] for c in graph.inputs_of(source)} for source in graph.sources}
    owners = defaultdict(set)
    for source, places in inputs.items():
        for place in places:
            owners[place].add(source)
    fed, new = set(), {source for source in graph.sources if source in ("embed", "position")}
    while new:
        fed |= new
        new = {owner for s, d in edges if s in fed for owner in owners[d]} - fed
    read, new = set(), {"logits"}
    while new:
        read |= new
        new = {place for s, d in edges if d in read for place in inputs[s]} - read
    return {(s, d) for s, d in edges if s in fed and d in read}
