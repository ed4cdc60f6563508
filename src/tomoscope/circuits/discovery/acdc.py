"""ACDC: take away one edge after another, from the logits back, and keep those whose loss is felt.

    run = acdc(wiring, KL(wiring.clean_logits), threshold=0.01)
    run.circuit, run.trace (every edge in the order in which it was tried), run.masks_run
    runs = acdc_sweep(wiring, metric, thresholds)

At each destination, later ones first, each incoming edge is ablated, later sources first; where the damage so grows by
less than the threshold, the edge stays away, and what follows is judged without it. Inputs of a node whose output
nobody reads any more go unasked: they change nothing.

Runs are speculative: the next decisions are guessed, the runs that these guesses imply are made as one batch, and
decisions are taken from them up to the first wrong guess (that run still decides its own edge). So the result is that
of one run after another, whatever was guessed; only how many runs are wasted depends on it. Guesses come from `prior`
(scores of the edges, or a run of another threshold), else from what was decided last.

How it can mislead: the result depends on the order, which is recorded; redundant parts are kept or lost together with
the first of them that is tried; a threshold on KL has no meaning across tasks, so sweep it. Two runs whose damages
differ from the threshold by rounding alone can be decided otherwise in a batch of another size.
Source: Conmy et al. 2023 (arXiv:2304.14997).

Steps: order; guess; run a batch; decide; go on until no edge is left; prune.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tomoscope.circuits.circuit import Circuit, inputs_matrix
from tomoscope.circuits.discovery.damage import Damage
from tomoscope.circuits.discovery.select import Scored
from tomoscope.circuits.graph import LOGITS, Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError

RECENT, MOST = 16, 64
Progress = Callable[[int, int], None]


class Step(NamedTuple):
    """One edge that was tried: its row and column, the damage without it, what that added, and whether it stayed."""

    row: int
    column: int
    damage: float
    added: float
    kept: bool


@dataclass(frozen=True)
class ACDCRun:
    """What ACDC did.

    Attributes:
        circuit: what is left, dead ends pruned; its scores are what each edge's loss added when it was tried (0 for
            edges that went unasked).
        trace: every edge that was tried, in order.
        threshold: of the damage.
        start: damage before any edge was taken away.
        masks_run: masks that were run, each on all prompts, wasted ones included.
        rounds: batches that were run one after another.
    """

    circuit: Circuit
    trace: tuple[Step, ...]
    threshold: float
    start: float
    masks_run: int
    rounds: int

    @property
    def order(self) -> list[tuple[str, str]]:
        """(source, destination) of the edges in the order in which they were tried."""
        graph = self.circuit.graph
        return [(graph.sources[step.row], graph.destinations[step.column]) for step in self.trace]


def edge_order(graph: Graph) -> list[tuple[int, int]]:
    """Rows and columns in the order of trial: destinations latest first, then sources latest first, heads ascending."""
    columns = sorted(range(len(graph.readers)), key=lambda c: (-graph.readers[c].moment, c))
    rows = sorted(range(len(graph.writers)), key=lambda r: (-graph.writers[r].moment, r))
    allowed = graph.allowed.numpy()
    return [(row, column) for column in columns for row in rows if allowed[row, column]]


def acdc(
    wiring: Wiring,
    metric: Metric | None = None,
    *,
    threshold: float,
    damage: str | None = None,
    prior: Scored | ACDCRun | None = None,
    speculation: int = MOST,
    progress: Progress | None = None,
) -> ACDCRun:
    """Find a circuit by taking edges away.

    Args:
        wiring: the model on the prompts to find it on, with the ablation of edges that are away.
        metric: of the wiring's pairs; by default KL from the model's own distribution.
        threshold: an edge stays away where its loss adds less than this to the damage.
        damage: what counts as damage, a mean over pairs: "value" (the metric itself: KL), "drop" (how far it fell below
            the model's: the paper's negative logit difference, by which harmful edges go first), or "change" (how far
            it moved either way). "value" for KL and "change" for all others by default.
        prior: what the decisions are guessed from.
        speculation: the most runs of a batch; 1 runs one after another.
        progress: called with edges decided and in all.

    Raises:
        DataError: an unknown damage, a threshold below 0, or fewer than one run a batch.
    """
    damages = Damage.of(wiring, metric, damage)
    if not threshold >= 0 or speculation < 1:
        raise DataError(f"A threshold of {threshold} with {speculation} runs a batch can't be run.")
    search = _Search(wiring, damages, threshold, _guesses(prior, threshold), speculation)
    search.run(progress)
    scores = torch.zeros(wiring.graph.allowed.shape, dtype=torch.float64)
    for step in search.trace:
        scores[step.row, step.column] = step.added
    how = {
        "method": "ACDC", "threshold": threshold, "metric": damages.metric.name, "damage": damages.kind,
        "prompts": len(wiring), "choices": wiring.ablation.choices().to_json(),
    }  # fmt: skip
    circuit = Circuit(wiring.graph, torch.from_numpy(search.mask), scores, how).pruned()
    return ACDCRun(circuit, tuple(search.trace), threshold, search.start, search.masks_run, search.rounds)


def acdc_sweep(
    wiring: Wiring,
    metric: Metric | None = None,
    *,
    thresholds: Sequence[float],
    damage: str | None = None,
    prior: Scored | None = None,
    speculation: int = MOST,
    progress: Progress | None = None,
) -> list[ACDCRun]:
    """ACDC at several thresholds, each guessed from the one before it (by size); in the order that was given."""
    found: dict[float, ACDCRun] = {}
    last: Scored | ACDCRun | None = prior
    for done, threshold in enumerate(sorted(set(thresholds))):
        last = found[threshold] = acdc(
            wiring, metric, threshold=threshold, damage=damage, prior=last, speculation=speculation
        )
        if progress is not None:
            progress(done + 1, len(set(thresholds)))
    return [found[threshold] for threshold in thresholds]


def sweep_area(circuits: Sequence[Circuit], known: Circuit, *, ignore: Tensor | None = None) -> float:
    """ROC area of a sweep: its circuits as points, joined by steps that give nothing for what was not measured.

    An empty circuit and the whole graph are always points. Between two points the area is that of the lower one, so a
    sweep that is too coarse is punished, not flattered (Conmy et al. 2023).
    """
    points = {(0.0, 0.0), (1.0, 1.0)}
    for circuit in circuits:
        edges = circuit.compare(known, ignore=ignore).edges
        points.add((edges.false_positive_rate, edges.recall))
    area, best, last = 0.0, 0.0, 0.0
    for x, y in sorted(points):
        area += (x - last) * best
        best, last = max(best, y), x
    return area


def _guesses(prior: Scored | ACDCRun | None, threshold: float) -> Bool[np.ndarray, "source destination"] | None:
    """Which edges are guessed to stay."""
    if prior is None:
        return None
    if isinstance(prior, ACDCRun):
        stays = np.zeros(prior.circuit.graph.allowed.shape, dtype=bool)
        for step in prior.trace:
            stays[step.row, step.column] = step.added >= threshold
        return stays
    scores = torch.as_tensor(prior.scores).double().nan_to_num(0.0).abs()
    return (scores >= threshold).numpy()


class _Search:
    """The state of one search."""

    def __init__(
        self,
        wiring: Wiring,
        damages: Damage,
        threshold: float,
        guesses: Bool[np.ndarray, "source destination"] | None,
        speculation: int,
    ) -> None:
        self.wiring, self.damages, self.threshold = wiring, damages, threshold
        self.guesses, self.speculation = guesses, speculation
        graph = wiring.graph
        self.order = edge_order(graph)
        self.inputs = inputs_matrix(graph).numpy()
        self.ends = np.array([node.kind == LOGITS for node in graph.readers])
        self.mask = graph.allowed.numpy().copy()
        self.place = 0
        self.trace: list[Step] = []
        self.recent: list[bool] = []
        self.batch = min(8, speculation)
        self.masks_run = self.rounds = 0
        self.start = self.current = float(damages(damages.clean.double()))

    def run(self, progress: Progress | None) -> None:
        """Decide every edge."""
        while self.place < len(self.order):
            tried, masks = self._plan()
            if tried:
                values = self.wiring.run(torch.from_numpy(np.stack(masks)), self.damages.metric)
                self.masks_run += len(tried)
                self.rounds += 1
                self._decide(tried, self.damages(values.double()).numpy())
            if progress is not None:
                progress(self.place, len(self.order))

    def _read(self, mask: np.ndarray, column: int) -> bool:
        """Whether anybody reads a node that this destination is an input of."""
        return bool(self.ends[column] or mask[self.inputs[:, column]].any())

    def _plan(self) -> tuple[list[tuple[int, bool]], list[np.ndarray]]:
        """The next places in the order with what is guessed of each, and the mask that tries each if guesses hold."""
        mask = self.mask.copy()
        often = sum(self.recent) * 2 > len(self.recent)
        tried: list[tuple[int, bool]] = []
        masks: list[np.ndarray] = []
        place = self.place
        while place < len(self.order) and len(tried) < self.batch:
            row, column = self.order[place]
            if self._read(mask, column):
                stays = often if self.guesses is None else bool(self.guesses[row, column])
                mask[row, column] = False
                masks.append(mask.copy())
                mask[row, column] = stays
                tried.append((place, stays))
            else:
                mask[row, column] = False
            place += 1
        if not tried:  # nothing is left that anybody reads
            self.mask, self.place = mask, place
        return tried, masks

    def _decide(self, tried: list[tuple[int, bool]], damages: Float[np.ndarray, " mask"]) -> None:
        decided, right = 0, True
        for (place, guess), value in zip(tried, damages.tolist(), strict=True):
            self._pass(place)
            row, column = self.order[place]
            added = value - self.current
            kept = not added < self.threshold
            self.trace.append(Step(row, column, value, added, kept))
            self.mask[row, column] = kept
            self.current = self.current if kept else value
            self.place, decided = place + 1, decided + 1
            self.recent = [*self.recent[1 - RECENT :], kept]
            right = kept == guess
            if not right:
                break
        self.batch = min(self.speculation, self.batch * 2 if right else decided + 1)

    def _pass(self, place: int) -> None:
        """Take away, unasked, what lies between the last decision and a place: nobody reads it."""
        for row, column in self.order[self.place : place]:
            self.mask[row, column] = False
