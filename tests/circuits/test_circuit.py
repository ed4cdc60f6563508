"""Circuits as values: pruning against walks over names, agreement against counting, files read back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.circuits.graphs import FAMILIES, graph, live_edges
from tomoscope.circuits import Circuit
from tomoscope.circuits.circuit import inputs_matrix, prune, rank_area
from tomoscope.errors import DataError, SiteError


def drawn(name: str, seed: int, share: float) -> torch.Tensor:
    g = graph(name, position=name == "gpt2")
    return g.allowed & (torch.rand(g.allowed.shape, generator=torch.Generator().manual_seed(seed)) < share)


@pytest.mark.parametrize("name", FAMILIES)
def test_inputs_are_those_of_the_graph(name: str) -> None:
    g = graph(name)
    for row, source in enumerate(g.sources):
        assert torch.nonzero(inputs_matrix(g)[row])[:, 0].tolist() == sorted(g.inputs_of(source))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(0, 10**6), st.sampled_from([0.02, 0.05, 0.1, 0.3, 0.9]))
def test_pruning_keeps_the_edges_on_a_way_through(name: str, seed: int, share: float) -> None:
    g, mask = graph(name, position=name == "gpt2"), drawn(name, seed, share)
    kept = prune(g, mask)
    # one fed input and one that is read may meet at a node through different heads of a group: walk until it is stable
    edges, before = set(g.names(mask)), None
    while edges != before:
        before, edges = edges, live_edges(g, edges)
    assert set(g.names(kept)) == edges


def test_a_pruned_circuit_says_how_large_it_was() -> None:
    g = graph("gpt2")
    circuit = Circuit.of_edges(g, ["embed->m0", "m0->logits", "a1.h0->logits", "embed->a2.h1<q>"], method="by hand")
    pruned = circuit.pruned()
    assert pruned.edges == [("embed", "m0"), ("m0", "logits")]
    assert pruned.how == {"method": "by hand", "before pruning": 4}
    assert pruned.pruned() is pruned
    assert pruned.nodes == ("embed", "m0")
    assert len(circuit) == 4
    assert circuit.share == 4 / g.n_edges
    assert circuit.complement.n_edges == g.n_edges - 4
    assert circuit.without(["m0", "a1.h0"]).edges == [("embed", "m0"), ("embed", "a2.h1<q>")]
    assert Circuit.whole(g).pruned().n_edges == g.n_edges


def test_comparison_counts_edges_and_nodes() -> None:
    g = graph("gpt2")
    known = Circuit.of_edges(g, ["embed->m0", "m0->m1", "m1->logits", "embed->a0.h1<v>", "a0.h1->logits"])
    found = Circuit.of_edges(g, ["embed->m0", "m0->m1", "m0->logits", "a1.h1->logits"])
    told = found.compare(known)
    assert (told.edges.precision, told.edges.recall) == (0.5, 0.4)
    assert told.edges.jaccard == 2 / 7
    assert told.edges.false_positive_rate == 2 / (g.n_edges - 5)
    assert told.edges.roc_area is None
    assert (told.nodes.shared, told.nodes.found, told.nodes.known) == (2, 3, 4)
    assert "2 of 5 known" in str(told)
    apart = found.compare(known, ignore=g.mask(["a1.h1->logits", "m1->logits"]))
    assert (apart.edges.found, apart.edges.known, apart.edges.of) == (3, 4, g.n_edges - 2)
    with pytest.raises(DataError, match="different graphs"):
        found.compare(Circuit.whole(graph("llama")))


@given(st.integers(0, 10**6), st.integers(1, 9))
def test_the_roc_area_is_scikit_learns(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (30,), generator=generator).double()
    known = torch.rand(30, generator=generator) < 0.3
    if known.all() or not known.any():
        assert rank_area(scores, known) is None
    else:
        assert rank_area(scores, known) == pytest.approx(roc_auc_score(known, scores), abs=1e-12)


def test_scores_rank_edges_by_size_and_nodes_by_their_largest_edge() -> None:
    g = graph("gpt2")
    known = Circuit.of_edges(g, ["embed->m0", "m0->logits"])
    scores = torch.zeros(g.allowed.shape)
    scores[g.edge("embed", "m0")], scores[g.edge("m0", "logits")] = -2.0, 1.0
    told = Circuit(g, known.mask, scores).compare(known)
    assert told.edges.roc_area == told.nodes.roc_area == 1.0
    scores[g.edge("m1", "logits")] = 1.5
    told = Circuit(g, known.mask, scores).compare(known)
    assert told.edges.roc_area == pytest.approx(1 - 0.5 / (g.n_edges - 2))
    assert told.nodes.roc_area == pytest.approx(1 - 0.5 / (len(g.sources) - 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_files_read_back_equal(name: str, tmp_path) -> None:
    g, mask = (
        graph(name, position=True),
        drawn(name, 1, 0.2) if name != "gpt2" else graph("gpt2", position=True).allowed,
    )
    scores = torch.randn(mask.shape, dtype=torch.float64).masked_fill(~g.allowed, torch.nan)
    scores[g.edge("embed", "logits")] = float("-inf")
    circuit = Circuit(g, mask, scores, {"method": "drawn", "seed": 1})
    again = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert again == circuit
    assert again.how == circuit.how
    assert again.scores is not None
    torch.testing.assert_close(again.scores, scores, rtol=0, atol=0, equal_nan=True)
    assert Circuit.load(Circuit(g, mask).save(tmp_path / "plain.json")).scores is None


def test_what_is_no_circuit_is_refused(tmp_path) -> None:
    g = graph("gpt2")
    with pytest.raises(DataError, match="shape"):
        Circuit(g, torch.ones(2, 2, dtype=torch.bool))
    wrong = g.allowed.clone()
    wrong[-1, 0] = True
    with pytest.raises(DataError, match="not computed before"):
        Circuit(g, wrong)
    with pytest.raises(SiteError, match="no node"):
        Circuit.whole(g).without(["a9.h9"])
    for text in ("", "[]", "{}", json.dumps({"format": "other", "version": 1}), '{"format": "tomoscope circuit"}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError):
            Circuit.load(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"nowhere\.json"):
        Circuit.load(tmp_path / "nowhere.json")


def test_it_prints_what_flows_where_from_the_logits_back() -> None:
    g = graph("gpt2")
    circuit = Circuit.of_edges(g, ["embed->m0", "m0->logits", "embed->logits"], method="ACDC")
    assert repr(circuit) == f"Circuit(3 of {g.n_edges} edges, 2 of {len(g.sources)} nodes, by ACDC)"
    assert str(circuit).splitlines()[1:] == ["logits <- embed, m0", "    m0 <- embed"]
    scored = Circuit(g, circuit.mask, torch.full(g.allowed.shape, 0.25))
    assert str(scored).splitlines()[1] == "logits <- embed +0.25, m0 +0.25"
