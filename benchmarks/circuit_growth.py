"""How circuits' costs grow: EAP with layers, tokens and pairs; ACDC's edges a second; and their peak memory.

Every case is a process of its own, so that its peak is its own. What a case adds to the peak of the model after one
plain forward is told beside the nodes, edges and tokens it had. ACDC runs on GPT-2 small's width with few layers,
because a model of twelve has 32,491 edges, each worth a run; its edges a second are beside plain forwards of the same
prompts (one an edge is what a plain implementation pays, before it prunes).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from benchmarks.common import tell
from benchmarks.edge_scores import pairs_of
from tomoscope.circuits.discovery.acdc import acdc
from tomoscope.circuits.graph import Graph
from tomoscope.circuits.scores.edges import edge_scores
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.model import build_subject

CASES = (
    *({"method": "EAP", "layers": layers, "length": 16, "pairs": 4} for layers in (3, 6, 12, 24)),
    *({"method": "EAP", "layers": 12, "length": length, "pairs": 4} for length in (32, 64, 128, 256)),
    *({"method": "EAP", "layers": 12, "length": 16, "pairs": pairs} for pairs in (16, 64)),
    *({"method": "ACDC", "layers": layers, "length": 16, "pairs": 4} for layers in (1, 2, 3)),
)
THRESHOLD = 0.01


def peak_gib() -> float:
    """The most memory that this process has had."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def case(method: str, layers: int, length: int, pairs: int) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers)
    subject = build_subject(transformers.GPT2LMHeadModel(config).eval(), name="gpt2 shape")
    graph, made = Graph.of(subject), pairs_of(subject, pairs, length)
    arguments = {**subject.forward_arguments(made.clean), "use_cache": False, "logits_to_keep": 1}

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            subject.model(**arguments)
        return time.perf_counter() - start

    forward()
    one, before = min(forward() for _ in range(3)), peak_gib()
    sizes = {"layers": layers, "nodes": len(graph.writers) + len(graph.readers), "edges": graph.n_edges}
    start = time.perf_counter()
    if method == "EAP":
        edge_scores(subject, made, graph=graph, method="EAP")
        start = time.perf_counter()
        edge_scores(subject, made, graph=graph, method="EAP")
        seconds, told = time.perf_counter() - start, {}
    else:
        wiring = Wiring(subject, made.clean, graph, ablation=Ablation.paired(made.corrupted))
        run = acdc(wiring, made.metric(), threshold=THRESHOLD)
        seconds = time.perf_counter() - start
        told = {
            "tried": len(run.trace), "runs": run.masks_run, "kept": run.circuit.n_edges,
            "edges_a_second": len(run.trace) / seconds,
            "all_edges_a_second": graph.n_edges / seconds,
        }  # fmt: skip
    tell(
        f"circuit_growth.{method}", **sizes, tokens=length, pairs=pairs, seconds=seconds, forwards=seconds / one,
        added_gib=peak_gib() - before, **told,
    )  # fmt: skip


def main() -> None:
    for one in CASES:
        subprocess.run([sys.executable, "-m", "benchmarks.circuit_growth", "--case", json.dumps(one)], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", default="", help="run one case in this process (JSON)")
    given = parser.parse_args().case
    case(**json.loads(given)) if given else main()
