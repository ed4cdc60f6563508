"""Node scores against the public reference, sums over edges, plain ablations; neurons against patched ones."""

from __future__ import annotations

import pytest
import torch

from tests.circuits.reference_eap import SCORES, reference_pairs, reference_subject
from tests.circuits.test_edges import close_to, pairs_of
from tests.circuits.test_wiring import DECODERS, subject_of
from tomoscope.circuits.scores.edges import edge_scores
from tomoscope.circuits.scores.gradients import Norms, Path, input_gradients
from tomoscope.circuits.scores.methods import mixed
from tomoscope.circuits.scores.nodes import neuron_scores, node_scores
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.ports import Ports
from tomoscope.circuits.wiring.sources import read_sources
from tomoscope.errors import DataError, UnavailableSiteError
from tomoscope.model import replace


def test_scores_equal_the_public_reference():
    subject, pairs = reference_subject(), reference_pairs()
    found = node_scores(subject, pairs, coordinates=True, by_position=True)
    expected = torch.from_numpy(SCORES["node_EAP-IG-inputs_bs1"]).double()
    coordinates = torch.from_numpy(SCORES["neuron_EAP-IG-inputs_bs1"]).double()
    mlps = torch.tensor([source.startswith("m") for source in found.graph.sources])
    assert found.coordinates is not None
    assert found.by_position is not None
    torch.testing.assert_close(found.scores[~mlps], expected[~mlps], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found.coordinates[~mlps], coordinates[~mlps], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found.coordinates.sum(1), found.scores)
    torch.testing.assert_close(found.by_position.sum(1), found.scores)
    # the reference's numbers for MLPs are the difference of the output times the gradient at the MLP's *input*
    ports, total = Ports.of(subject), torch.zeros(3, dtype=torch.float64)
    clean = read_sources(subject, pairs.clean, ports).sources
    corrupted = read_sources(subject, pairs.corrupted, ports).sources
    share = torch.arange(1, 6) / 5
    path = Path(1, torch.full((5,), 0.2), embed=mixed(clean.embed, corrupted.embed, share))
    gradients = input_gradients(subject, ports, Norms(subject), pairs.clean, pairs.metric(), torch.arange(4), path)
    for layer, port in enumerate(ports.mlp):
        assert port is not None
        total[layer] = ((clean.outs[layer] - corrupted.outs[layer]) * gradients.streams[port.reader][0]).sum() / 4
    torch.testing.assert_close(total, expected[mlps], atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("method", ["EAP", "clean-corrupted", "EAP-IG-activations"])
def test_a_nodes_score_is_the_sum_of_its_edges(method: str):
    for name in ("gpt2", "llama", "gemma2", "gptj") if method == "EAP" else ("gpt2", "granite"):
        subject = subject_of(name)
        pairs = pairs_of(subject)
        nodes = node_scores(subject, pairs, method=method, steps=3)
        edges = edge_scores(subject, pairs, method=method, steps=3)
        torch.testing.assert_close(nodes.scores, edges.scores.sum(1), **close_to(subject))


@pytest.mark.parametrize("name", DECODERS)
def test_an_mlp_ablated_is_its_output_replaced(name: str):
    subject = subject_of(name)
    pairs = pairs_of(subject)
    found = node_scores(subject, pairs, method="exact")
    metric, rows = pairs.metric(), torch.arange(3)
    clean = metric(subject.last_logits(pairs.clean), rows)
    site = "layer.1.mlp.out"
    edit = replace(site, subject.read(pairs.corrupted, site)[site])
    lost = float((clean - metric(subject.last_logits(pairs.clean, edits=[edit]), rows)).mean())
    assert found["m1"] == pytest.approx(lost, abs=3e-6)
    if "a1.h2" in found.graph.sources and name not in ("gemma2", "gemma3", "olmo2"):  # no norm after their heads
        site = "layer.1.attn.z[head=2]"
        edit = replace(site, subject.read(pairs.corrupted, site)[site])
        lost = float((clean - metric(subject.last_logits(pairs.clean, edits=[edit]), rows)).mean())
        assert found["a1.h2"] == pytest.approx(lost, abs=3e-6)


@pytest.mark.parametrize("kind", ["paired", "zero", "mean"])
def test_neurons_sum_to_their_mlp(kind: str):
    subject = subject_of("llama")
    pairs = pairs_of(subject)
    ablation = {
        "paired": Ablation.paired(pairs.corrupted),
        "zero": Ablation.zero(),
        "mean": Ablation.mean(pairs.corrupted),
    }[kind]
    neurons = neuron_scores(subject, pairs, ablation=ablation)
    nodes = node_scores(subject, pairs, method="EAP", ablation=ablation)
    # the output projection is linear and has no bias
    for layer in range(3):
        assert float(neurons[layer].sum()) == pytest.approx(nodes[f"m{layer}"], rel=2e-4, abs=1e-6)


def test_layers_without_neurons_are_not_numbers():
    subject = subject_of("qwen3_moe")
    neurons = neuron_scores(subject, pairs_of(subject))
    assert neurons[1].isfinite().all()
    assert neurons[[0, 2]].isnan().all()
    with pytest.raises(UnavailableSiteError):
        neuron_scores(subject_of("gpt_oss"), pairs_of(subject_of("gpt_oss")))
    with pytest.raises(DataError, match="no resample"):
        neuron_scores(subject, pairs_of(subject), ablation=Ablation.resample())


def test_names_and_refusals():
    subject = subject_of("gpt2")
    found = node_scores(subject, pairs_of(subject), method="exact")
    name, value = found.ranked()[0]
    assert abs(value) == float(found.scores.abs().max())
    assert found[name] == value
    with pytest.raises(DataError, match="no source"):
        found["a9.h9"]
    with pytest.raises(DataError, match="unknown"):
        node_scores(subject, pairs_of(subject), method="IG")  # ty: ignore[invalid-argument-type]
    with pytest.raises(DataError, match="by position"):
        node_scores(subject, pairs_of(subject), method="exact", by_position=True)
