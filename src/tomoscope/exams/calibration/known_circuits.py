"""How well do edge scores and circuit discovery rank the edges of circuits that are known edge by edge?

Compiled programs (phantoms.compiled) are the models, their cards the truth; the area under the ROC curve of the edges
is the number, 1.0 where every edge of the circuit stands above every other.

- zero: each edge alone ablated to nothing, on every input of the program (or a sample of inputs of every length): KL
  from the model's own answers. The edge from the embedding to the logits is not counted where the program has none: it
  holds the large constants that make the layer norm linear, and a zero takes these away too.
- paired: each edge alone given its value in a prompt with another token. What carries the same in both (constant
  edges) can't be found so, and is not counted.
- ACDC (paired, KL), at several thresholds; EAP and both EAP-IG.

Idle edges (their card says that no input needs them) are never counted. Besides, the overlap (Jaccard index) of
circuits found on resampled pairs, each of as many edges as the true one.

How it can mislead: compiled parts are all or nothing. Their neurons are steps, flat nearly everywhere, so that
gradients miss edges which ablation finds, unless the path has very many points: a trained model is kinder to gradients
and harder for everything else.

Steps: the truth as masks; prompts in both directions; scores; areas; the same on resampled pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tomoscope.circuits import KL, Ablation, Circuit, Graph, Pairs, Wiring, acdc_sweep, edge_scores, encode_pairs
from tomoscope.circuits.discovery.acdc import sweep_area
from tomoscope.circuits.discovery.select import top_edges
from tomoscope.circuits.proof.completeness import stability
from tomoscope.circuits.proof.held_out import taken
from tomoscope.data.pairs import Pair, PairSet
from tomoscope.errors import DataError
from tomoscope.phantoms.compiled import Compiled
from tomoscope.phantoms.compiled.interpret import some_inputs

STEPS = {"EAP-IG-inputs": 1000, "EAP-IG-activations": 100}
"""Points of the path: a step of a compiled program is about 1/1000 of the way wide."""
THRESHOLDS = (1e-9, 1e-6, 1e-3, 1e-2, 1e-1, 1.0)
METHODS = ("zero", "paired", "ACDC", "EAP", "EAP-IG-inputs", "EAP-IG-activations")
INPUTS = 2000
NOTHING = 1e-7
"""Damage below this is rounding: float64 logits of about 10 beside constants of 4e4."""


@dataclass(frozen=True)
class Ranked:
    """How one method ranks the edges of one program's circuit.

    Attributes:
        method: one of `METHODS`.
        area: ROC area of the edges that count.
        low, high: the 2.5 and 97.5 percentiles of the area over resampled pairs; None where it was not resampled.
        overlap: mean Jaccard index of any two circuits found on resampled pairs; None where it was not resampled.
        edges: edges that count; known: how many of these are the circuit's.
        prompts: how many were run.
    """

    method: str
    area: float
    low: float | None
    high: float | None
    overlap: float | None
    edges: int
    known: int
    prompts: int


def rank_edges(
    specimen: Compiled, method: str, *, pairs: int = 8, resamples: int = 0, steps: int | None = None, seed: int = 0
) -> Ranked:
    """Score all edges of a compiled program by a method, and compare them with its circuit.

    Args:
        specimen: what `compile_program` returns.
        method: one of `METHODS`.
        pairs: pairs, each run in both directions; "zero" runs inputs instead, at most `INPUTS`.
        resamples: resamples of the pairs; none for "zero", which runs every input.
        steps: of EAP-IG; by default those of `STEPS`.
        seed: of pairs and resamples.

    Raises:
        DataError: an unknown method.
    """
    if method not in METHODS:
        raise DataError(f"The method {method!r} is unknown.", remedy=f"It is one of {', '.join(METHODS)}.")
    subject, steps = specimen.subject, steps or STEPS.get(method, 1)
    graph = Graph.of(subject, position=True)
    truth = Circuit.of_edges(graph, list(specimen.circuit.edges))
    ignored = graph.mask(specimen.circuit.idle)
    if method == "zero":
        ballast = graph.edge("embed", "logits")
        ignored[ballast] = not bool(truth.mask[ballast])
        rows, _ = some_inputs(tuple(specimen.words.vocabulary), specimen.shape.max_length, most=INPUTS, seed=seed)
        prompts = subject.tokens([specimen.words.text(row) for row in rows])
        wiring = Wiring(subject, prompts, graph, ablation=Ablation.zero())
        made = Pairs(prompts, prompts, torch.zeros(len(prompts), 1).long(), torch.ones(len(prompts), 1).long())
        scores = edge_scores(
            subject, made, graph=graph, method="exact", ablation=Ablation.zero(), metric=KL(wiring.clean_logits)
        ).scores
        area = _area(graph, scores, truth, ignored)
        return _told(method, area, [], [], truth, ignored, len(prompts))
    ignored |= graph.mask(specimen.circuit.constant)
    found = encode_pairs(subject, _both_ways(specimen, pairs, seed))
    area, _ = _paired(specimen, graph, found, method, steps, truth, ignored)
    generator = np.random.default_rng(seed)
    areas, circuits = [], []
    for _ in range(resamples):
        # a pair and its reverse are one draw
        draw = generator.integers(0, len(found) // 2, len(found) // 2)
        some = taken(found, [*draw.tolist(), *(draw + len(found) // 2).tolist()])
        one, circuit = _paired(specimen, graph, some, method, steps, truth, ignored)
        areas.append(one)
        circuits.append(circuit)
    return _told(method, area, areas, circuits, truth, ignored, len(found))


def _paired(
    specimen: Compiled, graph: Graph, pairs: Pairs, method: str, steps: int, truth: Circuit, ignored: Tensor
) -> tuple[float, Circuit]:
    """Area, and a circuit of as many edges as the true one has (of ACDC's sweep, that nearest to it in size)."""
    size = int((truth.mask & ~ignored).sum())
    if method == "ACDC":
        wiring = Wiring(specimen.subject, pairs.clean, graph, ablation=Ablation.paired(pairs.corrupted))
        runs = acdc_sweep(wiring, KL(wiring.clean_logits), thresholds=THRESHOLDS)
        circuits = [run.circuit for run in runs]
        return sweep_area(circuits, truth, ignore=ignored), min(circuits, key=lambda c: abs(c.n_edges - size))
    by: Any = "exact" if method == "paired" else method
    scores = edge_scores(specimen.subject, pairs, graph=graph, method=by, steps=steps).scores
    kept = scores.masked_fill(ignored, 0)
    return _area(graph, scores, truth, ignored), top_edges(Circuit(graph, graph.allowed, kept), size, pruned=False)


def _area(graph: Graph, scores: Tensor, truth: Circuit, ignored: Tensor) -> float:
    kept = torch.where(scores.abs() < NOTHING, 0.0, scores.double())
    area = Circuit(graph, graph.allowed, kept).compare(truth, ignore=ignored).edges.roc_area
    if area is None:
        raise DataError("Every edge that counts is of the circuit, or none is, so there is nothing to rank.")
    return area


def _told(
    method: str, area: float, areas: Sequence[float], circuits: Sequence[Circuit], truth: Circuit, ignored: Tensor,
    prompts: int,
) -> Ranked:  # fmt: skip
    low, high = (float(x) for x in np.quantile(areas, [0.025, 0.975])) if len(areas) else (None, None)
    overlap = float(stability(list(circuits)).edges.mean()) if len(circuits) > 1 else None
    counted = truth.graph.allowed & ~ignored
    return Ranked(
        method, area, low, high, overlap, int(counted.sum()), int((truth.mask & counted).sum()), prompts
    )  # fmt: skip


def _both_ways(specimen: Compiled, pairs: int, seed: int) -> PairSet:
    """The specimen's pairs, and after them each with clean and corrupted exchanged."""
    from tomoscope.phantoms.compiled.specimens import make_pairs

    made = make_pairs(specimen, pairs, seed=seed)
    turned = tuple(Pair(p.corrupted, p.clean, p.wrong, p.answers, p.labels) for p in made.pairs)
    return replace(made, pairs=(*made.pairs, *turned))
