"""Selection from scores: the reference's masks, a greedy search by hand, random circuits of the very size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.circuits.graphs import FAMILIES, graph, live_edges, ours, reference
from tomoscope.circuits import Circuit, Graph
from tomoscope.circuits.discovery.select import edges_above, greedy_edges, random_circuit, top_edges
from tomoscope.errors import DataError


def scored(g: Graph, seed: int = 0) -> SimpleNamespace:
    scores = torch.randn(g.allowed.shape, generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(graph=g, scores=scores.masked_fill(~g.allowed, torch.nan))


@pytest.mark.parametrize("n", [0, 5, 10, 20, 50, 100, 262])
def test_masks_are_the_references(n: int) -> None:
    _, g, numbers = reference()
    given = SimpleNamespace(graph=g, scores=ours(g, numbers["EAP-IG-inputs_bs1"]))
    for kind, choose in (("topn", top_edges), ("greedy", greedy_edges)):
        expected = ours(g, numbers[f"circuit_{kind}_{n}_mask"])
        found = choose(given, n)
        assert torch.equal(found.mask, expected), kind
        assert found.how["asked"] == n
        assert found.how.get("before pruning", found.n_edges) == n


@pytest.mark.parametrize("name", FAMILIES)
def test_top_edges_are_the_largest(name: str) -> None:
    g = graph(name)
    given = scored(g)
    flat = given.scores[g.allowed]
    for absolute in (True, False):
        keys = flat.abs() if absolute else flat
        found = top_edges(given, 20, absolute=absolute, pruned=False)
        assert found.n_edges == 20
        got = given.scores[found.mask]
        assert (got.abs() if absolute else got).min() == keys.sort(descending=True).values[19]
        line = float(keys.sort(descending=True).values[19])
        assert edges_above(given, line, absolute=absolute, pruned=False) == found
    assert top_edges(given, g.n_edges).n_edges == g.n_edges
    with pytest.raises(DataError, match="were asked for"):
        top_edges(given, g.n_edges + 1)


def greedy_by_hand(g: Graph, scores: torch.Tensor, n: int) -> set[tuple[str, str]]:
    """Each time, look at every edge that is not chosen and leads into what is reached."""
    chosen: set[tuple[str, str]] = set()
    for _ in range(n):
        reached = {"logits"} | {g.destinations[c] for source, _ in chosen for c in g.inputs_of(source)}
        open_ = [e for e in g.names(g.allowed) if e[1] in reached and e not in chosen]
        chosen.add(max(open_, key=lambda e: abs(float(scores[g.edge(*e)]))))
    return chosen


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_edges_are_those_of_a_search_by_hand(name: str) -> None:
    g = graph(name)
    given = scored(g, 3)
    for n in (1, 7, 25):
        expected = greedy_by_hand(g, given.scores, n)
        found = greedy_edges(given, n, pruned=False)
        assert set(found.edges) == expected
        assert set(greedy_edges(given, n).edges) == live_edges(g, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_circuits_have_the_size_and_hang_together(name: str) -> None:
    g = graph(name)
    for n in (1, 2, 3, 10, min(40, g.n_edges), g.n_edges // 2, g.n_edges):
        seen = set()
        for seed in range(4):
            one = random_circuit(g, n, seed=seed)
            assert one.n_edges == n
            assert one.pruned() is one
            assert random_circuit(g, n, seed=seed) == one
            seen.add(one)
        assert len(seen) > 1 or n in (1, g.n_edges)
        assert random_circuit(g, n, seed=0, connected=False).n_edges == n
    with pytest.raises(DataError, match="were asked for"):
        random_circuit(g, g.n_edges + 1, seed=0)


def test_a_random_circuit_can_hold_any_edge() -> None:
    g = graph("llama")
    union = torch.zeros_like(g.allowed)
    for seed in range(60):
        union |= random_circuit(g, 30, seed=seed).mask
    assert float(union[g.allowed].float().mean()) > 0.9


def test_edges_without_a_score_are_never_chosen() -> None:
    g = graph("gpt2")
    given = scored(g)
    given.scores[:, -1] = torch.nan
    assert not top_edges(given, g.n_edges, pruned=False).mask[:, -1].any()
    assert greedy_edges(given, 10, pruned=False).n_edges == 0
    assert isinstance(top_edges(given, 3), Circuit)
