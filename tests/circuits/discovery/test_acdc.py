"""ACDC: batches of guesses decide exactly what one run after another decides, in the same order."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from tests.circuits.graphs import graph, live_edges
from tests.zoo import ZOO
from tomoscope.circuits import KL, Circuit, LogitDifference
from tomoscope.circuits.discovery.acdc import acdc, acdc_sweep, edge_order, sweep_area
from tomoscope.circuits.metrics import Metric
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError
from tomoscope.model import build_subject

NAMES = ("gpt2", "llama", "phi", "deepseek_v3")


@cache
def wiring(name: str, kind: str = "paired", seed: int = 0) -> Wiring:
    model = ZOO[name].build()
    opened = build_subject(model if name == "deepseek_v3" else model.double(), name=name)
    ids = torch.randint(3, 96, (6, 5), generator=torch.Generator().manual_seed(seed)).tolist()
    ablation = Ablation.zero() if kind == "zero" else Ablation.paired(opened.tokens(ids[3:]))
    return Wiring(opened, opened.tokens(ids[:3]), ablation=ablation)


def metrics(one: Wiring) -> dict[str, tuple[Metric, str]]:
    difference = LogitDifference([3, 4, 5], [13, 14, 15])
    return {"kl": (KL(one.clean_logits), "value"), "change": (difference, "change"), "drop": (difference, "drop")}


def plainly(
    one: Wiring, metric: Metric, damage: str, threshold: float
) -> tuple[list[tuple[str, str]], set, list[float]]:
    """One run after another, as the paper says it: edges asked, edges kept, damages."""
    g = one.graph
    clean = metric(one.clean_logits, torch.arange(len(one)))

    def damaged(mask: torch.Tensor) -> float:
        values = metric(one.logits(mask), torch.arange(len(one)))
        return float({"value": values, "change": (values - clean).abs(), "drop": clean - values}[damage].mean())

    mask, asked, damages = g.allowed.clone(), [], []
    current = damaged(mask)
    owners = {d: [s for s in g.sources if c in g.inputs_of(s)] for c, d in enumerate(g.destinations)}
    for row, column in edge_order(g):
        mask[row, column] = False
        end = g.destinations[column]
        if end != "logits" and not any(mask[g.sources.index(s)].any() for s in owners[end]):
            continue
        asked.append((g.sources[row], end))
        value = damaged(mask)
        damages.append(value)
        if value - current < threshold:
            current = value
        else:
            mask[row, column] = True
    return asked, set(g.names(mask)), damages


CASES = (
    ("gpt2", "kl", "paired", 3e-4), ("gpt2", "change", "zero", 5e-3), ("llama", "drop", "paired", 5e-3),
    ("phi", "kl", "zero", 3e-4), ("deepseek_v3", "kl", "paired", 3e-2),
)  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "kind", "threshold"), CASES)
def test_speculation_decides_what_one_run_after_another_does(
    name: str, damage: str, kind: str, threshold: float
) -> None:
    one = wiring(name, kind)
    metric, how = metrics(one)[damage]
    asked, kept, damages = plainly(one, metric, how, threshold)
    assert 0 < len(kept) < one.graph.n_edges
    noise = torch.rand(one.graph.allowed.shape, generator=torch.Generator().manual_seed(0)) * 2 * threshold
    prior = SimpleNamespace(graph=one.graph, scores=noise)
    for speculation, guessed in ((1, None), (64, None), (16, prior)):
        run = acdc(one, metric, threshold=threshold, damage=how, speculation=speculation, prior=guessed)
        assert run.order == asked
        assert set(run.circuit.edges) == live_edges(one.graph, kept)
        assert [step.damage for step in run.trace] == pytest.approx(damages, abs=1e-5)
        assert run.masks_run >= len(asked)
        if speculation == 1:
            assert run.masks_run == run.rounds == len(asked)
        else:
            assert run.rounds < len(asked)


@pytest.mark.parametrize("seed", range(3))
def test_on_other_models_and_prompts_too(seed: int) -> None:
    one = wiring("gpt2", "paired", seed)
    slow = acdc(one, threshold=2e-4, speculation=1)
    fast = acdc(one, threshold=2e-4)
    assert fast.circuit == slow.circuit
    assert [(s.row, s.column, s.kept) for s in fast.trace] == [(s.row, s.column, s.kept) for s in slow.trace]


def test_a_right_prior_wastes_nothing() -> None:
    one = wiring("gpt2")
    run = acdc(one, threshold=3e-4)
    again = acdc(one, threshold=3e-4, prior=run)
    assert [(s.row, s.column, s.kept) for s in again.trace] == [(s.row, s.column, s.kept) for s in run.trace]
    assert again.masks_run == len(run.trace) < run.masks_run
    assert again.rounds < run.rounds


def test_a_sweep_is_the_runs_one_by_one_in_the_order_given() -> None:
    one = wiring("llama")
    thresholds = (1e-3, 1e-5, 1e-4)
    runs = acdc_sweep(one, thresholds=thresholds)
    assert [run.threshold for run in runs] == list(thresholds)
    for run in runs:
        alone = acdc(one, threshold=run.threshold, speculation=1)
        assert run.circuit == alone.circuit
        assert [s.kept for s in run.trace] == [s.kept for s in alone.trace]


def test_the_order_is_from_the_logits_back_and_every_edge_is_in_it_once() -> None:
    for name in NAMES:
        g = graph(name)
        order = edge_order(g)
        assert len(set(order)) == len(order) == g.n_edges
        ends = [g.readers[column].moment for _, column in order]
        assert ends == sorted(ends, reverse=True)
        assert g.destinations[order[0][1]] == "logits"
        into = [g.writers[row].moment for row, column in order if g.destinations[column] == "logits"]
        assert into == sorted(into, reverse=True)


def test_extreme_thresholds_keep_everything_that_counts_or_nothing() -> None:
    one = wiring("gpt2")
    assert acdc(one, threshold=1e9).circuit.n_edges == 0
    everything = acdc(one, LogitDifference([3, 4, 5], [13, 14, 15]), threshold=0.0, damage="change")
    assert everything.circuit.n_edges > 0.4 * one.graph.n_edges
    assert everything.circuit.how["damage"] == "change"
    assert everything.circuit.how["choices"]["value"] == "paired"


def test_the_area_of_a_sweep_counts_only_what_was_reached() -> None:
    g = graph("gpt2")
    known = Circuit.of_edges(g, ["embed->m0", "m0->logits"])
    none, everything = Circuit.of_edges(g, []), Circuit.whole(g)
    assert sweep_area([known], known) == 1.0
    assert sweep_area([none, everything], known) == 0.0
    half = Circuit.of_edges(g, ["embed->m0"])
    assert sweep_area([half], known) == pytest.approx(0.5)
    more = Circuit.of_edges(g, ["embed->m0", "m0->logits", "m1->logits"])
    assert sweep_area([half, more], known) == pytest.approx(1 - 0.5 / (g.n_edges - 2))


def test_mistakes_are_told() -> None:
    one = wiring("gpt2")
    with pytest.raises(DataError, match="'value', 'drop'|value, drop"):
        acdc(one, threshold=0.1, damage="other")
    for bad in (-1.0, float("nan")):
        with pytest.raises(DataError, match="threshold"):
            acdc(one, threshold=bad)
    with pytest.raises(DataError, match="0 runs"):
        acdc(one, threshold=0.1, speculation=0)
