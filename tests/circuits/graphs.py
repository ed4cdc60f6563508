"""Graphs of the zoo and plain walks over them, for the tests of circuits."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import torch

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
def reference() -> tuple[Subject, Graph, dict[str, np.ndarray], dict]:
    """The reference's model, its graph, the numbers and what they are of."""
    opened = open_model(str(REFERENCE), dtype="float64")
    numbers = dict(np.load(REFERENCE / "eap_ref.npz"))
    return opened, Graph.of(opened), numbers, json.loads((REFERENCE / "eap_ref.json").read_text())


def ours(graph: Graph, matrix: np.ndarray) -> torch.Tensor:
    """A matrix of the reference in our order of rows and columns."""
    told = json.loads((REFERENCE / "eap_ref.json").read_text())
    rows = [told["src_nodes"].index("input" if s == "embed" else s) for s in graph.sources]
    columns = [told["dst_nodes"].index(d) for d in graph.destinations]
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
