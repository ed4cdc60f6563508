"""Attribution graphs in files: the field's JSON (circuit-tracer, Neuronpedia), and this library's own.

    write_neuronpedia(prune(graph), "graphs", slug="dallas")     graphs/dallas.json and graphs/graph-metadata.json
    found = read_neuronpedia("graphs/dallas.json")               found.graph, found.labels, found.supernodes
    save(graph, "dallas"); load("dallas")                        everything, as JSON and safetensors

The field's file holds a pruned graph: no biases, no row sums, and only nodes that were kept. What it does not say is
not a number here (nan), and what it left out is unknown, so shares and scores of a graph that was read are those of the
part in the file. Error nodes had the id "0_{layer}_{position}" until mid 2026, which is also that of a feature; now it
is "{layer}_-1_{position}". Both are read, by the node's type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from tomoscope.circuits.attribution.graph import AttributionGraph
from tomoscope.circuits.attribution.influence import Pruned
from tomoscope.circuits.attribution.supernodes import Supernode
from tomoscope.errors import DataError

TYPES = {
    "feature": "cross layer transcoder", "error": "mlp reconstruction error", "token": "embedding", "logit": "logit"
}  # fmt: skip
"""What the field's files call the kinds of nodes; they say "cross layer transcoder" of every transcoder."""
TENSORS = ("features", "activations", "logit_probabilities", "starts", "columns", "weights", "values", "bias", "rest",
           "mass")  # fmt: skip
VERSION = 1


# ---- the field's


def pairing(layer: int, feature: int) -> int:
    """Cantor's pairing, by which the field's files number a feature of a layer."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def to_neuronpedia(
    pruned: Pruned,
    *,
    slug: str,
    scan: str | Sequence[str] = "",
    prompt: str = "",
    threshold: float = 0.8,
    labels: Mapping[int, str] | None = None,
    supernodes: Sequence[Supernode] = (),
    old_error_ids: bool = False,
) -> dict[str, Any]:
    """A pruned graph as the field's JSON.

    Args:
        pruned: what is kept.
        slug: name of the graph.
        scan: name of the transcoders, or one for each layer; the graph's own by default.
        prompt: its text; the tokens joined by default.
        threshold: the nodes' share that was kept, for the record.
        labels: what nodes mean, by their number.
        supernodes: groups of nodes; those that were pruned are left out.
        old_error_ids: the ids that files had until mid 2026.
    """
    graph, labels = pruned.graph, labels or {}
    several = not isinstance(scan, str)
    kept = torch.nonzero(pruned.nodes)[:, 0].tolist()
    target = graph.row_nodes[graph.edge_rows[pruned.edges]].tolist()
    source = graph.columns[pruned.edges].tolist()
    linked = {*target, *source}
    kept = [n for n in kept if n in linked or graph.node(n).kind in ("token", "logit")]
    ids = {number: _node_id(graph, number, old=old_error_ids) for number in kept}
    groups = [[group.label, *(ids[n] for n in group.nodes if n in ids)] for group in supernodes]
    return {
        "metadata": {
            "slug": slug, "scan": f"custom-{slug}" if several else (scan or graph.scan),
            "transcoder_list": list(scan) if several else [], "prompt_tokens": list(graph.tokens),
            "prompt": prompt or "".join(graph.tokens), "node_threshold": threshold, "schema_version": 1,
        },
        "qParams": {"pinnedIds": [], "supernodes": [g for g in groups if len(g) > 1], "linkType": "both",
                    "clickedId": "", "sg_pos": ""},
        "nodes": [_node(pruned, number, ids[number], labels.get(number, "")) for number in kept],
        "links": [
            {"source": ids[s], "target": ids[t], "weight": w}
            for s, t, w in zip(source, target, graph.weights[pruned.edges].tolist(), strict=True)
        ],
    }  # fmt: skip


def _node_id(graph: AttributionGraph, number: int, *, old: bool) -> str:
    node = graph.node(number)
    if node.kind == "feature":
        return f"{node.layer}_{node.index}_{node.position}"
    if node.kind == "error":
        return f"0_{node.layer}_{node.position}" if old else f"{node.layer}_-1_{node.position}"
    if node.kind == "token":
        return f"E_{node.index}_{node.position}"
    return f"{graph.n_layers + 1}_{node.index}_{node.position}"


def _node(pruned: Pruned, number: int, node_id: str, label: str) -> dict[str, Any]:
    graph = pruned.graph
    node = graph.node(number)
    logit = node.kind == "logit"
    place = number - graph.range_of(node.kind).start
    probability = float(graph.logit_probabilities[place]) if logit else 0.0
    layer = {"token": "E", "logit": str(graph.n_layers + 1)}.get(node.kind, str(node.layer))
    name = {"feature": f"{node.layer}_{node.index}-0", "error": f"{node.layer}_{node.position}-0",
            "token": f"E_{node.index}-{node.position}", "logit": f"L_{node.index}-{node.position}"}  # fmt: skip
    number_of = {"feature": pairing(max(node.layer, 0), max(node.index, 0)), "error": -1, "token": node.position}
    said = f'Output "{graph.logit_names[place]}" (p={probability:.3f})' if logit else ""
    return {
        "node_id": node_id, "feature": number_of.get(node.kind, node.index), "layer": layer,
        "ctx_idx": node.position, "feature_type": TYPES[node.kind], "token_prob": probability,
        "is_target_logit": logit and place == 0, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": name[node.kind],
        "clerp": label or said, "influence": None if logit else float(pruned.cumulative[number]),
        "activation": float(graph.activations[number]) if node.kind == "feature" else None,
    }  # fmt: skip


def write_neuronpedia(pruned: Pruned, folder: str | Path, *, slug: str, **options: Any) -> Path:
    """Write {slug}.json and list it in graph-metadata.json; options as in `to_neuronpedia`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    value = to_neuronpedia(pruned, slug=slug, **options)
    path, listing = folder / f"{slug}.json", folder / "graph-metadata.json"
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
    known = json.loads(listing.read_text(encoding="utf-8"))["graphs"] if listing.exists() else []
    known = [one for one in known if one.get("slug") != slug] + [value["metadata"]]
    listing.write_text(json.dumps({"graphs": known}, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


@dataclass(frozen=True, eq=False)
class FoundGraph:
    """A graph from a file of the field's format.

    Attributes:
        graph: its nodes and links.
        influence: [node], the cumulative influence in the file, nan where it says none.
        labels: by node, what the file says it means.
        supernodes: groups in the file.
        metadata: the file's own.
    """

    graph: AttributionGraph
    influence: Float[Tensor, " node"]
    labels: Mapping[int, str] = field(default_factory=dict)
    supernodes: tuple[Supernode, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_neuronpedia(source: str | Path | Mapping[str, Any]) -> FoundGraph:
    """Read a graph of the field's JSON, from a file or as it was parsed.

    Raises:
        DataError: it is no such file, or a link names a node that is not there.
    """
    value = source
    if not isinstance(source, Mapping):
        try:
            value = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{source} can't be read as a graph: {error}.") from error
    try:
        return _found(value)  # ty: ignore[invalid-argument-type]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"This is no graph in the field's format: {error!r}.") from error


def _found(value: Mapping[str, Any]) -> FoundGraph:
    nodes, metadata = value["nodes"], value["metadata"]
    tokens = tuple(metadata["prompt_tokens"])
    kinds = {text: kind for kind, text in TYPES.items()} | {"transcoder": "feature"}
    by_kind: dict[str, list[Mapping[str, Any]]] = {kind: [] for kind in TYPES}
    for node in nodes:
        by_kind[kinds[node["feature_type"]]].append(node)
    numbers = [int(n["layer"]) for n in by_kind["feature"] + by_kind["error"]]
    n_layers = int(by_kind["logit"][0]["layer"]) - 1 if by_kind["logit"] else max(numbers, default=-1) + 1
    features = sorted(by_kind["feature"], key=_place)
    places = [_place(node) for node in features]
    ids = [-1] * len(tokens)
    for node in by_kind["token"]:
        ids[int(node["ctx_idx"])] = int(node["node_id"].split("_")[1])
    offset = len(features)
    number: dict[str, int] = {node["node_id"]: i for i, node in enumerate(features)}
    errors = {}
    for node in by_kind["error"]:
        errors[node["node_id"]] = offset + int(node["layer"]) * len(tokens) + int(node["ctx_idx"])
    clash = {name for name in errors if name in number}  # old ids: "0_3_5" is layer 0's feature 3, too
    number |= {name: at for name, at in errors.items() if name not in clash}
    offset += n_layers * len(tokens)
    number |= {node["node_id"]: offset + int(node["ctx_idx"]) for node in by_kind["token"]}
    offset += len(tokens)
    number |= {node["node_id"]: offset + i for i, node in enumerate(by_kind["logit"])}
    graph = _linked(value, number, clash, metadata, tokens, tuple(ids), n_layers, features, places, by_kind["logit"])
    influence, labels = torch.full((graph.n_nodes,), float("nan"), dtype=torch.float64), {}
    for node in nodes:
        at = errors[node["node_id"]] if node["feature_type"] == TYPES["error"] else number[node["node_id"]]
        if node.get("influence") is not None:
            influence[at] = float(node["influence"])
        if node.get("clerp"):
            labels[at] = str(node["clerp"])
    groups = [Supernode(str(label), tuple(number[i] for i in some if i in number))
              for label, *some in value.get("qParams", {}).get("supernodes", [])]  # fmt: skip
    return FoundGraph(graph, influence, labels, tuple(groups), dict(metadata))


def _place(node: Mapping[str, Any]) -> tuple[int, int, int]:
    """Layer, position and number of a feature's node."""
    layer, feature, position = (int(part) for part in node["node_id"].split("_"))
    return layer, position, feature


def _linked(
    value: Mapping[str, Any],
    number: Mapping[str, int],
    clash: set[str],
    metadata: Mapping[str, Any],
    tokens: tuple[str, ...],
    ids: tuple[int, ...],
    n_layers: int,
    features: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[int, int, int]],
    logits: Sequence[Mapping[str, Any]],
) -> AttributionGraph:
    """The graph of a file's links."""
    links = value["links"]
    ambiguous = sorted({link["source"] for link in links} & clash)
    if ambiguous:
        raise DataError(
            f"The id {ambiguous[0]} is both a feature's and an error's in this file, so its links can't be told apart.",
            remedy="Make the file again with a current version of circuit-tracer.",
        )
    first_logit = len(features) + (n_layers + 1) * len(tokens)
    source = torch.tensor([number[link["source"]] for link in links], dtype=torch.long)
    target = torch.tensor([number[link["target"]] for link in links], dtype=torch.long)
    row = torch.where(target >= first_logit, target - first_logit + len(features), target)
    n_rows = len(features) + len(logits)
    order = (row * (first_logit + len(logits)) + source).argsort()
    weights = torch.tensor([float(link["weight"]) for link in links], dtype=torch.float64)[order]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(row, minlength=n_rows).cumsum(0)])
    mass = torch.zeros(n_rows, dtype=torch.float64).index_add_(0, row[order], weights.abs())
    unknown = torch.full((n_rows,), float("nan"), dtype=torch.float64)
    activations = torch.tensor([float("nan") if n.get("activation") is None else n["activation"] for n in features],
                               dtype=torch.float64)  # fmt: skip
    values = torch.cat([activations, unknown[len(features) :]])
    names = [str(n.get("clerp", "")).partition('Output "')[2].rpartition('" (p=')[0] for n in logits]
    return AttributionGraph(
        str(metadata.get("slug", "")), str(metadata.get("scan", "")), ids, tokens, n_layers,
        torch.tensor(places, dtype=torch.long).reshape(-1, 3), activations,
        tuple(int(n["node_id"].split("_")[1]) for n in logits), tuple(names),
        torch.tensor([float(n.get("token_prob") or 0.0) for n in logits], dtype=torch.float64),
        starts, source[order].int(), weights, values, unknown, unknown.clone(), mass,
        settings={"read": "neuronpedia", "node_threshold": metadata.get("node_threshold")},
    )  # fmt: skip


# ---- our own


def save(graph: AttributionGraph, folder: str | Path, *, supernodes: Sequence[Supernode] = ()) -> Path:
    """Write a graph as graph.json and edges.safetensors; `load` reads it back equal."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "version": VERSION, "model": graph.model, "scan": graph.scan, "ids": list(graph.ids),
        "tokens": list(graph.tokens), "n_layers": graph.n_layers, "logit_ids": list(graph.logit_ids),
        "logit_names": list(graph.logit_names), "zeroed": graph.zeroed, "settings": dict(graph.settings),
        "supernodes": [[group.label, *group.nodes] for group in supernodes],
    }  # fmt: skip
    (folder / "graph.json").write_text(json.dumps(plain, indent=1, ensure_ascii=False), encoding="utf-8")
    save_file({name: getattr(graph, name).contiguous() for name in TENSORS}, folder / "edges.safetensors")
    return folder


def load(folder: str | Path) -> AttributionGraph:
    """Read a graph that `save` wrote.

    Raises:
        DataError: a file is missing, cut short, or of a later version.
    """
    folder = Path(folder)
    try:
        plain = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        if plain["version"] > VERSION:
            raise DataError(f"{folder} was written by a later version ({plain['version']}).", remedy="Update.")
        parts = load_file(folder / "edges.safetensors")
        t = {name: parts[name] for name in TENSORS}
        return AttributionGraph(
            plain["model"], plain["scan"], tuple(plain["ids"]), tuple(plain["tokens"]), plain["n_layers"],
            t["features"], t["activations"], tuple(plain["logit_ids"]), tuple(plain["logit_names"]),
            t["logit_probabilities"], t["starts"], t["columns"], t["weights"], t["values"], t["bias"], t["rest"],
            t["mass"], plain["zeroed"], plain["settings"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no attribution graph: {error!r}.") from error


def load_supernodes(folder: str | Path) -> list[Supernode]:
    """The supernodes that were saved with a graph."""
    plain = json.loads((Path(folder) / "graph.json").read_text(encoding="utf-8"))
    return [Supernode(label, tuple(nodes)) for label, *nodes in plain["supernodes"]]
