"""Which edges carry a task's answer? A circuit, found on one half of the pairs and proved on the other.

Edges are scored by integrated gradients on half A; the smallest circuit that keeps 80 % of the clean-corrupted gap
there is measured on half B, all other edges carrying what they carry in the corrupted prompts. Three claims a task:

- circuit: its share of the gap, above random connected circuits of the very size, above itself with the heads of each
  layer exchanged, and above the circuit that the same method picks on the architecture with untrained weights;
- ranking: the scores find the edges that count: the area between the circuits' share and 1 over sizes (CMD, on a log
  axis), below that of the untrained model's scores and of random circuits;
- stable: on resampled pairs the method finds the same edges (Jaccard index), more than with exchanged heads.

How it can mislead: a share above 1 means that edges which work against the answer were left out; a faithful circuit
need not be the only one, nor complete; the same templates stand in both halves. Numbers hold for this ablation
(paired), this metric, these prompts; another ablation gives others (Miller et al. 2024, arXiv:2407.08734).

Steps: halves by cluster; scores; `prove`; the same method on resampled pairs; claims, a curve and a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from tomoscope.circuits import Circuit, Pairs
from tomoscope.circuits.discovery.select import greedy_edges, with_heads_exchanged
from tomoscope.circuits.proof.completeness import stability
from tomoscope.circuits.proof.controls import untrained_like
from tomoscope.circuits.proof.faithfulness import Faithfulness
from tomoscope.circuits.proof.held_out import Proof, prove, taken
from tomoscope.circuits.scores.edges import EdgeScores, edge_scores
from tomoscope.exams.circuit_figures import circuit_figure, curve_figure
from tomoscope.exams.exam import Context, Exam
from tomoscope.exams.patching import linearised_shares
from tomoscope.exams.prompts import speaks_text
from tomoscope.exams.ready import Ready, TaskOptions, able, attempt, heading, metric_of, percent, title
from tomoscope.findings.estimate import format_number as number
from tomoscope.findings.finding import Control, Estimate, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval, null_interval, null_p_value
from tomoscope.findings.verdict import Rule
from tomoscope.model import Subject

UNIT = "share of the gap"
CLAIMS = {
    "circuit": "a small circuit carries the answer.",
    "ranking": "edge scores find the edges that count.",
    "stable": "the same circuit is found from other prompts.",
}


class DiscoveryOptions(TaskOptions):
    """Which tasks, how many pairs, and how circuits are found."""

    tasks: tuple[str, ...] = Field(
        ("ioi", "greater_than", "induction", "agreement", "world_two_hop"), description="Tasks whose circuits to find."
    )
    n: int = Field(64, ge=16, le=100_000, description="Pairs a task; half to find the circuit, half to measure it.")
    method: Literal["EAP", "EAP-IG-inputs", "EAP-IG-activations", "exact"] = Field(
        "EAP-IG-inputs", description="How edges are scored."
    )
    steps: int = Field(5, ge=1, le=1000, description="Steps of integrated gradients.")
    target: float = Field(0.8, gt=0, lt=1, description="Share of the gap that the circuit keeps where it is found.")
    draws: int = Field(20, ge=4, le=10_000, description="Random circuits, and circuits with exchanged heads.")
    resamples: int = Field(8, ge=3, le=1000, description="Resamples of the pairs for stability.")


@dataclass(frozen=True)
class Case:
    """One task on the way: its halves and what was found.

    Attributes:
        name: of the task.
        task: made and scored.
        found: half A.
        measured: half B.
        chosen: rows of half A.
        other: rows of half B.
        clusters: of half B.
        scores: of the edges on half A.
        proof: on half B.
    """

    name: str
    task: Ready
    found: Pairs
    measured: Pairs
    chosen: np.ndarray
    other: np.ndarray
    clusters: list[str]
    scores: EdgeScores
    proof: Proof


def run_discovery(context: Context) -> Iterator[Finding]:
    """For each task that the subject does: a circuit, and the evidence for it."""
    names = context.options.tasks
    for done, name in enumerate(names):
        context.progress(done, len(names), title(name))
        task = able(context, name, context.options.n)
        if isinstance(task, str):
            for kind in CLAIMS:
                yield context.not_measured(f"{name}_{kind}", _sentence(name, kind), task)
            continue
        made: list[Case] = []

        def circuit(name: str = name, task: Ready = task, made: list[Case] = made) -> Finding:
            made.append(_case(context, name, task))
            return _circuit(context, made[0])

        yield attempt(context, f"{name}_circuit", _sentence(name, "circuit"), circuit)
        for kind, make in (("ranking", _ranking), ("stable", _stable)):
            if made:
                yield attempt(
                    context,
                    f"{name}_{kind}",
                    _sentence(name, kind),
                    lambda make=make, made=made: make(context, made[0]),
                )
            else:
                yield context.not_measured(f"{name}_{kind}", _sentence(name, kind), "no circuit could be found")
    context.progress(len(names), len(names))


def _sentence(name: str, kind: str) -> str:
    return f"In {title(name)}, {CLAIMS[kind]}"


def _score(context: Context, subject: Subject, task: Ready, pairs: Pairs) -> EdgeScores:
    options = context.options
    metric = metric_of(task.spec, pairs)
    return edge_scores(subject, pairs, method=options.method, metric=metric, steps=options.steps)


def _case(context: Context, name: str, task: Ready) -> Case:
    options, subject = context.options, context.subject
    chosen, other = context.halves(task.clusters)
    found, measured = (taken(task.pairs, rows.tolist()) for rows in (chosen, other))
    clusters = [task.clusters[i] for i in other]
    scores = _score(context, subject, task, found)
    kind = "initial" if subject.config is not None else "shuffled"
    blank = untrained_like(subject, seed=context.seed_for(f"{name} untrained"), kind=kind)
    proof = prove(
        subject, scores, found, measured, untrained=_score(context, blank, task, found),
        metrics=(metric_of(task.spec, found), metric_of(task.spec, measured)), target=options.target,
        draws=options.draws, seed=context.seed_for(f"{name} random") % 2**31, clusters=clusters,
    )  # fmt: skip
    areas = proof.curve.areas(seed=context.seed_for(f"{name} areas"))
    context.log(
        f"{title(name)}: {proof.circuit!r}; CMD {areas.cmd}, on a log axis {areas.log_cmd}; CPR {areas.cpr}, on a log "
        f"axis {areas.log_cpr}; {proof.told.choices}"
    )
    return Case(name, task, found, measured, chosen, other, clusters, scores, proof)


def _shares(told: Faithfulness) -> Float[np.ndarray, "circuit pair"]:
    """Per circuit and pair a number whose mean is the circuit's share and whose spread is the ratio's own."""
    nothing = told.nothing.double().numpy()
    return linearised_shares(told.values.double().numpy() - nothing, told.whole.double().numpy() - nothing)


def _circuit(context: Context, case: Case) -> Finding:
    """The circuit's share of the gap on half B, beside circuits of the same size."""
    proof, name = case.proof, case.name
    seed = context.seed_for(f"{name} circuit")
    mine = _shares(proof.told)[0]
    gap = bootstrap_interval(
        (proof.told.whole - proof.told.nothing).double().numpy(), seed=seed, clusters=case.clusters
    )
    if gap.low is None or gap.low <= 0:
        why = f"clean prompts do not clearly score above corrupted ones ({gap}), so there is no gap to share"
        return context.not_measured(f"{name}_circuit", _sentence(name, "circuit"), why)
    controls, p = [], 0.0
    for told, label, said in (
        (proof.random, "random circuits", "Circuits of the very size, every edge on a way from embedding to logits."),
        (proof.exchanged, "other heads", "The same circuit with the heads of each layer exchanged at random."),
        (proof.untrained, "untrained scores", "The circuit that the method picks on the untrained architecture."),
    ):
        if told is None:
            continue
        others = _shares(told)
        drawn = len(others) > 1
        estimate = null_interval(others.mean(1), unit=UNIT) if drawn else bootstrap_interval(
            others[0], seed=seed, clusters=case.clusters, unit=UNIT
        )  # fmt: skip
        controls.append(Control(name=label, estimate=estimate, description=said))
        test = context.seed_for(f"{name} {label}")
        p = max(p, sign_flip_test(mine - others.mean(0), seed=test, clusters=case.clusters))
    circuit = proof.circuit
    return context.claim(
        f"{name}_circuit",
        f"In {title(name)}, {circuit.n_edges} of {circuit.graph.n_edges:,} edges carry the answer: alone, with all "
        f"others as in the corrupted prompts, they keep {percent(float(mine.mean()))} of the gap.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=case.clusters, unit=UNIT),
        controls=controls, p_value=p,
        test="the largest p of paired sign-flip tests over pairs, against the mean of each control", rule="circuit",
        sites=_sites(circuit), positions="all",
        figures=[
            context.figure(f"{name}_faithfulness", curve_figure(proof, heading(name), seed=seed)),
            context.figure(f"{name}_circuit", circuit_figure(circuit, heading(name))),
        ],
        chosen_on=case.task.note("half A", case.chosen), measured_on=case.task.note("half B", case.other),
        method=f"{DISCOVERY.method} The six choices: {proof.told.choices}.",
    )  # fmt: skip


def _sites(circuit: Circuit) -> list[str]:
    """The heads and MLPs of a circuit as sites."""
    found = []
    for node, there in zip(circuit.graph.writers, circuit.in_nodes.tolist(), strict=True):
        if there and node.kind in ("head", "attention", "mlp"):
            head = f"[head={node.head}]" if node.kind == "head" else ""
            found.append(f"layer.{node.layer}.{'mlp.out' if node.kind == 'mlp' else 'attn.z' + head}")
    return found


def _ranking(context: Context, case: Case) -> Finding:
    """The area between share and 1 over circuit sizes, on a log axis."""
    proof, name, unit = case.proof, case.name, "CMD on a log axis"
    seed = context.seed_for(f"{name} areas")

    def area(curve: Faithfulness) -> Estimate:
        found = curve.areas(seed=seed).log_cmd
        n = len(set(curve.clusters)) or len(curve.whole)
        return Estimate(
            value=found.value, low=found.low, high=found.high, unit=unit, n=n, method="bootstrap over pairs"
        )

    mine = area(proof.curve)
    chance = [curve.areas(seed=seed, resamples=2).log_cmd.value for curve in proof.random_curves]
    controls = [
        Control(
            name="random circuits", estimate=null_interval(chance, unit=unit),
            description="Connected random circuits of the curve's sizes.",
        )
    ]  # fmt: skip
    if proof.untrained_curve is not None:
        controls.append(
            Control(
                name="untrained scores", estimate=area(proof.untrained_curve),
                description="Circuits of the same sizes from the same method on the untrained architecture.",
            )
        )  # fmt: skip
    return context.claim(
        f"{name}_ranking",
        f"In {title(name)}, edge scores find the edges that count: from 0.1 % of the edges to all, circuits are "
        f"{number(mine.value or 0.0)} away from the model on average over sizes (log axis).",
        estimate=mine, controls=controls, rule="ranking", sites=_sites(proof.circuit), positions="all",
        chosen_on=case.task.note("half A", case.chosen), measured_on=case.task.note("half B", case.other),
    )  # fmt: skip


def _stable(context: Context, case: Case) -> Finding:
    """Jaccard index of circuits found on resamples of half A with the one that was found."""
    options, name, circuit = context.options, case.name, case.proof.circuit
    keys = [case.task.clusters[i] for i in case.chosen]
    generator, found = context.rng(f"{name} resamples"), []
    for _ in range(options.resamples):
        rows = _resampled(keys, generator)
        scores = _score(context, context.subject, case.task, taken(case.found, rows))
        found.append(greedy_edges(scores, min(circuit.graph.n_edges, circuit.how["asked"])))
    shared = stability(found).edges.numpy()
    seed = context.seed_for(f"{name} exchanged") % 2**31
    drawn = [with_heads_exchanged(circuit, seed=seed + i) for i in range(max(999, options.draws))]
    chance = np.array([circuit.compare(one).edges.jaccard for one in drawn])
    mine = np.array([circuit.compare(one).edges.jaccard for one in found])
    unit = "Jaccard index of edges"
    mean = float(mine.mean())
    return context.claim(
        f"{name}_stable",
        f"In {title(name)}, other prompts give the same circuit: {percent(mean)} of its edges and of those found on "
        "resampled pairs are common to both.",
        estimate=null_interval(mine, unit=unit),
        controls=[
            Control(
                name="other heads", estimate=null_interval(chance, unit=unit),
                description="The circuit with the heads of each layer exchanged at random.",
            )
        ],
        p_value=null_p_value(mean, chance), test=f"place among {len(chance)} circuits with exchanged heads",
        rule="stable", sites=_sites(circuit), positions="all", chosen_on=case.task.note("half A", case.chosen),
        measured_on=case.task.note(
            f"{options.resamples} resamples of half A, {number(float(shared.mean()))} among themselves", case.chosen
        ),
    )  # fmt: skip


def _resampled(keys: Sequence[str], generator: np.random.Generator) -> list[int]:
    """Rows of a bootstrap resample of whole clusters."""
    places: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        places.setdefault(key, []).append(row)
    groups = list(places.values())
    return [row for pick in generator.integers(0, len(groups), len(groups)) for row in groups[pick]]


DISCOVERY = Exam(
    name="circuits.discovery",
    title="The circuit of a task",
    question="Which edges between heads and MLPs carry the answer, and are they all that is needed?",
    run=run_discovery,
    rule={
        "circuit": Rule(direction="greater", minimum=0.3),
        "ranking": Rule(direction="less", minimum=0.1, alpha=None),
        "stable": Rule(direction="greater", minimum=0.1),
    },
    options=DiscoveryOptions,
    presets={
        "quick": {"n": 32, "draws": 8, "resamples": 4, "tasks": ["ioi"]},
        "deep": {"n": 128, "draws": 40, "resamples": 20},
    },
    applies=speaks_text,
    method=(
        "Edges between embedding, heads (query, key and value inputs apart), MLPs and logits are scored on half of the "
        "pairs; the smallest circuit, grown greedily from the logits, that keeps the target share of the gap there is "
        "run as a model on the other half, every other edge carrying its value in the corrupted prompt."
    ),
    cost=12.0,
)
