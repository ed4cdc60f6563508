"""Files of other tools: the reference's own file, and files that are written and read back."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tests.circuits.graphs import FAMILIES, REFERENCE, graph, ours, reference
from tomoscope.circuits import Circuit
from tomoscope.circuits.discovery.select import top_edges
from tomoscope.circuits.formats import mib_circuits, read_eap_ig, write_eap_ig, write_mib
from tomoscope.errors import DataError, SiteError


def test_the_references_file_is_read_and_written_back(tmp_path) -> None:
    _, g, numbers = reference()
    circuit = read_eap_ig(REFERENCE / "graph_eapig.json", g)
    expected = ours(g, numbers["EAP-IG-inputs_bs1"]).double()
    assert circuit.scores is not None
    torch.testing.assert_close(circuit.scores[g.allowed], expected[g.allowed], rtol=0, atol=0)
    assert torch.equal(circuit.mask, ours(g, numbers["circuit_topn_50_mask"]))
    again = json.loads(write_eap_ig(circuit, tmp_path / "again.json", d_model=32).read_text())
    told = json.loads((REFERENCE / "graph_eapig.json").read_text())
    assert again["cfg"] == told["cfg"]
    assert again["edges"] == told["edges"]
    assert again["nodes"] == told["nodes"]
    assert list(again["edges"]) != []


@pytest.mark.parametrize("suffix", [".json", ".pt"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "deepseek_v3"])
def test_written_and_read_back(name: str, suffix: str, tmp_path) -> None:
    g = graph(name)
    scores = torch.randn(g.allowed.shape, dtype=torch.float64).masked_fill(~g.allowed, 0)
    circuit = top_edges(SimpleNamespace(graph=g, scores=scores), 40)
    again = read_eap_ig(write_eap_ig(circuit, tmp_path / f"c{suffix}", d_model=32), g)
    assert again == circuit
    assert again.scores is not None
    torch.testing.assert_close(again.scores, scores, rtol=1e-6, atol=1e-6)


def test_a_groups_edge_is_one_into_each_of_its_heads(tmp_path) -> None:
    g = graph("llama")
    circuit = Circuit.of_edges(g, ["embed->a1.kv1<k>", "a1.h2->logits", "embed->a1.h0<q>"])
    scores = torch.zeros(g.allowed.shape)
    scores[g.edge("embed", "a1.kv1<k>")] = 3.0
    value = json.loads(write_eap_ig(Circuit(g, circuit.mask, scores), tmp_path / "c.json", d_model=32).read_text())[
        "edges"
    ]
    assert {name for name, edge in value.items() if edge["in_graph"]} == {
        "input->a1.h2<k>", "input->a1.h3<k>", "a1.h2->logits", "input->a1.h0<q>"
    }  # fmt: skip
    assert [value[f"input->a1.h{i}<k>"]["score"] for i in range(4)] == [0, 0, 1.5, 1.5]
    layers, heads = 3, 4
    assert len(value) == sum((1 + i * (heads + 1)) * (3 * heads + 1) + heads for i in range(layers)) + 1 + 3 * 5


def test_what_the_format_cannot_hold_is_refused(tmp_path) -> None:
    with pytest.raises(SiteError, match="one node"):
        write_eap_ig(Circuit.whole(graph("deepseek_v3")), tmp_path / "c.json", d_model=32)
    positions = graph("gpt2", position=True)
    with pytest.raises(DataError, match="position"):
        write_eap_ig(Circuit.whole(positions), tmp_path / "c.json", d_model=32)
    some = Circuit.of_edges(positions, ["embed->logits"])
    assert read_eap_ig(write_eap_ig(some, tmp_path / "c.json", d_model=32), graph("gpt2")).edges == [
        ("embed", "logits")
    ]
    with pytest.raises(DataError, match="n_layers|parallel"):
        read_eap_ig(tmp_path / "c.json", graph("phi"))
    for text in ("", "[]", '{"cfg": {}}', '{"cfg": {"d_model": 4}, "edges": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError):
            read_eap_ig(tmp_path / "bad.json", graph("gpt2"))
    torch.save({"cfg": print}, tmp_path / "code.pt")
    with pytest.raises(DataError, match=r"code\.pt"):
        read_eap_ig(tmp_path / "code.pt", graph("gpt2"))


def test_a_submission_has_scores_or_nine_circuits(tmp_path) -> None:
    _, g, numbers = reference()
    given = SimpleNamespace(graph=g, scores=ours(g, numbers["EAP-IG-inputs_bs1"]))
    (path,) = write_mib(given, tmp_path, task="ioi", model="gpt2", d_model=32)
    assert path == tmp_path / "ioi_gpt2" / "importances.json"
    assert all(edge["in_graph"] for edge in json.loads(path.read_text())["edges"].values())
    circuits = mib_circuits(given)
    assert [c.n_edges for c in circuits] == [int(n) for n in numbers["mib_absTrue_edges"]]
    assert [c.n_edges for c in mib_circuits(given, absolute=False)] == [int(n) for n in numbers["mib_absFalse_edges"]]
    paths = write_mib(circuits[:-1], tmp_path, task="mcqa", model="gpt2", d_model=32)
    assert len(paths) == 9
    assert [read_eap_ig(p, g) for p in paths] == sorted(circuits[:-1], key=len)
    with pytest.raises(DataError, match="9 circuits"):
        write_mib(circuits, tmp_path, task="mcqa", model="gpt2", d_model=32)
    with pytest.raises(DataError, match="more than 50 %"):
        write_mib([*circuits[:-2], Circuit.whole(g)], tmp_path, task="mcqa", model="gpt2", d_model=32)
