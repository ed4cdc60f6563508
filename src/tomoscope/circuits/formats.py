"""Circuit files of the field: EAP-IG's graphs (JSON and .pt), and submissions to MIB's circuit track.

    write_eap_ig(circuit, "graph.json", subject)         or "graph.pt"
    circuit = read_eap_ig("graph.json", graph)
    write_mib(scores_or_circuits, "submission", task="ioi", model="gpt2", subject=subject)

Their names: "input" is our "embed"; every query head has its own key and value input. A model with grouped-query heads
is written so too (its users un-group keys and values): an edge into a group's input becomes one into each of its heads,
with an equal part of the score, so that scores add up to the group's when they are read back.

How they can mislead: their graphs know neither learned positions as a source nor attention as one node, so a circuit
with such edges can't be written; scores are float32 in .pt files. An importance file ranks edges, and MIB cuts it by
its own rule: whether by signed or by absolute value is not in the file.

Steps: the names that both sides share; expand or gather groups; JSON or a dictionary of tensors (read with
`weights_only`, so that a file can't run code).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.circuit import Circuit, inputs_matrix, starts
from tomoscope.circuits.discovery.select import Scored, greedy_edges, top_edges
from tomoscope.circuits.graph import Graph
from tomoscope.errors import DataError, SiteError
from tomoscope.model import Subject

INPUT = "input"
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Circuit sizes of MIB as shares of all edges; a submission of circuits has all but the last."""


@dataclass(frozen=True)
class Layout:
    """The rows and columns of their matrices, and ours for each.

    Attributes:
        config: their `cfg`.
        sources: their names of rows.
        destinations: their names of columns.
        rows: our row of each.
        columns: our column of each.
        shared: how many of their columns are one of ours, for each of their columns.
        allowed: which edges they have.
    """

    config: dict[str, Any]
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    rows: Tensor
    columns: Tensor
    shared: Tensor
    allowed: Bool[Tensor, "source destination"]

    @classmethod
    def of(cls, graph: Graph, *, d_model: int) -> Layout:
        """Raises SiteError where their format can't hold the graph."""
        if any(node.kind == "attention" for node in graph.writers):
            raise SiteError(
                "Attention is one node in this model's graph (its keys and values are compressed), and EAP-IG's files "
                "have a node for each head.", remedy="Save it with `Circuit.save`.",
            )  # fmt: skip
        layers, heads = range(graph.n_layers), range(graph.n_heads)
        sources = [INPUT]
        destinations: list[str] = []
        for layer in layers:
            sources += [*(f"a{layer}.h{head}" for head in heads), f"m{layer}"]
            destinations += [*(f"a{layer}.h{head}<{part}>" for part in "qkv" for head in heads), f"m{layer}"]
        destinations.append("logits")
        group = graph.n_heads // max(1, graph.n_kv_heads)
        known_rows = {name: row for row, name in enumerate(graph.sources)}
        known_columns = {name: column for column, name in enumerate(graph.destinations)}
        ours = [_ours(name, known_columns, group) for name in destinations]
        missing = [name for name in sources if ("embed" if name == INPUT else name) not in known_rows]
        missing += [name for name, place in zip(destinations, ours, strict=True) if place is None]
        if missing:
            raise SiteError(
                f"This model's graph has no {missing[0]}, and EAP-IG's files have all heads and an MLP in each layer.",
                remedy="Save it with `Circuit.save`.",
            )
        rows = torch.tensor([known_rows["embed" if name == INPUT else name] for name in sources])
        columns = torch.tensor([known_columns[str(name)] for name in ours])
        shared = torch.bincount(columns, minlength=len(known_columns))[columns]
        moments = {(node.kind, node.layer): node.moment for node in graph.readers}
        parallel = graph.n_layers > 0 and moments[("head", 0)] == moments[("mlp", 0)]
        config = {
            "n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": parallel, "d_model": d_model
        }  # fmt: skip
        allowed = graph.allowed[rows][:, columns]
        return cls(config, tuple(sources), tuple(destinations), rows, columns, shared, allowed)

    def theirs(self, values: Tensor, *, split: bool) -> Tensor:
        """Our matrix as theirs; `split` divides what several of their columns share."""
        found = values[self.rows][:, self.columns]
        return found / self.shared if split else found

    def gather(self, values: Tensor, like: Tensor) -> Tensor:
        """Their matrix as ours: what several of their columns share is added up."""
        out = torch.zeros(like.shape, dtype=values.dtype)
        out.index_put_(
            (self.rows[:, None].expand(values.shape), self.columns[None].expand(values.shape)), values, accumulate=True
        )
        return out


def _ours(name: str, known: Mapping[str, int], group: int) -> str | None:
    """Our name of their destination: a head's own input, or its group's."""
    if name in known:
        return name
    stem, _, part = name.partition("<")
    layer, _, head = stem.partition(".h")
    grouped = f"{layer}.kv{int(head) // group}<{part}" if head.isdigit() else ""
    return grouped if grouped in known else None


def write_eap_ig(circuit: Circuit, path: str | Path, *, d_model: int | Subject) -> Path:
    """Write a circuit with its scores as EAP-IG does; a name that ends in ".pt" makes its tensor form.

    Edges without scores are written as 1 in the circuit and 0 outside.

    Args:
        circuit: of a graph without "position".
        path: where to.
        d_model: width of the stream, or the model itself: their files say it.

    Raises:
        SiteError: a graph that their format can't hold.
        DataError: edges from "position".
    """
    path, graph = Path(path), circuit.graph
    width = d_model if isinstance(d_model, int) else int(d_model.facts.d_model or 0)
    layout = Layout.of(graph, d_model=width)
    outside = [row for row in range(len(graph.sources)) if row not in layout.rows.tolist()]
    if bool(circuit.mask[outside].any()):
        raise DataError(
            "The circuit has edges from 'position', which EAP-IG's files don't know.",
            remedy="Find it on `Graph.of(subject)`, where learned positions are part of the stream.",
        )
    scores = circuit.mask.double() if circuit.scores is None else circuit.scores.double().nan_to_num(0.0)
    theirs, inside = layout.theirs(scores, split=True), layout.theirs(circuit.mask, split=False) & layout.allowed
    there = _nodes_there(graph, circuit.mask)[layout.rows]
    if path.suffix == ".pt":
        torch.save(
            {
                "cfg": layout.config, "src_nodes": list(layout.sources), "dst_nodes": list(layout.destinations),
                "edges_scores": theirs.float(), "edges_in_graph": inside, "nodes_in_graph": there,
            }, path,
        )  # fmt: skip
        return path
    nodes = {name: {"in_graph": bool(one)} for name, one in zip(layout.sources, there.tolist(), strict=True)}
    edges = {}
    for row, column in torch.nonzero(layout.allowed).tolist():
        name = f"{layout.sources[row]}->{layout.destinations[column]}"
        edges[name] = {"score": float(theirs[row, column]), "in_graph": bool(inside[row, column])}
    whole = {"cfg": layout.config, "nodes": {**nodes, "logits": {"in_graph": True}}, "edges": edges}
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


def _nodes_there(graph: Graph, mask: Tensor) -> Bool[Tensor, " source"]:
    """Their notion of a node in the graph: edges out of it, and edges into it (the input needs none)."""
    return mask.any(1) & (starts(graph) | (inputs_matrix(graph) & mask.any(0)).any(1))


def read_eap_ig(path: str | Path, graph: Graph) -> Circuit:
    """Read a circuit that EAP-IG wrote (.json or .pt) for a model's graph.

    A group's input is in the circuit where it is for any of its heads, and its score is their sum. Scores of nodes and
    neurons are left out: only edges are read.

    Raises:
        DataError: no such file, or one of another model or format.
    """
    path = Path(path)
    value = _load(path)
    try:
        config = value["cfg"]
        layout = Layout.of(graph, d_model=int(config["d_model"]))
        for key in ("n_layers", "n_heads", "parallel_attn_mlp"):
            if config[key] != layout.config[key]:
                raise DataError(
                    f"{path.name} is of a model with {key} {config[key]}; this one has {layout.config[key]}."
                )
        scores, inside = _matrices(value, layout) if "edges" in value else _tensors(value, layout)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{path} is no circuit of EAP-IG: {error!r}.", remedy="Its own files are read by `Circuit.load`."
        ) from error
    mask = layout.gather((inside & layout.allowed).double(), graph.allowed) > 0
    found = layout.gather(scores.masked_fill(~layout.allowed, 0), graph.allowed)
    return Circuit(graph, mask & graph.allowed, found, {"method": "read from a file", "file": path.name})


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".pt":
            return torch.load(path, weights_only=True, map_location="cpu")
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # a pickle of anything else raises what it likes
        raise DataError(f"{path} can't be read as a circuit of EAP-IG: {error}.") from error


def _matrices(value: Mapping[str, Any], layout: Layout) -> tuple[Float[Tensor, "s d"], Bool[Tensor, "s d"]]:
    rows = {name: row for row, name in enumerate(layout.sources)}
    columns = {name: column for column, name in enumerate(layout.destinations)}
    scores = torch.zeros(layout.allowed.shape, dtype=torch.float64)
    inside = torch.zeros_like(layout.allowed)
    for name, edge in value["edges"].items():
        source, _, destination = name.partition("->")
        place = rows[source], columns[destination]
        scores[place] = float(edge.get("score", edge["in_graph"]))
        inside[place] = bool(edge["in_graph"])
    return scores, inside


def _tensors(value: Mapping[str, Any], layout: Layout) -> tuple[Float[Tensor, "s d"], Bool[Tensor, "s d"]]:
    if tuple(value["src_nodes"]) != layout.sources or tuple(value["dst_nodes"]) != layout.destinations:
        raise DataError("The file's nodes are not this model's, or stand in another order.")
    return value["edges_scores"].double(), value["edges_in_graph"].bool()


def write_mib(
    submitted: Scored | Sequence[Circuit], folder: str | Path, *, task: str, model: str, d_model: int | Subject
) -> list[Path]:
    """Write one model and task of a submission to MIB's circuit track.

    Args:
        submitted: scores, written as one file of importances that MIB cuts itself; or nine circuits, one of at most
            each of 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges.
        folder: of the submission; the files go to its sub-folder "{task}_{model}".
        task: MIB's name ("ioi", "mcqa", "arithmetic-addition", "arithmetic-subtraction", "arc-easy", "arc-challenge").
        model: MIB's name ("gpt2", "qwen2.5", "gemma2", "llama3").
        d_model: as in `write_eap_ig`.

    Returns:
        The files. MIB asks for two models and two tasks at least.

    Raises:
        DataError: not nine circuits, or one that is larger than its size allows.
    """
    place = Path(folder) / f"{task}_{model}"
    if not isinstance(submitted, Sequence):
        place.mkdir(parents=True, exist_ok=True)
        whole = top_edges(submitted, submitted.graph.n_edges, pruned=False)
        return [write_eap_ig(whole, place / "importances.json", d_model=d_model)]
    shares = MIB_SHARES[:-1]
    if len(submitted) != len(shares):
        raise DataError(f"A submission has {len(shares)} circuits; {len(submitted)} were given.")
    circuits = sorted(submitted, key=len)
    for share, circuit in zip(shares, circuits, strict=True):
        layout = Layout.of(circuit.graph, d_model=1)
        size, most = int((layout.theirs(circuit.mask, split=False) & layout.allowed).sum()), int(layout.allowed.sum())
        if size > share * most:
            raise DataError(
                f"The circuit of {size} edges is more than {100 * share:g} % of the {most}.",
                remedy="Give one circuit of at most each of 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges.",
            )
    place.mkdir(parents=True, exist_ok=True)
    return [
        write_eap_ig(circuit, place / f"circuit_{100 * share:g}.json", d_model=d_model)
        for share, circuit in zip(shares, circuits, strict=True)
    ]


def mib_circuits(scores: Scored, *, absolute: bool = True, greedy: bool = False) -> list[Circuit]:
    """The ten circuits at which MIB evaluates scores: int(share * edges) asked for, dead ends pruned."""
    choose = greedy_edges if greedy else top_edges
    return [choose(scores, int(share * scores.graph.n_edges), absolute=absolute) for share in MIB_SHARES]
