"""Edge pruning: a mask over the edges, learned by gradient to be sparse and to keep the model's answers.

    found = learn_mask(wiring, edges=100, steps=300, seed=0)
    found.circuit, found.losses, found.sizes

Each edge has a gate from a hard-concrete distribution (Louizos et al. 2018): 0, 1, or between, with a gradient. The
loss is the metric's damage under sampled gates, and a Lagrangian holds the expected number of open gates at a target
that comes down from all edges to the one asked for. In the end the gates likeliest to be open are the circuit,
and that probability its scores.

How it can mislead: the result is one of many masks that do as well (other seeds give others: see `stability`), it is
fitted on its prompts and must be measured on others, and a mask that is learned can use what edges carry in ways in
which the whole model never does. Few steps give a random circuit. Source: Bhaskar et al. 2024 (Edge Pruning,
arXiv:2406.16778).

Steps: gates of edges; a batch of pairs; gates drawn, run, damage and expected size; one step down for the gates, one up
for the multipliers; the top of the gates, pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.circuit import Circuit
from tomoscope.circuits.discovery.damage import Damage, measured
from tomoscope.circuits.discovery.select import top_edges
from tomoscope.circuits.graph import Graph
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError

TEMPERATURE, LOW, HIGH = 2.0 / 3.0, -0.1, 1.1
"""Of the hard-concrete distribution: its temperature, and the ends to which it is stretched before it is cut."""
WARM = 0.5
"""Share of the steps over which the target comes down to the size that was asked for."""


@dataclass(frozen=True)
class LearnedMask:
    """A learned mask.

    Attributes:
        circuit: the gates likeliest to be open, dead ends pruned; its scores are those probabilities.
        losses: [step] damage under the gates that were drawn.
        sizes: [step] expected number of open gates.
    """

    circuit: Circuit
    losses: tuple[float, ...]
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class _Gates:
    """The graph, and the probability of each edge's gate to be open, as a matrix."""

    graph: Graph
    scores: Tensor


def gates(logits: Float[Tensor, "*edge"], noise: Float[Tensor, "*edge"]) -> Float[Tensor, "*edge"]:
    """Hard-concrete gates for uniform noise in (0, 1)."""
    soft = torch.sigmoid((noise.log() - (1 - noise).log() + logits) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(logits: Float[Tensor, "*edge"]) -> Float[Tensor, "*edge"]:
    """Probability that a gate is not 0."""
    return torch.sigmoid(logits - TEMPERATURE * math.log(-LOW / HIGH))


def learn_mask(
    wiring: Wiring,
    metric: Metric | None = None,
    *,
    edges: int,
    damage: str | None = None,
    steps: int = 300,
    rate: float = 0.2,
    push: float = 0.2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedMask:
    """Learn which edges to keep.

    Args:
        wiring: the model on the prompts to find the circuit on; all of them are run at each step, so give as many as
            fit into memory with gradients.
        metric: of the wiring's pairs; by default KL from the model's own distribution.
        edges: how many to keep; dead ends among them are pruned, so fewer may be left.
        damage: as in `acdc`: "value" for KL and "change" for all others by default.
        steps: of Adam.
        rate: of the gates' log odds.
        push: rate of the multipliers that hold the size at its target.
        seed: of the gates drawn.
        progress: called with steps done and in all.
    """
    graph = wiring.graph
    if not 0 < edges <= graph.n_edges or steps < 1:
        raise DataError(f"A mask of {edges} edges of {graph.n_edges:,} in {steps} steps can't be learned.")
    damages = Damage.of(wiring, metric, damage)
    device, generator = wiring.subject.device, torch.Generator().manual_seed(seed)
    precise = torch.float64 if wiring.subject.dtype == torch.float64 else torch.float32
    places = torch.nonzero(graph.allowed.flatten())[:, 0].to(device)
    # open at first: what is not needed is closed, rather than what is needed found
    logits = torch.full((len(places),), 3.0, dtype=precise, device=device, requires_grad=True)
    multipliers = torch.zeros(2, dtype=precise, device=device, requires_grad=True)
    down = torch.optim.Adam([logits], lr=rate)
    up = torch.optim.Adam([multipliers], lr=push, maximize=True)
    losses, sizes = [], []
    for step in range(steps):
        noise = torch.rand(len(places), generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        with torch.enable_grad():
            drawn = gates(logits, noise.to(device, precise))
            mask = torch.zeros(graph.allowed.numel(), dtype=precise, device=device).index_copy(0, places, drawn)
            lost = damages(measured(damages.metric, wiring.logits(mask.reshape(graph.allowed.shape))))
            size = open_probability(logits).sum()
            share = min(1.0, (step + 1) / max(1, WARM * steps))
            target = graph.n_edges + (edges - graph.n_edges) * share
            over = (size - target) / graph.n_edges
            loss = lost + multipliers[0] * over + multipliers[1] * over**2
            for optimiser in (down, up):
                optimiser.zero_grad()
            loss.backward()
        down.step()
        up.step()
        losses.append(float(lost.detach()))
        sizes.append(float(size.detach()))
        if progress is not None:
            progress(step + 1, steps)
    scores = torch.full((graph.allowed.numel(),), torch.nan, dtype=torch.float64)
    scores[places.cpu()] = open_probability(logits.detach().double()).cpu()
    chosen = top_edges(_Gates(graph, scores.reshape(graph.allowed.shape)), edges, absolute=False)
    how = {
        "method": "edge pruning", "metric": damages.metric.name, "damage": damages.kind,
        "prompts": len(wiring), "seed": seed, "steps": steps,
        "choices": wiring.ablation.choices().to_json(), **chosen.how,
    }  # fmt: skip
    return LearnedMask(Circuit(graph, chosen.mask, chosen.scores, how), tuple(losses), tuple(sizes))
