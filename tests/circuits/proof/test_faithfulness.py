"""Faithfulness against the reference's numbers and MIB's areas, against plain runs, and against counting by hand."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.circuits.graphs import graph, ours, reference, subject
from tests.circuits.reference_eap import reference_metric, reference_pairs
from tomoscope.circuits import Circuit, LogitDifference, Pairs
from tomoscope.circuits.discovery.select import greedy_edges, top_edges
from tomoscope.circuits.proof.completeness import completeness, minimality, stability
from tomoscope.circuits.proof.faithfulness import Faithfulness, faithfulness_curve, measure, random_faithfulness
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import DataError


@cache
def reference_wiring() -> tuple[Wiring, LogitDifference]:
    opened, g, _ = reference()
    pairs = reference_pairs()
    return Wiring(opened, pairs.clean, g, ablation=Ablation.paired(pairs.corrupted)), reference_metric()


@pytest.mark.parametrize("kind", ["topn", "greedy"])
def test_circuits_score_what_the_reference_says(kind: str) -> None:
    wiring, metric = reference_wiring()
    numbers, g = reference()[2], wiring.graph
    given = SimpleNamespace(graph=g, scores=ours(g, numbers["EAP-IG-inputs_bs1"]))
    choose = {"topn": top_edges, "greedy": greedy_edges}[kind]
    sizes = (0, 5, 10, 20, 50, 100, 262)
    told = measure(wiring, [choose(given, n) for n in sizes], metric)
    for row, n in enumerate(sizes):
        np.testing.assert_allclose(told.values[row], numbers[f"circuit_{kind}_{n}_metric"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(told.whole, numbers["baseline"], rtol=1e-6)
    np.testing.assert_allclose(told.nothing, numbers["corrupted_baseline"], rtol=1e-6)


@pytest.mark.parametrize("absolute", [True, False])
def test_areas_are_those_of_mibs_own_function(absolute: bool) -> None:
    wiring, metric = reference_wiring()
    numbers, g = reference()[2], wiring.graph
    given = SimpleNamespace(graph=g, scores=ours(g, numbers["EAP-IG-inputs_bs1"]))
    told = faithfulness_curve(wiring, given, metric, absolute=absolute)
    np.testing.assert_allclose(told.share, numbers[f"mib_abs{absolute}_faith"], rtol=1e-6, atol=1e-6)
    assert told.sizes == tuple(int(n) for n in numbers[f"mib_abs{absolute}_edges"])
    areas = told.areas()
    expected = numbers[f"mib_abs{absolute}_CPR_CMD_avg"]
    assert areas.cpr.value == pytest.approx(expected[0], abs=1e-6)
    assert areas.cmd.value == pytest.approx(expected[1], abs=1e-6)
    assert float(told.share.mean()) == pytest.approx(expected[2], abs=1e-6)
    assert all(area.low <= area.value <= area.high for area in areas)


def flat(share: list[float], shares: tuple[float, ...], *, pairs: int = 40, noise: float = 0.0) -> Faithfulness:
    generator = torch.Generator().manual_seed(0)
    whole = 2.0 + noise * torch.randn(pairs, generator=generator)
    nothing = torch.zeros(pairs)
    values = torch.tensor(share)[:, None] * whole + noise * torch.randn(len(share), pairs, generator=generator)
    choices = Ablation.zero().choices()
    return Faithfulness(values, whole, nothing, tuple(range(len(share))), shares, "metric", choices)


def test_areas_have_their_closed_forms() -> None:
    shares = (0.001, 0.01, 0.1, 1.0)
    perfect = flat([1.0] * 4, shares).areas()
    assert perfect.cmd == (0.0, 0.0, 0.0)
    assert perfect.cpr.value == pytest.approx(0.999, abs=1e-6)
    assert perfect.log_cpr.value == pytest.approx(1.0, abs=1e-6)
    # nothing until everything: one last trapezoid, which is a third of the log axis and 0.9 of the other
    nothing = flat([0.0, 0.0, 0.0, 1.0], shares).areas()
    assert nothing.cpr.value == pytest.approx(0.45, abs=1e-6)
    assert nothing.log_cmd.value == pytest.approx(2.5 / 3, abs=1e-6)
    # above the model: better by CPR, worse by CMD
    above = flat([2.0] * 4, shares).areas()
    assert above.cpr.value > perfect.cpr.value
    assert above.cmd.value == pytest.approx(0.999, abs=1e-6)
    for bad in ((0.1,), (0.2, 0.1), (0.0, 0.1)):
        with pytest.raises(DataError, match="area"):
            flat([1.0] * len(bad), bad).areas()


def test_intervals_cover_as_often_as_they_say() -> None:
    """The true share is 0.5; prompts of unequal gaps and noise; 95 % intervals hold it nearly as often."""
    generator, hits = torch.Generator().manual_seed(1), 0
    choices = Ablation.zero().choices()
    for trial in range(200):
        gap = 1.0 + torch.rand(60, generator=generator) * 3
        nothing = torch.randn(60, generator=generator)
        whole = nothing + gap + 0.3 * torch.randn(60, generator=generator)
        values = (nothing + 0.5 * gap + 0.3 * torch.randn(60, generator=generator))[None]
        told = Faithfulness(values, whole, nothing, (1,), (0.1,), "metric", choices)
        interval = told.intervals(seed=trial, resamples=300)[0]
        hits += interval.low <= 0.5 <= interval.high
    assert 180 <= hits <= 199


def test_clusters_of_pairs_are_drawn_together() -> None:
    told = flat([0.5], (0.1,), noise=0.5)
    doubled = Faithfulness(
        told.values.repeat_interleave(4, 1), told.whole.repeat_interleave(4), told.nothing.repeat_interleave(4),
        (1,), (0.1,), "metric", told.choices, clusters=tuple(i // 4 for i in range(160)),
    )  # fmt: skip
    alone, together = told.intervals()[0], doubled.intervals()[0]
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.05)


@cache
def tiny(name: str = "llama", pairs: int = 6) -> tuple[Wiring, LogitDifference]:
    opened = subject(name)
    ids = torch.randint(3, 96, (2 * pairs, 7), generator=torch.Generator().manual_seed(3)).tolist()
    answers = torch.randperm(90, generator=torch.Generator().manual_seed(4))[: 2 * pairs].reshape(2, pairs) + 3
    wiring = Wiring(
        opened, opened.tokens(ids[:pairs]), graph(name), ablation=Ablation.paired(opened.tokens(ids[pairs:]))
    )
    return wiring, LogitDifference(answers[0], answers[1])


def test_a_circuit_runs_as_a_model() -> None:
    wiring, _ = tiny()
    opened = subject("llama")
    pairs = Pairs(
        wiring.batch, opened.tokens([p.ids for p in wiring.ablation.prompts.prompts]), *torch.ones(2, 6, 1).long()
    )
    whole, nothing = Circuit.whole(wiring.graph), Circuit.of_edges(wiring.graph, [])
    torch.testing.assert_close(whole.logits(opened, pairs), opened.last_logits(pairs.clean), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nothing.logits(opened, pairs), opened.last_logits(pairs.corrupted), rtol=1e-4, atol=1e-4)
    zeroed = nothing.logits(opened, pairs, ablation=Ablation.zero())
    assert not torch.allclose(zeroed, opened.last_logits(pairs.corrupted), atol=1e-2)


def test_random_circuits_of_every_size_are_measured() -> None:
    wiring, metric = tiny()
    drawn = random_faithfulness(wiring, (3, 20, wiring.graph.n_edges), metric, draws=3, seed=0)
    assert len(drawn) == 3
    assert all(one.sizes == (3, 20, wiring.graph.n_edges) for one in drawn)
    assert all(float(one.share[-1]) == pytest.approx(1.0, abs=1e-4) for one in drawn)
    assert len({float(one.share[1]) for one in drawn}) == 3
    again = random_faithfulness(wiring, (3, 20, wiring.graph.n_edges), metric, draws=3, seed=0)
    torch.testing.assert_close(torch.stack([a.values for a in again]), torch.stack([a.values for a in drawn]))


def by_hand(wiring: Wiring, mask: torch.Tensor, metric: LogitDifference) -> float:
    return float(metric(wiring.logits(mask), torch.arange(len(wiring))).mean())


def test_completeness_is_its_definition_and_greedy_sets_are_the_worst_of_each_step() -> None:
    wiring, metric = tiny()
    g = wiring.graph
    circuit = top_edges(
        SimpleNamespace(graph=g, scores=torch.rand(g.allowed.shape, generator=torch.Generator().manual_seed(5))), 60
    )
    told = completeness(wiring, circuit, metric, sets=3, greedy=2, runs=1, candidates=99, seed=0)
    gap = by_hand(wiring, g.allowed, metric) - by_hand(wiring, torch.zeros_like(g.allowed), metric)
    assert told.gap == pytest.approx(gap, rel=1e-3)
    assert len(told.sets) == 5
    assert told.greedy == 2
    for row, nodes in enumerate(told.sets):
        mine = by_hand(wiring, circuit.without(nodes).mask, metric)
        model = by_hand(wiring, Circuit.whole(g).without(nodes).mask, metric)
        assert float(told.incompleteness[row]) == pytest.approx(abs(mine - model) / abs(gap), abs=2e-3)
    alone = {
        node: abs(by_hand(wiring, circuit.without([node]).mask, metric)
                  - by_hand(wiring, Circuit.whole(g).without([node]).mask, metric))
        for node in circuit.nodes if node != "embed"
    }  # fmt: skip
    assert told.sets[3] == (max(alone, key=lambda node: alone[node]),)
    assert told.sets[4][:1] == told.sets[3]
    assert told.worst[1] == float(told.incompleteness.max())
    whole = completeness(wiring, Circuit.whole(g), metric, sets=4, greedy=1, runs=1, seed=0)
    assert float(whole.incompleteness.max()) < 1e-3


def test_minimality_takes_each_part_out() -> None:
    wiring, metric = tiny()
    g = wiring.graph
    circuit = Circuit.of_edges(
        g, ["embed->m0", "m0->m1", "m1->logits", "m0->a2.h1<q>", "a2.h1->logits", "embed->logits"]
    )
    gap = abs(by_hand(wiring, g.allowed, metric) - by_hand(wiring, torch.zeros_like(g.allowed), metric))
    base = by_hand(wiring, circuit.mask, metric)
    edges = minimality(wiring, circuit, metric, level="edges", sets=0)
    for edge, change in zip(edges.parts, edges.change.tolist(), strict=True):
        mask = circuit.mask & ~g.mask([edge])
        assert change == pytest.approx(abs(by_hand(wiring, mask, metric) - base) / gap, abs=2e-3)
    nodes = minimality(wiring, circuit, metric, sets=3, seed=1)
    assert nodes.parts == circuit.nodes
    assert nodes.sets == 4
    alone = minimality(wiring, circuit, metric, sets=0)
    assert bool((nodes.change >= alone.change - 1e-6).all())
    hanging = Circuit(g, circuit.mask | g.mask(["embed->a1.h0<q>"]))
    dead = minimality(wiring, hanging, metric, level="edges", sets=0)
    assert "embed->a1.h0<q>" in dead.needless()


def test_stability_is_the_mean_jaccard_index_of_couples() -> None:
    g = graph("gpt2")
    sets = [["embed->m0", "m0->logits"], ["embed->m0", "m0->logits", "embed->logits"], ["embed->m1", "m1->logits"]]
    told = stability([Circuit.of_edges(g, edges) for edges in sets])
    assert told.edges.tolist() == pytest.approx([2 / 3, 0.0, 0.0])
    assert told.nodes.tolist() == pytest.approx([1.0, 1 / 3, 1 / 3])
    assert told.mean == pytest.approx(2 / 9)
    assert float(told.inclusion[g.edge("embed", "m0")]) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="two circuits"):
        stability([Circuit.whole(g)])


def test_mistakes_are_told() -> None:
    wiring, metric = tiny()
    with pytest.raises(DataError, match="no circuit"):
        measure(wiring, [], metric)
    with pytest.raises(DataError, match="another graph"):
        measure(wiring, [Circuit.whole(graph("gpt2"))], metric)
    with pytest.raises(DataError, match="cluster keys"):
        measure(wiring, [Circuit.whole(wiring.graph)], metric, clusters=[1])
    with pytest.raises(DataError, match="no heads or MLPs"):
        completeness(wiring, Circuit.of_edges(wiring.graph, ["embed->logits"]), metric)
    with pytest.raises(DataError, match="'nodes' or 'edges'"):
        minimality(wiring, Circuit.whole(wiring.graph), metric, level="neurons")
    with pytest.raises(DataError, match="empty"):
        minimality(wiring, Circuit.of_edges(wiring.graph, []), metric)


def test_the_stamp_is_on_every_number() -> None:
    wiring, metric = tiny()
    told = measure(wiring, [Circuit.whole(wiring.graph)], metric, name="all")
    assert told.choices.to_json()["value"] == "paired"
    assert "paired" in str(told)
    assert json.loads(json.dumps(told.choices.to_json()))["component"] == "edges"
