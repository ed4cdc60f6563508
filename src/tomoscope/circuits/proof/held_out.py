"""A circuit chosen on some pairs and measured on others, beside what it would score by chance.

    scores = edge_scores(subject, found)                    on one half of the pairs
    proof = prove(subject, scores, found, measured, seed=0)
    proof.circuit, proof.told.intervals(), proof.curve.areas()

The circuit is the smallest that keeps a target share of the behaviour on the pairs that it was found on (of growing
sizes, grown greedily from the logits), or one that is given. On the other pairs it stands beside circuits of the very
size: connected ones drawn at random; itself with the heads of each layer exchanged; and the one that the same method
picks on a model that learned nothing.

How it can mislead: random circuits of a small size score nothing in most models, so beating them is little; exchanged
heads are the harder control. Pairs of one template on both sides make the other half an easy one.

Steps: the curve on the first pairs, the size, the curve on the second ones, controls of that size, then of every size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from tomoscope.circuits.circuit import Circuit
from tomoscope.circuits.discovery.select import Scored, greedy_edges, random_circuit, with_heads_exchanged
from tomoscope.circuits.formats import MIB_SHARES
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.patching.activation import Pairs
from tomoscope.circuits.proof.faithfulness import Faithfulness, faithfulness_curve, measure, random_faithfulness
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError
from tomoscope.model import Batch, Subject

LARGEST = 0.2
"""Share of the edges that a chosen circuit has at most, where none reaches the target."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Proof:
    """A circuit and its evidence.

    Attributes:
        circuit: the one that was chosen.
        first: its curve on the pairs that it was found on.
        curve: the same circuits on the other pairs.
        told: the circuit alone, on the other pairs.
        random: random circuits of its size, connected.
        exchanged: itself with the heads of each layer exchanged.
        untrained: the circuit of its size from scores on a model that learned nothing; None where none were given.
        random_curves: random circuits of the curve's sizes.
        untrained_curve: the curve from those scores.
    """

    circuit: Circuit
    first: Faithfulness
    curve: Faithfulness
    told: Faithfulness
    random: Faithfulness
    exchanged: Faithfulness
    untrained: Faithfulness | None
    random_curves: tuple[Faithfulness, ...]
    untrained_curve: Faithfulness | None


def taken(pairs: Pairs, rows: Sequence[int] | Int[Tensor, " row"]) -> Pairs:
    """Some of the pairs, counted anew."""
    chosen = torch.as_tensor(rows, dtype=torch.long)

    def part(batch: Batch) -> Batch:
        piece = batch.take(chosen) if len(set(chosen.tolist())) == len(chosen) else _repeated(batch, chosen)
        return Batch(piece.input_ids, piece.attention_mask, piece.prompts, piece.pads, piece.extra)

    return Pairs(part(pairs.clean), part(pairs.corrupted), pairs.answers[chosen], pairs.wrong[chosen])


def _repeated(batch: Batch, rows: Tensor) -> Batch:
    """Rows of which some stand more than once (a bootstrap's)."""
    ids = None if batch.input_ids is None else batch.input_ids[rows]
    mask = None if batch.attention_mask is None else batch.attention_mask[rows]
    prompts = tuple(batch.prompts[row] for row in rows.tolist())
    return Batch(ids, mask, prompts, batch.pads[rows], {name: value[rows] for name, value in batch.extra.items()})


def prove(
    subject: Subject,
    scores: Scored,
    found: Pairs,
    measured: Pairs,
    *,
    circuit: Circuit | None = None,
    untrained: Scored | None = None,
    metrics: tuple[Metric, Metric] | None = None,
    target: float = 0.8,
    shares: Sequence[float] = MIB_SHARES,
    draws: int = 20,
    seed: int = 0,
    clusters: Sequence[Hashable] = (),
    progress: Progress | None = None,
) -> Proof:
    """Choose a circuit on some pairs, measure it on others, and compare it with chance.

    Args:
        subject: the model.
        scores: of its edges, from the first pairs.
        found: the pairs that the scores are from.
        measured: other pairs.
        circuit: one that is to be proved; the smallest that reaches the target by default.
        untrained: scores by the same method of a model that learned nothing.
        metrics: of the first and the second pairs; their logit difference by default.
        target: share of the behaviour that the chosen circuit keeps on the first pairs.
        shares: sizes of the curve as shares of all edges.
        draws: of random circuits, and of exchanged heads; the curve has a quarter as many.
        seed: of all draws.
        clusters: a key for each of the second pairs, where pairs belong together.
        progress: called with steps done and in all.

    Raises:
        DataError: the model scores no better on clean than on corrupted prompts of the first pairs.
    """
    graph, steps = scores.graph, 6
    metrics = metrics or (found.metric(), measured.metric())
    first = Wiring(subject, found.clean, graph, ablation=Ablation.paired(found.corrupted))
    second = Wiring(subject, measured.clean, graph, ablation=Ablation.paired(measured.corrupted))
    told = _Told(progress, steps)
    chosen_on = faithfulness_curve(first, scores, metrics[0], shares=shares, greedy=True, name="found on")
    if not bool(torch.isfinite(chosen_on.share).all()):
        raise DataError("The model scores the same on clean and corrupted prompts, so there is nothing to explain.")
    told()
    grown = [greedy_edges(scores, int(share * graph.n_edges)) for share in shares]
    circuit = grown[smallest(chosen_on, target)] if circuit is None else circuit
    curve = measure(second, grown, metrics[1], shares=shares, clusters=clusters, name="the circuit")
    alone = measure(second, [circuit], metrics[1], clusters=clusters, name="the circuit")
    told()
    size = len(circuit)
    drawn = [random_circuit(graph, size, seed=seed + draw) for draw in range(draws)]
    random = measure(second, drawn, metrics[1], clusters=clusters, name="random")
    told()
    others = [with_heads_exchanged(circuit, seed=seed + draw) for draw in range(draws)]
    exchanged = measure(second, others, metrics[1], clusters=clusters, name="other heads")
    told()
    blank = blank_curve = None
    if untrained is not None:
        same = greedy_edges(untrained, min(graph.n_edges, circuit.how.get("asked", size)))
        blank = measure(second, [same], metrics[1], clusters=clusters, name="untrained")
        blank_curve = faithfulness_curve(
            second, untrained, metrics[1], shares=shares, greedy=True, clusters=clusters, name="untrained"
        )
    told()
    chance = random_faithfulness(
        second, curve.sizes, metrics[1], draws=max(1, draws // 4), seed=seed + draws, clusters=clusters
    )
    curves = tuple(replace(one, shares=curve.shares) for one in chance)
    told()
    return Proof(circuit, chosen_on, curve, alone, random, exchanged, blank, curves, blank_curve)


def smallest(curve: Faithfulness, target: float) -> int:
    """The first circuit of a curve that reaches the target without overshooting the model by as much as it may fall
    short of it; where none does, the one of at most `LARGEST` of the edges whose share is nearest to 1.
    """
    share = curve.share.tolist()
    for place, value in enumerate(share):
        if target <= value <= 2 - target:
            return place
    allowed = [place for place, size in enumerate(curve.shares) if size <= LARGEST] or [0]
    return min(allowed, key=lambda place: abs(1 - share[place]))


class _Told:
    """Counts steps for a progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
