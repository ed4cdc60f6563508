"""A circuit's picture and its faithfulness over sizes, as figures."""

from __future__ import annotations

import numpy as np
import torch

from tomoscope.circuits import Circuit
from tomoscope.circuits.proof.faithfulness import Faithfulness
from tomoscope.circuits.proof.held_out import Proof
from tomoscope.findings.figures import Figure, curve, graph


def curve_figure(proof: Proof, heading: str, *, seed: int) -> Figure:
    """The share over circuit sizes of the scores, of random circuits and of an untrained model's scores."""
    shares = proof.curve.shares
    series, low, high = {}, {}, {}

    def put(name: str, told: Faithfulness) -> None:
        made = told.intervals(seed=seed)
        series[name] = np.array([one.value for one in made])
        low[name], high[name] = np.array([one.low for one in made]), np.array([one.high for one in made])

    put("edge scores", proof.curve)
    drawn = torch.stack([one.share for one in proof.random_curves]).double().numpy()
    series["random circuits"] = drawn.mean(0)
    low["random circuits"], high["random circuits"] = drawn.min(0), drawn.max(0)
    if proof.untrained_curve is not None:
        put("untrained scores", proof.untrained_curve)
    places = [place for place, size in enumerate(proof.curve.sizes) if size == len(proof.circuit)]
    at = f" The claim's circuit is the one at {_percent(shares[places[0]])}." if places else ""
    return curve(
        series, low=low, high=high, title=f"{heading}: faithfulness over circuit sizes",
        x_axis="edges asked for, of all edges", y_axis="share of the gap", ticks=[_percent(share) for share in shares],
        references={"the model": 1.0, "all edges ablated": 0.0},
        caption=f"Circuits grown greedily from scores of the other half of the pairs; all other edges carry what they "
                f"carry in the corrupted prompt.{at} Bands: bootstrap over pairs; of random circuits, all "
                f"{len(proof.random_curves)} draws.",
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def circuit_figure(circuit: Circuit, heading: str) -> Figure:
    """The circuit's nodes by layer, and its edges by their scores."""
    model = circuit.graph
    names, places, levels = [], [], ["embedding"]
    separate = any(
        a.kind == "mlp" and h.kind in ("head", "attention") and a.layer == h.layer and a.moment > h.moment
        for a in model.readers for h in model.readers
    )  # fmt: skip
    for layer in range(model.n_layers):
        levels += [f"layer {layer} heads", f"layer {layer} MLP"] if separate else [f"layer {layer}"]
    levels.append("logits")
    index: dict[str, int] = {}
    for node, there in zip(model.writers, circuit.in_nodes.tolist(), strict=True):
        if there:
            index[node.name] = len(names)
            names.append(node.name)
            places.append(_place(node.kind, node.layer, node.head, model.n_heads, separate))
    index["logits"] = len(names)
    names.append("logits")
    places.append((len(levels) - 1, 0.5))
    ends, weights, inputs = [], [], []
    shared = model.n_heads // max(1, model.n_kv_heads)
    for row, column in torch.nonzero(circuit.mask).tolist():
        reader = model.readers[column]
        weight = 1.0 if circuit.scores is None else float(circuit.scores[row, column])
        heads = range(reader.head * shared, (reader.head + 1) * shared) if ".kv" in reader.name else [reader.head]
        owners = [f"a{reader.layer}.h{h}" for h in heads] if reader.kind == "head" else [reader.name]
        for owner in owners:
            if owner in index:
                ends.append((index[model.writers[row].name], index[owner]))
                weights.append(weight)
                inputs.append({"q": "query", "k": "key", "v": "value"}.get(reader.input, ""))
    return graph(
        np.array(places), np.array(ends).reshape(-1, 2), np.array(weights), nodes=names, levels=levels, inputs=inputs,
        title=f"{heading}: the circuit", value_axis="" if circuit.scores is None else "lost without it",
        caption=f"{circuit.n_edges} of {model.n_edges:,} edges, {circuit.n_nodes} of {len(model.sources)} nodes. "
                "A line's width is the edge's score on the half of the pairs that it was found on; the second "
                "colour works against the answer.",
    )  # fmt: skip


def _place(kind: str, layer: int, head: int, n_heads: int, separate: bool) -> tuple[int, float]:
    """Level and place from 0 to 1."""
    if layer < 0:
        return 0, 0.5 if kind == "embed" else 0.85
    level = 1 + (2 * layer if separate else layer) + (1 if separate and kind == "mlp" else 0)
    if kind == "head":
        return level, (head + 0.5) / n_heads * (1.0 if separate else 0.85)
    return level, 0.5 if separate or kind == "attention" else 0.95
