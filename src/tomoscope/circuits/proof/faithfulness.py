"""Is a circuit the behaviour? Faithfulness, and its areas over circuit sizes.

    told = measure(wiring, [circuit], metric)             told.share: (m(C) - m(nothing)) / (m(model) - m(nothing))
    told = faithfulness_curve(wiring, scores, metric)     at MIB's ten sizes; told.areas(): CPR, CMD, both on a log axis
    chance = random_faithfulness(wiring, told.sizes, metric, draws=20, seed=0)

A share is a ratio of means over prompts; every interval is a bootstrap over prompts (whole clusters of them where keys
are given), of numerator and denominator together. `choices` stamps what was ablated by what on every result.

How it can mislead: a share of 1 says that the circuit gives the model's *score*, not its answers one by one. Shares are
not bounded: a circuit that leaves out what works against the behaviour scores above 1, which CPR rewards and CMD does
not; two thirds of CPR and CMD come from circuits of 20 % of the edges and more, so look at the areas on the log axis
first. A faithful circuit need not be complete nor minimal (`completeness`). Numbers of different ablations,
metrics or prompts do not compare (Miller et al. 2024). Sources: Wang et al. 2023 (arXiv:2211.00593), Mueller et al.
2025 (MIB, arXiv:2504.13151), Miller et al. 2024 (arXiv:2407.08734).

Steps: masks of all circuits as one stack through the wiring; means over prompts; ratios, trapezoids; resampled prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tomoscope.circuits.circuit import Circuit
from tomoscope.circuits.discovery.damage import measured
from tomoscope.circuits.discovery.select import Scored, greedy_edges, random_circuit, top_edges
from tomoscope.circuits.formats import MIB_SHARES
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.ablation import Choices
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError

RESAMPLES = 2000
LEVEL = 0.95
Progress = Callable[[int, int], None]


class Interval(NamedTuple):
    """A number with its bootstrap interval over prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Areas(NamedTuple):
    """Areas over circuit sizes as shares of all edges.

    `cpr` is the area under the faithfulness f and `cmd` that of |1 - f| over the share of edges (MIB); `log_cpr` and
    `log_cmd` are the same over the logarithm of the share, divided by its range, so that every order of magnitude
    counts the same.
    """

    cpr: Interval
    cmd: Interval
    log_cpr: Interval
    log_cmd: Interval


@dataclass(frozen=True)
class Faithfulness:
    """What some circuits score.

    Attributes:
        values: [circuit, pair] metric with all but the circuit ablated.
        whole: [pair] metric of the model.
        nothing: [pair] metric with every edge ablated.
        sizes: edges of each circuit.
        shares: the size that was asked for as a share of all edges (the realised one where none was asked for).
        metric: its name.
        choices: what was ablated, by what.
        clusters: a key a pair where pairs belong together, for the intervals.
        name: of the curve.
    """

    values: Float[Tensor, "circuit pair"]
    whole: Float[Tensor, " pair"]
    nothing: Float[Tensor, " pair"]
    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    metric: str
    choices: Choices
    clusters: tuple[Hashable, ...] = ()
    name: str = ""

    @property
    def share(self) -> Float[Tensor, " circuit"]:
        """Each circuit's share of what the model does beyond nothing."""
        gap = self.whole.mean() - self.nothing.mean()
        return (self.values.mean(1) - self.nothing.mean()) / gap

    def shares_resampled(self, *, seed: int = 0, resamples: int = RESAMPLES) -> Float[np.ndarray, "resample circuit"]:
        """`share` of resampled prompts."""
        weights = _weights(len(self.whole), self.clusters, seed, resamples)
        values, whole, nothing = (x.double().numpy() for x in (self.values, self.whole, self.nothing))
        bottom = weights @ nothing
        gap = weights @ whole - bottom
        return (weights @ values.T - bottom[:, None]) / gap[:, None]

    def intervals(self, *, seed: int = 0, resamples: int = RESAMPLES) -> list[Interval]:
        """Each circuit's share with its interval."""
        drawn = self.shares_resampled(seed=seed, resamples=resamples)
        return [_interval(float(value), column) for value, column in zip(self.share, drawn.T, strict=True)]

    def areas(self, *, seed: int = 0, resamples: int = RESAMPLES) -> Areas:
        """CPR and CMD as MIB defines them, and both on a log axis. Raises DataError for fewer than two sizes."""
        x = np.asarray(self.shares)
        if len(x) < 2 or bool((np.diff(x) <= 0).any()) or x[0] <= 0:
            raise DataError("An area needs two circuits or more, of growing sizes above 0.")
        f = np.concatenate([self.share.double().numpy()[None], self.shares_resampled(seed=seed, resamples=resamples)])
        log, span = np.log(x), np.log(x[-1]) - np.log(x[0])
        found = [np.trapezoid(y, at, axis=1) / by
                 for at, by in ((x, 1.0), (log, span)) for y in (f, np.abs(1 - f))]  # fmt: skip
        return Areas(*(_interval(float(area[0]), area[1:]) for area in found))

    def __str__(self) -> str:
        lines = [f"{self.name or 'faithfulness'} ({self.metric}; {len(self.whole)} pairs; {self.choices})"]
        lines += [f"{size:>8,} edges  {one}" for size, one in zip(self.sizes, self.intervals(), strict=True)]
        return "\n".join(lines)


def _weights(n: int, clusters: Sequence[Hashable], seed: int, resamples: int) -> np.ndarray:
    """[resample, pair] how often each pair is drawn; whole clusters at a time."""
    generator = np.random.default_rng(seed)
    if not clusters:
        return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    keys = {key: place for place, key in enumerate(dict.fromkeys(clusters))}
    place = np.array([keys[key] for key in clusters])
    return generator.multinomial(len(keys), np.full(len(keys), 1 / len(keys)), size=resamples)[:, place].astype(float)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def measure(
    wiring: Wiring,
    circuits: Sequence[Circuit],
    metric: Metric,
    *,
    shares: Sequence[float] | None = None,
    clusters: Sequence[Hashable] = (),
    name: str = "",
    progress: Progress | None = None,
) -> Faithfulness:
    """Run circuits as models and compare them with the whole model and with nothing.

    Args:
        wiring: the model on the prompts to measure on: others than those the circuits were found on.
        circuits: of the wiring's graph.
        metric: of the wiring's pairs.
        shares: sizes that were asked for, for areas.
        clusters: a key a pair where pairs belong together.
        name: of the curve.
        progress: called with rows done and in all.
    """
    if not circuits:
        raise DataError("There is no circuit to measure.")
    if any(circuit.graph != wiring.graph for circuit in circuits):
        raise DataError("A circuit is of another graph than the wiring.", remedy="Use one `Graph` for both.")
    if clusters and len(clusters) != len(wiring):
        raise DataError(f"There are {len(clusters)} cluster keys for {len(wiring)} pairs.")
    masks = torch.stack([torch.zeros_like(circuits[0].mask), *(circuit.mask for circuit in circuits)])
    different, back = torch.unique(masks.flatten(1), dim=0, return_inverse=True)
    values = wiring.run(different.reshape(-1, *masks.shape[1:]), metric, progress=progress)[back]
    return Faithfulness(
        values[1:], clean_metric(wiring, metric), values[0], tuple(len(circuit) for circuit in circuits),
        tuple(circuit.share for circuit in circuits) if shares is None else tuple(shares), metric.name,
        wiring.ablation.choices(), tuple(clusters), name,
    )  # fmt: skip


def clean_metric(wiring: Wiring, metric: Metric) -> Float[Tensor, " pair"]:
    """The metric of the model without ablation."""
    return measured(metric, wiring.clean_logits).cpu()


def faithfulness_curve(
    wiring: Wiring,
    scores: Scored,
    metric: Metric,
    *,
    shares: Sequence[float] = MIB_SHARES,
    absolute: bool = True,
    greedy: bool = False,
    clusters: Sequence[Hashable] = (),
    name: str = "",
    progress: Progress | None = None,
) -> Faithfulness:
    """Circuits of growing size from scores; by default those of MIB (int(share x edges) asked for, dead ends pruned).

    Args:
        wiring: the model on the prompts to measure on.
        scores: of the edges, from other prompts.
        metric: of the wiring's pairs.
        shares: sizes as shares of all edges.
        absolute: choose by absolute values (MIB's CMD) or by signed ones (its CPR).
        greedy: grow from the logits instead of taking the top.
        clusters: a key a pair where pairs belong together.
        name: of the curve.
        progress: called with rows done and in all.
    """
    choose = greedy_edges if greedy else top_edges
    circuits = [choose(scores, int(share * wiring.graph.n_edges), absolute=absolute) for share in shares]
    return measure(wiring, circuits, metric, shares=shares, clusters=clusters, name=name, progress=progress)


def random_faithfulness(
    wiring: Wiring,
    sizes: Sequence[int],
    metric: Metric,
    *,
    draws: int,
    seed: int,
    connected: bool = True,
    clusters: Sequence[Hashable] = (),
    progress: Progress | None = None,
) -> list[Faithfulness]:
    """Random circuits of the very sizes, `draws` of each: what a circuit scores by chance.

    Returns:
        One `Faithfulness` a draw.
    """
    circuits = [
        [random_circuit(wiring.graph, size, seed=seed + 1_000_003 * draw + place, connected=connected)
         for place, size in enumerate(sizes)] for draw in range(draws)
    ]  # fmt: skip
    flat = [one for drawn in circuits for one in drawn]
    told = measure(wiring, flat, metric, clusters=clusters, progress=progress)
    n = len(sizes)
    return [
        Faithfulness(
            told.values[draw * n : (draw + 1) * n], told.whole, told.nothing, tuple(sizes),
            told.shares[draw * n : (draw + 1) * n], told.metric, told.choices, told.clusters, f"random {draw}",
        ) for draw in range(draws)
    ]  # fmt: skip
