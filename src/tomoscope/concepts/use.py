"""Does the model use what a probe reads? Take the direction out, or add it, and see what the answers do.

    effect = causal_effect(subject, prompts, metric, direction, draws=20, seed=0)
    effect.erased, effect.added            [item] change of the metric
    effect.random_erased                   [draw, item] the same for random directions

The control is random directions of equal norm with the activations' own covariance once the concept is taken out of
them: a random vector of the space lies mostly where the stream has no variance, and is too easy to beat; and where the
concept is most of what varies, a draw with the whole covariance is the concept again, and cannot be beaten. How it can
mislead: a direction that
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
from tomoscope.errors import TomoscopeError
from tomoscope.findings.control import random_directions
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, null_p_value
from tomoscope.model import Subject, add
from tomoscope.model.batch import Batch
from tomoscope.model.bypass import bypassing

Metric = Callable[[Tensor], Tensor]
"""[item, vocab] last logits -> [item] how strongly the model says the concept's positive side."""

_TOLERANCE = 2e-3  # of the logits' spread: float32 sums in another order


@dataclass(frozen=True, eq=False)
class CausalEffect:
    """What a direction does to a metric.

    Attributes:
        plain: [item] the metric without any edit.
        erased: [item] with the direction removed; without `removal` empty, as `random_erased` is.
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
    removal: bool = True,
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
        removal: measure the removal too.
        clusters: a key an item, for intervals.
        seed: of the draws.
    """
    at = (None if direction.at == "mean" else direction.at) if at is None else at
    batch = subject.tokens(list(prompts))
    there = collect(subject, list(prompts), direction.site, at=direction.at)[direction.site]
    shift, mean = direction.shift, direction.mean
    assert shift is not None
    assert mean is not None
    drawn = beside(direction, there, draws, seed=seed)
    above = RunsFrom(subject, batch, direction.site)

    def run(edits: list[Any]) -> np.ndarray:
        return metric(above.last_logits(edits).float().cpu()).double().numpy()

    def swing(vector: Tensor) -> np.ndarray:
        up, down = (run([add(direction.site, vector, sign * strength, at=at)]) for sign in (1, -1))
        return up - down

    plain = run([])
    random_added = np.stack([swing(vector) for vector in drawn])
    erased, random_erased = np.zeros(0), np.zeros((0, 0))
    if removal:
        erased = run([direction.erase(at=at)])
        units = drawn / drawn.norm(dim=1, keepdim=True).clamp(min=1e-30)
        random_erased = np.stack([run([affine(direction.site, u[:, None], u[None], mean, at=at)]) for u in units])
    return CausalEffect(plain, erased, swing(shift), random_erased, random_added, clusters, seed)


def beside(
    direction: Direction, x: Float[Tensor, "item width"], draws: int, *, seed: int
) -> Float[Tensor, "draw width"]:
    """Random directions of the shift's norm, drawn with the covariance of items once the concept is taken out of them.

    The direction's own vector does not read them.
    """
    assert direction.shift is not None
    centred, shift, vector = (x - x.mean(0)).double(), direction.shift.double(), direction.vector.double()
    reads = vector @ shift
    if abs(float(reads)) > 1e-12:
        centred = centred - (centred @ vector / reads)[:, None] * shift
    covariance = (centred.T @ centred / max(1, len(centred) - 1)).numpy()
    return torch.from_numpy(random_directions(shift.numpy(), n=draws, seed=seed, covariance=covariance)).float()


class RunsFrom:
    """Many runs with edits of one block's output: the blocks up to it are run once.

    They are bypassed, and their stream given, where that gives the model's own logits; else every run is whole.
    """

    def __init__(self, subject: Subject, batch: Batch, site: str) -> None:
        self.subject = subject
        step = max(1, subject.rows_per_call(max(batch.width, 1)) // 2)  # so that no call is cut again
        self.batch, self.starts, self.step = batch, range(0, len(batch), step), step
        self.streams: list[Tensor] = []
        (found,) = subject.resolve([site])
        self.layer = found.layer if found.part == "resid_post" else None
        if self.layer is None:
            return
        self.streams = [subject.read(self._piece(start), found.name, keep_device=True)[found.name]
                        for start in self.starts]  # fmt: skip
        whole = subject.last_logits(self._piece(0))
        try:
            given = self._from(0, [])
        except (TomoscopeError, RuntimeError, TypeError, ValueError, AttributeError):  # blocks hand on more
            self.layer = None
            return
        if float((given - whole).abs().max()) > _TOLERANCE * float(whole.std()):
            self.layer = None

    def _piece(self, start: int) -> Batch:
        return self.batch.take(slice(start, start + self.step))

    def _from(self, place: int, edits: Sequence[Any]) -> Tensor:
        assert self.layer is not None
        with bypassing(self.subject, {**dict.fromkeys(range(self.layer)), self.layer: self.streams[place]}):
            return self.subject.last_logits(self._piece(self.starts[place]), edits=edits)

    def last_logits(self, edits: Sequence[Any]) -> Tensor:
        """[item, vocab] with edits of the site, at all items."""
        if self.layer is None:
            return self.subject.last_logits(self.batch, edits=edits)
        return torch.cat([self._from(place, edits) for place in range(len(self.starts))])
