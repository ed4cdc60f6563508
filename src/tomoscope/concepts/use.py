"""Does the model use what a probe reads? Take the direction out, or add it, and see what the answers do.

    effect = causal_effect(subject, prompts, metric, direction, draws=20, seed=0)
    effect.erased, effect.added            [item] change of the metric
    effect.random_erased                   [draw, item] the same for random directions

The control is random directions with the activations' own covariance, of equal norm and equally read: a random vector
of the space lies mostly where the stream has no variance, and is too easy to beat. How it can mislead: a direction that
is used only at other positions or layers shows no effect here; adding a direction moves the model off its distribution,
so an effect of a large dose is no use; several directions may say the same, so that taking one away changes nothing.

Source: Elazar et al. 2021 (amnesic probing, arXiv:2006.00995); Marks and Tegmark 2023 (arXiv:2310.06824).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.concepts.direction import Direction, affine
from tomoscope.concepts.states import collect
from tomoscope.findings.control import random_directions
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, null_p_value
from tomoscope.model import Subject, add

Metric = Callable[[Tensor], Tensor]
"""[item, vocab] last logits -> [item] how strongly the model says the concept's positive side."""


@dataclass(frozen=True, eq=False)
class CausalEffect:
    """What a direction does to a metric.

    Attributes:
        plain: [item] the metric without any edit.
        erased: [item] with the direction removed.
        added: [item] with `shift` added minus with it taken off.
        random_erased: [draw, item] with a random direction removed.
        random_added: [draw, item] likewise added minus taken off.
        clusters: [item] sources, or none.
        seed: of draws and intervals.
    """

    plain: Float[np.ndarray, " item"]
    erased: Float[np.ndarray, " item"]
    added: Float[np.ndarray, " item"]
    random_erased: Float[np.ndarray, "draw item"]
    random_added: Float[np.ndarray, "draw item"]
    clusters: Sequence[Any] | None
    seed: int

    @property
    def removal(self) -> Estimate:
        """Mean absolute change of the metric by the removal."""
        change = np.abs(self.erased - self.plain)
        return bootstrap_interval(change, seed=self.seed, clusters=self.clusters, unit="metric")

    @property
    def steering(self) -> Estimate:
        """Mean change of the metric from one step down to one step up."""
        return bootstrap_interval(self.added, seed=self.seed, clusters=self.clusters, unit="metric")

    @property
    def random_removals(self) -> Float[np.ndarray, " draw"]:
        """The removal's figure for each random direction."""
        return np.abs(self.random_erased - self.plain).mean(1)

    @property
    def random_steerings(self) -> Float[np.ndarray, " draw"]:
        """The steering's figure for each random direction, without its sign (which is chance)."""
        return np.abs(self.random_added.mean(1))

    def p_value(self) -> float:
        """How often a random direction's steering is at least as large."""
        return null_p_value(float(abs(self.added.mean())), self.random_steerings)

    def removal_p_value(self) -> float:
        """How often a random direction's removal changes as much."""
        return null_p_value(float(np.abs(self.erased - self.plain).mean()), self.random_removals)


def causal_effect(
    subject: Subject,
    prompts: Sequence[Any],
    metric: Metric,
    direction: Direction,
    *,
    at: Any = None,
    strength: float = 1.0,
    draws: int = 19,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
) -> CausalEffect:
    """Edit the direction's site, and random ones beside it.

    Args:
        subject: the model.
        prompts: the items.
        metric: of the last logits.
        direction: what a probe found.
        at: positions; those that the direction was fitted at by default (all, where it was fitted on means).
        strength: steps of `shift` that are added and taken off.
        draws: random directions.
        clusters: a key an item, for intervals.
        seed: of the draws.
    """
    at = (None if direction.at == "mean" else direction.at) if at is None else at
    batch = subject.tokens(list(prompts))
    there = collect(subject, list(prompts), direction.site, at=direction.at)[direction.site]
    assert direction.shift is not None
    assert direction.mean is not None
    centred = (there - there.mean(0)).double().numpy()
    covariance = centred.T @ centred / max(1, len(centred) - 1)
    drawn = torch.from_numpy(
        random_directions(direction.shift.double().numpy(), n=draws, seed=seed, covariance=covariance)
    ).float()

    def run(edits: list[Any]) -> np.ndarray:
        return metric(subject.last_logits(batch, edits=edits).float().cpu()).double().numpy()

    plain = run([])
    erased = run([direction.erase(at=at)])
    added = run([direction.write(strength, at=at)]) - run([direction.write(-strength, at=at)])
    random_erased, random_added = [], []
    for vector in drawn:
        unit = vector / vector.norm().clamp(min=1e-30)
        random_erased.append(run([affine(direction.site, unit[:, None], unit[None], direction.mean, at=at)]))
        up, down = (run([add(direction.site, vector, sign * strength, at=at)]) for sign in (1, -1))
        random_added.append(up - down)
    return CausalEffect(plain, erased, added, np.stack(random_erased), np.stack(random_added), clusters, seed)
