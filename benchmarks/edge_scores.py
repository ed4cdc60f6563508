"""Scores of all edges of GPT-2 small's shape: against the public EAP-IG code, and against the floor of forwards.

The floor of EAP is three forwards a pair (clean, corrupted, and a backward that costs a forward without weights'
gradients), of EAP-IG with m steps 2 + 2 m. The reference is run by `--peer PYTHON` (see `peers/edge_scores.py`), in
turns with ours and at its better batch size; without it the comparison is with the gradient of a mask by autograd, one
pair at a time, which copies the stream for each head.
Exact patching is compared with one plain forward an edge (a sample of them).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Peer, gpt2_small, interleaved, ratio, tell
from tomoscope.circuits import Pairs
from tomoscope.circuits.graph import Graph
from tomoscope.circuits.scores.edges import edge_scores
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.model import Subject

PEAK_KB = "VmHWM"
METHODS = ("EAP", "EAP-IG-inputs")


def pairs_of(subject: Subject, count: int, length: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 50257, (count, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 4:7] = torch.randint(0, 50257, (count, 3), generator=generator)
    answers, wrong = torch.arange(count)[:, None] + 100, torch.arange(count)[:, None] + 900
    return Pairs(subject.tokens(clean.tolist()), subject.tokens(corrupted.tolist()), answers, wrong)


def reference(python: str, folder: Path, subject: Subject, pairs: Pairs, steps: int) -> Peer:
    """The public code in its own environment, ready to score these pairs."""
    subject.model.save_pretrained(folder)  # ty: ignore[not-callable]
    given = {
        "clean": pairs.clean.input_ids.tolist(),  # ty: ignore[unresolved-attribute]
        "corrupted": pairs.corrupted.input_ids.tolist(),  # ty: ignore[unresolved-attribute]
        "answers": pairs.answers[:, 0].tolist(),
        "wrong": pairs.wrong[:, 0].tolist(),
        "steps": steps,
    }
    (folder / "pairs.json").write_text(json.dumps(given))
    return Peer(python, "edge_scores.py", folder)


def main(pairs: int = 4, length: int = 16, steps: int = 5, rounds: int = 3, peer: str = "", exact: int = 64) -> None:
    subject = gpt2_small()
    graph, made = Graph.of(subject), pairs_of(subject, pairs, length)
    arguments = {**subject.forward_arguments(made.clean), "use_cache": False, "logits_to_keep": 1}

    def forward() -> None:
        with torch.no_grad():
            subject.model(**arguments)

    def mask_gradient() -> torch.Tensor:
        total = torch.zeros(graph.allowed.shape)
        for row in range(pairs):
            one = slice(row, row + 1)
            wiring = Wiring(
                subject, made.clean.take(one), graph, ablation=Ablation.paired(made.corrupted.take(one)),
                numbers=torch.tensor([row]),
            )  # fmt: skip
            mask = torch.ones(graph.allowed.shape, requires_grad=True)
            metric = made.metric()
            value = metric(wiring.logits(mask)[:, metric.tokens], torch.tensor([row]))
            total += torch.autograd.grad(value.sum(), mask)[0]
        return total / pairs

    works: dict[Any, Callable[[], Any]] = {
        "forward": forward,
        "EAP": lambda: edge_scores(subject, made, graph=graph, method="EAP"),
        "EAP-IG-inputs": lambda: edge_scores(subject, made, graph=graph, steps=steps),
    }
    folder = Path(tempfile.mkdtemp())
    asked = {}
    if peer:
        public = reference(peer, folder, subject, made, steps)
        sizes = sorted({1, pairs})
        for method, frozen, size in itertools.product(METHODS, (False, True), sizes):
            line = json.dumps({"method": method, "frozen": frozen, "batch_size": size})
            asked[method, frozen, size] = lambda line=line: public(line)
    times = interleaved({**works, **asked}, rounds=rounds)
    for method, forwards in (("EAP", 3), ("EAP-IG-inputs", 2 + 2 * steps)):
        seconds = statistics.median(times[method])
        found = edge_scores(subject, made, graph=graph, method=method, steps=steps).scores
        told: dict[str, Any] = {
            "seconds": seconds, "times_floor": ratio(times, method, "forward") / forwards, "edges": graph.n_edges,
        }  # fmt: skip
        if peer:
            scores = np.load(folder / f"eap_{method}.npy")
            told["worst"] = float(np.abs(found.numpy() - scores).max() / np.abs(scores).max())
            for frozen in (False, True):
                each = {size: ratio(times, (method, frozen, size), method) for size in sizes}
                told["speedup_frozen" if frozen else "speedup"] = min(each.values())
                told["speedup_frozen_by_batch" if frozen else "speedup_by_batch"] = each
        elif method == "EAP":
            start = time.perf_counter()
            expected = mask_gradient()
            told["speedup_over_autograd"] = (time.perf_counter() - start) / seconds
            told["worst"] = float((found - expected).abs().max() / expected.abs().max())
        tell(f"edge_scores.{method}", **told)
    _exact(subject, graph, made, exact)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(PEAK_KB))
    tell("edge_scores.memory", peak_gib=int(peak.split()[1]) / 2**20)


def _exact(subject: Subject, graph: Graph, pairs: Pairs, sample: int) -> None:
    """Edges a second: a sample of edges in one call, against a plain forward each (two for the pair's values)."""
    wiring = Wiring(subject, pairs.clean, graph, ablation=Ablation.paired(pairs.corrupted))
    edges = torch.nonzero(graph.allowed)
    drawn = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))[:sample]]
    masks = torch.ones(sample, *graph.allowed.shape, dtype=torch.bool)
    masks[torch.arange(sample), drawn[:, 0], drawn[:, 1]] = False
    arguments = subject.forward_arguments(pairs.clean)

    def plain() -> None:
        with torch.no_grad():
            for _ in range(8):
                subject.model(**arguments)

    times = interleaved({"plain": plain, "wiring": lambda: wiring.run(masks, pairs.metric())}, rounds=2)
    mine, one = min(times["wiring"]) / sample, min(times["plain"]) / 8
    tell("edge_scores.exact", edges_a_second=1 / mine, sampled=sample, speedup_over_a_forward_an_edge=one / mine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", default="", help="a Python that has the reference (see peers/edge_scores.py)")
    parser.add_argument("--exact", type=int, default=64)
    main(**vars(parser.parse_args()))
