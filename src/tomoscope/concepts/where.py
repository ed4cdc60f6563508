"""Where a direction works: every site and position, read and written; and the one that ablation and addition choose.

- `sweep`: the difference of means at each site and position, how well it reads held-out items (against the best of the
  whole grid under shuffled labels), and what a step along it does to the answers (against random directions).
- `select_direction`: of all those candidates the one whose removal everywhere takes the behaviour away and whose
  addition brings it about, without harming neutral text (Arditi et al. 2024, arXiv:2406.11717, who found refusal so).
  Candidates are fitted on one part of the texts, chosen on a second and measured on a third.

How they can mislead: reading well and writing well are different places as a rule, neither is "the" place of the
concept; the best of many cells is lucky, which the shuffled grid pays for; texts of different length have other things
at one position counted from the end unless they end alike (a template).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tomoscope.concepts.direction import Direction, affine
from tomoscope.concepts.linear import fit
from tomoscope.concepts.measures import areas
from tomoscope.concepts.splits import cluster_index, null_labels, split
from tomoscope.concepts.states import collect
from tomoscope.concepts.use import Metric, RunsFrom, beside
from tomoscope.errors import DataError
from tomoscope.findings.estimate import Estimate
from tomoscope.findings.statistics import bootstrap_interval, null_p_value
from tomoscope.model import Edit, Subject, add

Heard = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Sweep:
    """A grid of sites and positions.

    Attributes:
        sites, positions: the axes.
        areas: [site, position] held-out area under the ROC curve.
        right: [site, position, item] held out.
        null: [draw] the best share right of the whole grid, after learning shuffled labels.
        written: [site, position, item] change of the metric from one step down to one step up; empty without a metric.
        random: [site, position, draw] mean absolute change by random directions beside it, likewise.
        directions: (site, position) -> direction.
        clusters: [item] numbers of the held-out items' sources.
        seed: of everything drawn.
    """

    sites: tuple[str, ...]
    positions: tuple[Any, ...]
    areas: Float[np.ndarray, "site position"]
    right: Float[np.ndarray, "site position item"]
    null: Float[np.ndarray, " draw"]
    written: Float[np.ndarray, "site position item"]
    random: Float[np.ndarray, "site position draw"]
    directions: dict[tuple[str, Any], Direction]
    clusters: Int[np.ndarray, " item"]
    seed: int

    def p_value(self, site: str, position: Any) -> float:
        """Of a cell's share right, against the best of the grid under shuffled labels."""
        i, j = self.sites.index(site), self.positions.index(position)
        return null_p_value(float(self.right[i, j].mean()), self.null)

    def effect(self, site: str, position: Any) -> Estimate:
        """Mean change of the metric by a step, its interval by source."""
        if not self.written.size:
            return Estimate.unknown("no metric was given", unit="metric")
        values = self.written[self.sites.index(site), self.positions.index(position)]
        return bootstrap_interval(values, seed=self.seed, clusters=self.clusters, unit="metric")


def sweep(
    subject: Subject,
    prompts: Sequence[Any],
    labels: Int[np.ndarray, " item"] | Sequence[int],
    *,
    sites: Any = "layer.*.resid_post",
    positions: Sequence[Any] = (-1,),
    metric: Metric | None = None,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    draws: int = 3,
    nulls: int = 99,
    concept: str = "concept",
    seed: int = 0,
    progress: Heard | None = None,
) -> Sweep:
    """Fit, read and write a direction at every site and position.

    Args:
        subject: the model.
        prompts: the items.
        labels: 0 or 1.
        sites: names or patterns.
        positions: counted from the end, or spans' labels; every prompt must have each.
        metric: of the last logits, for what writing does; without it directions are only read.
        clusters: a key an item; half of the sources are fitted on, the other half measured.
        draws: random directions a cell.
        nulls: shuffled labellings of the grid.
        concept: a name.
        seed: of everything drawn.
        progress: called with (cells done, cells).

    Raises:
        DataError: labels other than 0 and 1, or none of one of them.
    """
    y = np.asarray(labels)
    if set(np.unique(y)) != {0, 1}:
        raise DataError("A direction is between two classes, 0 and 1.", remedy="Give labels of both.")
    index = cluster_index(range(len(y)) if clusters is None else clusters)
    train, test = split(index, share=0.5, seed=seed, labels=y)
    rows = np.concatenate([y[None, train], null_labels(y[train], index[train], n=nulls, seed=seed + 1)])
    shuffled = np.concatenate([y[None, test], null_labels(y[test], index[test], n=nulls, seed=seed + 2)])
    held = [prompts[i] for i in test]
    batch = subject.tokens(held)
    cells: dict[str, list[Any]] = {"area": [], "right": [], "null": [], "written": [], "random": []}
    directions, names = {}, [site.name for site in subject.resolve([sites] if isinstance(sites, str) else sites)]
    states = [collect(subject, prompts, names, at=position) for position in positions]
    for place, site in enumerate(names):
        runs = None if metric is None else RunsFrom(subject, batch, site)
        for k, position in enumerate(positions):
            x = states[k][site]
            reader = fit(x[train], torch.as_tensor(rows), 2, method="means")
            scores = reader.scores(x[test])[..., 0].T.double().numpy()
            hits = (scores > 0) == (shuffled == 1)
            direction = _means(concept, site, position, x[train], y[train], seed)
            directions[site, position] = direction
            cells["area"].append(areas(scores[0], y[test] == 1))
            cells["right"].append(hits[0])
            cells["null"].append(hits[1:].mean(1))
            if runs is not None and metric is not None:
                cells["written"].append(_swing(runs, metric, direction.site, direction.shift, position))
                others = beside(direction, x[train], draws, seed=seed + place)
                swings = [_swing(runs, metric, direction.site, one, position).mean() for one in others]
                cells["random"].append(np.abs(swings))
            if progress is not None:
                progress(place * len(positions) + k + 1, len(names) * len(positions))
    grid = (len(names), len(positions))
    made = {key: np.array(value).reshape(*grid, -1) if value else np.zeros((0, 0, 0)) for key, value in cells.items()}
    return Sweep(
        tuple(names), tuple(positions), made["area"][..., 0], made["right"].astype(float), made["null"].max((0, 1)),
        made["written"], made["random"], directions, index[test], seed,
    )  # fmt: skip


def _means(concept: str, site: str, at: Any, x: Tensor, y: np.ndarray, seed: int) -> Direction:
    high, low = x[torch.as_tensor(y == 1)].mean(0), x[torch.as_tensor(y == 0)].mean(0)
    step = high - low
    unit = step / step.norm().clamp(min=1e-30)
    return Direction(
        concept, site, unit, -float(unit @ (high + low)) / 2, step, x.mean(0), at, "difference of means", n=len(x),
        spread=float((x @ unit).std()), seed=seed,
    )  # fmt: skip


def _swing(runs: RunsFrom, metric: Metric, site: str, vector: Tensor | None, at: Any) -> np.ndarray:
    up, down = (metric(runs.last_logits([add(site, vector, s, at=at)]).float().cpu()) for s in (1.0, -1.0))
    return (up - down).double().numpy()


# ---- the one that ablation and addition choose


@dataclass(frozen=True)
class Candidate:
    """One site and position on the choosing part of the texts.

    Attributes:
        site, position: where the difference of means was taken.
        ablated: mean metric of texts with the behaviour, the direction removed everywhere.
        added: mean metric of texts without it, the direction added at its site.
        divergence: mean KL in nats of the next token on neutral texts, the direction removed.
        kept: whether it may be chosen.
    """

    site: str
    position: Any
    ablated: float
    added: float
    divergence: float
    kept: bool


@dataclass(frozen=True, eq=False)
class Selected:
    """The chosen direction and how it does on texts that had no part in its choice.

    Attributes:
        direction: the difference of means.
        candidates: all, on the choosing part.
        plain_with, plain_without: [item] metric without edits, of texts with and without the behaviour.
        ablated, added: [item] metric with the direction removed everywhere, and added.
        random_ablated, random_added: [item] the same for a random direction beside it, of equal norm.
        seed: of intervals.
    """

    direction: Direction
    candidates: tuple[Candidate, ...]
    plain_with: Float[np.ndarray, " item"]
    plain_without: Float[np.ndarray, " item"]
    ablated: Float[np.ndarray, " item"]
    added: Float[np.ndarray, " item"]
    random_ablated: Float[np.ndarray, " item"]
    random_added: Float[np.ndarray, " item"]
    seed: int

    @property
    def lost(self) -> Estimate:
        """Fall of the metric by the removal, more than by the random direction's."""
        return bootstrap_interval(self.random_ablated - self.ablated, seed=self.seed, unit="metric")

    @property
    def induced(self) -> Estimate:
        """Rise of the metric by the addition, more than by the random direction's."""
        return bootstrap_interval(self.added - self.random_added, seed=self.seed, unit="metric")


def removal(subject: Subject, unit: Float[Tensor, " width"]) -> list[Edit]:
    """Take (x . unit) unit from x at every block's input and at what its attention and MLP write."""
    layers = range(subject.facts.n_layers)
    wanted = [f"layer.{i}.{part}" for i in layers for part in ("resid_pre", "attn.out", "mlp.out")]
    unit = unit / unit.norm().clamp(min=1e-30)
    zero = torch.zeros_like(unit)
    return [affine(site, unit[:, None], unit[None], zero) for site in wanted]


def select_direction(
    subject: Subject,
    with_it: Sequence[Any],
    without_it: Sequence[Any],
    metric: Metric,
    neutral: Sequence[Any],
    *,
    positions: Sequence[Any] = (-1,),
    most_divergence: float = 0.1,
    last_layers: float = 0.2,
    concept: str = "behaviour",
    seed: int = 0,
) -> Selected:
    """Fit candidates on half of the texts, choose on a quarter, measure on a quarter.

    Args:
        subject: a decoder.
        with_it: texts that show the behaviour.
        without_it: texts that do not.
        metric: how strongly the last logits show it.
        neutral: texts that must stay as they are.
        positions: counted from the end.
        most_divergence: nats that the removal may cost on neutral texts.
        last_layers: share of the blocks at the end from which no direction is taken (they write the answer itself).
        concept: a name.
        seed: of the parts and of the random direction.

    Raises:
        DataError: fewer than 8 texts of either sort, or no candidate that keeps the rules.
    """
    if min(len(with_it), len(without_it)) < 8:
        raise DataError("Fewer than eight texts of a sort.", remedy="Give eight or more with and without.")
    generator = np.random.default_rng(seed)
    parts: list[list[list[Any]]] = []
    for texts in (with_it, without_it):
        order = generator.permutation(len(texts))
        cuts = np.split(order, [len(order) // 2, 3 * len(order) // 4])
        parts.append([[texts[i] for i in cut] for cut in cuts])
    (fit_with, choose_with, ask_with), (fit_without, choose_without, ask_without) = parts

    def run(texts: Sequence[Any], edits: Sequence[Edit]) -> np.ndarray:
        return metric(subject.last_logits(list(texts), edits=edits).float().cpu()).double().numpy()

    plain = subject.last_logits(list(neutral)).float().cpu().log_softmax(-1)
    base = float(run(choose_without, []).mean())
    both, y = [*fit_with, *fit_without], np.repeat([1, 0], [len(fit_with), len(fit_without)])
    count = subject.facts.n_layers
    allowed = max(1, int(count * (1 - last_layers)))
    names = [f"layer.{i}.resid_pre" for i in range(1, count)]
    candidates, directions, kept_states = [], {}, {}
    for position in positions:
        states = collect(subject, both, names, at=position)
        for layer, site in enumerate(names, start=1):
            one = _means(concept, site, position, states[site], y, seed)
            assert one.shift is not None
            edits = removal(subject, one.shift)
            changed = subject.last_logits(list(neutral), edits=edits).float().cpu().log_softmax(-1)
            divergence = float((plain.exp() * (plain - changed)).sum(-1).mean())
            added = float(run(choose_without, [one.write(1.0)]).mean())
            kept = layer < allowed and divergence <= most_divergence and added > base
            ablated = float(run(choose_with, edits).mean())
            candidates.append(Candidate(site, position, ablated, added, divergence, kept))
            directions[site, position], kept_states[site, position] = one, states[site]
    fit_ones = [one for one in candidates if one.kept]
    if not fit_ones:
        raise DataError(
            f"None of {len(candidates)} directions adds the behaviour and spares neutral text.",
            remedy="Allow more divergence, or give texts in which the behaviour is plainer.",
        )
    best = min(fit_ones, key=lambda one: one.ablated)
    direction = directions[best.site, best.position]
    (other,) = beside(direction, kept_states[best.site, best.position], 1, seed=seed)
    return Selected(
        direction, tuple(candidates), run(ask_with, []), run(ask_without, []),
        run(ask_with, removal(subject, direction.unit)), run(ask_without, [direction.write(1.0)]),
        run(ask_with, removal(subject, other)), run(ask_without, [add(direction.site, other, 1.0)]), seed,
    )  # fmt: skip
