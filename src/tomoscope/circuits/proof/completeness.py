"""Is a circuit all of the behaviour, and nothing else? Completeness, minimality, stability.

    completeness(wiring, circuit, metric, seed=0)     the circuit against the model, the same nodes taken from both
    minimality(wiring, circuit, metric, seed=0)       what each part adds
    stability(circuits)                               of resampled prompts, other seeds, other templates

How it can mislead: completeness is a largest value over sets of nodes, so it grows with the search; a backup that no
set uncovers is not seen. A part can be needless only because another does the same. Circuits that agree on all
resamples can still be wrong together. Source: Wang et al. 2023 (arXiv:2211.00593).

Steps: sets of nodes, drawn and greedy; masks of circuit and model without them as one stack; differences as shares of
the gap between model and nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.circuit import Circuit
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.proof.faithfulness import clean_metric
from tomoscope.circuits.wiring.ablation import Choices
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Completeness:
    """The circuit against the model, with the same nodes taken away from both (Wang et al. 2023).

    Attributes:
        sets: the nodes taken away.
        circuit: [set, pair] metric of the circuit without them.
        model: [set, pair] metric of the model without them.
        gap: metric of the whole model less that with everything ablated, the unit of `incompleteness`.
        greedy: how many of the sets, at the end, were grown to make the difference large.
        choices: what was ablated, by what.
    """

    sets: tuple[tuple[str, ...], ...]
    circuit: Float[Tensor, "set pair"]
    model: Float[Tensor, "set pair"]
    gap: float
    greedy: int
    choices: Choices

    @property
    def incompleteness(self) -> Float[Tensor, " set"]:
        """|mean F(C less K) - mean F(M less K)| as a share of the gap, for each set K; 0 is complete."""
        return (self.circuit.mean(1) - self.model.mean(1)).abs() / abs(self.gap)

    @property
    def worst(self) -> tuple[tuple[str, ...], float]:
        """The set that tells circuit and model apart most, and by how much."""
        place = int(self.incompleteness.argmax())
        return self.sets[place], float(self.incompleteness[place])


def completeness(
    wiring: Wiring,
    circuit: Circuit,
    metric: Metric,
    *,
    sets: int = 20,
    greedy: int = 5,
    runs: int = 3,
    candidates: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Completeness:
    """Take the same nodes out of the circuit and out of the model: does the rest still agree?

    Args:
        wiring: the model on the prompts to measure on.
        circuit: of its graph.
        metric: of its pairs.
        sets: random sets, each node in it with probability one half.
        greedy: nodes that each greedy set grows to (a prefix of every length counts as a set).
        runs: greedy searches, each from another draw.
        candidates: nodes tried at each step of a search, drawn among those that are left.
        seed: of all draws.
        progress: called with sets done and in all.
    """
    nodes = [node for node in circuit.nodes if node not in ("embed", "position")]
    if not nodes:
        raise DataError("The circuit has no heads or MLPs to take away, so completeness is not defined.")
    generator = np.random.default_rng(seed)
    chosen = [tuple(np.array(nodes)[generator.random(len(nodes)) < 0.5].tolist()) for _ in range(sets)]
    ends = _ends(wiring, metric)
    total = sets + runs * greedy
    pieces = [_both(wiring, circuit, metric, chosen)] if chosen else []
    for run in range(runs):
        grown: tuple[str, ...] = ()
        for step in range(min(greedy, len(nodes))):
            left = [node for node in nodes if node not in grown]
            tried = [left[i] for i in generator.permutation(len(left))[:candidates]]
            found = _both(wiring, circuit, metric, [(*grown, node) for node in tried])
            best = int((found[0].mean(1) - found[1].mean(1)).abs().argmax())
            grown = (*grown, tried[best])
            chosen.append(grown)
            pieces.append((found[0][best : best + 1], found[1][best : best + 1]))
            if progress is not None:
                progress(sets + run * greedy + step + 1, total)
    mine, model = (torch.cat([piece[side] for piece in pieces]) for side in (0, 1))
    return Completeness(tuple(chosen), mine, model, ends, len(chosen) - sets, wiring.ablation.choices())


def _both(
    wiring: Wiring, circuit: Circuit, metric: Metric, sets: Sequence[Sequence[str]]
) -> tuple[Float[Tensor, "set pair"], Float[Tensor, "set pair"]]:
    whole = Circuit.whole(circuit.graph)
    masks = [one.without(nodes).mask for one in (circuit, whole) for nodes in sets]
    values = wiring.run(torch.stack(masks), metric)
    return values[: len(sets)], values[len(sets) :]


def _ends(wiring: Wiring, metric: Metric) -> float:
    """The metric's gap between the model and nothing."""
    nothing = wiring.run(torch.zeros_like(wiring.graph.allowed)[None], metric)[0]
    gap = float(clean_metric(wiring, metric).mean() - nothing.mean())
    if gap == 0.0:
        raise DataError("The model scores the same with every edge ablated, so there is no behaviour to explain.")
    return gap


@dataclass(frozen=True)
class Minimality:
    """What each part of a circuit adds to it.

    Attributes:
        parts: nodes, or edges as "source->destination".
        change: [part], the largest |F(C less K) - F(C less K and the part)| over the sets K tried, as a share of the
            gap between model and nothing.
        sets: how many sets K were tried, the empty one among them.
        choices: what was ablated, by what.
    """

    parts: tuple[str, ...]
    change: Float[Tensor, " part"]
    sets: int
    choices: Choices

    def needless(self, least: float = 0.01) -> tuple[str, ...]:
        """Parts that change the score by less than a share of the gap (Wang et al. ask for 1 %)."""
        return tuple(part for part, change in zip(self.parts, self.change.tolist(), strict=True) if change < least)


def minimality(
    wiring: Wiring,
    circuit: Circuit,
    metric: Metric,
    *,
    level: str = "nodes",
    sets: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Minimality:
    """Take each part out of the circuit, and out of the circuit without some others (which may stand in for it).

    Args:
        wiring: the model on the prompts to measure on.
        circuit: of its graph.
        metric: of its pairs.
        level: "nodes" or "edges".
        sets: random sets of other nodes (each with probability one quarter), besides the empty one.
        seed: of the sets.
        progress: called with rows done and in all.
    """
    if level not in ("nodes", "edges"):
        raise DataError(f"Minimality of {level!r} is unknown.", remedy="It is of 'nodes' or 'edges'.")
    nodes = circuit.nodes
    parts = nodes if level == "nodes" else tuple(f"{source}->{end}" for source, end in circuit.edges)
    if not parts:
        raise DataError("The circuit is empty.")
    generator = np.random.default_rng(seed)
    out = [(), *(tuple(np.array(nodes)[generator.random(len(nodes)) < 0.25].tolist()) for _ in range(sets))]
    masks = []
    for taken in out:
        base = circuit.without(taken).mask
        masks.append(base)
        for part in parts:
            mask = base.clone()
            if level == "nodes":
                mask[circuit.rows([part])] = False
            else:
                source, _, end = part.partition("->")
                mask[circuit.graph.edge(source, end)] = False
            masks.append(mask)
    values = wiring.run(torch.stack(masks), metric, progress=progress).mean(1).reshape(len(out), 1 + len(parts))
    change = (values[:, 1:] - values[:, :1]).abs().max(0).values / abs(_ends(wiring, metric))
    return Minimality(tuple(parts), change, len(out), wiring.ablation.choices())


# ---- stability


@dataclass(frozen=True)
class Stability:
    """How much circuits of the same behaviour agree (over resampled prompts, seeds, templates).

    Attributes:
        edges: [pair of circuits] Jaccard index of their edges.
        nodes: [pair of circuits] Jaccard index of their nodes.
        inclusion: [source, destination] share of the circuits that have each edge.
        n: circuits.
    """

    edges: Float[Tensor, " couple"]
    nodes: Float[Tensor, " couple"]
    inclusion: Float[Tensor, "source destination"]
    n: int

    @property
    def mean(self) -> float:
        """Mean Jaccard index of edges over all couples."""
        return float(self.edges.mean())


def stability(circuits: Sequence[Circuit]) -> Stability:
    """Compare circuits with each other; two of them at least."""
    if len(circuits) < 2:
        raise DataError("Stability needs two circuits at least.")
    if any(circuit.graph != circuits[0].graph for circuit in circuits):
        raise DataError("The circuits are of different graphs.")
    masks = torch.stack([circuit.mask for circuit in circuits])
    by_edge, by_node = _jaccard(masks.flatten(1)), _jaccard(masks.any(2))
    return Stability(by_edge, by_node, masks.double().mean(0), len(circuits))


def _jaccard(masks: Tensor) -> Float[Tensor, " couple"]:
    sets = masks.double()
    shared, size = sets @ sets.T, sets.sum(1)
    union = size[:, None] + size[None] - shared
    index = torch.where(union > 0, shared / union.clamp(min=1), torch.ones_like(union))
    first, second = torch.triu_indices(len(sets), len(sets), offset=1)
    return index[first, second]
