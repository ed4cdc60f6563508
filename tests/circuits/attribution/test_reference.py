"""Attribution graphs against the numbers of the field's reference implementation (circuit-tracer), in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.circuits.attribution.parts import reference_numbers, reference_subject, reference_transcoders
from tomoscope.circuits.attribution import (
    AttributionGraph,
    Intervention,
    LocalReplacement,
    attribution_graph,
    intervene,
    node_influence,
    prune,
    scores,
)

SETS = ("plt_relu", "plt_jump_skip")
TOLERANCE = 1e-9


def graph_of(name: str, **options: object) -> AttributionGraph:
    prompt = reference_numbers(name)["input_ids"].tolist()
    return attribution_graph(reference_subject(), reference_transcoders(name), prompt, **options)


@pytest.mark.parametrize("name", SETS)
def test_nodes_edges_and_logits(name: str) -> None:
    numbers, graph = reference_numbers(name), graph_of(name)
    assert (graph.features.numpy() == numbers["active_features"]).all()
    np.testing.assert_allclose(graph.activations, numbers["activation_values"], atol=TOLERANCE)
    assert list(graph.logit_ids) == numbers["logit_ids"].tolist()
    np.testing.assert_allclose(graph.logit_probabilities, numbers["logit_probs"], atol=TOLERANCE)
    dense = graph.adjacency().numpy()
    assert int((dense != 0).sum()) == int(numbers["n_edges"])
    target, source = numbers["edges"].astype(int)
    np.testing.assert_allclose(dense[target, source], numbers["weights"], atol=TOLERANCE)
    np.testing.assert_allclose(dense.sum(1), numbers["row_sums"], atol=TOLERANCE)
    np.testing.assert_allclose(np.abs(dense).sum(1), numbers["row_masses"], atol=TOLERANCE)
    np.testing.assert_allclose(dense.sum(0), numbers["column_sums"], atol=TOLERANCE)
    # the reference's rows do not sum to anything; with the bias ours do
    assert graph.gap < 1e-12


@pytest.mark.parametrize("name", SETS)
def test_influence_scores_and_pruning(name: str) -> None:
    numbers, graph = reference_numbers(name), graph_of(name)
    np.testing.assert_allclose(node_influence(graph), numbers["node_influence"], atol=TOLERANCE)
    got = scores(graph)
    np.testing.assert_allclose([got.replacement, got.completeness], numbers["replacement_completeness"], atol=TOLERANCE)
    assert got.low == pytest.approx(got.high, abs=1e-12)
    pruned = prune(graph)
    assert (pruned.nodes.numpy() == numbers["prune_node_mask"]).all()
    kept = torch.stack([graph.row_nodes[graph.edge_rows], graph.columns.long()])[:, pruned.edges].numpy()
    expected = numbers["pruned_edges"].astype(int)
    assert {tuple(edge) for edge in kept.T.tolist()} == {tuple(edge) for edge in expected.T.tolist()}
    np.testing.assert_allclose(pruned.cumulative, numbers["prune_cumulative"], atol=TOLERANCE)


@pytest.mark.parametrize("name", SETS)
def test_a_partial_graph_has_the_same_features_and_edges(name: str) -> None:
    numbers = reference_numbers(name)
    graph = graph_of(name, max_features=30)
    expected = numbers["active_features"][numbers["partial_selected"]]
    assert (graph.features.numpy() == expected).all()
    dense = graph.adjacency().numpy()
    np.testing.assert_allclose(dense.sum(1), numbers["partial_row_sums"], atol=TOLERANCE)
    np.testing.assert_allclose(dense.sum(0), numbers["partial_column_sums"], atol=TOLERANCE)


@pytest.mark.parametrize("mode", [("iterative", "iter"), ("free", "free_attn"), ("constrained", "direct")])
@pytest.mark.parametrize("name", SETS)
def test_interventions_in_three_modes(name: str, mode: tuple[str, str]) -> None:
    numbers = reference_numbers(name)
    replacement = LocalReplacement.of(reference_subject(), reference_transcoders(name), numbers["input_ids"].tolist())
    layer, position, feature = numbers["iv_feature"].tolist()
    for factor in (0.0, -2.0):
        one = Intervention(layer, position, feature, factor, relative=True)
        # two sets in one batch: rows do not touch each other
        outcome = intervene(replacement, [[one], []], mode=mode[0], every_position=True, read=range(3))
        key = f"iv_{mode[1]}_{factor}"
        np.testing.assert_allclose(outcome.logits[0, [7, 14]], numbers[key], atol=TOLERANCE)
        np.testing.assert_allclose(outcome.last[1], numbers["logits"][0], atol=TOLERANCE)
        read = torch.stack([outcome.preactivations(i)[0] for i in range(3)])[:, 1:, ::4]
        np.testing.assert_allclose(read, numbers[f"{key}_preacts"][:, 1:], atol=TOLERANCE)
