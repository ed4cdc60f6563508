"""One circuit from a task's name or from pairs of one's own, outside a scan: what `tomoscope circuit` prints.

    told = find_circuit(subject, make_pairs(subject, task="ioi"), method="EAP-IG-inputs", seed=0)
    print(told.text()); told.save("ioi")

It can mislead as `tomoscope.circuits.proof.held_out` says; and nobody asked here whether the model does the task: `gap`
says how far clean prompts score above corrupted ones, and a circuit of a gap near 0 means nothing. Steps: pairs,
halves, scores (or ACDC, or a learned mask) on one half, `prove` on the other, one document.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tomoscope.circuits import KL, LogitDifference, Metric, Pairs, Probability, encode_pairs
from tomoscope.circuits.circuit import Circuit
from tomoscope.circuits.discovery.acdc import acdc
from tomoscope.circuits.discovery.masks import learn_mask
from tomoscope.circuits.discovery.select import Scored, greedy_edges
from tomoscope.circuits.formats import write_eap_ig
from tomoscope.circuits.graph import Graph
from tomoscope.circuits.proof.controls import untrained_like
from tomoscope.circuits.proof.faithfulness import Faithfulness, Interval
from tomoscope.circuits.proof.held_out import Proof, prove
from tomoscope.circuits.scores.edges import METHODS as SCORING
from tomoscope.circuits.scores.edges import edge_scores
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.data import TASKS, PairSet, load_pairs
from tomoscope.errors import DataError, SiteError, nearest
from tomoscope.exams.ready import CORRUPTIONS
from tomoscope.model import Subject
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS

METHODS = (*SCORING, "ACDC", "edge-pruning")
METRICS = ("auto", "logit-difference", "probability", "kl")
PRUNED = 0.02
"""Share of the edges that a learned mask keeps where no size is given."""


@dataclass(frozen=True)
class CircuitRun:
    """A circuit with its proof, and what it is of.

    Attributes:
        name: the task, or the file of pairs.
        model: the subject's name.
        d_model: width of its stream.
        found: pairs that it was found on.
        measured: pairs that it was measured on.
        proof: the circuit and its evidence.
        notes: what a reader must know.
    """

    name: str
    model: str
    d_model: int
    found: int
    measured: int
    proof: Proof
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """All of it as JSON values."""
        proof = self.proof
        rows = {"circuit": proof.told, "random": proof.random, "other heads": proof.exchanged}
        rows |= {} if proof.untrained is None else {"untrained scores": proof.untrained}
        curves = {"circuit": proof.curve} | (
            {} if proof.untrained_curve is None else {"untrained": proof.untrained_curve}
        )
        return {
            "model": self.model, "task": self.name, "pairs": {"found": self.found, "measured": self.measured},
            "circuit": proof.circuit.to_json() | {"n_edges": proof.circuit.n_edges, "n_nodes": proof.circuit.n_nodes},
            "metric": proof.told.metric, "choices": proof.told.choices.to_json(),
            "share": {name: _summary(told) for name, told in rows.items()},
            "curve": {name: _curve(told) for name, told in curves.items()},
            "areas": {name: _finite(area) for name, area in proof.curve.areas()._asdict().items()},
            "notes": list(self.notes),
        }  # fmt: skip

    def save(self, folder: str | Path) -> list[Path]:
        """Write the document, the circuit, and the circuit as EAP-IG's tools read it (where their format can)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / "proof.json"
        whole.write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        paths = [whole, self.proof.circuit.save(folder / "circuit.json")]
        with contextlib.suppress(SiteError):  # a graph that their format can't hold; ours does
            paths.append(write_eap_ig(self.proof.circuit, folder / "circuit.eap-ig.json", d_model=self.d_model))
        return paths


def _summary(told: Faithfulness) -> dict[str, Any]:
    """One circuit's share with its interval; of several, their mean and range."""
    if len(told.sizes) == 1:
        return _finite(told.intervals()[0])
    drawn = told.share.double()
    return _finite(Interval(float(drawn.mean()), float(drawn.min()), float(drawn.max()))) | {"draws": len(drawn)}


def _finite(one: Interval) -> dict[str, Any]:
    """An interval as JSON: what is not defined is null."""
    return {name: value if math.isfinite(value) else None for name, value in one._asdict().items()}


def _curve(told: Faithfulness) -> dict[str, Any]:
    return {"asked": list(told.shares), "edges": list(told.sizes), "share": [_finite(one) for one in told.intervals()]}


def make_pairs(subject: Subject, *, task: str = "", file: str | Path = "", n: int = 64, seed: int = 0) -> PairSet:
    """Pairs of a task, made for the subject, or those of a file. Raises DataError for an unknown task."""
    if bool(task) == bool(file):
        raise DataError("A circuit is of a task or of a file of pairs.", remedy="Give --task or --pairs, one of them.")
    if file:
        return load_pairs(file)
    known = {**TASKS, **WORLD_TASKS}
    if task not in known:
        hint = nearest(task, known) or f"There are: {', '.join(known)}."
        raise DataError(f"There is no task {task!r}.", remedy=hint)
    spec = known[task]
    return spec.make(subject.tokenizer, n, seed=seed, corruption=CORRUPTIONS.get(task, spec.corruptions[0]))


def metric_for(name: str, pairs: Pairs, subject: Subject, *, task: str = "") -> Metric:
    """A metric of pairs by name; "auto" is the task's own, else the logit difference, or the answer's probability where
    no wrong answers are given.
    """
    if name not in METRICS:
        raise DataError(f"There is no metric {name!r}.", remedy=f"It is one of {', '.join(METRICS)}.")
    bare = pairs.wrong.numel() == 0 or bool((pairs.wrong < 0).all(1).any())
    if name == "kl":
        return KL(subject.last_logits(pairs.clean))
    spec = TASKS.get(task) or WORLD_TASKS.get(task)
    by_probability = spec is not None and spec.metric == "probability_difference"
    if name == "probability" or (name == "auto" and (bare or by_probability)):
        return Probability(pairs.answers) if bare else Probability(pairs.answers, pairs.wrong)
    return LogitDifference(pairs.answers, pairs.wrong)


def find_circuit(
    subject: Subject,
    raw: PairSet,
    *,
    method: str = "EAP-IG-inputs",
    metric: str = "auto",
    edges: int | None = None,
    threshold: float | None = None,
    steps: int = 5,
    target: float = 0.8,
    draws: int = 20,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CircuitRun:
    """Find a circuit on half of the pairs, and measure it on the other half.

    Args:
        subject: the model.
        raw: the pairs.
        method: one of `METHODS`.
        metric: one of `METRICS`.
        edges: how many edges to take; by default as many as reach the target (a learned mask: 2 %).
        threshold: of ACDC, in units of the metric's damage.
        steps: of integrated gradients, or hundreds of them of a learned mask.
        target: share of the behaviour to be kept.
        draws: of each control.
        seed: of halves and controls.
        progress: called with what is done next.
    """
    said = progress or (lambda text: None)
    graph = _checked(subject, method, edges, threshold)
    halves = raw.halves(seed=seed)
    found, measured = (encode_pairs(subject, half) for half in halves)
    metrics = [metric_for(metric, pairs, subject, task=raw.name) for pairs in (found, measured)]
    said(f"finding a circuit by {method} on {len(found)} pairs")
    circuit: Circuit | None = None
    blank: Scored | None = None
    if method in SCORING:
        scores: Scored = _scores(subject, found, method, graph, metrics[0], steps)
        said("the same on an untrained model")
        plain = untrained_like(subject, seed=seed, kind="initial" if subject.config is not None else "shuffled")
        blank = _scores(plain, found, method, graph, metric_for(metric, found, plain, task=raw.name), steps)
        circuit = None if edges is None else greedy_edges(scores, edges)
    else:
        wiring = Wiring(subject, found.clean, graph, ablation=Ablation.paired(found.corrupted))
        if method == "ACDC":
            scores = circuit = acdc(wiring, metrics[0], threshold=threshold or 0.0).circuit
        else:
            size = edges or max(1, int(PRUNED * graph.n_edges))
            scores = circuit = learn_mask(wiring, metrics[0], edges=size, steps=100 * steps, seed=seed).circuit
    said(f"measuring it on {len(measured)} other pairs")
    proof = prove(
        subject, scores, found, measured, circuit=circuit, untrained=blank, metrics=(metrics[0], metrics[1]),
        target=target, draws=draws, seed=seed, clusters=[pair.clean.text for pair in halves[1]],
    )  # fmt: skip
    return CircuitRun(
        raw.name, subject.name, int(subject.facts.d_model or 0), len(found), len(measured), proof, _notes(proof, target)
    )


def _scores(subject: Subject, pairs: Pairs, method: str, graph: Graph, metric: Metric, steps: int) -> Scored:
    return edge_scores(subject, pairs, method=method, graph=graph, metric=metric, steps=steps)  # ty: ignore[invalid-argument-type]


def _checked(subject: Subject, method: str, edges: int | None, threshold: float | None) -> Graph:
    if method not in METHODS:
        hint = nearest(method, METHODS) or f"It is one of {', '.join(METHODS)}."
        raise DataError(f"There is no method {method!r}.", remedy=hint)
    if (method == "ACDC") != (threshold is not None):
        raise DataError(
            "ACDC takes a threshold, and no other method does.", remedy="Give --threshold with --method ACDC alone."
        )
    if method == "ACDC" and edges is not None:
        raise DataError("ACDC's threshold decides how many edges there are.", remedy="Leave --edges out.")
    graph = Graph.of(subject)
    if edges is not None and not 0 < edges <= graph.n_edges:
        raise DataError(f"{edges} edges were asked for; the model's graph has {graph.n_edges:,}.")
    return graph


def _notes(proof: Proof, target: float) -> tuple[str, ...]:
    told, notes = proof.told, []
    gap = (told.whole - told.nothing).double()
    error = float(gap.std() / max(1, len(gap)) ** 0.5) if len(gap) > 1 else float("inf")
    if abs(float(gap.mean())) < 2 * error:
        notes.append(
            f"Clean and corrupted prompts hardly differ in {told.metric} ({float(gap.mean()):.3g}): shares mean little."
        )
    if len(proof.circuit) == 0:
        notes.append("The circuit is empty: no edge was kept, or all were dead ends.")
    elif float(proof.first.share.max()) < target:
        notes.append(f"No circuit reached {target:g} of the gap on the pairs that it was found on.")
    if not torch.isfinite(told.share).all():
        notes.append("The share is not defined, because the model scores as with all edges ablated.")
    return tuple(notes)
