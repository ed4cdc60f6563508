"""Nodes and edges of a graph by name; predictions beside outcomes; supernodes; files."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.circuits.attribution.parts import (
    PROMPT,
    REFERENCE,
    reference_numbers,
    reference_subject,
    reference_transcoders,
    subject_of,
    transcoders,
)
from tomoscope.circuits.attribution import (
    AttributionGraph,
    Intervention,
    LocalReplacement,
    Supernode,
    attribution_graph,
    check_interventions,
    direction_targets,
    intervene,
    load,
    merge,
    node_influence,
    predict,
    prune,
    read_neuronpedia,
    same_features,
    save,
    suppress,
    to_neuronpedia,
    write_neuronpedia,
)
from tomoscope.circuits.attribution.formats import load_supernodes, pairing
from tomoscope.errors import DataError, EditError, SiteError


@cache
def replacement_of(name: str = "gpt2", kind: str = "relu") -> LocalReplacement:
    return LocalReplacement.of(subject_of(name), transcoders(kind), PROMPT)


@cache
def graph_of(name: str = "gpt2", kind: str = "relu") -> AttributionGraph:
    return attribution_graph(
        subject_of(name), transcoders(kind), PROMPT, replacement=replacement_of(name, kind), targets=[7, 8, 9, 10]
    )


def test_nodes_have_names_and_edges_have_ends() -> None:
    graph = graph_of()
    assert [graph.node(n).number for n in range(graph.n_nodes)] == list(range(graph.n_nodes))
    logit = graph.range_of("logit").start
    assert graph.node(logit).name == "logit '7'"
    dense = graph.adjacency()
    source, weight = graph.inputs(logit, 1)[0]
    assert weight == float(dense[logit, source.number])
    assert abs(weight) == float(dense[logit].abs().max())
    target, weight = graph.outputs(source.number, 1)[0]
    assert abs(weight) == float(dense[:, source.number].abs().max())
    assert graph.weight(source.number, target.number) == weight
    layer, position, index = graph.features[3].tolist()
    assert graph.number_of(layer, position, index) == 3
    with pytest.raises(SiteError, match="no inputs"):
        graph.inputs(graph.range_of("token").start)
    with pytest.raises(SiteError, match="no node"):
        graph.number_of(0, 0, 0)


def test_a_direction_is_explained_as_the_difference_of_two_logits() -> None:
    subject, replacement = subject_of("gpt2"), replacement_of()
    both = attribution_graph(subject, transcoders("relu"), PROMPT, targets=[7, 8])
    W_U = subject.model.get_output_embeddings().weight.detach()
    targets = direction_targets(replacement, (W_U[7] - W_U[8])[None], ["7 - 8"])
    one = attribution_graph(subject, transcoders("relu"), PROMPT, targets=targets, replacement=replacement)
    rows = both.adjacency()[-2:, :-2]
    torch.testing.assert_close(one.adjacency()[-1, :-1], rows[0] - rows[1])
    assert one.gap < 1e-12
    assert one.logit_ids == (96,)
    with pytest.raises(SiteError, match="no tokens"):
        check_interventions(one, replacement, [suppress(one, [0])])


# ---- predictions


@pytest.mark.parametrize("kind", ["relu", "cross", "jump_skip"])
def test_direct_predictions_are_exact_when_all_is_frozen(kind: str) -> None:
    graph, replacement = graph_of("gpt2", kind), replacement_of("gpt2", kind)
    strong = node_influence(graph)[: graph.n_features].topk(5).indices.tolist()
    sets = [suppress(graph, [n]) for n in strong] + [suppress(graph, strong[:3], -2.0)]
    found = check_interventions(graph, replacement, sets, mode="constrained")
    for logits in (True, False):
        assert found.unexplained(logits=logits) < 1e-18
        assert found.correlation(logits=logits) == pytest.approx(1.0)


def test_predictions_with_reactions_are_exact_where_the_transcoder_is_the_mlp() -> None:
    """OPT's MLP is a ReLU MLP: its neurons are a perfect dictionary, so only the norms' scales are approximated."""
    subject = subject_of("opt")
    model = subject.model
    from tomoscope.features import SparseCoder, TranscoderSet

    coders = [
        SparseCoder(
            block.fc1.weight.detach().T, block.fc2.weight.detach().T, block.fc1.bias.detach(), block.fc2.bias.detach()
        )
        for block in model.model.decoder.layers
    ]
    dictionary = TranscoderSet(coders)
    replacement = LocalReplacement.of(subject, dictionary, PROMPT, zeroed=0)
    assert float(replacement.errors.abs().max()) < 1e-12
    graph = attribution_graph(subject, dictionary, PROMPT, replacement=replacement, targets=[7, 8, 9])
    strong = node_influence(graph)[: graph.n_features].topk(12).indices.tolist()
    little = check_interventions(graph, replacement, [suppress(graph, [n], 0.999) for n in strong], mode="iterative")
    direct = torch.stack([predict(graph, suppress(graph, [n], 0.999), react=False) for n in strong])
    logit = little.logit
    with_paths = (little.predicted - little.actual)[:, logit].square().sum()
    without = (direct - little.actual)[:, logit].square().sum()
    assert float(little.correlation()) > 0.9
    assert float(with_paths) < float(without)


def test_a_features_position_may_be_all_of_them() -> None:
    replacement, graph = replacement_of(), graph_of()
    layer, _, index = graph.features[5].tolist()
    everywhere = intervene(replacement, [Intervention(layer, None, index, 0.0)])
    each = [Intervention(layer, p, index, 0.0) for p in range(1, len(PROMPT))]
    torch.testing.assert_close(everywhere.last, intervene(replacement, each).last)
    with pytest.raises(EditError, match="unknown"):
        intervene(replacement, each, mode="frozen")
    with pytest.raises(EditError, match="no feature 99"):
        intervene(replacement, [Intervention(0, 1, 99, 0.0)])
    with pytest.raises(SiteError, match="position"):
        predict(graph, [Intervention(layer, None, index, 0.0)])


def test_constrained_layers_let_later_ones_react() -> None:
    replacement, graph = replacement_of("gpt2", "cross"), graph_of("gpt2", "cross")
    mine = [n for n in range(graph.n_features) if int(graph.features[n, 0]) == 0][:3]
    sets = [suppress(graph, mine)]
    none, first, every = (
        intervene(replacement, sets, mode="constrained", layers=layers).last
        for layers in (range(0, 1), range(0, 2), range(0, 3))
    )
    clean = replacement.subject.last_logits(PROMPT)
    gaps = [float((a - b).abs().max()) for a, b in ((none, first), (first, every), (none, clean))]
    assert min(gaps) > 1e-4


# ---- supernodes


def test_groups_add_up() -> None:
    graph = graph_of()
    groups = [Supernode("a", (0, 5, 9)), Supernode("b", (20, 21)), Supernode("said", (graph.n_nodes - 1,))]
    merged = merge(graph, groups)
    dense = graph.adjacency()
    assert float(merged.weights[1, 0]) == pytest.approx(float(dense[[20, 21]][:, [0, 5, 9]].sum()))
    assert float(merged.weights.sum()) == pytest.approx(float(dense.sum()))
    assert float(merged.weights[2].sum()) == pytest.approx(float(dense[-1].sum()))
    taken = merged.shares.sum(1)
    torch.testing.assert_close(taken[[0, 1, 2]], torch.ones(3, dtype=taken.dtype))
    assert merged.labels[3:] == ("other features", "errors", "other tokens", "other logits")
    for group in same_features(graph):
        assert len({(graph.node(n).layer, graph.node(n).index) for n in group.nodes}) == 1
    with pytest.raises(DataError, match="another group"):
        merge(graph, [Supernode("a", (0,)), Supernode("b", (0,))])
    with pytest.raises(DataError, match="label"):
        merge(graph, [Supernode("a", (0,)), Supernode("a", (1,))])


# ---- files


def test_the_reference_file_is_written_as_the_reference_wrote_it() -> None:
    name = "plt_jump_skip"
    ids = reference_numbers(name)["input_ids"].tolist()
    graph = attribution_graph(reference_subject(), reference_transcoders(name), ids)
    reference = json.loads((REFERENCE / f"{name}_graph.json").read_text(encoding="utf-8"))
    made = to_neuronpedia(
        prune(graph), slug=reference["metadata"]["slug"], scan=["tiny"] * 3, old_error_ids=True
    )  # fmt: skip
    theirs, ours = ({n["node_id"]: n for n in one["nodes"]} for one in (reference, made))
    assert set(theirs) == set(ours)
    for key, node in theirs.items():
        assert {k: v for k, v in node.items() if not isinstance(v, float)} == {
            k: v for k, v in ours[key].items() if not isinstance(v, float)
        }
        for part in ("influence", "activation", "token_prob"):
            assert ours[key][part] == (None if node[part] is None else pytest.approx(node[part], abs=1e-9))
    links = {(link["source"], link["target"]): link["weight"] for link in reference["links"]}
    mine = {(link["source"], link["target"]): link["weight"] for link in made["links"]}
    assert set(links) == set(mine)
    assert all(mine[edge] == pytest.approx(weight, abs=1e-9) for edge, weight in links.items())
    same = ("prompt_tokens", "prompt", "node_threshold", "schema_version", "transcoder_list", "slug")
    assert {k: made["metadata"][k] for k in same} == {k: reference["metadata"][k] for k in same}
    assert made["qParams"] == reference["qParams"]


def test_the_reference_file_is_read_by_its_old_ids() -> None:
    name = "plt_jump_skip"
    graph = attribution_graph(
        reference_subject(), reference_transcoders(name), reference_numbers(name)["input_ids"].tolist()
    )
    pruned, found = prune(graph), read_neuronpedia(REFERENCE / f"{name}_graph.json")
    assert edges_of(found.graph) == {
        edge: pytest.approx(w, abs=1e-9) for edge, w in edges_of(graph, pruned.edges).items()
    }
    assert found.metadata["slug"] == "plt_jump_skip_graph"


def edges_of(graph: AttributionGraph, some: torch.Tensor | None = None) -> dict[tuple[str, str], float]:
    some = torch.ones(graph.n_edges, dtype=torch.bool) if some is None else some
    ends = zip(graph.columns[some].tolist(), graph.edge_rows[some].tolist(), graph.weights[some].tolist(), strict=True)
    return {(graph.node(c).name, graph.node(int(graph.row_nodes[r])).name): w for c, r, w in ends}


def test_a_graph_comes_back_from_the_fields_file(tmp_path: Path) -> None:
    graph = graph_of()
    pruned = prune(graph)
    kept = [n for n in pruned.nodes.nonzero()[:, 0].tolist() if n < graph.n_features]
    groups = [Supernode("two of them", tuple(kept[:2]))]
    path = write_neuronpedia(
        pruned, tmp_path, slug="small", labels={kept[0]: "a thing"}, supernodes=groups
    )  # fmt: skip
    write_neuronpedia(pruned, tmp_path, slug="other")
    listing = json.loads((tmp_path / "graph-metadata.json").read_text(encoding="utf-8"))
    assert [one["slug"] for one in listing["graphs"]] == ["small", "other"]
    found = read_neuronpedia(path)
    back = found.graph
    assert back.n_layers == 3
    assert back.ids == graph.ids
    assert back.n_edges == int(pruned.edges.sum())
    assert edges_of(back) == edges_of(graph, pruned.edges)
    first = back.number_of(*graph.features[kept[0]].tolist())
    assert found.labels[first] == "a thing"
    assert found.supernodes[0].label == "two of them"
    assert float(found.influence[first]) == pytest.approx(float(pruned.cumulative[kept[0]]))
    assert bool(torch.isnan(back.bias).all())
    assert float(node_influence(back).sum()) > 0


def test_an_id_that_is_two_nodes_is_refused_only_where_it_matters() -> None:
    value = to_neuronpedia(prune(graph_of()), slug="x", old_error_ids=True)
    feature = dict(next(n for n in value["nodes"] if n["feature_type"] == "cross layer transcoder"))
    error = next(n for n in value["nodes"] if n["feature_type"] == "mlp reconstruction error")
    value["nodes"].append({**feature, "node_id": error["node_id"], "layer": "0"})
    with pytest.raises(DataError, match="both a feature's and an error's"):
        read_neuronpedia(value)
    with pytest.raises(DataError, match="no graph"):
        read_neuronpedia({"nodes": []})


def test_pairing_is_cantors() -> None:
    assert [pairing(0, 9), pairing(0, 11), pairing(2, 3)] == [54, 77, 18]


def test_a_graph_is_saved_whole(tmp_path: Path) -> None:
    graph = graph_of()
    save(graph, tmp_path / "g", supernodes=[Supernode("a", (1, 2))])
    back = load(tmp_path / "g")
    torch.testing.assert_close(back.adjacency(), graph.adjacency(), rtol=0, atol=0)
    assert back.gap == graph.gap
    assert (back.tokens, back.logit_names, back.settings) == (graph.tokens, graph.logit_names, graph.settings)
    assert load_supernodes(tmp_path / "g") == [Supernode("a", (1, 2))]
    (tmp_path / "g" / "edges.safetensors").unlink()
    with pytest.raises(DataError, match="no attribution graph"):
        load(tmp_path / "g")
