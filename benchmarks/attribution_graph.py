"""An attribution graph of a prompt: our sweep against circuit-tracer at its best batch size, and against the floor.

The floor is the products of a plain sweep, causal half: every feature's row passes the attention of every block below
it (two products of the stream's width by the heads', over half of the positions on average, and the pattern's mix), and
meets every source once. circuit-tracer needs an older transformers, so it runs in an environment of its own, in turns
with ours: `--peer PYTHON` is an interpreter that can import it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.common import Peer, matmul_rate, tell
from tomoscope.circuits.attribution import AttributionGraph, LocalReplacement, attribution_graph, node_influence, prune
from tomoscope.circuits.attribution.skeleton import find_skeleton
from tomoscope.features import SparseCoder, TranscoderSet, save_transcoders
from tomoscope.model import Subject, build_subject

BATCHES = (64, 256)


def make(layers: int, width: int, features: int, length: int, active: int) -> tuple[Subject, TranscoderSet, list[int]]:
    """A GPT-2 of random weights, transcoders of which about `active` features fire at a place, and a prompt."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=2000, n_positions=max(64, length), n_embd=width, n_layer=layers, n_head=max(1, width // 32),
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    subject = build_subject(transformers.GPT2LMHeadModel(config).eval(), name="gpt2 shape")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(2, 2000, (length,), generator=generator).tolist()
    acts = subject.read([prompt], "layer.*.mlp.in")
    coders = []
    for layer in range(layers):
        encoder = torch.randn(width, features, generator=generator) / width**0.5
        pre = acts[f"layer.{layer}.mlp.in"][0] @ encoder
        threshold = pre.flatten().topk(active * length).values[-1]
        decoder = torch.randn(features, width, generator=generator) / features**0.5
        coders.append(SparseCoder(encoder, decoder, torch.full((features,), -float(threshold)), torch.zeros(width)))
    return subject, TranscoderSet(coders, scan="random"), prompt


def floor_flops(subject: Subject, graph: AttributionGraph) -> float:
    """Floating-point operations of a plain sweep, causal half."""
    facts, P = subject.facts, graph.n_positions
    d, heads = facts.d_model or 1, facts.n_heads * (facts.head_dim or 1)
    layer, position = graph.features[:, 0].double(), graph.features[:, 1].double()
    blocks = float(((layer + 1) * (position + 1)).sum()) + graph.n_logits * graph.n_layers * P
    sources = 2.0 * d * graph.n_nodes * len(graph.values) / 2
    return blocks * (4.0 * d * heads + 2.0 * P * heads) + sources


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = work()
    return time.perf_counter() - start, out


def main(
    layers: int = 8, width: int = 256, features: int = 2048, length: int = 24, active: int = 17, rounds: int = 3,
    peer: str = "",
) -> None:  # fmt: skip
    subject, transcoders, prompt = make(layers, width, features, length, active)
    skeleton = find_skeleton(subject)

    def ours() -> AttributionGraph:
        replacement = LocalReplacement.of(subject, transcoders, prompt, skeleton=skeleton)
        return attribution_graph(subject, transcoders, prompt, replacement=replacement)

    graph = ours()
    flops = floor_flops(subject, graph)
    peers = {}
    if peer:
        folder = Path(tempfile.mkdtemp())
        subject.model.save_pretrained(folder / "model")  # ty: ignore[call-non-callable]
        save_transcoders(transcoders, folder / "transcoders")
        (folder / "prompt.json").write_text(json.dumps(prompt))
        peers = {batch: Peer(peer, "attribution.py", folder, batch) for batch in BATCHES}
        for one in peers.values():
            one()
    seconds, analysis, floors = [], [], []
    theirs: dict[int, list[dict[str, Any]]] = {batch: [] for batch in peers}
    for _ in range(rounds):
        floors.append(flops / matmul_rate())
        spent, graph = timed(ours)
        seconds.append(spent)
        analysis.append(timed(lambda found=graph: (node_influence(found), prune(found)))[0])
        for batch, one in peers.items():
            theirs[batch].append(one())
    numbers: dict[str, Any] = {}
    if peers:
        medians = {batch: statistics.median(one["seconds"] for one in some) for batch, some in theirs.items()}
        best = min(medians, key=lambda batch: medians[batch])
        last = theirs[best][-1]
        numbers = {
            "peer_seconds": medians[best], "peer_batch": best,
            "speedup": statistics.median(o["seconds"] / s for o, s in zip(theirs[best], seconds, strict=True)),
            "peer_prune_seconds": last["prune_seconds"], "peer_features": last["features"],
            "worst_row_mass": _worst(last["masses"], _masses(graph)),
        }  # fmt: skip
    tell(
        "attribution_graph", features=graph.n_features, nodes=graph.n_nodes, edges=graph.n_edges,
        seconds=statistics.median(seconds), floor_seconds=statistics.median(floors),
        times_floor=statistics.median(s / f for s, f in zip(seconds, floors, strict=True)),
        prune_seconds=statistics.median(analysis), gap=graph.gap, **numbers,
    )  # fmt: skip


def _worst(theirs: list[float], ours: list[float]) -> float | None:
    """The largest relative difference of two graphs' rows; None where they do not have the same features."""
    if len(theirs) != len(ours):
        return None
    return max(abs(a - b) / max(a, 1e-9) for a, b in zip(theirs, ours, strict=True))


def _masses(graph: AttributionGraph) -> list[float]:
    return graph.mass[: graph.n_features].tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 8), ("width", 256), ("features", 2048), ("length", 24), ("active", 17)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default="", help="an interpreter that can import circuit_tracer")
    main(**vars(parser.parse_args()))
